#!/bin/sh
# Passes the tests on a machine that has Rust and a C compiler: installs what they need, as root on Debian, and runs
# them all. Without root nothing is installed, and tests that need root or a package say so loudly.
set -eu
cd "$(dirname "$0")"
exec cargo xtask test --install
