#!/bin/bash
# Tries out the running cluster: all that tests of the product rely on. Finds it by the variables of
# its `env`. Needs half a minute, and leaves nothing.
set -euo pipefail
k() {
  "$EBACKUP_TEST_KUBECTL" --kubeconfig="$EBACKUP_TEST_KUBECONFIG" "$@"
}
ok() {
  echo "ok: $*"
}
expect() { # WHAT WANTED GOT
  if [ "$2" != "$3" ]; then
    echo "failed: $1: wanted '$2', got '$3'" >&2
    exit 1
  fi
  ok "$1"
}

volume=$(mktemp -d)
finish() {
  k delete namespace smoke --ignore-not-found >/dev/null
  k delete persistentvolume/smoke storageclass/local --ignore-not-found >/dev/null
  rm -rf "$volume"
}
trap finish EXIT

k create namespace smoke >/dev/null
until k -n smoke get serviceaccount default >/dev/null 2>&1; do sleep 0.2; done
sed -e "s|VOLUME|$volume|" -e "s|KUBELET|$EBACKUP_TEST_KUBELET_ROOT|" "$(dirname "$0")/smoke.yaml" |
  k apply --server-side -f - >/dev/null
k -n smoke rollout status daemonset/agent --timeout=300s >/dev/null
# The agent runs, and reaches the API server by its service address.
k -n smoke scale statefulset/stateful --replicas=1 >/dev/null
k -n smoke rollout status deployment/deployment --timeout=300s >/dev/null
k -n smoke rollout status statefulset/stateful --timeout=300s >/dev/null
ok 'a DaemonSet, a Deployment and a StatefulSet run, service addresses too'

pod() { # LABEL
  k -n smoke get pod -l "app=$1" -o "jsonpath={.items[0].metadata.$2}"
}
deployment=$(pod deployment name) agent=$(pod agent name)
expect 'exec and an emptyDir' 'of the folder' "$(k -n smoke exec "$deployment" -- cat /data/file)"
expect 'logs' 'a line' "$(k -n smoke logs "$deployment")"
expect 'a local volume' 'of the volume' "$(cat "$volume/file")"
expect 'an agent sees an emptyDir' 'of the folder' "$(k -n smoke exec "$agent" -- \
  cat "/pods/$(pod deployment uid)/volumes/kubernetes.io~empty-dir/data/file")"
expect 'an agent sees a volume that was mounted after its start' 'of the volume' \
  "$(k -n smoke exec "$agent" -- \
    cat "/pods/$(pod stateful uid)/volumes/kubernetes.io~local-volume/smoke/file")"

until [ "$(k -n smoke get pod greedy -o 'jsonpath={.status.phase}')" = Failed ]; do sleep 0.2; done
expect 'a limit of memory is enforced' OOMKilled "$(k -n smoke get pod greedy \
  -o 'jsonpath={.status.containerStatuses[0].state.terminated.reason}')"

review() { # AUDIENCE
  k create -f - -o 'jsonpath={.status.authenticated} {.status.user.username}' <<REVIEW
apiVersion: authentication.k8s.io/v1
kind: TokenReview
spec: { token: "$token", audiences: ["$1"] }
REVIEW
}
token=$(k -n smoke exec "$deployment" -- cat /token/token)
expect "a projected token is good for its audience" \
  'true system:serviceaccount:smoke:default' "$(review ebackup)"
expect 'and for no other' ' ' "$(review other)"
