#!/bin/sh
# Removes what a killed cluster left on the machine outside of its namespaces and its folder.
#
#   cluster-clean.sh DIR PORT    as cluster.sh was given
set -eu
dir=$1 port=$2
. "$(dirname "$0")/names.sh"

ip link delete "$bridge" 2>/dev/null || true
ip address delete "$services" dev lo 2>/dev/null || true
ip address delete "$node_ip/32" dev lo 2>/dev/null || true
for hierarchy in $hierarchies; do
  [ ! -d "$hierarchy/$cgroup" ] || find "$hierarchy/$cgroup" -depth -type d -exec rmdir {} +
done
[ ! -e "$dir/ip_forward" ] || cat "$dir/ip_forward" >/proc/sys/net/ipv4/ip_forward
rmdir /var/lib/cni 2>/dev/null || true
