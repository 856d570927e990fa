#!/bin/bash
# A second S3 server for tests, of another make than Ceph's: Garage, one process, from its crate. It is strict about the
# region, and ignores the condition of a PUT, as OBS may.
#
#   garage.sh DIR PORT     runs in the foreground: http on PORT; needs 'garage' on the PATH
#
# DIR keeps everything, DIR/env tells tests how to reach it, and is written when the server answers.
set -eu
D=$(mkdir -p "$1" && cd "$1" && pwd) PORT=$2
KEY=GK0123456789abcdef01234567 SECRET=$(printf '%064d' 7)
rm -f "$D/env"
cat > "$D/garage.toml" <<CONF
metadata_dir = "$D/meta"
data_dir = "$D/data"
db_engine = "sqlite"
replication_factor = 1
rpc_bind_addr = "127.0.0.1:$((PORT + 1))"
rpc_public_addr = "127.0.0.1:$((PORT + 1))"
rpc_secret = "$SECRET"
[s3_api]
s3_region = "garage"
api_bind_addr = "127.0.0.1:$PORT"
root_domain = ".s3.test"
CONF
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 143' TERM INT
GARAGE_DEFAULT_ACCESS_KEY=$KEY GARAGE_DEFAULT_SECRET_KEY=$SECRET GARAGE_DEFAULT_BUCKET=ebackup-tests \
  garage -c "$D/garage.toml" server --single-node --default-bucket &
server=$!
for _ in $(seq 240); do
  if (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then
    printf '%s\n' "EBACKUP_TEST_GARAGE_PORT=$PORT" "EBACKUP_TEST_GARAGE_KEY=$KEY" \
      "EBACKUP_TEST_GARAGE_SECRET=$SECRET" >"$D/env.new"
    mv "$D/env.new" "$D/env"
    wait $server
  fi
  kill -0 $server
  sleep 0.25
done
echo "Garage does not answer; its files are in $D" >&2
exit 1
