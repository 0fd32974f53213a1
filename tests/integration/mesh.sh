#!/bin/bash
# A member whose trainer is four rank processes beside one with a single process: rounds go on, anchors are equal; a
# killed rank costs a restart of the trainer, which says which it was, and nothing else.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
cd "$W" || exit 1
check() { if "${@:2}"; then echo "ok      $1"; else echo "NOT OK  $1"; fail "$1"; fi; }
children() { cat /proc/"$1"/task/*/children 2>/dev/null; }
# Rank processes of a node: children of the one child of its agent.
ranks() { children "$(children "${PID[$1]}" | tr -d ' ')"; }

for i in $(seq 6000); do echo "line $((i * i % 7919)) of a text to train on, $((i % 13)) or more"; done >text
"$NODE" data --out corpus --sequence 32 text >data.log || fail data
"$COORDINATOR" init r --corpus corpus --set model.layers=2 --set model.width=32 --set model.heads=4 --set model.kv_heads=2 \
    --set model.ffn=64 --set model.sequence=32 --set inner.batch=4 --set outer.inner_steps=10 --set outer.quorum=2 \
    --set outer.silence_seconds=4 --set outer.grace_seconds=1 --set outer.chunk_elements=4096 \
    --set inner.total_tokens=100000000 >init.log 2>&1 || fail init
start_coordinator r "$(free_port)"
start_node alone r
start_node mesh r --tp 2 --dp 2 --shard full
check "rounds are committed by both" wait_for 60 r 'round >= 3 and members_live == 3'
check "the node says what it trains as" grep -q '4 ranks, tensor-parallel 2 by data-parallel 2 (shard: full)' mesh.log
read -r -a three <<<"$(ranks mesh)"
check "its trainer has three rank processes beside the first" test ${#three[@]} = 3
kill -KILL "${three[1]}"
for _ in $(seq 100); do grep -q "rank 2 of 4 (process ${three[1]}) died" mesh.log && break; sleep 0.1; done
check "a killed rank is named" grep -q "the trainer ends: rank 2 of 4 (process ${three[1]}) died" mesh.log
for _ in $(seq 100); do read -r -a new <<<"$(ranks mesh)"; [ ${#new[@]} = 3 ] && [ "${new[1]}" != "${three[1]}" ] && break; sleep 0.1; done
check "and all ranks start anew" test ${#new[@]} = 3 -a "${new[0]}" != "${three[0]}"
at=$(status r round)
check "rounds go on with both" wait_for 60 r "round >= $at + 4 and members_live == 3"
for n in alone mesh; do kill -TERM "${PID[$n]}"; wait "${PID[$n]}"; check "$n leaves in order" test $? = 0; done
check "no rank is left" test -z "$(ps -o pid= -p "$(IFS=,; echo "${new[*]}")" 2>/dev/null)"
start_node alone r; start_node mesh r --dp 3 --shard optimizer --activations 0.0001 --offload optimizer
check "it goes on as another mesh" wait_for 60 r "round >= $at + 8 and members_live == 3"
check "whose ranks have room for one sample each" grep -q 'shard: optimizer); 3 of 4 samples at once' mesh.log
check "offloading changes nothing on the CPU, and it says so" grep -q 'offload changes nothing' mesh.log
"$COORDINATOR" pause r >pause.log || fail pause
sleep 3 # what was leased is trained and committed
same_index='len(set(m["state_index"] for m in members if m["live"])) == 1'
check "all come to the same ledger entry" wait_for 30 r "$same_index"
for _ in $(seq 50); do
    digests=$(anchor_digest alone/state/anchor; anchor_digest mesh/state/anchor)
    [ "$(sort -u <<<"$digests" | wc -l)" = 1 ] && break; sleep 0.1
done
check "the anchors are equal" test "$(sort -u <<<"$digests" | wc -l)" = 1
"$COORDINATOR" ledger verify r >verify.log || fail verify
