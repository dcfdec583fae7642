#!/bin/bash
# The entry of the stand-in for the image postgres:18: the same variables, folders and stages as the real one.
# As there, a first start sets the database up with a temporary server that answers on its unix socket only.
set -eu
[ "${1:-postgres}" = postgres ] || exec "$@"

data=${PGDATA:-/var/lib/postgresql/18/docker}
user=${POSTGRES_USER:-postgres}
database=${POSTGRES_DB:-$user}
as_postgres=(setpriv --reuid postgres --regid postgres --clear-groups)

install --directory --owner postgres --group postgres --mode 0700 "$data"
install --directory --owner postgres --group postgres --mode 2775 /var/run/postgresql

if [ ! -s "$data/PG_VERSION" ]; then
    printf '%s' "${POSTGRES_PASSWORD:?a password is needed to set the database up}" > /tmp/password
    chown postgres /tmp/password
    "${as_postgres[@]}" initdb --pgdata "$data" --username "$user" --pwfile /tmp/password --no-sync \
        --encoding UTF8 --locale C.UTF-8 --auth-local trust --auth-host trust
    rm /tmp/password
    echo 'host all all all scram-sha-256' >> "$data/pg_hba.conf"
    "${as_postgres[@]}" pg_ctl --pgdata "$data" --wait --options "-c listen_addresses=''" start
    [ "$database" = postgres ] || "${as_postgres[@]}" createdb --username "$user" "$database"
    for script in /docker-entrypoint-initdb.d/*.sh; do
        [ -f "$script" ] && bash "$script"
    done
    "${as_postgres[@]}" pg_ctl --pgdata "$data" --wait --mode fast stop
fi
exec "${as_postgres[@]}" postgres -D "$data" -c listen_addresses='*'
