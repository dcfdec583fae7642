#!/bin/sh
# What `deploy.py restore` asks of PostgreSQL: restore.sh ACT DATABASE, with .env as its environment. DATABASE is the
# name of one beside the live one. An act may be repeated, and one that is cut off leaves the live one at work.
set -eu
act=$1 other=$2 live=${DEFAULT_DB_NAME:-gforms-db}
export PGUSER="${DEFAULT_DB_USER:-postgres}"

# Where PostgreSQL runs. For one on another machine write here: "$@", and PGHOST and PGPASSWORD in .env.
run() {
    docker exec -i -e PGUSER postgresql "$@"
}

# SQL from stdin, in the database that is named; template1, because the other two change their names.
sql() {
    run psql --quiet --no-psqlrc --tuples-only --no-align --dbname="$1" --set=ON_ERROR_STOP=1 \
        --set=live="$live" --set=other="$other" --set=between="${other}_"
}
disconnect="SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname IN (:'live', :'other');"

case $act in
freeze) # the live one takes no more writes, and those under way have ended, one way or the other
    sql template1 <<-END
	ALTER DATABASE :"live" SET default_transaction_read_only = on;
	SELECT pg_sleep(0.5); -- who was connecting just then can be seen by now
	$disconnect
	END
    ;;
load) # make DATABASE of the backup on stdin
    run createdb --template=template0 "$other" </dev/null
    run pg_restore --exit-on-error --dbname="$other"
    echo "ANALYZE;" | sql "$other"
    ;;
count) # a line for each table, its number of rows last; without DATABASE those of the live one
    sql "${other:-$live}" <<-'END'
	SELECT format('SELECT %L, count(*) FROM %s', relid::regclass, relid::regclass) FROM pg_stat_user_tables \gexec
	END
    ;;
swap) # exchange the names of the two at once; the live one takes no writes yet
    for try in 1 2 3; do # it may meet somebody who is half connected, and is refused by one of the two then
        sql template1 <<-END && exit
	BEGIN;
	LOCK TABLE pg_database; -- whoever connects now waits
	$disconnect
	ALTER DATABASE :"live" RENAME TO :"between";
	ALTER DATABASE :"other" RENAME TO :"live";
	ALTER DATABASE :"between" RENAME TO :"other";
	ALTER DATABASE :"live" SET default_transaction_read_only = on;
	COMMIT;
	END
    done
    exit 1
    ;;
thaw) # the live one takes writes again
    sql template1 <<-END
	ALTER DATABASE :"live" RESET default_transaction_read_only;
	$disconnect
	END
    ;;
drop) # DATABASE goes, if it is there
    run dropdb --if-exists --force "$other" </dev/null
    ;;
*)
    echo "restore.sh does not know $act" >&2
    exit 2
    ;;
esac
