#!/usr/bin/python3
"""forge.py LEDGER RUN ONLINE_KEY: damages and forges a ledger that reader.py saved, in every way that its rules
name, and proves that the reader refuses each. The forger has the run's online key (ONLINE_KEY, an identity file): what
he alters he signs again, and all entries after it. Exit status 0, or 1 with the forgeries that were accepted."""
import copy
import random
import sys

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from document import Document
from ledger import Ledger
from offline import PAGE
from reader import load
from wire import Codec, Record, Refused, digest, identity_load, public_bytes, sign


class Forger:
    def __init__(self, document, entries, run, private):
        self.document, self.codec = document, Codec(document)
        self.entries, self.run, self.private = entries, run, private
        self.kind = {name: number for number, (name, _, _) in document.kinds.items()}
        self.record = {number: record for number, (_, record, _) in document.kinds.items()}

    def opened(self, i):
        entry = self.codec.decode("entry", self.entries[i].bytes)
        return entry, self.codec.decode(self.record[entry.kind], entry.body)

    def of_kind(self, name):
        return [i for i in range(len(self.entries)) if self.opened(i)[0].kind == self.kind[name]]

    def sealed(self, entry, body=None, private=None):
        if body is not None:
            entry.body = entry["body"] = self.codec.encode(self.record[entry.kind], body)
        data = self.codec.encode("entry", entry)
        return Record(bytes=data, signature=sign(private or self.private, "ledger", self.run, entry["term"], data))

    def rechained(self, entries, start):
        """Entries from `start` on follow the one before them again."""
        out = entries[:start]
        for e in entries[start:]:
            entry = self.codec.decode("entry", e.bytes)
            entry["index"], entry["previous"] = len(out), digest(out[-1].bytes)
            out.append(self.sealed(entry))
        return out

    def altered(self, i, change, private=None):
        """Entry i with change(entry, body), all after it signed anew."""
        entry, body = copy.deepcopy(self.opened(i))
        change(entry, body)
        return self.rechained(self.entries[:i] + [self.sealed(entry, body, private)] + self.entries[i + 1:], i + 1)

    def inserted(self, i, kind, body, private=None, **fields):
        entry = Record(index=i, previous=digest(self.entries[i - 1].bytes), kind=self.kind.get(kind, kind),
                       term=self.codec.decode("entry", self.entries[i - 1].bytes).term,
                       body=self.codec.encode(self.record[self.kind[kind]], body) if kind in self.kind else b"")
        entry.update(fields)
        return self.rechained(self.entries[:i] + [self.sealed(entry, private=private)] + self.entries[i:], i + 1)

    def why_refused(self, entries):
        ledger = Ledger(self.document, self.codec, self.run)
        try:
            for e in entries:
                if ledger.take(e) is None:
                    return "an index twice"
        except Refused as why:
            return str(why)
        return None


def damages(f):
    """What anybody on the way could do."""
    rng = random.Random(1)
    for i, e in enumerate(f.entries):
        for part in ("bytes", "signature"):
            at = rng.randrange(len(e[part]))
            bad = Record(e)
            bad[part] = e[part][:at] + bytes([e[part][at] ^ 1 << rng.randrange(8)]) + e[part][at + 1:]
            yield f"a bit of entry {i}'s {part}", f.entries[:i] + [bad] + f.entries[i + 1:], ""
        yield f"entry {i} left out", f.entries[:i] + f.entries[i + 1:], "came when" if i + 1 < len(f.entries) else None
    yield "two entries exchanged", f.entries[:2] + [f.entries[3], f.entries[2]] + f.entries[4:], "came when 2 was next"
    yield "an entry twice", f.entries + [f.entries[-1]], "an index twice"
    yield "bytes after the end", f.entries[:-1] + [Record(f.entries[-1], bytes=f.entries[-1].bytes + b"\0")], \
        "not msgpack"


def put(record, path, value):
    """put(body, "spent.0.start", 5); value may be a function of what stands there."""
    *way, last = [int(k) if k.isdigit() else k for k in path.split(".")]
    for k in way:
        record = record[k]
    record[last] = value(record[last]) if callable(value) else value


def forgeries(f):
    """What the coordinator itself, or who stole its key, could do."""
    commits = [i for i in f.of_kind("COMMIT") if f.opened(i)[1].spent]  # another fragment may have spent it all
    first, last = commits[0], commits[-1]
    if first == last:
        raise Refused("this ledger is too short to forge")
    change = lambda i, path, value: f.altered(i, lambda entry, body: put(body, path, value))
    both = lambda i, *pairs: f.altered(i, lambda entry, body: [put(body, p, v) for p, v in pairs])
    spent = f.opened(first)[1].spent[0]
    yield "signed anew, unchanged", f.altered(first, lambda entry, body: None), None
    yield "a round left out", change(last, "round", lambda r: r + 1), "is next"
    yield "on another base", change(last, "base_index", 1), "is next"
    yield "a fragment that is not there", change(last, "fragment", 63), "there is no fragment 63"
    again = ("spent.0.start", spent.start), ("spent.0.count", spent.count)
    yield "a sample spent again", both(last, *again), "second time"
    yield "a sample twice in one commit", change(last, "spent", lambda s: s + [s[-1]]), "second time"
    yield "a sample beyond the corpus", change(last, "spent.0.start", 2**40), "spends samples"
    yield "samples of who was not summed", change(last, "spent.0.member", 99), "was not summed"
    yield "more tokens than samples", change(last, "tokens", lambda t: t + 1), "tokens"
    yield "another sum of tokens", change(last, "tokens_committed", lambda t: t + 64), "tokens"
    yield "a contributor who is no member", change(last, "contributors.0.member", 900), "is not enrolled"
    yield "a contributor twice", change(last, "contributors", lambda c: c + [c[0]]), "twice"
    yield "no weight", change(last, "contributors.0.weight", 0), "no weight"
    yield "a weight that was not summed", change(last, "summed.0.weight", lambda w: w + 1), "another weight"
    yield "a chunk summed from nobody", change(last, "summed.0.set", lambda s: bytes(len(s))), "another weight"
    yield "a set of strangers", change(last, "summed.0.set", b"\x80"), "not there"
    yield "fewer chunks summed", change(last, "summed.0.chunks", lambda n: n + 1), "are summed"
    yield "a holder alone", f.altered(last, lambda e, b: put(b, "shards.0.holder", b.shards[0].aggregator)), "alone"
    yield "a gap between shards", change(last, "shards.0.first", 1), "gap"
    yield "shards of more chunks", change(last, "shards.0.count", lambda n: n + 1), ""
    yield "another root of a state", both(
        last, ("state_index", f.opened(first)[1].state_index), ("state_root", bytes(range(32)))), "two roots"
    yield "the root of no state", change(last, "state_index", 1), "no state"
    yield "a lower term", f.altered(last, lambda entry, body: entry.update(term=0)), "after term"
    yield "signed by a stranger", f.altered(last, lambda e, b: None, Ed25519PrivateKey.generate()), "not signed"
    end = len(f.entries)
    genesis, delegation, enrolment = (f.opened(f.of_kind(k)[0])[1] for k in ("GENESIS", "DELEGATION", "ENROLMENT"))
    yield "a second genesis", f.inserted(end, "GENESIS", genesis), "entry 0, and no other"
    own = dict(delegation, number=9, key=public_bytes(f.private))
    yield "a delegation of its own", f.inserted(end, "DELEGATION", own), "not signed by the run's root key"
    yield "a kind that is none", f.inserted(end, 77, None), "unknown kind 77"
    enrolment["member"] = len(f.of_kind("ENROLMENT")) + 1
    yield "a member's key again", f.inserted(end, "ENROLMENT", enrolment), "second time"
    yield "a member out of order", f.inserted(end, "ENROLMENT", dict(enrolment, member=50, key=bytes(32))), "is next"
    yield "a new member", f.inserted(end, "ENROLMENT", dict(enrolment, key=bytes(range(32)))), None
    yield "a revoked stranger", f.inserted(end, "REVOCATION", dict(member=99, reason="")), "is not enrolled"
    quarantine = dict(member=1, lifted=0, reason="", kind=f.document.numbers["READY"], proof_term=1, proof=bytes(200))
    yield "a quarantine with a wrong proof", f.inserted(end, "QUARANTINE", quarantine), "proves it"
    yield "a quarantine with a proof that nobody signs", f.inserted(
        end, "QUARANTINE", dict(quarantine, kind=f.document.numbers["ROOT"])), "proves it"
    word = dict(quarantine, kind=0, proof=b"")
    yield "a quarantine on the coordinator's word", f.inserted(end, "QUARANTINE", word), None
    yield from quarantined(f, last, word)
    checkpoint = dict(at_index=last, state_root=bytes(32), url="file:///", manifest=bytes(32), tokens_committed=1)
    yield "a checkpoint with other tokens", f.inserted(end, "CHECKPOINT", checkpoint), "no such state"
    yield "a rewind to nothing", f.inserted(end, "REWIND", dict(to=[checkpoint], reason="")), "does not have"
    yield from rewinds(f, first, last)


def quarantined(f, last, word):
    """The round that was in work when it came may still name the member, the next one may not."""
    end, body = len(f.entries), f.opened(last)[1]
    commits = [i for i in f.of_kind("COMMIT") if f.opened(i)[1].fragment == body.fragment]
    tokens = f.opened(f.of_kind("COMMIT")[-1])[1].tokens_committed
    out = Forger(f.document, f.inserted(end, "QUARANTINE", dict(word, member=body.contributors[0].member)), f.run, f.private)
    at_work = Record(body, round=len(commits), base_index=commits[-1], spent=[], tokens=0, tokens_committed=tokens)
    then = Forger(f.document, out.inserted(end + 1, "COMMIT", at_work), f.run, f.private)
    yield "a contributor that went into quarantine meanwhile", then.entries, None
    yield "a contributor in quarantine", then.inserted(end + 2, "COMMIT", Record(
        at_work, round=len(commits) + 1, base_index=end + 1)), "is in quarantine"


def rewinds(f, first, last):
    """To the state at `first`; then the samples of `last` are free, those of `first` are not."""
    end, body = len(f.entries), f.opened(last)[1]
    tokens = f.opened(first)[1].tokens_committed
    checkpoint = dict(at_index=first, state_root=bytes(32), url="file:///", manifest=bytes(32), tokens_committed=tokens)
    roots = {f.opened(i)[1].state_index: f.opened(i)[1].state_root for i in f.of_kind("COMMIT")}
    checkpoint["state_root"] = roots.get(first, bytes(32))
    at = Forger(f.document, f.inserted(end, "CHECKPOINT", checkpoint), f.run, f.private)
    yield "a checkpoint", at.entries, None
    back = Forger(f.document, at.inserted(end + 1, "REWIND", dict(to=[checkpoint], reason="")), f.run, f.private)
    yield "a rewind to it", back.entries, None
    rounds = sum(f.opened(i)[1].fragment == body.fragment for i in f.of_kind("COMMIT"))
    after = Record(body, round=rounds, base_index=end + 1, state_index=end + 1, state_root=checkpoint["state_root"],
                   tokens_committed=tokens + body.tokens)
    yield "the same samples after it", back.inserted(end + 2, "COMMIT", after), None
    yield "on the state before it", back.inserted(end + 2, "COMMIT", Record(after, base_index=last)), "is next"
    yield "samples that it did not free", back.inserted(end + 2, "COMMIT", Record(
        after, spent=[dict(s, member=after.spent[0].member) for s in f.opened(first)[1].spent])), "second time"


def main():
    path, run, key = sys.argv[1:]
    document = Document(PAGE)
    f = Forger(document, load(path, Codec(document)), bytes.fromhex(run), identity_load(key))
    if f.why_refused(f.entries) is not None:
        sys.exit("the ledger itself is refused")
    accepted = tried = 0
    for make in (damages, forgeries):
        for name, entries, want in make(f):
            why = f.why_refused(entries)
            tried += 1
            if (why is None) != (want is None) or (want and want not in why):
                accepted += 1
                print(f"NOT OK  {name}: {'accepted' if why is None else why}; expected: {want}")
    print(f"{tried} damaged and forged ledgers, {accepted} not judged as they must be")
    sys.exit(accepted > 0)


if __name__ == "__main__":
    main()
