#!/bin/sh
# Puts a snapshot into the volume 'data' of a new pod, whose program starts when all of it is there.
#
#   restore-volume.sh NAMESPACE POD SNAPSHOT [LOCATION]        IMAGE=busybox:1.36 is the new pod's
#
# RUN_AS=999 is the user that both its containers run as. It is needed where the volume is open to one user
# alone, as a database's is: restore-wait has to look into it.
set -eu
[ $# -ge 3 ] || { sed -n 4p "$0" >&2 && exit 2; }
namespace=$1 pod=$2 snapshot=$3 location=${4:-default}
context=${RUN_AS:+"runAsUser: $RUN_AS"}
# What tells this restore from others: the mark that the pod waits for.
restore=$(cat /proc/sys/kernel/random/uuid)
helper=$(kubectl -n velero get daemonset node-agent -o 'jsonpath={.spec.template.spec.containers[0].image}')

kubectl create -f - >&2 <<YAML
apiVersion: v1
kind: Pod
metadata:
  name: $pod
  namespace: $namespace
spec:
  initContainers:
    # First in the list: others may need what it waits for.
    - name: restore-wait
      image: $helper
      imagePullPolicy: IfNotPresent
      command: [ebackup, restore-wait]
      args: [$restore]
      securityContext:
        runAsNonRoot: true
        runAsUser: ${RUN_AS:-65532}
        allowPrivilegeEscalation: false
        capabilities:
          drop: [ALL]
        seccompProfile:
          type: RuntimeDefault
      volumeMounts:
        - name: data
          mountPath: /restores/data
  containers:
    - name: main
      image: ${IMAGE:-busybox:1.36}
      imagePullPolicy: IfNotPresent
      command: [sleep, "1000000"]
      securityContext: {$context}
      volumeMounts:
        - name: data
          mountPath: /data
  volumes:
    - name: data
      emptyDir: {}
YAML
restoring=$(kubectl create -o name -f - <<YAML
apiVersion: velero.io/v1
kind: PodVolumeRestore
metadata:
  generateName: $pod-
  namespace: velero
  labels:
    velero.io/restore-uid: $restore
spec:
  pod:
    kind: Pod
    namespace: $namespace
    name: $pod
    uid: $(kubectl -n "$namespace" get pod "$pod" -o 'jsonpath={.metadata.uid}')
  volume: data
  backupStorageLocation: $location
  repoIdentifier: ""
  snapshotID: $snapshot
  sourceNamespace: $namespace
YAML
)
of_restore() { kubectl -n velero get "$restoring" -o "jsonpath={$1}"; }
while :; do
  case $(of_restore .status.phase) in
    Completed) break ;;
    Failed | Canceled)
      of_restore .status.message >&2
      printf "\n%s waits until another restore with label velero.io/restore-uid=%s is done, or is deleted\n" "$pod" "$restore" >&2
      exit 1
      ;;
  esac
  sleep 1
done
kubectl -n "$namespace" wait --for=condition=Ready "pod/$pod" --timeout=10m >&2
