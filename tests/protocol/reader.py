#!/usr/bin/python3
"""A listener in a live run, written from docs/protocol.md and docs/flow.md alone.

  reader.py INVITE [--commits N] [--reconnect] [--seconds S] [--save FILE] [--json]
      Enrols, takes the ledger, checks every entry, then follows the run: fetches the result of each new commit from
      its holders, fetches the state once from a donor, brings it forward by itself and compares each root.
      Ends well when N commits came, were verified, applied, and their roots agree with the run's. --reconnect: leaves
      the connection after the first and comes back with the ledger that it has.
  reader.py --ledger FILE --run HEX [--json]
      Checks what --save wrote.

INVITE is the line, or @FILE. Exit status 0, 1 where something is not as the document says, 2 for wrong use."""
import argparse
import json
import os
import random
import select
import struct
import sys
import time

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import outer
from document import Document
from ledger import Ledger
from wire import (VERSION, ZERO, Closed, Codec, Invite, Link, Record, Refused, digest, identity_load, is_signed, leaf,
                  path_leads, tls_context, tree_root)

PAGE = os.path.join(os.path.dirname(__file__), "../../docs/protocol.md")
STARTED = time.monotonic()
STRANGERS, WITH_C, WITH_MEMBERS = "before the peer is known", "with the coordinator", "between members"


def bitmap(n, bits):
    out = bytearray((n + 7) // 8)
    for i in bits:
        out[i // 8] |= 1 << i % 8
    return bytes(out)


def show(text):
    print(f"{time.monotonic() - STARTED:6.2f} {text}", file=sys.stderr, flush=True)


class Peer:
    """A link to a member: lane 0 and bulk lanes, all dialled by us. Frames come in the order that AFTER asks for."""
    TENSORS = ("CHUNK", "RESULT", "STATE", "MOMENTS")
    BULK_LANES = 2

    def __init__(self, reader, host, port, key, process, number):
        self.lanes, self.taken, self.bulk = [], 0, 0  # taken: messages of lane 0 that AFTER counts
        document = reader.document
        strangers, members = (document.payload_max[k] for k in (STRANGERS, WITH_MEMBERS))
        try:
            for lane in range(1 + self.BULK_LANES):
                link = Link(document, reader.codec, reader.context, host, port, strangers, seconds=2)
                self.lanes.append(link)
                if link.key != key:
                    raise Refused(f"another key than the member's answers at {host} port {port}")
                link.send("LINK", Record(process=process, number=number, lane=lane), reader.term)
                answer = link.wait(2)
                if answer.name != "LINK" or (answer.message.number, answer.message.lane) != (number, lane):
                    raise Refused(f"{answer.name} came where the LINK of lane {lane} must")
                link.payload_max = members
        except Exception:
            self.close()
            raise
        self.queues = [[] for _ in self.lanes]  # of bulk lanes: frames that wait
        self.after = [0] * len(self.lanes)

    def close(self):
        for lane in self.lanes:
            lane.close()

    def send(self, *message):
        self.lanes[0].send(*message)

    def frames(self):
        for frame in self.lanes[0].frames():
            if frame.name in ("LINK", "AFTER"):
                raise Refused(f"{frame.name} on lane 0 of an open link")
            self.taken += frame.name not in self.TENSORS
            yield frame
        for i in range(1, len(self.lanes)):
            self.queues[i].extend(self.lanes[i].frames())
            yield from self._released(i)

    def _released(self, i):
        queue = self.queues[i]
        while queue and (queue[0].name == "AFTER" or self.taken >= self.after[i]):
            frame = queue.pop(0)
            if frame.name == "AFTER":
                self.after[i] = frame.message.control
            elif frame.name in self.TENSORS[:3]:
                self.bulk += 1
                yield frame
            else:
                raise Refused(f"{frame.name} on a bulk lane")


class Results:
    """The encoded mean of one commit's fragment, shard by shard from whoever holds it."""

    def __init__(self, term, body):
        self.term, self.body = term, body
        self.leaves = {}                         # chunk: leaf
        self.unchecked = {}                      # chunk: (member, bytes)
        self.data = {}                           # chunk: bytes under result_root
        self.verified = self.done = False
        self.turns = [0] * len(body.shards)
        self.asked = [0.0] * len(body.shards)    # when

    def chunks(self, shard):
        s = self.body.shards[shard]
        return range(s.first, s.first + s.count)



class State:
    """Anchor and momentum, chunk by chunk, each with the version it has."""

    def __init__(self, layout):
        self.layout = layout
        self.version = [None] * layout.chunks
        self.anchor = [None] * layout.chunks
        self.momentum = [None] * layout.chunks
        self.leaves = [None] * layout.chunks

    def put(self, chunk, version, anchor, momentum):
        self.version[chunk], self.anchor[chunk], self.momentum[chunk] = version, anchor, momentum
        self.leaves[chunk] = leaf(chunk, anchor.astype("<f4").tobytes(), momentum.astype("<f4").tobytes())

    def missing(self):
        return [c for c, v in enumerate(self.version) if v is None]

    def put_initial(self, genesis):
        anchor = outer.initial_anchor(genesis)
        for c in range(self.layout.chunks):
            part = anchor[self.layout.first(c):][:self.layout.count(c)]
            self.put(c, 0, part, outer.np.zeros(len(part), outer.F))

    def apply(self, index, body, data):
        for k, chunk in enumerate(self.layout.fragments[body.fragment]):
            if self.version[chunk] >= index:
                continue  # the donor gave it later
            if self.version[chunk] != body.base_index:
                raise Refused(f"chunk {chunk} is of {self.version[chunk]}, commit {index} stands on {body.base_index}")
            d = outer.decode(body.codec, data[k], self.layout.count(chunk))
            self.put(chunk, index, *outer.apply(self.anchor[chunk], self.momentum[chunk], d, body.lr, body.momentum))


class Reader:
    def __init__(self, document, invite, private):
        self.document, self.codec, self.invite = document, Codec(document), invite
        self.context = tls_context(private)
        self.ledger = Ledger(document, self.codec, invite.run)
        self.term = self.session = self.member = 0
        self.peers = {}          # member: Peer
        self.links_made = 0
        self.process = random.getrandbits(64)
        self.addresses = {}      # member: (host, port)
        self.dialled = {}        # member: when last
        self.roster = {}         # member: key
        self.roster_version = -1
        self.donors = []
        self.told = {}           # index: root, by ROOT and RESYNC
        self.heard_from = None   # ledger index of the run's head when we first came
        self.instance = random.getrandbits(64)
        self.results = {}        # commit index: Results
        self.state, self.state_asked, self.early = None, 0.0, []
        self.applied = {}        # commit index: root of the state by our own arithmetic
        self.applied_to = None   # newest state we have whole
        self.beat_at = 0.0
        self.heard = time.monotonic()
        self.goodbye = None
        self.counts = dict(frames=0, bulk_frames=0, connections=0, entries_again=0, result_chunks=0, state_chunks=0,
                           roots_by_ledger=0, roots_by_word=0)

    # ---- the coordinator ----

    def connect(self):
        self.link = Link(self.document, self.codec, self.context, self.invite.host, self.invite.port,
                         self.document.payload_max[WITH_C])
        self._welcome(self._next("WELCOME"))
        self.counts["connections"] += 1
        if not self.member:
            self.link.send("ENROL", Record(secret=self.invite.secret, name="reader", aggregate_only=1), self.term)
            self.member = self._next("ENROLLED").message.member
        self.link.send("HELLO", Record(
            software="reader.py", instance=self.instance, trains=0, port=0,
            head_index=max(self.ledger.next_index, 1) - 1, head_digest=self.ledger.head, term_max=self.term,
            has_state=0, state_index=0, state_root=ZERO), self.term)
        ack = self._next("HELLO_ACK")
        if ack.message.session != ack.session or ack.session == self.session:
            raise Refused("HELLO_ACK gives no new session, or is not of it")
        self.session = ack.session
        if self.heard_from is None:
            self.heard_from = ack.message.head_index
        self._give_donors(ack.message.donors)
        self.beat_at = 0
        show(f"member {self.member}, session {self.session}, ledger up to {ack.message.head_index}")

    def _next(self, name):
        """The one message that must come now."""
        frame = self.link.wait(10)
        self.counts["frames"] += 1
        if frame.name == "BYE":
            self._bye(frame)
            raise Refused(self.goodbye)
        if frame.name != name:
            raise Refused(f"{frame.name} came where {name} must")
        return frame

    def _welcome(self, frame):
        m = frame.message
        if m.version != VERSION:
            raise Refused(f"WELCOME of version {m.version}")
        if digest(m.genesis) != self.invite.run:
            raise Refused("it serves another run than the invite's")
        genesis = self.codec.decode("genesis", m.genesis)
        if not is_signed(genesis.root_key, "delegation", self.invite.run, 0, m.delegation, m.delegation_signature):
            raise Refused("its delegation is not signed by the run's root key")
        delegation = self.codec.decode("delegation", m.delegation)
        if delegation.run != self.invite.run or delegation.key != self.link.key:
            raise Refused("its delegation is for another run or key than TLS proved")
        self.genesis, self.term = genesis, frame.term
        self.heartbeat = genesis.outer[0].heartbeat_ms / 1000
        self.silence = genesis.outer[0].silence_ms_max / 1000

    def _bye(self, frame):
        m = frame.message
        name = self.document.codes.get(m.code, str(m.code))
        self.goodbye = f"BYE({name}{', final' if m.final else ''}): {m.reason}"
        self.completed = name == "NONE" and m.final
        show(self.goodbye)

    def _beat(self):
        self.link.send("HEARTBEAT", Record(
            progress=self.counts["frames"], step=0, loss=0.0, tokens_per_s=0.0,
            phase=self.document.phases["CATCHING_UP"], trainer_restarts=0, state_index=0, rates=[]),
            self.term, self.session)
        self.beat_at = time.monotonic() + self.heartbeat

    def _on_coordinator(self, frame):
        self.heard = time.monotonic()
        if frame.term < self.term or frame.session not in (0, self.session):
            return
        self.term = frame.term
        handler = getattr(self, "_c_" + frame.name.lower(), None)
        if handler:
            handler(frame)
        elif frame.name not in ("HEARTBEAT_ACK", "LEASES", "DUE", "PLAN", "DROP", "RESET", "AUDIT", "STATE_LEAVES_GET"):
            raise Refused(f"{frame.name} from the coordinator in a session")

    def _c_bye(self, frame):
        self._bye(frame)

    def _c_ledger(self, frame):
        for signed in frame.message.entries:
            taken = self.ledger.take(signed)
            self.counts["entries_again"] += not taken
            if not taken:
                continue
            entry, body = taken
            if entry.index > self.heard_from and entry.index in self.ledger.commits:
                self.results[entry.index] = Results(entry.term, body)
                show(f"commit {entry.index}: fragment {body.fragment} round {body.round}, {len(body.contributors)} "
                     f"contributors, {len(body.shards)} shards, {body.tokens} tokens")

    def _c_roster(self, frame):
        m = frame.message
        if not any(is_signed(k, "roster", self.ledger.run, frame.term, m.body, m.signature)
                   for k in self.ledger.online.values()):
            raise Refused("a roster that no online key signed")
        body = self.codec.decode("roster_body", m.body)
        if body.version < self.roster_version:
            raise Refused("a roster older than the one before")
        self.roster_version = body.version
        self.roster = {x.member: x.key for x in body.members}
        want = {n: x.key for n, x in self.ledger.members.items()
                if x.since <= body.version and not (x.revoked and x.revoked <= body.version)}
        if body.version < self.ledger.next_index and self.roster != want:
            raise Refused("a roster that is not what the ledger says")

    def _give_donors(self, addresses):
        for a in addresses:
            self.addresses[a.member] = (a.host, a.port)
            if a.member not in self.donors:
                self.donors.append(a.member)

    def _c_holders(self, frame):
        for a in frame.message.addresses:
            self.addresses[a.member] = (a.host, a.port)

    def _c_root(self, frame):
        self.told[frame.message.index] = frame.message.root

    def _c_resync(self, frame):
        self._c_root(frame)
        self.donors = []
        self._give_donors(frame.message.donors)

    # ---- members ----

    def _peer(self, member):
        """A link to it, or None."""
        if member in self.peers or member not in self.addresses or member not in self.roster:
            return self.peers.get(member)
        if time.monotonic() < self.dialled.get(member, 0) + self.heartbeat:
            return None
        self.dialled[member] = time.monotonic()
        self.links_made += 1
        try:
            self.peers[member] = Peer(self, *self.addresses[member], self.roster[member], self.process, self.links_made)
        except (OSError, Closed) as why:  # it may not have the roster yet that we are in
            show(f"member {member} at {self.addresses[member]}: {why}")
        return self.peers.get(member)

    def _send_peer(self, member, name, message, term, plan=0):
        peer = self._peer(member)
        if not peer:
            return False
        try:
            peer.send(name, message, term, self.session, plan)
        except OSError:
            self._lose_peer(member)
            return False
        return True

    def _lose_peer(self, member):
        peer = self.peers.pop(member)
        self.counts["bulk_frames"] += peer.bulk
        peer.close()

    def _on_member(self, member, frame):
        handler = getattr(self, "_m_" + frame.name.lower(), None)
        if handler:
            handler(member, frame)

    # ---- results ----

    def _ask_results(self):
        """One round of a fragment at a time: a question about another one takes the place of the first."""
        now, busy = time.monotonic(), set()
        for index in sorted(self.results):
            r = self.results[index]
            if r.done or r.body.fragment in busy:
                continue
            busy.add(r.body.fragment)
            fragment = self.ledger.layout.fragments[r.body.fragment]
            for i, shard in enumerate(r.body.shards):
                wanted = [k for k in r.chunks(i) if k not in r.data and k not in r.unchecked]
                known = all(k in r.leaves for k in r.chunks(i))
                if (not wanted and known) or now < r.asked[i] + 2 * self.heartbeat:
                    continue
                if r.asked[i]:
                    r.turns[i] += 1
                r.asked[i] = now
                candidate = (shard.aggregator, shard.holder)[r.turns[i] % 2]
                self._send_peer(candidate, "RESULT_GET", Record(
                    fragment=r.body.fragment, round=r.body.round, plan=r.body.plan,
                    chunks=bitmap(len(fragment), wanted)), r.term, r.body.plan)

    def _results_of(self, frame):
        m = frame.message
        for r in self.results.values():
            if (r.term, r.body.plan, r.body.fragment, r.body.round) == (frame.term, frame.plan, m.fragment, m.round) \
                    and m.plan == frame.plan and not r.done:
                return r
        return None

    def _m_result_leaves(self, member, frame):
        r, m = self._results_of(frame), frame.message
        if not r or r.verified:
            return
        if m.first + len(m.leaves) > sum(s.count for s in r.body.shards):
            raise Refused(f"member {member} shows leaves of more chunks than there are")
        for k, item in enumerate(m.leaves, m.first):
            r.leaves.setdefault(k, item.digest)
        self._check_results(r)

    def _m_result(self, member, frame):
        r, m = self._results_of(frame), frame.message
        if not r or m.chunk in r.data or m.chunk >= sum(s.count for s in r.body.shards):
            return
        if m.codec != r.body.codec:
            raise Refused(f"member {member} sends results of codec {m.codec}")
        r.unchecked[m.chunk] = (member, m.data)
        self._check_results(r)

    def _m_none(self, member, frame):
        pass  # asked again, elsewhere, two heartbeats after the question

    def _check_results(self, r):
        """All leaves must stand under what the ledger says, all bytes under the leaves."""
        leaves = r.leaves
        if len(leaves) < sum(s.count for s in r.body.shards):
            return
        if not r.verified and tree_root(leaves[k] for k in range(len(leaves))) != r.body.result_root:
            show(f"round {r.body.round}: these leaves are not the ledger's")
            r.leaves, r.unchecked = {}, {}
            return
        r.verified = True
        for k, (member, data) in r.unchecked.items():
            if leaf(k, data) != leaves[k]:
                raise Refused(f"member {member}: result chunk {k} is not what was committed")
            r.data[k] = data
            self.counts["result_chunks"] += 1
        r.unchecked = {}
        r.done = len(r.data) == len(leaves)

    # ---- state ----

    def _root_of(self, index):
        known = self.ledger.states.get(index)
        return known.root if known and known.root else self.told.get(index)

    def _ask_state(self):
        if self.ledger.next_index <= self.heard_from:
            return
        if self.state is None:
            self.state = State(self.ledger.layout)
            if not self.ledger.commits and not self.genesis.init_from:
                self.state.put_initial(self.genesis)
                self._state_is_whole(0)
        missing, now = self.state.missing(), time.monotonic()
        if self.applied_to is not None or not missing or now < self.state_asked + 2 * self.heartbeat or not self.donors:
            return
        donor = self.donors[0]
        self.donors = self.donors[1:] + self.donors[:1]
        self.state_asked = now
        self._send_peer(donor, "STATE_GET", Record(
            index_min=self.ledger.newest, chunks=bitmap(self.ledger.layout.chunks, missing)), self.term)

    def _m_state(self, member, frame):
        self.early.append((member, frame.message))
        self.state_asked = time.monotonic()

    def _take_state(self):
        waiting, self.early = self.early, []
        for member, m in waiting:
            root = self._root_of(m.index)
            if root is None or m.index >= self.ledger.next_index:
                self.early.append((member, m))
                continue
            self._take_chunk(member, m, root)
        if self.state and self.applied_to is None and not self.state.missing():
            self._state_is_whole(min(self.state.version))

    def _take_chunk(self, member, m, root):
        layout = self.ledger.layout
        if m.chunk >= layout.chunks:
            raise Refused(f"member {member} sends chunk {m.chunk} of {layout.chunks}")
        n = layout.count(m.chunk)
        if len(m.data) != 8 * n:
            raise Refused(f"member {member} sends {len(m.data)} bytes of {n} values and their momentum")
        if not path_leads(root, leaf(m.chunk, m.data), m.chunk, layout.chunks, [p.digest for p in m.path]):
            raise Refused(f"member {member}: chunk {m.chunk} is not in the state at ledger {m.index}")
        fragment = next(f for f, chunks in enumerate(layout.fragments) if m.chunk in chunks)
        version = self.ledger.versions_at(m.index)[fragment]
        if m.version != version:
            raise Refused(f"member {member}: chunk {m.chunk} of version {m.version}, at {m.index} it is {version}")
        if self.state.version[m.chunk] is None:
            both = outer.np.frombuffer(m.data, "<f4").astype(outer.F)
            self.state.put(m.chunk, m.version, both[:n], both[n:])
            self.counts["state_chunks"] += 1

    def _state_is_whole(self, oldest):
        """Every chunk is there; those of later commits than others wait for these."""
        self.applied_to = oldest
        show("the initial state is made from the seed" if not self.ledger.commits else
             f"the state is here, {self.counts['state_chunks']} chunks, the oldest of version {oldest}")

    def _bring_forward(self):
        if self.applied_to is None:
            return
        for index in sorted(self.ledger.commits):
            term, body = self.ledger.commits[index]
            chunks = self.ledger.layout.fragments[body.fragment]
            if all(self.state.version[c] >= index for c in chunks):
                continue
            r = self.results.get(index)
            if r is None:  # from before we listened, and the donor's state was older than that
                r = self.results[index] = Results(term, body)
            if not r.done:
                return
            self.state.apply(index, body, r.data)
            if self.state.version == self._versions_at(index):  # else the donor gave some chunks later than this
                self.applied[index] = tree_root(self.state.leaves)
                show(f"the state at {index} is computed")

    def _versions_at(self, index):
        out = [0] * self.ledger.layout.chunks
        for fragment, version in zip(self.ledger.layout.fragments, self.ledger.versions_at(index)):
            for c in fragment:
                out[c] = version
        return out

    def _compare_roots(self):
        """How many of our own roots the run has confirmed."""
        by_ledger = by_word = 0
        for index, own in self.applied.items():
            named, told = self.ledger.states[index].root, self.told.get(index)
            if named not in (None, own) or (named is None and told not in (None, own)):
                raise Refused(f"our state at ledger {index} has another root than the run's")
            by_ledger += named == own
            by_word += told == own
        self.counts.update(roots_by_ledger=by_ledger, roots_by_word=by_word)
        return sum(1 for i, own in self.applied.items() if own in (self.ledger.states[i].root, self.told.get(i)))

    def check_initial(self):
        root = self.ledger.states[0].root
        if root is None or self.genesis.init_from:
            return None
        state = State(self.ledger.layout)
        state.put_initial(self.genesis)
        if tree_root(state.leaves) != root:
            raise Refused("the initial state made from the seed has another root than the ledger's")
        return True

    # ---- the loop ----

    def turn(self):
        if time.monotonic() >= self.beat_at:
            self._beat()
        if time.monotonic() - self.heard > self.silence:
            raise Refused("no word from the coordinator for silence_ms_max")
        select.select([self.link, *(lane for peer in self.peers.values() for lane in peer.lanes)], [], [], 0.05)
        for frame in self.link.frames():
            self.counts["frames"] += 1
            self._on_coordinator(frame)
        for member, peer in list(self.peers.items()):
            try:
                for frame in peer.frames():
                    self.counts["frames"] += 1
                    self._on_member(member, frame)
            except Closed:
                self._lose_peer(member)
        self._ask_state()
        self._ask_results()
        self._take_state()
        self._bring_forward()

    def follow(self, commits, seconds, reconnect):
        end = time.monotonic() + seconds
        confirmed = 0
        while confirmed < commits and not self.goodbye:
            if time.monotonic() > end:
                raise Refused(f"{confirmed} of {commits} commits verified and applied within {seconds} s")
            try:
                self.turn()
            except Closed as why:
                raise Refused(f"the coordinator's connection: {self.goodbye or why}") from None
            confirmed = self._compare_roots()
            if reconnect and confirmed:
                reconnect = False
                self.link.close()
                self.connect()
        if confirmed < commits:
            raise Refused(f"{confirmed} of {commits} commits, then {self.goodbye}")
        return confirmed

    def leave(self):
        try:
            self.link.send("LEAVE", Record(reason="it has seen enough"), self.term, self.session)
            end = time.monotonic() + 1
            while time.monotonic() < end:
                select.select([self.link], [], [], 0.1)
                for frame in self.link.frames():
                    if frame.name == "BYE":
                        return
        except (Closed, OSError):
            pass
        finally:
            self.link.close()
            for member in list(self.peers):
                self._lose_peer(member)


# ---- a saved ledger ----------------------------------------------------------------------------------

def save(path, codec, entries):
    with open(path, "wb") as f:
        for e in entries:
            data = codec.encode("signed_entry", e)
            f.write(struct.pack("<I", len(data)) + data)


def load(path, codec):
    out = []
    with open(path, "rb") as f:
        while head := f.read(4):
            out.append(codec.decode("signed_entry", f.read(struct.unpack("<I", head)[0])))
    return out


def verdict(ledger):
    return dict(run=ledger.run.hex(), entries=ledger.next_index, head=ledger.head.hex(), term=ledger.term,
                commits=len(ledger.commits), members=len(ledger.members), rounds=ledger.rounds, tokens=ledger.tokens,
                samples_spent=sum(ledger.spent or b""))


def check_saved(document, path, run):
    codec = Codec(document)
    ledger = Ledger(document, codec, run)
    for e in load(path, codec):
        if ledger.take(e) is None:
            raise Refused(f"ledger entry {ledger.next_index - 1} comes twice")
    if not ledger.entries:
        raise Refused("the ledger is empty")
    return verdict(ledger)


def run_live(document, args):
    line = open(args.invite[1:]).read() if args.invite.startswith("@") else args.invite
    private = identity_load(args.identity) if args.identity else Ed25519PrivateKey.generate()
    reader = Reader(document, Invite(line), private)
    try:
        reader.connect()
        confirmed = reader.follow(args.commits, args.seconds, args.reconnect)
        initial = reader.check_initial()
    finally:
        if args.save:
            save(args.save, reader.codec, reader.ledger.entries)
    reader.leave()
    return dict(verdict(reader.ledger), member=reader.member, followed=confirmed, initial_state=initial,
                **reader.counts)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("invite", nargs="?")
    p.add_argument("--commits", type=int, default=3)
    p.add_argument("--reconnect", action="store_true")
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--identity", help="a file as the document describes it; without: a new key")
    p.add_argument("--document", default=PAGE)
    p.add_argument("--save", metavar="FILE", help="the ledger as it came")
    p.add_argument("--ledger", metavar="FILE")
    p.add_argument("--run", metavar="HEX")
    p.add_argument("--json", action="store_true")
    args = p.parse_args()
    if bool(args.invite) == bool(args.ledger) or bool(args.ledger) != bool(args.run):
        p.error("an invite, or --ledger and --run")
    document = Document(args.document)
    try:
        out = check_saved(document, args.ledger, bytes.fromhex(args.run)) if args.ledger else run_live(document, args)
    except (Refused, OSError, Closed) as why:
        if args.json:
            print(json.dumps(dict(ok=False, why=str(why))))
        sys.exit(f"refused: {why}")
    if args.json:
        print(json.dumps(dict(ok=True, **out)))
    else:
        print("verified: " + ", ".join(f"{k} {v}" for k, v in out.items()))


if __name__ == "__main__":
    main()
