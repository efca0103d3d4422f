-- schema.sql: the table, applied at every start. Django: models.py and its migrations.

BEGIN;

-- CREATE TABLE IF NOT EXISTS is not safe against itself: two instances that start at once can both find
-- no table, and one of them fails. The lock (its number is arbitrary, and the same for all) lines them up
-- until COMMIT.
SELECT pg_advisory_xact_lock(20260101);

-- The program refuses bad input with a helpful answer. The CHECKs say the same to everyone else, psql too.
CREATE TABLE IF NOT EXISTS properties (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- What the listing is called: 1 to 200 characters, not all of them blank in Unicode's sense (the ones
    -- listed are those of Go's unicode.IsSpace).
    title       varchar(200) NOT NULL
                CHECK (btrim(title, E' \t\n\x0B\f\r\u0085\u00A0\u1680\u2000\u2001\u2002\u2003\u2004\u2005'
                    '\u2006\u2007\u2008\u2009\u200A\u2028\u2029\u202F\u205F\u3000') <> ''),
    -- Free text; may be empty.
    description text NOT NULL,
    -- An exact decimal. numeric accepts NaN, and sorts it above every number: the upper bound refuses it.
    price       numeric(10, 2) NOT NULL CHECK (price >= 0 AND price <= 99999999.99),
    -- Where it is, as a person would say it: 1 to 100 characters, not all blank.
    location    varchar(100) NOT NULL
                CHECK (btrim(location, E' \t\n\x0B\f\r\u0085\u00A0\u1680\u2000\u2001\u2002\u2003\u2004\u2005'
                    '\u2006\u2007\u2008\u2009\u200A\u2028\u2029\u202F\u205F\u3000') <> ''),
    -- When the row was inserted; never changes.
    created_at  timestamptz NOT NULL DEFAULT now()
);

COMMIT;
