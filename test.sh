#!/bin/sh
# Passes the tests on a machine that has Rust and a C compiler: installs what they need, then runs
# them all. Without root nothing is installed, and tests that need root or a package say so loudly.
set -eu
cd "$(dirname "$0")"

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  # bindfs: a real FUSE file system. attr, acl: to look at attributes with another program's eyes.
  missing=
  for package in bindfs attr acl util-linux; do
    dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
  done
  if [ -n "$missing" ]; then
    apt-get update -q >/dev/null
    # shellcheck disable=SC2086 # a list of packages
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing >/dev/null
  fi
fi

command -v cargo-deny >/dev/null || cargo install --quiet --locked cargo-deny

exec cargo xtask test
