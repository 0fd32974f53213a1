/* fuzz_chain.c - a valid ledger that somebody without its keys tampered with: entries dropped,
 * repeated, cut, changed, signed by a stranger or taken from another history of the same run, and then
 * the bytes of its file changed. Whatever is still followed must be, entry by entry, one history as it
 * was written.
 *
 * Input: steps of four bytes (what, entry, two for where), a byte 0, then bytes laid over the file. */
#include <stdio.h>
#include <stdlib.h>

#include "ckpt/internal.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/ledger.h"

#define ENTRIES_MAX 24
#define STEPS_MAX 32

static const struct fuzz_ledger *ledger;

struct tampered {
    struct msg_signed_entry entry[ENTRIES_MAX];
    uint32_t count;
    uint8_t *changed[STEPS_MAX]; /* copies of entries' bytes, freed in the end */
    uint32_t changed_count;
};

static void init(void) {
    struct err err;
    int failed = proto_init(&err);
    assert(!failed);
    ledger = fuzz_ledger();
}

static void drop(struct tampered *t, uint32_t i) {
    memmove(&t->entry[i], &t->entry[i + 1], (t->count - i - 1) * sizeof *t->entry);
    t->count--;
}

/* Put the original entry `from` behind entry i. */
static void repeat(struct tampered *t, uint32_t i, uint32_t from) {
    if (t->count == ENTRIES_MAX) return;
    memmove(&t->entry[i + 2], &t->entry[i + 1], (t->count - i - 1) * sizeof *t->entry);
    t->entry[i + 1] = ledger->entry[from];
    t->count++;
}

static void flip(struct tampered *t, uint32_t i, uint16_t where) {
    struct proto_bytes *b = &t->entry[i].bytes;
    uint8_t *copy = where / 8u < b->length ? malloc(b->length) : NULL;
    if (!copy) return;
    memcpy(copy, b->data, b->length);
    copy[where / 8] ^= (uint8_t)(1u << (where % 8));
    b->data = t->changed[t->changed_count++] = copy;
}

static void step(struct tampered *t, uint8_t what, uint32_t i, uint16_t where) {
    struct msg_signed_entry *e = &t->entry[i];
    switch (what % 8) {
    case 0: drop(t, i); break;
    case 1: repeat(t, i, where % LEDGER_ENTRIES); break;
    case 2: flip(t, i, where); break;
    case 3: e->signature.b[where / 8 % PROTO_SIG_BYTES] ^= (uint8_t)(1u << (where % 8)); break;
    case 4: e->bytes.length = where % (e->bytes.length + 1); break;
    case 5: fuzz_sign(ledger, SIGNER_MEMBER1, where % 4, e); break;
    case 6: e->signature = ledger->entry[where % LEDGER_ENTRIES].signature; break;
    case 7: *e = ledger->fork[where % FORK_ENTRIES]; break;
    }
}

static bool same_entry(const struct msg_signed_entry *a, const struct msg_signed_entry *b) {
    return a->bytes.length == b->bytes.length && !memcmp(a->bytes.data, b->bytes.data, a->bytes.length) &&
           !memcmp(&a->signature, &b->signature, sizeof a->signature);
}

static bool is_written(const struct msg_signed_entry *e, uint64_t i, bool forked) {
    if (forked) return i >= FORK && i < FORK + FORK_ENTRIES && same_entry(e, &ledger->fork[i - FORK]);
    return i < LEDGER_ENTRIES && same_entry(e, &ledger->entry[i]);
}

/* Follow it; returns how many entries were taken. */
static uint64_t follow(const struct msg_signed_entry *entries, uint32_t count) {
    struct ledger_chain chain;
    bool forked = false;
    ledger_chain_init(&chain, &ledger->run);
    for (uint32_t i = 0; i < count; i++) {
        struct msg_entry decoded;
        struct err err = {0};
        uint64_t index = chain.next_index;
        if (ledger_chain_take(&chain, &entries[i], &decoded, &err)) {
            if (err.code == ERR_STALE) continue;
            assert(err.code == ERR_CORRUPT);
            break;
        }
        if (index == FORK) forked = is_written(&entries[i], index, true);
        assert(is_written(&entries[i], index, forked));
        proto_decoded_release(RECORD_entry, &decoded);
    }
    return chain.next_index;
}

/* As a checkpoint keeps it; entries are then taken from the file. */
static bool through_file(const struct tampered *t, struct fuzz_input *in) {
    struct ckpt_blob file;
    struct msg_signed_entry *entries;
    struct digest head = {0};
    struct err err = {0};
    uint32_t count;
    int failed = ledger_format(t->entry, t->count, &file, &err);
    assert(!failed);
    size_t at = fuzz_le(in, 2);
    for (; in->left && at < file.length; at++) file.data[at] ^= fuzz_u8(in);
    bool whole = false;
    if (!ledger_parse(&file, &entries, &count, &err)) {
        bool linked = !ledger_check(entries, count, LEDGER_ENTRIES - 1, &head, &err);
        uint64_t taken = follow(entries, count);
        whole = linked && taken == LEDGER_ENTRIES;
        free(entries);
    }
    assert(whole || !err.code || err.code == ERR_CORRUPT);
    free(file.data);
    return whole;
}

static bool take(const uint8_t *bytes, size_t length) {
    struct fuzz_input in = {bytes, length};
    struct tampered t = {.count = LEDGER_ENTRIES};
    memcpy(t.entry, ledger->entry, sizeof ledger->entry);
    for (int n = 0; n < STEPS_MAX && t.count; n++) {
        uint8_t what = fuzz_u8(&in);
        if (!what) break;
        uint32_t i = fuzz_u8(&in) % t.count;
        step(&t, what, i, (uint16_t)fuzz_le(&in, 2));
    }
    bool whole = through_file(&t, &in);
    while (t.changed_count) free(t.changed[--t.changed_count]);
    return whole;
}

static void samples(const struct fuzz_sink *out) {
    out->sample(out->arg, "untouched", "", 0);
    out->sample(out->arg, "flipped-twice", "\2\3\5\0\2\3\5\0", 9);
    out->sample(out->arg, "dropped-and-put-back", "\10\13\0\0\1\12\13\0\10\6\0\0\1\5\6\0", 17);
}

const struct fuzz_target fuzz_chain = {"chain", init, take, samples};
