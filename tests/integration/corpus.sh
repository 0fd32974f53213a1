#!/bin/bash
# A run on a mixture of two corpora with a byte-level BPE tokenizer: one member has them on its disk, the other reads
# them from a web server. Both train, their anchors are equal, and eval and generate find the tokenizer.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
R=$W/run P=$(free_port) H=$(free_port)
T=tests/reference/tokenizer-llama3.json
data() { "$NODE" data "$@" >>"$W/data.log" 2>&1 || fail "data $1: $(tail -n 1 "$W/data.log")"; }

mkdir "$W/srv"
cat docs/*.md README.md | head -c 200000 >"$W/words.txt"
python3 -c 'import json, sys
for name in sys.argv[1:]: print(json.dumps({"text": open(name).read()}))' node/data*.c node/s*.c coordinator/*.c | gzip >"$W/code.jsonl.gz"
data tokenize --out "$W/srv/words" --sequence 128 --tokenizer $T --heldout 0.05 "$W/words.txt"
data tokenize --out "$W/srv/code" --sequence 128 --tokenizer $T "$W/code.jsonl.gz"
data mix --out "$W/srv/mixture" 70:"$W/srv/words" 30:"$W/srv/code"

# A web server that answers ranges, and says how often it was asked for tokens.
python3 - "$W/srv" "$H" >"$W/web.log" 2>&1 <<'EOF' &
import http.server, os, re, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, body):
        path = os.path.join(sys.argv[1], self.path.lstrip("/"))
        if not os.path.isfile(path):
            self.send_response(404), self.send_header("Content-Length", "0"), self.end_headers()
            return
        data = open(path, "rb").read()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), min(int(asked[2]), len(data) - 1)) if asked else (0, len(data) - 1)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last - first + 1))
        if asked: self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body: self.wfile.write(data[first:last + 1])
    do_GET = lambda self: self.answer(True)
    do_HEAD = lambda self: self.answer(False)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
EOF
PID[web]=$!

"$COORDINATOR" init "$W/remote" --corpus "http://127.0.0.1:$H/mixture" --preset debug --set model.vocabulary=512 >"$W/init.log" 2>&1 ||
    fail "init with a corpus on the web: $(tail -n 1 "$W/init.log")"
cmp -s $T "$W/remote/aggregator/tokenizer.json" || fail "init did not bring the tokenizer of a corpus on the web"
"$COORDINATOR" init "$R" --corpus "$W/srv/mixture" --preset debug --set model.vocabulary=512 --set inner.total_tokens=60000 \
    --set outer.inner_steps=10 --set outer.round_seconds=10 --set outer.checkpoint_rounds=2 >"$W/init.log" 2>&1 || fail "init: $(tail -n 1 "$W/init.log")"
start_coordinator "$R" "$P"
start_node near "$R"
INTELLECT_CACHE=$W/cache INTELLECT_CACHE_GB=0.01 start_node far "$R" --corpus "http://127.0.0.1:$H/mixture"
wait_for 240 "$R" 'phase == "complete"' || fail "not complete: $(status "$R" '(round, phase, tokens_committed, tokens_total)')"
for n in near far; do
    wait "${PID[$n]}" || fail "$n ended with $?"
    unset "PID[$n]"
done
digests=$(for d in "$W/near" "$W/far" "$R/aggregator"; do anchor_digest "$d/state/anchor"; done | sort -u)
[ "$(wc -l <<<"$digests")" = 1 ] && [ -n "$digests" ] || fail "anchors differ: $digests"
grep -q 'GET /words/tokens-00000.bin ' "$W/web.log" && grep -q 'GET /code/tokens-00000.bin ' "$W/web.log" || fail "far did not read over the web"
[ "$(du -sb "$W/cache" | cut -f1)" -le 10000000 ] || fail "the cache is too large"

C=$(ls -d "$R"/checkpoints/step-* | tail -n 1)
says() { # says STATUS WORDS COMMAND...
    local want=$1 words=$2; shift 2
    "$@" >"$W/out.log" 2>&1; local rc=$?
    [ $rc = "$want" ] && grep -q -- "$words" "$W/out.log" || fail "$1 $2 gave $rc, expected $want and \"$words\""
}
says 0 'The run' "$NODE" generate "$C" --prompt "The run" --tokens 8
says 0 'is whole' "$NODE" verify "$C"
cmp -s $T "$C/tokenizer.json" || fail "the checkpoint has not the run's tokenizer.json"
says 1 'was trained with tokenizer' "$NODE" generate "$C" --prompt "The run" --tokens 8 --tokenizer tests/reference/tokenizer-gpt2.json
says 0 'The run' "$NODE" generate "$C" --prompt "The run" --tokens 8 --tokenizer "$W/srv/words"
says 0 'bits per byte' "$NODE" eval "$C" --corpus "$W/srv/mixture" --tokenizer $T
"$NODE" export "$C" "$W/bare" >"$W/export.log" 2>&1 && rm "$W/bare/tokenizer.json" || fail "export: $(cat "$W/export.log")"
says 1 'name the tokenizer.json' "$NODE" generate "$W/bare" --prompt "The run" --tokens 8
says 0 'bits per byte' "$NODE" eval "$C" --corpus "http://127.0.0.1:$H/mixture"
echo "a mixture, read from a disk and over the web: $(cat "$W/out.log")"
