#!/bin/sh
# Packs a folder as a container image of one layer, in the format of `docker save`, which containerd
# (`ctr images import`), Docker (`docker load`), Podman and Skopeo read.
#
#   pack.sh ROOT NAME CONFIG OUT    CONFIG: the image's "config" as JSON (Entrypoint, User, ...)
#
# The same files make the same image, byte for byte: times are zero, owner is root.
set -eu
root=$1 name=$2 config=$3 out=$4

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pack() {
  tar --create --format=gnu --sort=name --mode=a+rX --mtime=@0 \
    --owner=0 --group=0 --numeric-owner "$@"
}
pack --file="$work/layer.tar" --directory="$root" .
layer=$(sha256sum "$work/layer.tar" | cut -d ' ' -f 1)
case $(uname -m) in
  x86_64) architecture=amd64 ;;
  aarch64) architecture=arm64 ;;
  *) architecture=$(uname -m) ;;
esac
cat >"$work/config.json" <<JSON
{"architecture":"$architecture","os":"linux","config":$config,
 "rootfs":{"type":"layers","diff_ids":["sha256:$layer"]}}
JSON
cat >"$work/manifest.json" <<JSON
[{"Config":"config.json","RepoTags":["$name"],"Layers":["layer.tar"]}]
JSON
mkdir -p "$(dirname "$out")"
pack --file="$out.part" --directory="$work" manifest.json config.json layer.tar
mv "$out.part" "$out"
