# What a cluster takes of the machine besides ports, each derived from its first port, so that
# clusters can run side by side. Read by cluster.sh and cluster-clean.sh; expects `port`.
# shellcheck shell=sh disable=SC2034,SC2154

number=$((port / 20 % 200))
services=10.97.$number.1/24
apiserver_ip=10.97.$number.1
pods=10.98.$number.0/24
node_ip=198.51.100.$((number + 10))
bridge=ebackup$number
cgroup=ebackup-test-$number

# All mounted hierarchies of control groups, of version 1 and 2.
hierarchies=$(awk '$3 ~ /^cgroup2?$/ { print $2 }' /proc/mounts)
