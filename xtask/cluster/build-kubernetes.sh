#!/bin/sh
# Builds Kubernetes 1.20 from Debian's source package into the folder given: kube-apiserver,
# kube-controller-manager, kube-scheduler, kubelet and kubectl. Takes about five minutes, once:
# the folder lies outside the checkout, and the programs appear in it only when all are built.
#
# Debian has no binary packages of them, except of kubectl, which gets in the way of other packages
# of kubectl. Needs the packages golang-go, golang-github-modern-go-reflect2-dev, make, jq, rsync.
set -eu

cache=$1
mkdir -p "$cache"
# Only one at a time; kubectl is the last to appear. What a killed build left goes.
exec 9>"$cache/lock"
flock 9
[ ! -e "$cache/kubectl" ] || exit 0
rm -rf "$cache"/build.*

work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"

# The machine's own apt setup stays as it is: a list of sources and a folder of lists apart, from
# the mirror that the machine uses.
# shellcheck disable=SC2016 # apt expands it
mirror=$(apt-get indextargets --format '$(REPO_URI)' \
  'Created-By: Packages' 'Codename: bookworm' 'Component: main' | head -n 1)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb-src [signed-by=$keys] ${mirror:-http://deb.debian.org/debian} bookworm main" >sources.list
mkdir -p lists/partial
apt() {
  apt-get -q -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State::Lists="$work/lists" -o Dir::Cache::srcpkgcache= -o Dir::Cache::pkgcache= \
    -o APT::Sandbox::User=root "$@"
}
apt update
apt source --download-only kubernetes
mkdir tree
tar -xzf kubernetes_*.orig.tar.gz -C tree --strip-components=1
cd tree

# Its reflect2 1.0.1 crashes under Go 1.18 and newer, in the API server's first server-side apply.
reflect2=github.com/modern-go/reflect2
rm -rf "vendor/$reflect2"
cp -rL "/usr/share/gocode/src/$reflect2" "vendor/$reflect2"

mkdir -p .go/src/k8s.io
ln -s "$PWD" .go/src/k8s.io/kubernetes
cd .go/src/k8s.io/kubernetes
programs='kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl'
mkdir "$work/tmp"
export TMPDIR="$work/tmp" GOCACHE="$work/gocache"
export GOPATH="$work/tree/.go" CGO_ENABLED=0 GO111MODULE=off
# shellcheck disable=SC2086 # a list of programs
make GOLDFLAGS='-s -w' WHAT="$(printf 'cmd/%s ' $programs)"

for program in $programs; do
  cp "_output/local/go/bin/$program" "$work/"
done
for program in $programs; do
  mv "$work/$program" "$cache/"
done
