#!/bin/sh
# Saves one volume of a running pod: makes a PodVolumeBackup, waits for it, and prints the snapshot.
#
#   save-volume.sh NAMESPACE POD VOLUME [LOCATION]
set -eu
[ $# -ge 3 ] || { sed -n 4p "$0" >&2 && exit 2; }
namespace=$1 pod=$2 volume=$3 location=${4:-default}

of_pod() { kubectl -n "$namespace" get pod "$pod" -o "jsonpath={$1}"; }
backup=$(kubectl create -o name -f - <<YAML
apiVersion: velero.io/v1
kind: PodVolumeBackup
metadata:
  generateName: $pod-
  namespace: velero
spec:
  node: $(of_pod .spec.nodeName)
  pod:
    kind: Pod
    namespace: $namespace
    name: $pod
    uid: $(of_pod .metadata.uid)
  volume: $volume
  backupStorageLocation: $location
  repoIdentifier: ""
YAML
)
of_backup() { kubectl -n velero get "$backup" -o "jsonpath={$1}"; }
told=
while :; do
  case $(of_backup .status.phase) in
    Completed) of_backup .status.snapshotID && echo && exit 0 ;;
    Failed | Canceled) of_backup .status.message >&2 && echo >&2 && exit 1 ;;
  esac
  # Why it waits, if it does.
  message=$(of_backup .status.message)
  [ "$message" = "$told" ] || echo "$message" >&2
  told=$message
  sleep 1
done
