#!/bin/sh
# docker/mirror.sh [-security] - Debian's archive among apt's sources, or the archive of its security updates; empty when
# apt knows none (apt-get update first).
apt-get indextargets --format '$(SITE) $(RELEASE)' 'Created-By: Packages' 'Origin: Debian' 2>/dev/null |
    awk -v end="${1:-}" 'end == "" ? $2 !~ /-/ : $2 ~ end "$"' | sed -n '1s/ .*//p'
