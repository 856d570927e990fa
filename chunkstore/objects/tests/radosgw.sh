#!/bin/bash
# A real S3 server for tests: Ceph's object gateway on one machine, from the Debian packages
# radosgw ceph-mon ceph-osd ceph-common, with openssl for certificates. Needs root.
#
#   radosgw.sh DIR PORT     runs in the foreground: http on PORT, https on PORT+1
#
# DIR keeps everything, DIR/env tells tests how to reach it, and is written when the server answers.
# Buckets are reached as BUCKET.s3.test. Ready in about 20 s; a killed gateway comes back by itself,
# other processes by running it again.
set -eu
D=$(mkdir -p "$1" && cd "$1" && pwd) PORT=$2
TLS=$((PORT + 1)) MON=$((PORT + 2)) KEY=testaccesskey SECRET=testsecretkey12345
export CEPH_CONF=$D/ceph.conf
mkdir -p "$D/mon" "$D/osd" "$D/run" "$D/rgw" "$D/tls"
rm -f "$D/env"

if [ ! -f "$D/tls/server.pem" ]; then
  cd "$D/tls"
  openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=ebackup-test-ca -keyout ca.key -out ca.pem 2>/dev/null
  openssl req -newkey rsa:2048 -nodes -subj /CN=s3.test -keyout server.key -out server.csr 2>/dev/null
  printf 'subjectAltName=DNS:s3.test,DNS:*.s3.test,IP:127.0.0.1\n' > san
  openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 3650 -extfile san -out server.crt 2>/dev/null
  cat server.key server.crt > server.pem
fi

# cephx with one keyring, for without it the gateway does not start; no limit on the length of object
# names; tcp_nodelay, for without it each small answer waits 40 ms; what is deleted gives its room back in seconds, not
# in hours, so that a long run does not fill the disk.
cat > "$CEPH_CONF" <<CONF
[global]
fsid = 11111111-2222-3333-4444-555555555555
mon host = [v2:127.0.0.1:$MON]
mon initial members = a
ms bind ipv6 = false
public addr = 127.0.0.1
public network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = $D/keyring
mon data avail warn = 1
mon data avail crit = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon warn on pool no redundancy = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
run dir = $D/run
log file = $D/run/\$name.log
pid file = $D/run/\$name.pid
admin socket = $D/run/\$name.asok
debug ms = 0
debug rgw = 0
rgw max objs per shard = 1000000
[mon.a]
keyring = $D/keyring
mon data = $D/mon/a
[osd]
keyring = $D/keyring
osd objectstore = bluestore
osd data = $D/osd/\$id
osd journal size = 0
osd memory target = 939524096
bluestore block size = 21474836480
bluestore fsck on mount = false
[client.rgw.a]
keyring = $D/keyring
rgw data = $D/rgw
rgw frontends = beast endpoint=127.0.0.1:$PORT ssl_endpoint=127.0.0.1:$TLS ssl_certificate=$D/tls/server.pem tcp_nodelay=1
rgw dns name = s3.test
rgw enable usage log = false
rgw enable ops log = false
rgw thread pool size = 64
rgw gc obj min wait = 5
rgw gc processor period = 5
rgw gc processor max time = 5
CONF

first=
if [ ! -d "$D/mon/a/store.db" ]; then
  first=1
  mkdir -p "$D/mon/a" "$D/osd/0"
  tool="ceph-authtool $D/keyring --gen-key"
  $tool --create-keyring -n mon. --cap mon 'allow *' >/dev/null
  $tool -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
  $tool -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' --cap mgr 'allow profile osd' >/dev/null
  $tool -n client.rgw.a --cap mon 'allow rw' --cap osd 'allow rwx' >/dev/null
  monmaptool --create --fsid 11111111-2222-3333-4444-555555555555 --addv a "[v2:127.0.0.1:$MON]" "$D/monmap" --clobber >/dev/null
  ceph-mon --mkfs -i a --monmap "$D/monmap" --keyring "$D/keyring" >/dev/null 2>&1
fi
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 143' TERM INT
ceph-mon -f -i a >"$D/run/mon.out" 2>&1 &
if [ "$first" ]; then
  ceph -s --connect-timeout 30 >/dev/null 2>&1
  ceph auth import -i "$D/keyring" >/dev/null 2>&1
  id=$(cat /proc/sys/kernel/random/uuid)
  ceph osd new "$id" 0 >/dev/null
  ceph-osd -i 0 --mkfs --osd-uuid "$id" >/dev/null 2>&1
fi
ceph-osd -f -i 0 >"$D/run/osd.out" 2>&1 &
if [ "$first" ]; then
  radosgw-admin user create --uid=t --display-name=t --access-key=$KEY --secret-key=$SECRET >/dev/null 2>&1
  # One whose every bucket is full after 4 MiB.
  radosgw-admin user create --uid=small --display-name=small --access-key=smallaccesskey --secret-key=$SECRET >/dev/null 2>&1
  radosgw-admin quota set --quota-scope=user --uid=small --max-size=4M >/dev/null 2>&1
  radosgw-admin quota enable --quota-scope=user --uid=small >/dev/null 2>&1
fi
serve() {
  radosgw -f -n client.rgw.a >>"$D/run/rgw.out" 2>&1 &
  gateway=$!
  echo $gateway >"$D/run/gateway"
}
serve

for _ in $(seq 240); do
  if (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then
    printf '%s\n' "EBACKUP_TEST_S3_PORT=$PORT" "EBACKUP_TEST_S3_TLS_PORT=$TLS" \
      "EBACKUP_TEST_S3_CA=$D/tls/ca.pem" "EBACKUP_TEST_S3_KEY=$KEY" \
      "EBACKUP_TEST_S3_SECRET=$SECRET" >"$D/env.new"
    mv "$D/env.new" "$D/env"
    # Tests kill the gateway, whose number is in DIR/run/gateway: it comes back.
    while :; do
      wait $gateway || true
      sleep 1
      serve
    done
  fi
  sleep 0.25
done
echo "the object gateway does not answer; its logs are in $D/run" >&2
exit 1
