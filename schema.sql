-- schema.sql: the table, and the trigger that announces its changes. Django: models.py and
-- migrations.
--
-- The program runs this at every start. What is there already is left alone, so a role that may
-- not create anything can run it too.

DO $schema$
DECLARE
    unusable text;
    f        text[];
BEGIN
    IF current_setting('server_version_num')::int < 130000 THEN
        RAISE feature_not_supported USING MESSAGE = concat(
            'PostgreSQL ', current_setting('server_version'), ' is too old: 13 or newer is needed');
    END IF;

    -- Somebody's lock may hold this up, but not for ever.
    PERFORM set_config('lock_timeout', '5s', true);

    -- Instances that start at once take turns. The lock's number is arbitrary.
    PERFORM pg_advisory_xact_lock(20260101);

    -- The program refuses bad input with a helpful answer. The CHECKs stop everyone else, psql
    -- too. (A later column also needs an ALTER TABLE after this block, before the shape is checked,
    -- with a DEFAULT, for a table that lacks it; inside an IF, because a role that isn't the owner
    -- runs this too.)
    IF to_regclass('properties') IS NULL THEN
        CREATE TABLE properties (
            id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            -- What the listing is called. (The program also refuses Unicode's other blanks.)
            title       varchar(200) NOT NULL CHECK (btrim(title) <> ''),
            -- Free text; may be empty.
            description text NOT NULL,
            -- An exact decimal. numeric sorts NaN above every number, so the upper bound refuses
            -- it.
            price       numeric(10, 2) NOT NULL CHECK (price >= 0 AND price <= 99999999.99),
            -- Where it is, as a person would say it.
            location    varchar(100) NOT NULL CHECK (btrim(location) <> ''),
            -- When the row was inserted; never changes.
            created_at  timestamptz NOT NULL DEFAULT now()
        );
    END IF;

    -- A table of another shape is refused here, and not at the first request. (N, S and D are
    -- PostgreSQL's categories for numbers, strings and times.)
    SELECT string_agg(name, ', ') INTO unusable
    FROM (VALUES ('id', 'N'), ('title', 'S'), ('description', 'S'), ('price', 'N'),
                 ('location', 'S'), ('created_at', 'D')) AS wanted (name, category)
    WHERE NOT EXISTS (SELECT FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
                      WHERE attrelid = 'properties'::regclass AND attname = name
                          AND typcategory = category AND attnotnull
                          AND (name <> 'price' OR typname = 'numeric'));
    IF unusable IS NOT NULL THEN
        RAISE undefined_column USING MESSAGE = concat(
            'the table properties has another shape: no usable NOT NULL column ', unusable);
    END IF;

    -- JSON's timestamps (RFC 3339) end with the year 9999, and know no infinity.
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'properties'::regclass
                       AND conname = 'properties_created_at_fits_json') THEN
        ALTER TABLE properties ADD CONSTRAINT properties_created_at_fits_json
            CHECK (created_at >= '0001-01-01 00:00Z' AND created_at < '10000-01-01 00:00Z');
    END IF;

    -- The functions: name, type, body. Each is replaced where its body differs from this file.
    -- (Not by CREATE OR REPLACE alone, because a role may run this that owns none of them.) One
    -- that calls another keeps today's search_path, so that it works for every role, and while
    -- pg_restore loads rows.
    FOREACH f SLICE 1 IN ARRAY ARRAY[

        -- The run of the server: transaction ids mean something only within one. A crash gives
        -- out ids again under the same postmaster, but it resets the statistics. Then the table
        -- and its file, so that neither another schema's table nor one that was swapped or
        -- rewritten is taken for this one. (pg_stat_get_bgwriter_stat_reset_time() is stats_reset
        -- of pg_stat_bgwriter. plpgsql, because it keeps its plan: as SQL it would cost each
        -- write ten times as much.)
        ['properties_server()', 'text LANGUAGE plpgsql STABLE', $$
        BEGIN
            RETURN concat_ws('.',
                (extract(epoch FROM pg_postmaster_start_time()) * 1e6)::bigint,
                (extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time()) * 1e6)::bigint,
                (SELECT oid FROM pg_database WHERE datname = current_database()),
                to_regclass('properties')::oid, pg_relation_filenode(to_regclass('properties')));
        END $$],

        -- What a read at this moment sees. It is STABLE, so that it has its caller's snapshot.
        ['properties_snapshot()', 'text LANGUAGE plpgsql STABLE SET search_path FROM CURRENT', $$
        BEGIN
            IF pg_is_in_recovery() THEN
                RAISE read_only_sql_transaction USING MESSAGE =
                    'a standby lags, and its snapshot does not say what it lacks';
            END IF;
            RETURN json_build_object(
                'server', properties_server(),
                'xmax', pg_snapshot_xmax(pg_current_snapshot())::text::bigint,
                'running', ARRAY(SELECT pg_snapshot_xip(pg_current_snapshot())::text::bigint));
        END $$],

        -- For the listener: there is nothing to hear from a server that is read-only.
        ['properties_line()', 'text LANGUAGE plpgsql STABLE SET search_path FROM CURRENT', $$
        BEGIN
            IF current_setting('transaction_read_only')::boolean THEN
                RAISE read_only_sql_transaction USING MESSAGE = 'the server is read-only';
            END IF;
            RETURN properties_server();
        END $$],

        -- PostgreSQL delivers the announcement after the commit. Equal announcements of one
        -- transaction are one, so an import of many INSERTs is announced once.
        ['properties_announce()', 'trigger LANGUAGE plpgsql SET search_path FROM CURRENT', $$
        BEGIN
            PERFORM pg_notify('properties', properties_server() || ' ' || pg_current_xact_id());
            RETURN NULL;
        END $$]
    ] LOOP
        CONTINUE WHEN f[3] = (SELECT prosrc FROM pg_proc WHERE oid = to_regprocedure(f[1]));
        BEGIN
            EXECUTE format('CREATE OR REPLACE FUNCTION %s RETURNS %s AS %L', f[1], f[2], f[3]);
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE insufficient_privilege USING MESSAGE = concat(
                'the function ', f[1], ' is not schema.sql''s, and may not be replaced: ', SQLERRM);
        END;
    END LOOP;

    IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'properties'::regclass
                       AND tgname = 'properties_announce') THEN
        CREATE TRIGGER properties_announce
            AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON properties
            FOR EACH STATEMENT EXECUTE FUNCTION properties_announce();
    END IF;

    -- ALWAYS, so that session_replication_role doesn't silence it. A trigger that somebody has
    -- disabled stays so: then the program asks instead (see signals.go).
    IF EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'properties'::regclass
                   AND tgname = 'properties_announce' AND tgenabled = 'O') THEN
        ALTER TABLE properties ENABLE ALWAYS TRIGGER properties_announce;
    END IF;

    -- These fail if this role may not read the table, or not call a function.
    PERFORM FROM properties LIMIT 1;
    PERFORM properties_snapshot();
END
$schema$;

-- Example listings: -seed N inserts N, the same ones every time, if there are none. It walks
-- through each list in steps such as 5 of 9, which share no factor, so it meets all of it.
DO $seed$
DECLARE
    n         bigint := current_setting('properties.seed');
    qualities text[] := '{Sunny,Quiet,Spacious,Renovated,Bright,Historic,Compact,Airy}';
    kinds     text[] := '{studio,one-bedroom flat,two-bedroom flat,loft,terraced house,'
                        'family home,villa,penthouse,cottage}';
    extras    text[] := '{balcony,garden,roof terrace,bay window,fireplace,workshop,'
                        'view of the water}';
    places    text[] := '{the tram stop,a bakery,the park,two schools,the market hall}';
    quarters  text[] := '{Old Town,Harbour,Riverside,Hillside,Station Quarter,University,'
                        'Market Square}';
    cities    text[] := '{Accra,Lisbon,Nairobi,Oslo,Kyoto,Montréal,Valparaíso,Ghent,Tallinn,'
                        'Cape Town,Hội An}';
BEGIN
    -- Without -seed it needs no right to insert.
    IF n = 0 OR EXISTS (SELECT FROM properties) THEN
        RETURN;
    END IF;
    INSERT INTO properties (title, description, price, location, created_at)
    SELECT qualities[1 + i % 8] || ' ' || kinds[1 + i * 5 % 9] || ' with ' || extras[1 + i * 3 % 7],
           'Built in ' || 1900 + i * 37 % 125 || ', ' || 25 + i * 17 % 190 || ' m², ' || 2 + i % 20
               || ' minutes on foot from ' || places[1 + i * 2 % 5]
               || '. Viewing by appointment, on weekdays from ' || 8 + i % 9 || ' o''clock.',
           60000 + i * 7919 % 940000 + i * 31 % 100 / 100.0,
           quarters[1 + i * 4 % 7] || ', ' || cities[1 + i * 7 % 11],
           timestamptz '2025-01-01 08:00:00Z' + i % 300000 * interval '2 minutes'
    FROM generate_series(1, n) AS i
    ORDER BY i;
END
$seed$;
