#!/bin/sh
# Installs the packages that the tests need, as root on Debian. Elsewhere it does nothing, and tests that need
# root or a package say so loudly.
set -eu
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "NOT TESTED: what needs packages that are not here, for only root on Debian has them installed"
  exit 0
fi

# bindfs: a real FUSE file system. attr, acl: to look at attributes with another program's eyes.
# libarchive-tools: bsdtar, the second program that unpacks our archives.
# radosgw and its like: a real S3 server, for which openssl makes certificates. etcd-server and its
# like: a Kubernetes cluster, whose other programs are built from their source package, once.
packages='bindfs attr acl libarchive-tools util-linux radosgw ceph-mon ceph-osd ceph-common openssl ca-certificates
  etcd-server containerd runc containernetworking-plugins iproute2 busybox-static'
if [ ! -e "${XDG_CACHE_HOME:-$HOME/.cache}/ebackup-test/kubernetes-1.20.2/kubectl" ]; then
  packages="$packages golang-go golang-github-modern-go-reflect2-dev make jq rsync"
fi
missing=
for package in $packages; do
  dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

# Packages must not start services of their own.
if [ ! -e /usr/sbin/policy-rc.d ]; then
  printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
  chmod +x /usr/sbin/policy-rc.d
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
# Another checkout may be installing.
apt='apt-get -q -o DPkg::Lock::Timeout=600'
$apt update
# shellcheck disable=SC2086 # a list of packages
DEBIAN_FRONTEND=noninteractive $apt install -y --no-install-recommends $missing
