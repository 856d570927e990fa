#!/bin/sh
# Makes the image busybox:test, for pods of tests and as the container that holds a pod's namespaces
# together, from the package busybox-static.
#
#   busybox.sh OUT
set -eu
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/bin" "$root/etc" "$root/tmp"
chmod 755 "$root"
chmod 1777 "$root/tmp"
cp /bin/busybox "$root/bin/"
for applet in $(/bin/busybox --list); do
  [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
done
printf 'root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n' >"$root/etc/passwd"
"$(dirname "$0")/../image/pack.sh" "$root" busybox:test \
  '{"Cmd":["/bin/sh","-c","trap exit TERM; sleep 2147483647 & wait"],"Env":["PATH=/bin"]}' "$1"
