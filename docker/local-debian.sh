#!/bin/bash
# docker/local-debian.sh - make the image localhost/debian:12-slim from Debian's archive, for building ours where no registry
# answers. What is there already is kept. Needs root, debootstrap and podman; exit 77 with a reason where it cannot be done.
#   MIRROR=   Debian archive to install from (default: the one apt uses here)
set -euo pipefail
cd "$(dirname "$0")/.."
image=localhost/debian:12-slim
podman image exists $image && exit 0
skip() { echo "local-debian: skipped: $*"; exit 77; }
[ "$(id -u)" = 0 ] || skip "debootstrap needs root"
command -v debootstrap >/dev/null || skip "debootstrap is not installed"
mirror=${MIRROR:-$(docker/mirror.sh)}
[ -n "$mirror" ] || skip "apt lists no Debian archive; run apt-get update, or set MIRROR="

scratch=$(mktemp -d "${TMPDIR:-/tmp}/debian.XXXXXX")
trap 'rm -rf --one-file-system -- "$scratch"' EXIT
root=$scratch/root
debootstrap --force-check-gpg --variant=minbase bookworm "$root" "$mirror" >"$scratch/log" 2>&1 ||
    { tail -n 5 "$scratch/log"; skip "debootstrap failed"; }
security=$(docker/mirror.sh -security)
[ -z "$security" ] || echo "deb $security bookworm-security main" >>"$root/etc/apt/sources.list"
# What makes it slim, also for the packages that come later; and no package starts a service.
printf 'path-exclude /usr/share/%s/*\n' man info locale doc >"$root/etc/dpkg/dpkg.cfg.d/slim"
echo 'path-include /usr/share/doc/*/copyright' >>"$root/etc/dpkg/dpkg.cfg.d/slim"
echo 'Acquire::Languages "none";' >"$root/etc/apt/apt.conf.d/slim"
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod +x "$root/usr/sbin/policy-rc.d"
find "$root/usr/share/doc" -type f ! -name copyright -delete
rm -rf "$root"/usr/share/{man,info,locale}/* "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/var/log/*.log
: >"$root/etc/resolv.conf"
tar -C "$root" --one-file-system --numeric-owner --sort=name -cf "$scratch/root.tar" .
podman import --change 'CMD ["bash"]' --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
    "$scratch/root.tar" $image >/dev/null 2>"$scratch/log" || { cat "$scratch/log"; exit 1; }
