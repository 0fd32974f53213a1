# lib.sh - a run of real processes on loopback, for the demo, the churn test and tests/integration.
# Source it; it makes a scratch folder $W, and ends what it started, by process id, when the shell exits.
# Every process gets its log in $W/NAME.log. Needs $BUILD.
set -u
BUILD=$(cd "${BUILD:-build}" && pwd)
NODE=$BUILD/intellect-node
COORDINATOR=$BUILD/intellect-coordinator
W=$(mktemp -d "${TMPDIR:-/tmp}/intellect.XXXXXX")
declare -A PID
export OMP_WAIT_POLICY=passive

end_all() {
    local p
    for p in "${PID[@]}"; do kill -TERM "$p" 2>/dev/null; done
    for _ in $(seq 50); do
        local left=
        for p in "${PID[@]}"; do kill -0 "$p" 2>/dev/null && left=1; done
        [ -n "$left" ] || break
        sleep 0.1
    done
    for p in "${PID[@]}"; do kill -KILL "$p" 2>/dev/null; done
    [ -n "${KEEP:-}" ] && echo "kept: $W" || rm -rf "$W"
}
trap end_all EXIT
trap 'exit 130' INT TERM

fail() { echo "FAILED: $*"; for l in "$W"/*.log; do echo "--- $l"; tail -n "${LOG_LINES:-15}" "$l"; done; exit 1; }
# SIGKILL, without the shell's own remark about it.
kill_now() { { kill -KILL "${PID[$1]}"; wait "${PID[$1]}"; } 2>/dev/null; unset "PID[$1]"; }
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# The demo's text: the manual pages of Perl in Debian's package perl-doc, 8 MB of English; REPEAT=N times over.
corpus() { # corpus OUT_DIR [data options]
    local out=$1 i; shift
    local files=("$(dirname "$(dpkg -L perl-doc | grep -m1 '/perlfaq1\.pod$')")"/*.pod) all=()
    for i in $(seq "${REPEAT:-1}"); do all+=("${files[@]}"); done
    "$NODE" data --out "$out" "$@" "${all[@]}"
}

# WRAP: what to run these two under, such as `ip netns exec NAME`.
start_coordinator() { # start_coordinator RUN_DIR PORT [HOST]
    ${WRAP:-} "$COORDINATOR" serve "$1" --listen "${3:-127.0.0.1}":"$2" >>"$W/coordinator.log" 2>&1 &
    PID[coordinator]=$!
    for _ in $(seq 100); do
        [ "$(status "$1" serving)" = True ] && return 0
        kill -0 "${PID[coordinator]}" 2>/dev/null || break
        sleep 0.1
    done
    fail "the coordinator did not start: $(tail -n 1 "$W/coordinator.log")"
}

start_node() { # start_node NAME RUN_DIR [options]: joins with a new invite, or goes on when the home is there
    local name=$1 run=$2; shift 2
    if [ -f "$W/$name/run.json" ]; then ${WRAP:-} "$NODE" run --home "$W/$name" --threads 1 "$@" >>"$W/$name.log" 2>&1 &
    else
        "$COORDINATOR" invite "$run" --uses 1 2>/dev/null >"$W/$name.invite" || fail "no invite for $name"
        ${WRAP:-} "$NODE" join @"$W/$name.invite" --home "$W/$name" --name "$name" --threads 1 "$@" >>"$W/$name.log" 2>&1 &
    fi
    PID[$name]=$!
}

# status RUN_DIR EXPRESSION: a Python expression over the fields of `status --json`; empty when there is no answer.
status() {
    "$COORDINATOR" status "$1" --json 2>/dev/null | python3 -c '
import json, sys
try: s = json.load(sys.stdin)
except ValueError: sys.exit()
print(eval(sys.argv[1], {}, s))' "$2" 2>/dev/null
}

wait_for() { # wait_for SECONDS RUN_DIR EXPRESSION: until it is true
    local end=$((SECONDS + $1))
    while [ $SECONDS -lt $end ]; do
        [ "$(status "$2" "$3")" = True ] && return 0
        sleep 0.3
    done
    return 1
}

# Digest of a node's anchor on its disk.
anchor_digest() { b2sum -l 256 "$1" | cut -c1-64; }

# Pause the run, and wait until all members have come to one state on disk, aggregator included. Sets `digests`, of which
# there is one if they are equal.
settle() { # settle RUN_DIR NODE...
    local run=$1 n; shift
    wait_for 90 "$run" "members_live >= $# + 1 and len(set(m['state_index'] for m in members if m['live'])) == 1" ||
        fail "the members do not come together again: $("$COORDINATOR" status "$run")"
    "$COORDINATOR" pause "$run" >/dev/null
    sleep 10 # what was leased is trained and committed, or stays where it is
    for _ in $(seq 20); do # nobody can commit once the coordinator stands still
        kill -STOP "${PID[coordinator]}"; sleep 2
        digests=$(for n in "$@"; do anchor_digest "$W/$n/state/anchor"; done; anchor_digest "$run/aggregator/state/anchor")
        digests=$(echo "$digests" | sort -u)
        kill -CONT "${PID[coordinator]}"
        [ "$(echo "$digests" | wc -l)" = 1 ] && break
        sleep 1
    done
}
