#!/usr/bin/env python3
"""Where the tokens of a run went between two moments, from the logs of its nodes (--log-json).

    account.py [--percent P] [--utilisation] SEQUENCE FROM TO COMMITTED LOG...

SEQUENCE   tokens of a sample
FROM, TO   the moments, as in the logs (2026-01-31T12:00:00.000Z)
COMMITTED  tokens that the run committed between them

Every "round" line of a node says what its process did since it began; a process begins with a "start" line.
Could have been trained: all that trainers did train, and for each millisecond that a trainer was up and had nothing
to work on, what it trains in one while it has (its own rate, over the whole time). A trainer that is down or starts,
or whose agent is stopped, could not have trained; one that was stopped itself has its rate lowered by that. What a
process did after its last line, before it was killed, is in no row: about a second, for a line comes with each commit.
Prints the account; the exit status is 1 if less than P percent of that was committed. --utilisation prints instead,
as JSON, the share of the time that its trainer was up in which each node trained, and the share of what could have been
trained that was committed.
"""
import json
import os
import sys

IDLE = ("no_data_ms", "no_state_ms", "standing_ms")


def processes(path):
    """Lists of the "round" lines of each process in a log."""
    all_of_them, lines = [], []
    for text in open(path, errors="replace"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line.get("event") == "start" and lines:
            all_of_them.append(lines)
            lines = []
        if line.get("event") == "round" and "samples" in line:
            lines.append(line)
    return all_of_them + [lines] if lines else all_of_them


def main(arguments):
    percent, utilisation = 0.0, None
    if arguments[0] == "--percent":
        percent, arguments = float(arguments[1]), arguments[2:]
    if arguments[0] == "--utilisation":
        utilisation, arguments = {}, arguments[1:]
    sequence, begin, end, committed = int(arguments[0]), arguments[1], arguments[2], int(arguments[3])
    total, in_work, killed, could, working = {}, 0, 0, 0.0, 0
    for path in arguments[4:]:
        node = {}
        runs = processes(path)
        for number, lines in enumerate(runs):
            inside = [l for l in lines if begin <= l["time"] <= end]
            before = [l for l in lines if l["time"] < begin]
            if not inside:
                continue
            last, first = inside[-1], before[-1] if before else None
            for key, value in last["samples"].items():
                node[key] = node.get(key, 0) + value - (first["samples"][key] if first else 0)
            if first:
                in_work -= first["uncommitted"]
            if number + 1 < len(runs) and runs[number + 1][0]["time"] <= end:
                killed += last["samples"]["unfrozen"]  # the process died with it
            else:
                in_work += last["uncommitted"]
        rate = node.get("trained", 0) / max(1, node.get("working_ms", 0))
        could += node.get("trained", 0)
        working += node.get("working_ms", 0)
        up_ms = node.get("working_ms", 0) + sum(node.get(key, 0) for key in IDLE)
        if utilisation is not None:
            utilisation[os.path.splitext(os.path.basename(path))[0]] = node.get("working_ms", 0) / max(1, up_ms)
        for key in IDLE:
            node["idle_" + key] = node.get(key, 0) * rate
            could += node["idle_" + key]
        for key, value in node.items():
            total[key] = total.get(key, 0) + value
    could = max(could * sequence, 1)
    if utilisation is not None:
        print(json.dumps({"utilisation": utilisation, "committed": committed / could}))
        return 0

    def say(samples, what):
        print("  %9d  %5.1f %%  %s" % (samples * sequence, 100 * samples * sequence / could, what))

    lost = {k: v for k, v in total.items() if k.startswith("lost_")}
    rest = total.get("trained", 0) - committed / sequence - in_work - killed - sum(lost.values())
    print("tokens, and of what could have been trained (by trainers while up: trained, and idle time at their own rate)")
    say(could / sequence, "could have been trained")
    say(total.get("idle_no_data_ms", 0), "not trained: no samples")
    say(total.get("idle_no_state_ms", 0), "not trained: waited for the state at a start or reset")
    say(total.get("idle_standing_ms", 0), "not trained: stood still for a commit")
    say(total.get("trained", 0), "trained")
    say(lost.get("lost_trainer", 0), "lost: a trainer died, since its last frozen contribution")
    say(killed, "lost: an agent died, since its last frozen contribution")
    say(lost.get("lost_orphan", 0), "lost: frozen before its trainer died, and not summed")
    say(lost.get("lost_leases", 0), "lost: the samples went to others")
    say(lost.get("lost_refused", 0), "lost: the contribution was refused")
    say(lost.get("lost_state", 0), "lost: the state was fetched anew")
    say(in_work, "more in work at the end than at the beginning")
    say(rest, "not accounted for (what a process did after its last line)")
    say(committed / sequence, "committed")
    print("committed: %.1f %% of what could have been trained; trainers worked %.0f s"
          % (100 * committed / could, working / 1000))
    return 0 if 100 * committed >= percent * could else 1


sys.exit(main(sys.argv[1:]))
