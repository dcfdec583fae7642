#!/bin/sh
# What `deploy.py` asks of PostgreSQL: restore.sh ACT [DATABASE], with .env as its environment. DATABASE is the name of
# one beside the live one, which becomes DATABASE_old in the swap. An act may be repeated, which also puts right what
# was cut off in it. The role needs no more than to own the live database and to have CREATEDB.
set -eu
act=$1 other=${2:-} live=${DEFAULT_DB_NAME:-gforms-db}
export PGUSER="${DEFAULT_DB_USER:-postgres}" PGAPPNAME="${PGAPPNAME:-deploy.py}"
# a statement ends soon after its client was killed, which PostgreSQL would not notice before the next row otherwise
export PGOPTIONS="-c client_connection_check_interval=2s -c client_min_messages=warning"

# Where PostgreSQL runs. For one on another machine write here: "$@", and PGHOST and PGPASSWORD in .env.
run() {
    docker exec -i -e PGUSER -e PGAPPNAME -e PGOPTIONS postgresql "$@"
}

# SQL from stdin, in the database that is named; template1, because the others change their names.
sql() {
    run psql --quiet --no-psqlrc --tuples-only --no-align --dbname="$1" --set=ON_ERROR_STOP=1 \
        --set=live="$live" --set=other="$other" --set=old="${other}_old"
}

# No other roles' sessions: whoever is no superuser may not end them. Nor autovacuum's, which makes way by itself.
ours="pid <> pg_backend_pid() AND pg_has_role(usesysid, 'USAGE')"

# The sessions with the live database end, one by one, when they have been idle for a tenth of a second: between two
# requests, most likely, so that Django connects again and notices nothing, with CONN_HEALTH_CHECKS. All within 2 s.
drain="
    SELECT set_config('deploy.live', :'live', false) \\g /dev/null
    DO \$\$
    BEGIN
        FOR tenth IN 1..70 LOOP
            PERFORM pg_stat_clear_snapshot();
            PERFORM CASE
                WHEN tenth > 20 OR state = 'idle' AND state_change < clock_timestamp() - interval '0.1 s'
                THEN pg_terminate_backend(pid)
            END FROM pg_stat_activity
            WHERE $ours AND datname = current_setting('deploy.live') AND backend_start < statement_timestamp();
            EXIT WHEN NOT FOUND;
            PERFORM pg_sleep(0.1);
        END LOOP;
    END \$\$;"

# take_writes SETTING: whether the live database takes writes, for whoever is connected to it after this
take_writes() {
    sql template1 <<-SQL
	ALTER DATABASE :"live" $1;
	SELECT pg_sleep(0.5) \\g /dev/null
	-- who was connecting just then can be seen by now
	$drain
	SQL
}

# exchange NEW SAVED: the live database becomes SAVED, and NEW the live one, which takes no writes yet; all at once
exchange() {
    for _ in 1 2 3 4 5; do # a session that begins in this very moment is in the way
        sql template1 <<-SQL && return
	SELECT count(*) FILTER (WHERE datname = :'$1') = 0 AND count(*) FILTER (WHERE datname = :'$2') = 1 AS done
	FROM pg_database \\gset
	\\if :done
	    \\quit
	\\endif
	BEGIN;
	SET LOCAL lock_timeout = '500ms';
	SET LOCAL statement_timeout = '4s'; -- nobody waits for longer than that
	-- Whoever connects now waits, instead of being refused. It takes a superuser, and somebody who has looked at the
	-- list of databases in a transaction can be in the way: then it goes on without.
	DO 'BEGIN LOCK TABLE pg_database; EXCEPTION WHEN insufficient_privilege OR lock_not_available THEN END';
	$drain
	SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE $ours AND datname IN (:'live', :'$1') \\g /dev/null
	ALTER DATABASE :"live" RENAME TO :"$2"; -- it waits for the end of these
	ALTER DATABASE :"$1" RENAME TO :"live";
	ALTER DATABASE :"live" SET default_transaction_read_only = on;
	COMMIT;
	SQL
        sleep 1
    done
    return 1
}

case $act in
which) # the server and the database, as whoever is connected to it sees them
    sql "$live" <<-'SQL'
	SELECT format('%s %s', extract(epoch FROM pg_postmaster_start_time()), oid)
	FROM pg_database WHERE datname = current_database()
	SQL
    ;;
room) # the bytes that `load` needs, and those that are free where PostgreSQL has its data, if that can be seen
    folder=$(echo "SELECT setting FROM pg_settings WHERE name = 'data_directory'" | sql template1)
    sql "$live" <<-'SQL'
	SELECT (size * 1.5)::bigint + least(size, pg_size_bytes(current_setting('max_wal_size')))
	FROM pg_database_size(current_database()) size
	SQL
    if [ "$folder" ]; then
        run df -Pk "$folder" </dev/null | {
            read -r _
            read -r _ _ _ free _
            echo $((free * 1024))
        }
    fi
    ;;
invalid) # the statements that drop the indexes which a CREATE INDEX CONCURRENTLY that failed has left
    sql "$live" <<-'SQL'
	SELECT format('DROP INDEX CONCURRENTLY %I.%I;', nspname, relname)
	FROM pg_index JOIN pg_class c ON c.oid = indexrelid JOIN pg_namespace n ON n.oid = relnamespace
	WHERE NOT indisvalid AND relkind = 'i' AND indexrelid NOT IN
	    (SELECT index_relid FROM pg_stat_progress_create_index WHERE datname = current_database())
	SQL
    ;;
end) # what earlier acts, or a migration, have left at work in PostgreSQL ends
    sql template1 <<-SQL
	SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
	WHERE $ours AND application_name = current_setting('application_name') \\g /dev/null
	SQL
    ;;
dump) # the live one, to stdout; what follows are options of pg_dump
    shift
    run pg_dump --format=custom "$@" "$live"
    ;;
load) # make DATABASE of the backup on stdin, with all that is set for the live one
    sql template1 <<-'SQL'
	DROP DATABASE IF EXISTS :"other";
	SELECT concat(
	    format('CREATE DATABASE %I OWNER %I TEMPLATE template0', :'other', pg_get_userbyid(datdba)),
	    format(' ENCODING %L LC_COLLATE %L LC_CTYPE %L', pg_encoding_to_char(encoding), datcollate, datctype),
	    CASE facts->>'datlocprovider' -- PostgreSQL 15
	        WHEN 'c' THEN ' LOCALE_PROVIDER libc'
	        WHEN 'i' THEN ' LOCALE_PROVIDER icu ICU_LOCALE ' || quote_literal(locale)
	        WHEN 'b' THEN ' LOCALE_PROVIDER builtin BUILTIN_LOCALE ' || quote_literal(locale)
	    END,
	    ' ICU_RULES ' || quote_literal(facts->>'daticurules'),
	    ' TABLESPACE ' || quote_ident(nullif(spcname, 'pg_default')))
	FROM pg_database d JOIN pg_tablespace s ON s.oid = dattablespace, to_jsonb(d) facts,
	    coalesce(facts->>'datlocale', facts->>'daticulocale') locale
	WHERE datname = :'live' \gexec
	SQL
    run pg_restore --exit-on-error --dbname="$other"
    echo "SET client_min_messages = error; ANALYZE;" | sql "$other"
    # what the role may not set is told
    sql template1 2>&1 <<-'SQL'
	\set ON_ERROR_STOP 0
	\set ECHO errors
	SELECT unnest(ARRAY[
	    format('ALTER DATABASE %I CONNECTION LIMIT %s', :'other', datconnlimit),
	    format('COMMENT ON DATABASE %I IS %L', :'other', shobj_description(oid, 'pg_database')),
	    format('REVOKE ALL ON DATABASE %I FROM public, %I', :'other', pg_get_userbyid(datdba))])
	FROM pg_database WHERE datname = :'live'
	UNION ALL
	SELECT format('GRANT %s ON DATABASE %I TO %s %s', privilege_type, :'other',
	    coalesce(quote_ident(rolname), 'public'), CASE WHEN is_grantable THEN 'WITH GRANT OPTION' END)
	FROM pg_database d, aclexplode(coalesce(datacl, acldefault('d', datdba))) LEFT JOIN pg_roles r ON r.oid = grantee
	WHERE datname = :'live'
	UNION ALL
	SELECT format('ALTER %s DATABASE %I SET %I TO %s', 'ROLE ' || quote_ident(rolname) || ' IN', :'other', name,
	    CASE WHEN name IN ('search_path', 'temp_tablespaces', 'local_preload_libraries', 'session_preload_libraries')
	        THEN translate(value, '"', '''') -- it is a list
	        ELSE quote_literal(value)
	    END)
	FROM pg_database d JOIN pg_db_role_setting ON setdatabase = d.oid LEFT JOIN pg_roles r ON r.oid = setrole,
	    unnest(setconfig) setting, split_part(setting, '=', 1) name, substr(setting, length(name) + 2) value
	WHERE datname = :'live' AND name <> 'default_transaction_read_only' \gexec
	SQL
    ;;
count) # a line for each table, its number of rows last; without DATABASE those of the live one
    sql "${other:-$live}" <<-'SQL'
	SELECT format('SELECT %L, count(*) FROM %s', relid::regclass, relid::regclass) FROM pg_stat_user_tables \gexec
	SQL
    ;;
freeze) # the live one takes no more writes, and those under way have ended, one way or the other
    take_writes "SET default_transaction_read_only = on"
    ;;
swap) # DATABASE becomes the live one, which becomes DATABASE_old
    exchange other old
    ;;
back) # what the swap has done is undone
    exchange old other
    ;;
thaw) # the live one takes writes again
    take_writes "RESET default_transaction_read_only"
    ;;
drop) # DATABASE and DATABASE_old go, as far as they are there
    sql template1 <<-SQL
	SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
	WHERE $ours AND datname IN (:'other', :'old') \\g /dev/null
	DROP DATABASE IF EXISTS :"other";
	DROP DATABASE IF EXISTS :"old";
	SQL
    ;;
*)
    echo "restore.sh does not know $act" >&2
    exit 2
    ;;
esac
