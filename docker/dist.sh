#!/bin/bash
# docker/dist.sh BUILD VERSION - put BUILD/dist/{bin,libexec} of `make dist`, the CUDA plugin where it was built, and
# every library that they load but glibc's into BUILD/intellect-VERSION.tar.gz. It runs from any folder of any
# x86-64 Linux whose glibc is not older than the one named at the end; CUDA's own libraries come from there.
set -euo pipefail
build=$1 name=intellect-$2
cd "$(dirname "$0")/.."
dist=$build/dist out=$build/$name
rm -rf "$out" && mkdir -p "$out"/{lib,libexec/tests/reference,licenses}
cp -a "$dist/bin" "$dist/libexec" "$out/"
cp tests/gpu.sh "$out/libexec/"
cp tests/reference/kernel_vectors.bin "$out/libexec/tests/reference/"

# glibc belongs to the system: it and the loader must be of one build.
is_glibc() { case $1 in ld-linux* | libc.so.* | libm.so.* | libpthread.so.* | libdl.so.* | librt.so.* | libresolv.so.* | libutil.so.* | libanl.so.*) ;; *) return 1 ;; esac; }
take_libraries() { # take_libraries FILE: those that it loads, and their licenses
    local library arrow path rest package
    while read -r library arrow path rest; do
        [ "$arrow" = "=>" ] || continue
        [ "$path" != not ] || { echo "dist: $1 lacks $library" >&2; exit 1; }
        is_glibc "$library" && continue
        [ -e "$out/lib/$library" ] || cp -L "$path" "$out/lib/$library"
        package=$(dpkg-query -S "$(readlink -f "$path")" "$(readlink -f "$path" | sed 's,^/usr,,')" 2>/dev/null | cut -d: -f1 | head -n 1) || true
        [ -z "$package" ] || cp -L "/usr/share/doc/$package/copyright" "$out/licenses/$package" 2>/dev/null || true
    done < <(ldd "$1")
}
for f in "$out"/bin/* "$out"/libexec/{test_kernels,test_bf16,test_outer_cuda,test_cuda,bench-train}; do take_libraries "$f"; done
if [ -f "$build/libintellect-cuda.so" ]; then
    cp "$build/libintellect-cuda.so" "$out/lib/"
    strip --strip-unneeded "$out/lib/libintellect-cuda.so"
    # What it needs of the compiler's; cuBLASLt is looked for at run time, kernels/plugin.c.
    ldd "$build/libintellect-cuda.so" | grep -E 'lib(stdc\+\+|gcc_s|gomp)' | while read -r library _ path _; do cp -L "$path" "$out/lib/$library"; done
fi
glibc=$(objdump -T "$out"/bin/* "$out"/lib/* 2>/dev/null | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1 | cut -d_ -f2)
cat >"$out/README" <<R
intellect $2
bin/intellect-node --help; bin/intellect-node doctor says what this machine can do.
Everything but glibc ($glibc or newer) is in lib/, with its licenses in licenses/.
A GPU needs NVIDIA's driver and cuBLASLt: of a CUDA toolkit, or of Python's nvidia-cublas wheel, in the active
environment or the user's or system's site-packages; or name its folder in LD_LIBRARY_PATH.
https:// corpora and stores need the certificates of the system at /etc/ssl/certs/ca-certificates.crt, as Debian has them.
libexec/gpu.sh proves the GPU backend on this machine.
R
stamp=$(git log -1 --format=%ct 2>/dev/null || echo 0)
tar -C "$build" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$stamp" -cf - "$name" | gzip -n >"$out.tar.gz"
rm -rf "$out"
bytes=$(stat -c %s "$out.tar.gz")
echo "$out.tar.gz: $((bytes / 1000000)) MB, for glibc $glibc or newer"
[ "$bytes" -lt 50000000 ] || { echo "dist: over 50 MB" >&2; exit 1; }
