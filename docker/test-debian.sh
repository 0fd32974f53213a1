#!/bin/bash
# docker/test-debian.sh [SUITE [TARGET...]] - run make targets of HEAD in a fresh Debian, as on a machine that never saw
# the project: trixie (13, the default) for newer gcc, oneDNN and msgpack-c, bookworm (12) for what setup installs.
# Needs root, debootstrap, git, the network, 2 GB and some minutes. Exit 77 with a reason where it cannot be done.
#   MIRROR=   Debian archive to install from (default: the one apt uses here)
#   TMPDIR=   where the scratch folder goes (default /tmp); removed at the end
set -euo pipefail
cd "$(dirname "$0")/.."
suite=${1:-trixie}
shift || true
say() { echo "test-debian: $*"; }
skip() { say "skipped: $*"; exit 77; }

[ "$(id -u)" = 0 ] || skip "chroot and debootstrap need root"
for t in debootstrap git apt-get; do command -v $t >/dev/null || skip "$t is not installed"; done
mirror=${MIRROR:-$(docker/mirror.sh)}
[ -n "$mirror" ] || skip "apt lists no Debian archive; run apt-get update, or set MIRROR="
commit=$(git rev-parse --short HEAD 2>/dev/null) || skip "not a git checkout"

scratch=$(mktemp -d "${TMPDIR:-/tmp}/debian.XXXXXX")
root=$scratch/root
clean() { # a mount that stays must not be deleted through: rm keeps to one file system
    awk -v d="$scratch/" 'index($2, d) == 1 { print $2 }' /proc/mounts | tac | xargs -r umount -l
    rm -rf --one-file-system -- "$scratch"
}
trap clean EXIT
trap 'exit 130' INT TERM HUP

say "installing Debian $suite into $root"
debootstrap --force-check-gpg --variant=minbase $suite "$root" "$mirror" >"$scratch/log" 2>&1 ||
    { tail -n 5 "$scratch/log"; skip "debootstrap failed"; }
security=$(docker/mirror.sh -security)
[ -z "$security" ] || echo "deb $security $suite-security main" >>"$root/etc/apt/sources.list"
# What Debian's installer writes: a test connects to a localhost of two addresses. And apt has no terminal here.
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' >"$root/etc/hosts"
echo 'Dpkg::Use-Pty "0";' >"$root/etc/apt/apt.conf.d/no-terminal"
mount --bind /proc "$root/proc"
mount --bind /dev "$root/dev"
mount --bind /dev/pts "$root/dev/pts"
mount -t tmpfs tmpfs "$root/dev/shm" # where tests that sync files to disk keep them

say "copying commit $commit"
mkdir "$root/src"
git archive "$commit" | tar -x -C "$root/src"

inside() {
    say "$*"
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 chroot "$root" sh -c "cd /src && $*"
}
inside "apt-get update -qq && apt-get install -y -qq --no-install-recommends make >/dev/null"
inside "make setup && make help | sed -n '/^found:/,\$p'"
inside make "${*:-test}"
