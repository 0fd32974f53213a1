#!/bin/sh
# Install what building and testing needs, on Debian 12 or newer. Only what is missing; nothing when all is there.
set -eu
need="gcc g++ make pkg-config libc6-dev libdnnl-dev libsodium-dev libssl-dev libevent-dev libsqlite3-dev
libyaml-dev libjansson-dev libcurl4-openssl-dev libcmocka-dev python3 procps"
[ "${1:-}" = --lint ] && need="$need clang clang-tidy cppcheck libclang-rt-dev libomp-dev"
# libFuzzer is part of clang's compiler-rt.
[ "${1:-}" = --fuzz ] && need="$need clang libclang-rt-dev libomp-dev"
# Programs for aarch64, and running them: make bitexact.
[ "${1:-}" = --cross ] && need="$need gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
# The demo's text; its package is named in README.md.
[ "${1:-}" = --lint ] || need="$need perl-doc"
missing=
for p in $need; do
    dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing="$missing $p"
done
pkg-config --exists msgpack-c 2>/dev/null || pkg-config --exists msgpack 2>/dev/null || missing="$missing libmsgpack-c-dev"
[ -n "$missing" ] || exit 0

sudo=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "setup: run as root, or install sudo; missing:$missing" >&2; exit 1; }
    sudo=sudo
fi
echo "setup: installing$missing"
$sudo apt-get update -qq
# msgpack-c has two names: libmsgpack-c-dev, and libmsgpack-dev on Debian 12.
case "$missing" in *msgpack*) apt-cache show libmsgpack-c-dev >/dev/null 2>&1 || missing=$(echo "$missing" | sed s/msgpack-c-dev/msgpack-dev/) ;; esac
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null
