#!/bin/bash
# venv.sh DIR: a virtual environment with the newest torch and transformers of PyPI, for the scripts here.
#
# PyPI's torch is the one for CUDA, which pulls in 3 GB of libraries that a CPU never calls. So it comes without
# them, and where this machine has none of their name either, an empty library stands in: each function that torch
# links aborts when it is called. What a CPU needs is installed in full. A second call changes nothing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$1

if [ ! -e "$dir/ready" ]; then
    python3 -m venv "$dir"
    pip=("$dir/bin/pip" install --quiet --no-compile --disable-pip-version-check)
    "${pip[@]}" --no-deps torch
    "${pip[@]}" -r "$here/requirements.txt"

    lib=$(echo "$dir"/lib/python3*/site-packages/torch/lib)
    stub() { cc -shared -fPIC -w -Wl,-soname,"$1" -o "$lib/$1" -x c "$2"; }
    missing=$(for f in "$lib"/*.so; do ldd "$f"; done 2>/dev/null | sed -n 's/^\t\(.*\) => not found$/\1/p' | sort -u)
    for name in $missing; do stub "$name" /dev/null; done
    for f in "$lib"/*.so; do ldd -r "$f"; done 2>&1 | sed -n 's/^undefined symbol: \([A-Za-z_0-9]*\).*/\1/p' |
        grep -v '^_' | grep -v '^Py' | sort -u | sed 's/.*/void &(void) { __builtin_trap(); }/' > "$dir/stubs.c"
    for name in $missing; do stub "$name" "$dir/stubs.c"; done
    touch "$dir/ready"
fi
"$dir/bin/python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
