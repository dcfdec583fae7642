#!/bin/bash
# The entry of the stand-in for the image redis:8: as there, protected mode is off and the data are in /data.
set -eu
[ "${1#-}" = "${1:-}" ] || set -- redis-server "$@"
[ "${1:-redis-server}" = redis-server ] || exec "$@"
chown redis /data
exec setpriv --reuid redis --regid redis --clear-groups "${@:-redis-server}" --protected-mode no
