#!/bin/sh
# docker/runtime-packages.sh PROGRAM - the Debian packages with the shared libraries that PROGRAM loads, one a line. The images'
# second stage installs these, so that no list of them can fall behind the Makefile.
set -eu
libraries=$(ldd "$1")
case $libraries in *"not found"*) echo "runtime-packages: $1: $libraries" >&2; exit 1 ;; esac
for library in $(echo "$libraries" | awk '$2 == "=>" { print $3 }'); do
    path=$(readlink -f "$library")
    # dpkg knows a library under /usr/lib or under /lib, whichever its package says.
    package=$(dpkg-query -S "$path" "${path#/usr}" 2>/dev/null | cut -d: -f1 | head -n 1)
    [ -n "$package" ] || { echo "runtime-packages: $library is in no package" >&2; exit 1; }
    echo "$package"
done | sort -u
