/* ledger.c - the valid ledger of the ledger targets. */
#include "tests/fuzz/ledger.h"

#include <assert.h>

#include "tests/fuzz/records.h"

#define SEQUENCE 8
#define SAMPLES 100

static struct fuzz_ledger ledger;
static uint32_t count;

void fuzz_sign(const struct fuzz_ledger *l, enum ledger_signer signer, uint64_t term,
               struct msg_signed_entry *e) {
    proto_sign(&l->signer[signer], "ledger", &l->run, term, e->bytes.data, e->bytes.length,
               &e->signature);
}

static void append(enum ledger_kind kind, uint64_t term, enum ledger_signer signer,
                   enum proto_record body_record, const void *body) {
    struct proto_buffer encoded = record_encoded(body_record, body);
    struct msg_entry e = {.index = count, .term = term, .kind = (uint8_t)kind,
                          .body = buffer_bytes(&encoded)};
    if (count) e.previous = LEDGER_DIGEST(&ledger.entry[count - 1]);
    else ledger.run = digest_of(encoded.data, encoded.length);
    assert(count < LEDGER_ENTRIES);
    ledger.bytes[count] = record_encoded(RECORD_entry, &e);
    ledger.entry[count].bytes = buffer_bytes(&ledger.bytes[count]);
    fuzz_sign(&ledger, signer, term, &ledger.entry[count]);
    count++;
    proto_buffer_release(&encoded);
}

static void append_genesis(void) {
    union any_record made;
    record_make(RECORD_genesis, 1, &made);
    struct msg_genesis g = *(const struct msg_genesis *)made.bytes;
    struct msg_model model = g.model[0];
    struct msg_outer outer = g.outer[0];
    struct msg_corpus corpus = g.corpus[0];
    g.version = PROTO_VERSION;
    g.root_key = ledger.signer[SIGNER_ROOT].key;
    model.sequence = SEQUENCE;
    outer.fragments = 2;
    corpus.samples = SAMPLES;
    g.init_spent_count = 0; /* what is made lies anywhere */
    g.model = &model;
    g.outer = &outer;
    g.corpus = &corpus;
    append(LEDGER_GENESIS, 0, SIGNER_ROOT, RECORD_genesis, &g);
    proto_decoded_release(RECORD_genesis, &made);
}

static void append_delegation(uint64_t term, uint32_t number, enum ledger_signer to, uint32_t retires) {
    struct msg_delegation d = {
        .run = ledger.run, .key = ledger.signer[to].key, .number = number, .retires = retires};
    append(LEDGER_DELEGATION, term, SIGNER_ROOT, RECORD_delegation, &d);
}

static void append_enrolment(uint32_t member, enum ledger_signer who) {
    struct msg_enrolment m = {.member = member, .key = ledger.signer[who].key, .name = proto_str("m")};
    append(LEDGER_ENROLMENT, 1, SIGNER_ONLINE, RECORD_enrolment, &m);
}

/* Both members, summed in the one chunk there is. */
static void append_commit(void) {
    static const uint8_t both[1] = {3};
    struct msg_contributor c[2] = {
        {.member = 1, .weight = 4, .clip = 1, .tokens = 4 * SEQUENCE, .norm = 1},
        {.member = 2, .weight = 6, .clip = 1, .tokens = 6 * SEQUENCE, .norm = 1},
    };
    struct msg_shard shard = {.first = 0, .count = 1, .aggregator = 1, .holder = 2};
    struct msg_summed summed = {.chunks = 1, .set = {both, 1}, .weight = 10};
    struct msg_spend spent[2] = {{.member = 1, .lease = 1, .start = 0, .count = 4},
                                 {.member = 2, .lease = 2, .start = 10, .count = 6}};
    struct msg_commit m = {.plan = 1, .lr = 0.7f, .momentum = 0.9f, .codec = 1,
                           .tokens = 10 * SEQUENCE, .tokens_committed = 10 * SEQUENCE,
                           .contributors = c, .contributors_count = 2,
                           .shards = &shard, .shards_count = 1,
                           .summed = &summed, .summed_count = 1,
                           .spent = spent, .spent_count = 2};
    append(LEDGER_COMMIT, 1, SIGNER_ONLINE, RECORD_commit, &m);
}

static const struct msg_checkpoint *checkpoint(void) {
    static struct msg_checkpoint m = {.at_index = 4, .tokens_committed = 10 * SEQUENCE};
    m.url = proto_str("file:///c/step-000000000004");
    return &m;
}

/* What member 2 signed is shown; what is wrong with it is not the ledger's business. */
static void append_quarantine(uint8_t lifted) {
    struct msg_ready ready = {.chunks = 1, .samples = 6};
    struct err err;
    int failed = proto_record_sign(&ledger.signer[SIGNER_MEMBER2], "ready", &ledger.run, 1, RECORD_ready,
                                   &ready, &ready.signature, &err);
    assert(!failed);
    struct proto_buffer proof = record_encoded(RECORD_ready, &ready);
    struct msg_quarantine m = {.member = 2, .lifted = lifted, .reason = proto_str("why")};
    if (!lifted) {
        m.kind = MSG_READY;
        m.proof_term = 1;
        m.proof = buffer_bytes(&proof);
    }
    append(LEDGER_QUARANTINE, 2, SIGNER_ONLINE2, RECORD_quarantine, &m);
    proto_buffer_release(&proof);
}

static void append_revocation(void) {
    struct msg_revocation m = {.member = 2, .reason = proto_str("gone")};
    append(LEDGER_REVOCATION, 2, SIGNER_ONLINE, RECORD_revocation, &m);
}

static void append_rewind(void) {
    struct msg_checkpoint to = *checkpoint();
    struct msg_rewind m = {.to = &to, .to_count = 1, .reason = proto_str("lost")};
    append(LEDGER_REWIND, 3, SIGNER_ONLINE2, RECORD_rewind, &m);
}

static void make_fork(void) {
    for (uint32_t i = 0; i < FORK_ENTRIES; i++) {
        struct msg_enrolment m = {.member = 3 + i, .key = {{(uint8_t)i}}, .name = proto_str("x")};
        struct proto_buffer body = record_encoded(RECORD_enrolment, &m);
        struct msg_entry e = {.index = FORK + i, .term = 1, .kind = LEDGER_ENROLMENT, .body = buffer_bytes(&body)};
        e.previous = i ? LEDGER_DIGEST(&ledger.fork[i - 1]) : LEDGER_DIGEST(&ledger.entry[FORK - 1]);
        ledger.fork_bytes[i] = record_encoded(RECORD_entry, &e);
        ledger.fork[i].bytes = buffer_bytes(&ledger.fork_bytes[i]);
        fuzz_sign(&ledger, SIGNER_ONLINE, 1, &ledger.fork[i]);
        proto_buffer_release(&body);
    }
}

const struct fuzz_ledger *fuzz_ledger(void) {
    if (count) return &ledger;
    for (unsigned i = 0; i < SIGNERS; i++) {
        uint8_t seed[32] = {(uint8_t)i};
        identity_from_seed(&ledger.signer[i], seed);
    }
    append_genesis();
    append_delegation(0, 1, SIGNER_ONLINE, 0);
    append_enrolment(1, SIGNER_MEMBER1);
    append_enrolment(2, SIGNER_MEMBER2);
    append_commit();
    append_delegation(1, 2, SIGNER_ONLINE2, 0);
    append(LEDGER_CHECKPOINT, 2, SIGNER_ONLINE2, RECORD_checkpoint, checkpoint());
    append_quarantine(0);
    append_quarantine(1);
    append_revocation();
    append_rewind();
    append_delegation(3, 3, SIGNER_ONLINE, 1);
    assert(count == LEDGER_ENTRIES);
    make_fork();
    return &ledger;
}
