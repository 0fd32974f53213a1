"""A ledger is followed entry by entry, and believed only as far as docs/protocol.md allows ("The ledger")."""
from outer import Layout
from wire import ZERO, Refused, digest, is_signed, record_is_signed

ONLINE_KEYS_MAX, MEMBERS_MAX, WEIGHT_LIMIT = 64, 1024, 2**24


class Member:
    def __init__(self, index, enrolment):
        self.key, self.name, self.since = enrolment.key, enrolment.name, index
        self.quarantined = self.revoked = 0  # by this entry
        self.rounds = self.tokens = 0


class State:
    """The vector after a commit or a rewind; index 0: the initial one."""

    def __init__(self, tokens=0, root=None, undone=False):
        self.tokens, self.root, self.undone = tokens, root, undone


class Ledger:
    def __init__(self, document, codec, run):
        self.codec, self.run = codec, run
        self.kinds, self.numbers = document.kinds, document.numbers
        self.entries = []        # signed_entry records
        self.head, self.term = ZERO, 0
        self.root_key, self.online, self.number_max = None, {}, 0
        self.genesis = self.layout = None
        self.members = {}
        self.rounds, self.base = [], []
        self.commits = {}        # index: (term of the entry, body)
        self.changes = []        # (index, fragment; None: a rewind, of all)
        self.states = {0: State()}
        self.checkpoints = []
        self.spent = None        # a byte for each sample
        self.spends = []         # (index, start, count)
        self.tokens = 0

    @property
    def next_index(self):
        return len(self.entries)

    @property
    def newest(self):
        """Index of the newest state."""
        return max(self.states)

    def versions_at(self, index):
        """Of each fragment's chunks, in the state at this index."""
        out = [0] * len(self.rounds)
        for i, fragment in self.changes:
            if i <= index:
                out = [i] * len(out) if fragment is None else out[:fragment] + [i] + out[fragment + 1:]
        return out

    def note_root(self, index, root):
        """Whoever names the root of a state must name the same one."""
        if index not in self.states:
            raise Refused(f"a root of ledger {index}, which is no state")
        known = self.states[index].root
        if known not in (None, root):
            raise Refused(f"two roots for the state at ledger {index}")
        self.states[index].root = root

    # ---- entries ----

    def take(self, signed):
        """Check the next entry and take it in. Returns (entry, body), or None for one that is here already."""
        entry = self.codec.decode("entry", signed.bytes)
        if entry.index < self.next_index:
            return None
        try:
            body = self._check(entry, signed)
        except Refused as why:
            raise Refused(f"ledger entry {entry.index}: {why}") from None
        self.entries.append(signed)
        self.head, self.term = digest(signed.bytes), entry.term
        return entry, body

    def _check(self, entry, signed):
        if entry.index != self.next_index:
            raise Refused(f"came when {self.next_index} was next")
        if entry.previous != self.head:
            raise Refused("does not follow the one before it")
        if entry.term < self.term:
            raise Refused(f"is of term {entry.term} after term {self.term}")
        if entry.kind not in self.kinds:
            raise Refused(f"is of unknown kind {entry.kind}")
        name, record, signer = self.kinds[entry.kind]
        if (entry.index == 0) != (name == "GENESIS"):
            raise Refused("the genesis is entry 0, and no other")
        body = self.codec.decode(record, entry.body)
        root_key = body.root_key if name == "GENESIS" else self.root_key
        keys = {"root key": [root_key], "online key": list(self.online.values())}[signer]
        if not any(is_signed(k, "ledger", self.run, entry.term, signed.bytes, signed.signature) for k in keys):
            raise Refused(f"is not signed by the run's {signer}")
        getattr(self, "_" + name.lower())(entry, body)
        return body

    def _genesis(self, entry, body):
        if digest(entry.body) != self.run:
            raise Refused("is the genesis of another run")
        if entry.term or entry.previous != ZERO:
            raise Refused("a genesis with a term or a predecessor")
        if not all(len(body[part]) == 1 for part in ("model", "inner", "outer", "corpus")):
            raise Refused("a genesis without model, inner, outer or corpus")
        self.genesis, self.root_key, self.layout = body, body.root_key, Layout(body)
        self.rounds = [0] * body.outer[0].fragments
        self.base = [0] * body.outer[0].fragments
        self.spent = bytearray(body.corpus[0].samples)
        for r in body.init_spent:
            self.spent[r.start:r.start + r.count] = b"\1" * r.count
        self.tokens = sum(self.spent) * body.model[0].sequence
        self.states[0].tokens = self.tokens

    def _delegation(self, entry, body):
        if body.run != self.run or body.number <= self.number_max:
            raise Refused("a delegation of another run, or out of order")
        if body.retires and self.online.pop(body.retires, None) is None:
            raise Refused(f"retires delegation {body.retires}, which is not in force")
        if len(self.online) == ONLINE_KEYS_MAX:
            raise Refused("too many online keys")
        self.online[body.number], self.number_max = body.key, body.number

    def _enrolment(self, entry, body):
        if body.member != len(self.members) + 1 or body.member > MEMBERS_MAX:
            raise Refused(f"enrols member {body.member}, {len(self.members) + 1} is next")
        if any(m.key == body.key for m in self.members.values()):
            raise Refused("enrols a key for the second time")
        self.members[body.member] = Member(entry.index, body)

    def _member(self, number):
        if number not in self.members:
            raise Refused(f"member {number} is not enrolled")
        return self.members[number]

    def _revocation(self, entry, body):
        self._member(body.member).revoked = entry.index

    def _quarantine(self, entry, body):
        member = self._member(body.member)
        purpose = {self.numbers["READY"]: "ready", self.numbers["SHARD_REPORT"]: "shard_report"}.get(body.kind)
        shown = body.kind or body.proof
        if not body.lifted and shown and not (
                purpose and record_is_signed(member.key, purpose, self.run, body.proof_term, body.proof)):
            raise Refused(f"nothing that member {body.member} signed proves it")
        if body.lifted and shown:
            raise Refused("lifts a quarantine with a proof")
        member.quarantined = 0 if body.lifted else entry.index

    def _checkpoint(self, entry, body):
        state = self.states.get(body.at_index)
        if not state or state.undone or body.tokens_committed != state.tokens:
            raise Refused(f"a checkpoint of ledger {body.at_index}, which is no such state")
        self.note_root(body.at_index, body.state_root)
        self.checkpoints.append(body)

    def _rewind(self, entry, body):
        if len(body.to) != 1 or body.to[0] not in self.checkpoints or self.states[body.to[0].at_index].undone:
            raise Refused("goes back to a checkpoint that this ledger does not have")
        to = body.to[0]
        while self.spends and self.spends[-1][0] > to.at_index:
            _, start, count = self.spends.pop()
            self.spent[start:start + count] = bytes(count)
        for index, state in self.states.items():
            state.undone |= index > to.at_index
        self.tokens = to.tokens_committed
        self.base = [entry.index] * len(self.base)
        self.states[entry.index] = State(self.tokens, to.state_root)
        self.changes.append((entry.index, None))

    # ---- commits ----

    def _commit(self, entry, body):
        if body.fragment >= len(self.rounds):
            raise Refused(f"there is no fragment {body.fragment}")
        if body.round != self.rounds[body.fragment] or body.base_index != self.base[body.fragment]:
            raise Refused(f"round {body.round} on {body.base_index}; round {self.rounds[body.fragment]} on "
                          f"{self.base[body.fragment]} is next")
        chunks = len(self.layout.fragments[body.fragment])
        self._check_contributors(body)
        self._check_shards(body, chunks)
        summed = self._check_summed(body, chunks)
        spent = self._check_spent(body, summed)
        tokens = sum(spent.values()) * self.genesis.model[0].sequence
        if body.tokens != tokens or body.tokens_committed != self.tokens + tokens:
            raise Refused(f"says {body.tokens} tokens, {body.tokens_committed} in all; its samples have {tokens}")
        self.note_root(body.state_index, body.state_root)
        # Everything is right: take it in.
        for s in body.spent:
            self.spent[s.start:s.start + s.count] = b"\1" * s.count
            self.spends.append((entry.index, s.start, s.count))
        for number in summed:
            self.members[number].rounds += 1
            self.members[number].tokens += spent.get(number, 0) * self.genesis.model[0].sequence
        self.rounds[body.fragment] += 1
        self.base[body.fragment] = entry.index
        self.tokens = body.tokens_committed
        self.commits[entry.index] = (entry.term, body)
        self.states[entry.index] = State(self.tokens)
        self.changes.append((entry.index, body.fragment))

    def _check_contributors(self, body):
        numbers = [c.member for c in body.contributors]
        if len(set(numbers)) != len(numbers):
            raise Refused("a contributor stands there twice")
        for c in body.contributors:
            if 0 < self._member(c.member).quarantined < body.base_index:
                raise Refused(f"contributor {c.member} is in quarantine")
            if not c.weight:
                raise Refused(f"contributor {c.member} has no weight")
        if sum(c.weight for c in body.contributors) >= WEIGHT_LIMIT:
            raise Refused("the weights add up to too much")

    def _check_shards(self, body, chunks):
        at = 0
        for s in body.shards:
            if s.first != at or not s.count:
                raise Refused("the shards leave a gap or overlap")
            if s.aggregator == s.holder:
                raise Refused(f"member {s.holder} held a shard alone")
            self._member(s.aggregator), self._member(s.holder)
            at += s.count
        if at != chunks:
            raise Refused(f"the shards have {at} chunks, the fragment has {chunks}")

    def _check_summed(self, body, chunks):
        """Members that are in some chunk."""
        summed, at = set(), 0
        for run in body.summed:
            if len(run.set) != (len(body.contributors) + 7) // 8 or not run.chunks:
                raise Refused("a set of another size than the contributors, or of no chunk")
            bits = [i for i in range(8 * len(run.set)) if run.set[i // 8] >> i % 8 & 1]
            if bits and bits[-1] >= len(body.contributors):
                raise Refused("a set names a contributor that is not there")
            if not bits or run.weight != sum(body.contributors[i].weight for i in bits):
                raise Refused("chunks with another weight than their contributors")
            summed |= {body.contributors[i].member for i in bits}
            at += run.chunks
        if at != chunks:
            raise Refused(f"{at} chunks are summed, the fragment has {chunks}")
        return summed

    def _check_spent(self, body, summed):
        """Samples by member."""
        out, here = {}, set()
        for s in body.spent:
            if s.member not in summed:
                raise Refused(f"member {s.member} spends samples and was not summed")
            if not s.count or s.start + s.count > len(self.spent):
                raise Refused(f"spends samples {s.start}+{s.count} of {len(self.spent)}")
            samples = range(s.start, s.start + s.count)
            if any(self.spent[s.start:s.start + s.count]) or not here.isdisjoint(samples):
                raise Refused(f"member {s.member} spends a sample for the second time")
            here.update(samples)
            out[s.member] = out.get(s.member, 0) + s.count
        return out
