#!/bin/sh
# A Kubernetes API server with its etcd, without any controller or node: what tests of a controller
# need. Also the first part of the whole cluster (cluster.sh).
#
#   apiserver.sh DIR PORT [ADDRESS SERVICES FLAG...]    runs in the foreground
#
# etcd listens on PORT and PORT+1 of the loopback, the API server on PORT+2, or, where ADDRESS is
# given, on ADDRESS:443; SERVICES is the range of service addresses, FLAGs are more flags of the API
# server. DIR keeps everything; DIR/env tells how to reach it, and is written when it answers.
# Programs are found by PATH. Needs no root.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
dir=$1 port=$2
shift 2
if [ $# -gt 1 ]; then
  address=$1 services=$2 secure_port=443
  shift 2
else
  address=127.0.0.1 services=10.96.0.0/24 secure_port=$((port + 2))
  # What it asks for is made by a controller that does not run here.
  set -- --disable-admission-plugins=ServiceAccount
fi
server=https://$address:$secure_port

"$here/certificates.sh" "$dir/pki" "$server"
pki=$dir/pki

etcd --name=test --data-dir="$dir/etcd" --unsafe-no-fsync=true --logger=zap --log-level=warn \
  --listen-client-urls="http://127.0.0.1:$port" --advertise-client-urls="http://127.0.0.1:$port" \
  --listen-peer-urls="http://127.0.0.1:$((port + 1))" \
  --initial-advertise-peer-urls="http://127.0.0.1:$((port + 1))" \
  --initial-cluster="test=http://127.0.0.1:$((port + 1))" >"$dir/etcd.log" 2>&1 &

# The advertised address only has to look like one: no endpoint is made of it.
serve() {
  kube-apiserver --etcd-servers="http://127.0.0.1:$port" \
    --bind-address="$address" --secure-port="$secure_port" \
    --advertise-address=198.51.100.1 --endpoint-reconciler-type=none \
    --tls-cert-file="$pki/server.crt" --tls-private-key-file="$pki/server.key" \
    --client-ca-file="$pki/ca.crt" --authorization-mode=Node,RBAC --allow-privileged=true \
    --service-cluster-ip-range="$services" \
    --service-account-issuer=https://kubernetes.default.svc \
    --api-audiences=https://kubernetes.default.svc \
    --service-account-key-file="$pki/tokens.pub" \
    --service-account-signing-key-file="$pki/tokens.key" \
    --kubelet-client-certificate="$pki/admin.crt" --kubelet-client-key="$pki/admin.key" \
    --kubelet-preferred-address-types=InternalIP --profiling=false \
    "$@" >>"$dir/kube-apiserver.log" 2>&1 &
  apiserver=$!
}
serve "$@"

kubeconfig=$pki/admin.kubeconfig
until kubectl --kubeconfig="$kubeconfig" get --raw /readyz >/dev/null 2>&1; do
  if ! kill -0 $apiserver 2>/dev/null; then
    echo "the API server ended; see $dir/kube-apiserver.log and $dir/etcd.log" >&2
    exit 1
  fi
  sleep 0.2
done

cat >"$dir/env.part" <<ENV
KUBECONFIG=$kubeconfig
EBACKUP_TEST_APISERVER_KUBECONFIG=$kubeconfig
EBACKUP_TEST_KUBECTL=$(command -v kubectl)
ENV
mv "$dir/env.part" "$dir/env"
# Tests kill the API server: it comes back.
while :; do
  wait $apiserver || true
  sleep 0.5
  serve "$@"
done
