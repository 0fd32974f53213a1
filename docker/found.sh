#!/bin/sh
# What `make help` says was found: compilers, libraries with versions, CPU features that oneDNN uses.
echo "found:"
row() { printf '  %-22s %s\n' "$1" "$2"; }
row "$CC" "$($CC --version 2>/dev/null | head -n 1 || echo 'not found')"
if [ -n "$NVCC" ]; then row nvcc "$NVCC ($("$NVCC" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p'))"; else row nvcc "not found: CPU build"; fi
for p in $PACKAGES; do row "$p" "$(pkg-config --modversion "$p" 2>/dev/null || echo 'not found: make setup')"; done
header=$(find /usr/include /usr/local/include -path '*oneapi*' -name dnnl_version.h 2>/dev/null | head -n 1)
if [ -n "$header" ]; then
    row oneDNN "$(sed -n 's/#define DNNL_VERSION_\(MAJOR\|MINOR\|PATCH\) *//p' "$header" | paste -sd.)"
else row oneDNN "not found: make setup"; fi
row "CPU for oneDNN" "$(grep -m1 -E '^(flags|Features)' /proc/cpuinfo | tr ' ' '\n' \
    | grep -xE 'avx2|fma|avx512f|avx512_bf16|avx512_vnni|amx_bf16|amx_int8|asimd|bf16|sve' | paste -sd' ')"
for t in clang-tidy cppcheck; do row $t "$(command -v $t || echo 'not found: needed by make lint')"; done
