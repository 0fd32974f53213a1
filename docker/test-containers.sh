#!/bin/bash
# docker/test-containers.sh - build both images with podman and let docker/compose.yaml run them: a coordinator and two nodes
# train a small model on this project's own text, one node is killed and comes back, all are stopped in order. Exit 77 with a
# reason where that cannot be done. As root the containers' network is a namespace of its own, without a way out.
#   DEBIAN=   base image (default: Debian's from its registry; where none answers, one made with debootstrap)
#   LIMIT=    seconds that one wait may take (default 120)
set -euo pipefail
cd "$(dirname "$0")/.."
export DEBIAN=${DEBIAN:-} BUILDAH_FORMAT=docker # OCI's format has no HEALTHCHECK
say() { printf '%4d s  %s\n' $SECONDS "$*"; }
skip() { echo "test-containers: skipped: $*"; exit 77; }
fail() { echo "FAILED: $*"; exit 1; }

# ---- podman ------------------------------------------------------------------------------------------------------------

starts() { podman run --rm --network=none "$DEBIAN" true >"$W/starts.log" 2>&1; }

# Its own settings first. Where they start no container: no systemd, runc in place of crun (which refuses a host with both
# versions of cgroups), and limits below those of this process, which podman would raise.
limit() { local hard; hard=$(ulimit -H "$1"); { [ "$hard" != unlimited ] && [ "$hard" -lt "$2" ] && echo "$hard"; } || echo "$2"; }
podman_starts() {
    local files processes
    starts && return
    files=$(limit -n 65536) processes=$(limit -u 32768)
    cat >"$W/containers.conf" <<END
[containers]
default_ulimits = ["nofile=$files:$files", "nproc=$processes:$processes"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
END
    export CONTAINERS_CONF=$W/containers.conf
    starts
}

base_image() {
    [ -n "$DEBIAN" ] && return
    DEBIAN=docker.io/library/debian:12-slim
    podman image exists $DEBIAN || timeout 120 podman pull -q $DEBIAN >"$W/pull.log" 2>&1 && return
    say "no registry answers: the base image comes from debootstrap"
    DEBIAN=localhost/debian:12-slim
    docker/local-debian.sh || exit
}

# ---- the images --------------------------------------------------------------------------------------------------------

build() { # build PROGRAM
    local start=$SECONDS
    podman build --network=host --build-arg DEBIAN="$DEBIAN" --build-arg REVISION="$(git describe --always --dirty 2>/dev/null)" \
        -f "docker/$1.Dockerfile" -t "intellect-$1" . >"$W/build-$1.log" 2>&1 || { tail -n 40 "$W/build-$1.log"; fail "build $1"; }
    say "intellect-$1 built in $((SECONDS - start)) s"
}

build_stage() { sed -n '/^# ---- build/,/^# ---- the image/p' "docker/$1.Dockerfile"; }

# ---- the run -----------------------------------------------------------------------------------------------------------

compose() { podman-compose -f docker/compose.yaml -p "$P" "$@" >>"$W/compose.log" 2>&1; }
coordinator() { podman exec "${P}_coordinator_1" intellect-coordinator "$@"; }
# status EXPRESSION: in Python, over the fields of `status --json`; empty when there is no answer.
status() {
    coordinator status /srv/run --json 2>/dev/null | python3 -c '
import json, sys
try: s = json.load(sys.stdin)
except ValueError: sys.exit()
print(eval(sys.argv[1], {}, s))' "$1"
}
wait_for() { # wait_for EXPRESSION WHAT
    local end=$((SECONDS + ${LIMIT:-120}))
    until [ "$(status "$1")" = True ]; do
        [ $SECONDS -lt $end ] || fail "$2: not within ${LIMIT:-120} s"
        sleep 0.5
    done
    say "$2"
}

end_run() {
    local rc=$?
    if [ $rc != 0 ]; then
        tail -n 30 "$W/compose.log"
        for c in coordinator node1 node2; do echo "--- $c"; podman logs --tail 15 "${P}_${c}_1" 2>&1; done
    fi
    compose down -v
    podman network rm -f "${P}_default" >/dev/null 2>&1 # Debian 12's podman-compose leaves it
    exit $rc
}

corpus() { # this project's own text, tokenised by the image
    local files=(docs/*.md */*.c */*.h)
    mkdir "$W/corpus"
    podman run --rm --network=none --user 0:0 -v "$PWD:/text:ro" -v "$W/corpus:/corpus" intellect-node \
        data --out /corpus --sequence 128 "${files[@]/#//text/}" >"$W/data.log" 2>&1 || { cat "$W/data.log"; fail "data"; }
    chmod -R a+rX "$W/corpus"
    export CORPUS=$W/corpus
}

# The folder keeps others on this machine out, and the file itself can then be read by the user in the container.
invite() {
    install -d -m 700 "$W/secrets"
    export INVITE=$W/secrets/invite
    coordinator invite /srv/run --uses 2 >"$INVITE" 2>>"$W/compose.log" || fail "invite"
    chmod 644 "$INVITE"
}

# Where anybody with access to podman, or to /proc, could read it.
invite_is_nowhere() {
    local secret
    secret=$(sed 's/.*#//' "$INVITE")
    podman exec "${P}_node1_1" grep -q "$secret" /run/secrets/invite || fail "the invite did not reach node1"
    { podman inspect "${P}_node1_1" "${P}_node2_1" "${P}_coordinator_1"
      podman exec "${P}_node1_1" sh -c 'cat /proc/[0-9]*/cmdline /proc/1/environ 2>/dev/null || true'
      for c in coordinator node1 node2; do podman logs "${P}_${c}_1" 2>&1; done; } >"$W/seen" 2>/dev/null
    grep -qa join "$W/seen" || fail "what the containers show is not there"
    ! grep -qa "$secret" "$W/seen" || fail "the invite's secret can be seen from outside"
}

is_confined() { # is_confined CONTAINER
    [ "$(podman exec "$1" id -u)" = 7171 ] || fail "$1 runs as root"
    podman exec "$1" grep -q '^CapEff:[[:space:]]*0*$' /proc/self/status || fail "$1 has capabilities"
    ! podman exec "$1" touch /usr/local/bin/x 2>/dev/null || fail "$1 can write into its image"
}

smoke() {
    local commits tokens of_node2 c code
    trap end_run EXIT
    trap 'exit 130' INT TERM
    [ "$(id -u)" != 0 ] || ip link set lo up
    corpus
    compose run --rm --no-deps -T coordinator init /srv/run --corpus /corpus/corpus.json --preset debug \
        --set serve.address=coordinator:7171 --set serve.aggregator_port=7172 --set outer.inner_steps=20 \
        --set outer.round_seconds=20 --set outer.grace_seconds=1 --set outer.silence_seconds=5
    compose up -d --no-build coordinator
    wait_for serving "the coordinator serves"
    invite
    compose up -d --no-build
    wait_for 'members_live == 3 and commits >= 2' "two nodes and the coordinator's own are in, 2 rounds are committed"
    for c in coordinator node1 node2; do podman healthcheck run "${P}_${c}_1" >/dev/null || fail "$c is not healthy"; done
    for c in coordinator node1; do is_confined "${P}_${c}_1"; done
    invite_is_nowhere
    for c in 7171 7172; do timeout 5 bash -c "</dev/tcp/127.0.0.1/$c" || fail "port $c is not published"; done
    say "healthy, confined, published; the invite's secret is in its file only"

    podman kill --signal KILL "${P}_node2_1" >/dev/null
    wait_for 'members_live == 2' "node2 is killed (SIGKILL), and lost"
    commits=$(status commits) of_node2='[m["tokens_committed"] for m in members if m["name"] == "node2"][0]'
    tokens=$(status "$of_node2")
    wait_for "commits > $commits" "1 more round is committed without it"
    podman start "${P}_node2_1" >/dev/null 2>>"$W/compose.log"
    wait_for "$of_node2 > $tokens" "node2 is back with the command it had, and its work is in a round"
    [ "$(status root_mismatches)" = 0 ] || fail "members disagree"

    for c in node1 node2 coordinator; do
        podman stop -t 60 "${P}_${c}_1" >/dev/null 2>>"$W/compose.log"
        code=$(podman inspect --format '{{.State.ExitCode}}' "${P}_${c}_1")
        [ "$code" = 0 ] || fail "$c ended with $code"
    done
    say "all stopped in order, exit status 0"
    podman run --rm --network=none -v "${P}_run:/srv/run" intellect-coordinator ledger verify /srv/run \
        2>>"$W/compose.log" || fail "ledger verify"
}

if [ "${1:-}" = smoke ]; then # by ourselves, below
    SECONDS=$3 W=$2 P=intellect-test-$PPID
    smoke
    exit 0
fi

command -v podman >/dev/null || skip "podman is not installed (make test-containers installs it)"
command -v podman-compose >/dev/null || skip "podman-compose is not installed (make test-containers installs it)"
W=$(mktemp -d "${TMPDIR:-/tmp}/containers.XXXXXX")
trap 'rm -rf --one-file-system -- "$W"' EXIT
trap 'exit 130' INT TERM
base_image
podman_starts || skip "podman cannot start a container here: $(tail -n 1 "$W/starts.log")"
diff <(build_stage node) <(build_stage coordinator) || fail "the Dockerfiles' build stages differ"
build node
build coordinator
apart=
[ "$(id -u)" != 0 ] || apart="unshare --net"
$apart docker/test-containers.sh smoke "$W" $SECONDS
podman images --format '{{.Repository}} {{.Size}}' | sed -n 's/^localhost\/\(intellect-[a-z]*\) /\1: /p'
say "containers: all is well"
