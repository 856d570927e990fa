#!/bin/sh
# A Kubernetes cluster of one real node for tests, from programs found by PATH. Needs root.
#
#   unshare --mount --pid --fork --mount-proc cluster.sh DIR PORT    runs in the foreground
#
# It runs in mount and process namespaces of its own: when the first process is killed, everything
# is gone, containers and mounts too. It shares the machine's network, so that pods with
# `hostNetwork` reach servers of the tests. What is left for cluster-clean.sh: cgroups, the bridge,
# addresses on the loopback, a switch of the kernel's.
#
# PORT to PORT+19 are its ports. DIR keeps everything; DIR/env tells how to reach it, and is written
# when the node is ready.
#
# There is no kube-proxy and no DNS. Instead the whole range of service addresses lies on the
# loopback, so that a Service reaches a pod with `hostNetwork` that listens on the Service's port.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
dir=$1 port=$2
. "$here/names.sh"

# The kubelet and containerd make sockets below DIR, whose paths hold 107 bytes.
if [ ${#dir} -gt 75 ]; then
  echo "the path $dir is too long for sockets below it; use a checkout with a shorter path" >&2
  exit 1
fi

# Mounts made later must reach pods that ask for it (HostToContainer); none leaves this namespace.
mount --make-rprivate /
mount --make-rshared /
# State that has fixed paths.
cp /etc/resolv.conf "$dir/resolv.conf"
mkdir -p "$dir/var-log" "$dir/cni-state" /var/lib/cni
mount -t tmpfs -o mode=755 tmpfs /run
mount --bind "$dir/var-log" /var/log
mount --bind "$dir/cni-state" /var/lib/cni

# The bridge's plugin switches this on.
cat /proc/sys/net/ipv4/ip_forward >"$dir/ip_forward"
ip address add "$services" dev lo
# A kubelet refuses a loopback address: one of the range for documentation.
ip address add "$node_ip/32" dev lo

mkdir -p "$dir/control-plane"
"$here/apiserver.sh" "$dir/control-plane" "$port" "$apiserver_ip" "$services" &
control_plane=$!

# Waits until a command succeeds; gives up when one of the processes it may wait for has ended.
wait_for() {
  until "$@" >/dev/null 2>&1; do
    for process in $processes; do
      if ! kill -0 "$process" 2>/dev/null; then
        echo "a part of the cluster ended while waiting for '$*'; see the logs in $dir" >&2
        exit 1
      fi
    done
    sleep 0.2
  done
}
processes=$control_plane
wait_for test -e "$dir/control-plane/env"

pki=$dir/control-plane/pki
kube-controller-manager --kubeconfig="$pki/controller-manager.kubeconfig" \
  --use-service-account-credentials=true --service-account-private-key-file="$pki/tokens.key" \
  --root-ca-file="$pki/ca.crt" --leader-elect=false --pvclaimbinder-sync-period=1s \
  --flex-volume-plugin-dir="$dir/volume-plugins" \
  --bind-address=127.0.0.1 --port=0 --secure-port=$((port + 3)) \
  >"$dir/kube-controller-manager.log" 2>&1 &
processes="$processes $!"

kube-scheduler --kubeconfig="$pki/scheduler.kubeconfig" --leader-elect=false \
  --bind-address=127.0.0.1 --port=0 --secure-port=$((port + 4)) \
  >"$dir/kube-scheduler.log" 2>&1 &
processes="$processes $!"

# restrict_oom_score_adj: a machine without CAP_SYS_RESOURCE cannot protect sandboxes from the
# OOM killer, and none would start. An overlay cannot lie on an overlay.
snapshotter=overlayfs
[ "$(stat -f -c %T "$dir")" != overlayfs ] || snapshotter=native
cat >"$dir/containerd.toml" <<CONFIG
version = 2
root = "$dir/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "$dir/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "busybox:test"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "$snapshotter"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$dir/cni"
CONFIG
mkdir -p "$dir/cni"
cat >"$dir/cni/bridge.conflist" <<CONFIG
{ "cniVersion": "0.4.0", "name": "test", "plugins": [
  { "type": "bridge", "bridge": "$bridge", "isGateway": true,
    "ipam": { "type": "host-local", "ranges": [[{ "subnet": "$pods" }]],
              "routes": [{ "dst": "0.0.0.0/0" }], "dataDir": "/run/cni" } } ] }
CONFIG
containerd --config "$dir/containerd.toml" >"$dir/containerd.log" 2>&1 &
processes="$processes $!"
export CONTAINERD_ADDRESS="$dir/containerd.sock" CONTAINERD_NAMESPACE=k8s.io
wait_for ctr version
"$here/busybox.sh" "$dir/busybox.tar"
ctr images import "$dir/busybox.tar" >/dev/null

for hierarchy in $hierarchies; do
  mkdir -p "$hierarchy/$cgroup"
done
# Images are brought by hand: none may be collected, and a full disk is the tests' own business.
# Changes of secrets and tokens are to be seen at once.
cat >"$dir/kubelet.yaml" <<CONFIG
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $node_ip
port: $((port + 5))
healthzPort: $((port + 6))
readOnlyPort: 0
authentication:
  anonymous: { enabled: false }
  webhook: { enabled: false }
  x509: { clientCAFile: $pki/ca.crt }
authorization: { mode: AlwaysAllow }
cgroupDriver: cgroupfs
cgroupRoot: /$cgroup
failSwapOn: false
makeIPTablesUtilChains: false
resolvConf: $dir/resolv.conf
serializeImagePulls: false
imageGCHighThresholdPercent: 100
evictionHard: { nodefs.available: 1Mi }
syncFrequency: 5s
fileCheckFrequency: 5s
nodeStatusUpdateFrequency: 5s
configMapAndSecretChangeDetectionStrategy: Watch
volumePluginDir: $dir/volume-plugins
eventRecordQPS: 0
kubeAPIQPS: 100
kubeAPIBurst: 100
CONFIG
mkdir -p "$dir/kubelet"
kubelet --config="$dir/kubelet.yaml" --kubeconfig="$pki/node.kubeconfig" \
  --root-dir="$dir/kubelet" --cert-dir="$dir/kubelet-pki" --hostname-override=node \
  --node-ip="$node_ip" --container-runtime=remote \
  --container-runtime-endpoint="unix://$dir/containerd.sock" \
  >"$dir/kubelet.log" 2>&1 &
processes="$processes $!"

kubeconfig=$pki/admin.kubeconfig
wait_for kubectl --kubeconfig="$kubeconfig" get node node
wait_for kubectl --kubeconfig="$kubeconfig" wait --for=condition=Ready node/node --timeout=1s
wait_for kubectl --kubeconfig="$kubeconfig" get serviceaccount default

cat >"$dir/env.part" <<ENV
KUBECONFIG=$kubeconfig
EBACKUP_TEST_KUBECONFIG=$kubeconfig
EBACKUP_TEST_KUBECTL=$(command -v kubectl)
EBACKUP_TEST_KUBELET_ROOT=$dir/kubelet
EBACKUP_TEST_NODE=node
CONTAINERD_ADDRESS=$CONTAINERD_ADDRESS
CONTAINERD_NAMESPACE=$CONTAINERD_NAMESPACE
ENV
mv "$dir/env.part" "$dir/env"
wait
