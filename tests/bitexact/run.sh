#!/bin/bash
# tests/bitexact/run.sh [--without-aarch64] [--renew] - does the outer step compute the same bits whatever compiler, flags, vector
# width, processor and left-behind floating-point environment? Builds outer_bits.c in many variants, runs each and compares every
# checksum with expected.txt. Then proves that the comparison can fail: builds that break the rules must differ, or not compile.
#   --without-aarch64  pass although no variant for aarch64 could be built and run
#   --renew            write expected.txt anew; for a change of the bits that is meant, which no running model survives
# Needs gcc on x86-64; clang, and (docker/setup-debian.sh --cross) aarch64-linux-gnu-gcc with qemu-user, for the rest.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${BUILD:-build}/bitexact expected=tests/bitexact/expected.txt
without_aarch64= renew= failed=0 aarch64_ran=0
for option in "$@"; do
    case $option in
        --without-aarch64) without_aarch64=1 ;;
        --renew) renew=1 ;;
        *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
[ "$(uname -m)" = x86_64 ] || { echo "bitexact: variants are built on x86-64 only, this is $(uname -m)"; exit 77; }
mkdir -p "$out"
rm -f "$out"/*.sums

common="-std=gnu11 -I. -Wall -Wextra -Werror -Wno-pass-failed -fno-math-errno -fno-strict-aliasing -fopenmp-simd"
exact="$common -ffp-contract=off"
plain="-DWIDE=__attribute__((noinline))" # in place of gcc's clones for several vector widths
avx512="-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma"
arm_clang="clang --target=aarch64-linux-gnu"

have() { command -v "$1" >/dev/null; }
cpu() { grep -qw "$1" /proc/cpuinfo; }
# Can this be run here? Prints why not.
lacks() { # COMPILER FLAGS RUNNER
    local word
    for word in ${1%% *} ${3%% *}; do have "$word" || { echo "no $word"; return; }; done
    case $1 in *aarch64*) have aarch64-linux-gnu-gcc || { echo "no aarch64-linux-gnu-gcc"; return; } ;; esac
    [ -n "$3" ] && return # emulated
    case $2 in *avx512f*) cpu avx512f || { echo "no AVX-512 in this processor"; return; } ;; esac
    case $2 in *avx2*) cpu avx2 || { echo "no AVX2 in this processor"; return; } ;; esac
    case $2 in *mfma*) cpu fma || echo "no FMA in this processor" ;; esac
}

# Build SOURCE in place of kernels/outer.c. Foreign programs are static, so that they need no foreign loader.
build() { # NAME COMPILER FLAGS [SOURCE]
    local link=
    case $2 in *aarch64*) link=-static ;; esac
    $2 $3 $link tests/bitexact/outer_bits.c "${4:-kernels/outer.c}" proto/err.c -o "$out/$1" >"$out/$1.log" 2>&1
}

run() { # NAME RUNNER
    { timeout 120 $2 "$out/$1" >"$out/$1.sums"; } 2>>"$out/$1.log"
}

# Functions of NAME.sums that differ from the expected ones; where not in every environment, with a list of those.
differing() { # NAME
    awk 'NR == FNR { want[$1] = $2; next }
         { seen[$1]++ }
         want[$1] != $3 { if (!($1 in bad)) order[++n] = $1; bad[$1] = bad[$1] "," $2 }
         END { for (f in want) if (!(f in seen)) printf "%s (missing) ", f
               for (i = 1; i <= n; i++) {
                   f = order[i]
                   if (split(bad[f], list, ",") - 1 == seen[f]) printf "%s ", f
                   else printf "%s (%s) ", f, substr(bad[f], 2)
               } }' "$expected" "$out/$1.sums"
}

row() { printf '%-26s %s\n' "$1" "$2"; }
fail() { row "$1" "$2"; failed=1; }

variant() { # NAME COMPILER FLAGS [RUNNER]
    local why bad
    why=$(lacks "$2" "$3" "${4:-}")
    [ -z "$why" ] || { row "$1" "not run: $why"; return; }
    build "$1" "$2" "$3" || { fail "$1" "does not compile: $out/$1.log"; return; }
    run "$1" "${4:-}" || { fail "$1" "exit status $? after $(tail -n 1 "$out/$1.sums")"; return; }
    if [ -n "$renew" ]; then
        awk '$2 == "started" { print $1, $3 }' "$out/$1.sums" >"$expected"
        renew=
        echo "wrote $expected from $1"
    fi
    case $1 in aarch64*) aarch64_ran=1 ;; esac
    bad=$(differing "$1")
    [ -z "$bad" ] && row "$1" "ok: $(wc -l <"$out/$1.sums") checksums" || fail "$1" "DIFFERS: $bad"
}

# A build that breaks a rule: if the comparison does not see it, the comparison is worth nothing.
must_differ() { # NAME COMPILER FLAGS RUNNER FUNCTION [SOURCE]
    local why bad
    why=$(lacks "$2" "$3" "$4")
    [ -z "$why" ] || { row "$1" "not run: $why"; return; }
    build "$1" "$2" "$3" "${6:-}" || { fail "$1" "does not compile: $out/$1.log"; return; }
    run "$1" "$4"
    bad=$(differing "$1")
    case " $bad" in
        *" $5 "*) row "$1" "differs, as it must: $bad" ;;
        *) fail "$1" "NOT SEEN: $5 should differ, differing are: ${bad:-none}" ;;
    esac
}

must_not_compile() { # NAME COMPILER FLAGS
    have "$2" || { row "$1" "not run: no $2"; return; }
    if build "$1" "$2" "$3"; then fail "$1" "COMPILES"
    elif grep -q 'must not be compiled' "$out/$1.log"; then row "$1" "refused, as it must be"
    else fail "$1" "refused for another reason: $out/$1.log"
    fi
}

row variant "of each function and codec: one checksum in each of six floating-point environments"
variant gcc-O0             gcc "$exact -O0 $plain"
variant gcc-O3             gcc "$exact -O3 $plain"
variant gcc-O3-avx2        gcc "$exact -O3 $plain -mavx2 -mfma"
variant gcc-O3-avx512      gcc "$exact -O3 $plain $avx512"
variant gcc-O3-lto         gcc "$exact -O3 $plain -flto"
variant gcc-clones         gcc "$exact -O2"
variant gcc-clones-sse2    gcc "$exact -O2" "qemu-x86_64 -cpu qemu64"
variant gcc-clones-avx2    gcc "$exact -O2" "qemu-x86_64 -cpu max"
variant gcc-fast-math-link gcc "$exact -O2 -Wl,$(gcc -print-file-name=crtfastmath.o)" # flushes subnormals from the start
variant clang-O0           clang "$exact -O0"
variant clang-O3           clang "$exact -O3"
variant clang-O3-avx2      clang "$exact -O3 -mavx2 -mfma"
variant clang-O3-avx512    clang "$exact -O3 $avx512"
variant aarch64-gcc-O0     aarch64-linux-gnu-gcc "$exact -O0" qemu-aarch64
variant aarch64-gcc-O3     aarch64-linux-gnu-gcc "$exact -O3" qemu-aarch64
variant aarch64-gcc-O3-sve aarch64-linux-gnu-gcc "$exact -O3 -march=armv8.2-a+sve" "qemu-aarch64 -cpu max,sve512=on"
variant aarch64-clang-O0   "$arm_clang" "$exact -O0" qemu-aarch64
variant aarch64-clang-O3   "$arm_clang" "$exact -O3" qemu-aarch64

# outer.c without the line that sets the floating-point environment.
sed 's/^    fp_set(FP_STRICT);$//' kernels/outer.c >"$out/outer_unset.c"
cmp -s kernels/outer.c "$out/outer_unset.c" && fail outer_unset.c "kernels/outer.c no longer has the line to take out"
must_differ contract-fast         gcc "$common -O3 $plain -mavx2 -mfma -ffp-contract=fast" "" nesterov
must_differ contract-fast-clang   clang "$common -O3 -mavx2 -mfma -ffp-contract=fast" "" nesterov
must_differ contract-fast-aarch64 aarch64-linux-gnu-gcc "$common -O3 -ffp-contract=fast" qemu-aarch64 nesterov
must_differ environment-unset     gcc "$exact -O3 $plain" "" nesterov "$out/outer_unset.c"
must_differ environment-unset-arm aarch64-linux-gnu-gcc "$exact -O3" qemu-aarch64 nesterov "$out/outer_unset.c"
must_not_compile fast-math        gcc "$exact -O3 -ffast-math"
must_not_compile fast-math-clang  clang "$exact -O3 -ffast-math"
must_not_compile reassociating    gcc "$exact -O3 -fno-signed-zeros -fno-trapping-math -fassociative-math"

if [ $aarch64_ran = 0 ] && [ -z "$without_aarch64" ]; then
    echo "bitexact: no variant for aarch64 ran; docker/setup-debian.sh --cross installs what it needs, --without-aarch64 does without"
    failed=1
fi
[ $failed = 0 ] && echo "bitexact: all variants that ran agree" || { echo "bitexact: FAILED; programs and checksums are in $out"; exit 1; }
