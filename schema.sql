-- schema.sql: the table, the trigger that announces its changes, and example listings. The program runs this at every start.
-- Django: models.py and its migrations.

DO $schema$
DECLARE
    unusable text;
BEGIN
    -- Somebody's lock may hold this up, but not for ever.
    PERFORM set_config('lock_timeout', '5s', true);

    -- What is there already is left alone, so a role that may not create anything can run this, too. The lock
    -- makes instances that start at once take turns; its number is arbitrary.
    PERFORM pg_advisory_xact_lock(20260101);

    -- The program refuses bad input with a helpful answer. The CHECKs stop everyone else, psql too.
    IF to_regclass('properties') IS NULL THEN
        CREATE TABLE properties (
            id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            -- What the listing is called. (The program also refuses Unicode's other blanks.)
            title       varchar(200) NOT NULL CHECK (btrim(title) <> ''),
            -- Free text; may be empty.
            description text NOT NULL,
            -- An exact decimal. numeric sorts NaN above every number, so the upper bound refuses it.
            price       numeric(10, 2) NOT NULL CHECK (price >= 0 AND price <= 99999999.99),
            -- Where it is, as a person would say it.
            location    varchar(100) NOT NULL CHECK (btrim(location) <> ''),
            -- When the row was inserted; never changes.
            created_at  timestamptz NOT NULL DEFAULT now()
        );
    END IF;

    -- A table of another shape is refused here, and not at the first request. (N, S and D are PostgreSQL's categories
    -- for numbers, strings and times.)
    SELECT string_agg(name, ', ') INTO unusable
    FROM (VALUES ('id', 'N'), ('title', 'S'), ('description', 'S'), ('price', 'N'), ('location', 'S'), ('created_at', 'D'))
        AS wanted (name, category)
    WHERE NOT EXISTS (SELECT FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
                      WHERE attrelid = 'properties'::regclass AND attname = name AND typcategory = category);
    IF unusable IS NOT NULL THEN
        RAISE undefined_column USING MESSAGE = concat('the table properties has another shape: no usable ', unusable);
    END IF;

    -- JSON's timestamps (RFC 3339) end with the year 9999, and know no infinity.
    IF NOT EXISTS (SELECT FROM pg_constraint
                   WHERE conrelid = 'properties'::regclass AND conname = 'properties_created_at_fits_json') THEN
        ALTER TABLE properties ADD CONSTRAINT properties_created_at_fits_json
            CHECK (created_at >= '0001-01-01 00:00Z' AND created_at < '10000-01-01 00:00Z');
    END IF;

    -- Every commit that changed the table is announced by the name of its transaction: its id, and its time
    -- because a failover may give the same id again. (property.go has the same expression in its writes.)
    -- PostgreSQL delivers the announcement after the commit.
    IF NOT EXISTS (SELECT FROM pg_trigger
                   WHERE tgrelid = 'properties'::regclass AND tgname = 'properties_announce') THEN
        CREATE OR REPLACE FUNCTION properties_announce() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_notify('properties', concat(pg_current_xact_id(), '@', extract(epoch FROM now())));
            RETURN NULL;
        END $$;
        CREATE TRIGGER properties_announce AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON properties
            FOR EACH STATEMENT EXECUTE FUNCTION properties_announce();
    END IF;

    IF to_regprocedure('properties_seed(bigint)') IS NULL THEN
        -- -seed N calls this: N listings, the same ones every time, if there are none. The lock is for two instances
        -- that start at once. Steps such as i * 5 % 9 walk through a whole list, because 5 and 9 share no factor.
        CREATE FUNCTION properties_seed(n bigint) RETURNS bigint LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
        DECLARE
            qualities text[] := '{Sunny,Quiet,Spacious,Renovated,Bright,Historic,Compact,Airy}';
            kinds     text[] := '{studio,one-bedroom flat,two-bedroom flat,loft,terraced house,family home,villa,penthouse,cottage}';
            extras    text[] := '{balcony,garden,roof terrace,bay window,fireplace,workshop,view of the water}';
            places    text[] := '{the tram stop,a bakery,the park,two schools,the market hall}';
            quarters  text[] := '{Old Town,Harbour,Riverside,Hillside,Station Quarter,University,Market Square}';
            cities    text[] := '{Accra,Lisbon,Nairobi,Oslo,Kyoto,Montréal,Valparaíso,Ghent,Tallinn,Cape Town,Hội An}';
            inserted  bigint;
        BEGIN
            LOCK TABLE properties IN EXCLUSIVE MODE;
            INSERT INTO properties (title, description, price, location, created_at)
            SELECT qualities[1 + i % 8] || ' ' || kinds[1 + i * 5 % 9] || ' with ' || extras[1 + i * 3 % 7],
                   'Built in ' || 1900 + i * 37 % 125 || ', ' || 25 + i * 17 % 190 || ' m², ' || 2 + i % 20
                       || ' minutes on foot from ' || places[1 + i * 2 % 5]
                       || '. Viewing by appointment, on weekdays from ' || 8 + i % 9 || ' o''clock.',
                   60000 + i * 7919 % 940000 + i * 31 % 100 / 100.0,
                   quarters[1 + i * 4 % 7] || ', ' || cities[1 + i * 7 % 11],
                   timestamptz '2025-01-01 08:00:00Z' + i % 300000 * interval '2 minutes'
            FROM generate_series(1, n) AS i
            WHERE NOT EXISTS (SELECT FROM properties)
            ORDER BY i;
            GET DIAGNOSTICS inserted = ROW_COUNT;
            RETURN inserted;
        END $$;
    END IF;

    PERFORM FROM properties LIMIT 1; -- fails if this role may not read the table
END
$schema$;
