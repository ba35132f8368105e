# What compose.yaml relies on in the entrypoint of the official image, in brief.
set -e
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  [ -z "$POSTGRES_PASSWORD" ] || POSTGRES_PASSWORD_FILE=$(mktemp)
  [ -z "$POSTGRES_PASSWORD" ] || printf %s "$POSTGRES_PASSWORD" > "$POSTGRES_PASSWORD_FILE"
  POSTGRES_USER=${POSTGRES_USER:-postgres}
  mkdir -p "$PGDATA"
  chmod 700 "$PGDATA"
  initdb --username="$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" --auth-local=trust \
    --auth-host=scram-sha-256 --encoding=UTF8 --locale=C -D "$PGDATA"
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  pg_ctl -D "$PGDATA" -o "-c listen_addresses='' -k /run/postgresql" -w start
  if [ "${POSTGRES_DB:-$POSTGRES_USER}" != postgres ]; then
    createdb -h /run/postgresql -U "$POSTGRES_USER" "${POSTGRES_DB:-$POSTGRES_USER}"
  fi
  pg_ctl -D "$PGDATA" -m fast -w stop
fi
exec "$@" -k /run/postgresql
