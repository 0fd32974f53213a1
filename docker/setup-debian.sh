#!/bin/sh
# Install what building and testing needs, on Debian 12 or newer. Only what is missing; nothing when all is there.
#   --build       only what building needs: the images are built with it
#   --containers  only what docker/test-containers.sh needs
#   --s3          only what tests/s3/ceph.sh needs: a real S3 server
#   --lint, --fuzz, --cross   also what those targets need
set -eu
build="gcc make pkg-config libc6-dev libdnnl-dev libsodium-dev libssl-dev libevent-dev libsqlite3-dev
libyaml-dev libjansson-dev libcurl4-openssl-dev libpcre2-dev libutf8proc-dev
zlib1g-dev libzstd-dev"
test="g++ libcmocka-dev python3 python3-cryptography python3-msgpack python3-numpy procps binutils"
# The demo's text is perl-doc; the package is named in README.md.
case ${1:-} in
    --build) need=$build ;;
    # runc: Debian 12's crun refuses hosts with both versions of cgroups.
    --containers) need="podman podman-compose runc netavark aardvark-dns iptables debootstrap util-linux iproute2 python3" ;;
    --s3) need="ceph-mon ceph-osd radosgw ceph-common curl python3 util-linux" ;;
    --lint) need="$build $test clang clang-tidy cppcheck libclang-rt-dev libomp-dev" ;;
    # libFuzzer is part of clang's compiler-rt.
    --fuzz) need="$build $test perl-doc clang libclang-rt-dev libomp-dev" ;;
    # Programs for aarch64, and running them: make bitexact.
    --cross) need="$build $test perl-doc gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user" ;;
    *) need="$build $test perl-doc" ;;
esac
missing=
for p in $need; do
    dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing="$missing $p"
done
case ${1:-} in
    --containers | --s3) ;;
    *) pkg-config --exists msgpack-c 2>/dev/null || pkg-config --exists msgpack 2>/dev/null || missing="$missing libmsgpack-c-dev" ;;
esac
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
