/* fuzz_entry.c - one ledger entry of any content, signed for real, so that what stands behind the
 * signature is reached: by the chain that every member follows, and by the audit of `ledger verify`.
 *
 * Input: how many entries of a valid ledger come before it, who signs it, the entry. Where none
 * comes before it, the run is named after whatever genesis it carries. */
#include <stdio.h>

#include "coordinator/audit.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/ledger.h"
#include "tests/fuzz/records.h"

static const struct fuzz_ledger *ledger;
static struct ledger_chain before[LEDGER_ENTRIES + 1]; /* each number of entries */

static void init(void) {
    struct audit a;
    struct err err = {0};
    int failed = proto_init(&err);
    assert(!failed);
    ledger = fuzz_ledger();
    audit_init(&a, &ledger->run);
    before[0] = a.chain;
    for (uint32_t i = 0; i < LEDGER_ENTRIES; i++) {
        if (audit_take(&a, &ledger->entry[i], &err)) fprintf(stderr, "%s\n", err.msg);
        assert(!err.code);
        before[i + 1] = a.chain;
    }
    audit_release(&a);
}

/* Taken in, so the right one signed it. */
static void check_taken(const struct ledger_chain *was, const struct ledger_chain *is, const struct msg_entry *entry,
                        const struct msg_signed_entry *e, const struct proto_key *signer) {
    struct digest head = LEDGER_DIGEST(e);
    bool by_root = entry->kind == LEDGER_GENESIS || entry->kind == LEDGER_DELEGATION;
    assert(is->next_index == was->next_index + 1 && is->term >= was->term);
    assert(digest_equal(&is->head, &head) && is->online_count <= LEDGER_ONLINE_KEYS_MAX);
    assert(by_root ? !memcmp(signer, &is->root_key, sizeof *signer) : ledger_chain_speaks(was, signer));
}

/* The audit takes what the chain takes, if it makes sense. */
static bool audited(uint32_t count, const struct digest *run, const struct msg_signed_entry *e) {
    struct audit a;
    struct err err = {0};
    audit_init(&a, run);
    for (uint32_t i = 0; i < count; i++) audit_take(&a, &ledger->entry[i], &err);
    assert(!err.code);
    bool passed = !audit_take(&a, e, &err);
    assert(passed || (err.code && *err.msg));
    audit_release(&a);
    return passed;
}

static bool take(const uint8_t *bytes, size_t length) {
    struct fuzz_input in = {bytes, length};
    uint32_t at = fuzz_u8(&in) % (LEDGER_ENTRIES + 1);
    enum ledger_signer signer = (enum ledger_signer)(fuzz_u8(&in) % SIGNERS);
    struct msg_signed_entry e = {.bytes = {in.at, (uint32_t)in.left}};
    struct ledger_chain chain = before[at], was;
    struct msg_entry decoded;
    struct err err = {0};
    uint64_t term = 0;
    if (!proto_decode(in.at, in.left, RECORD_entry, &decoded, NULL)) {
        term = decoded.term;
        if (at == 0) chain.run = digest_of(decoded.body.data, decoded.body.length);
    }
    proto_sign(&ledger->signer[signer], "ledger", &chain.run, term, in.at, in.left, &e.signature);
    was = chain;
    if (ledger_chain_take(&chain, &e, &decoded, &err)) {
        assert(err.code && !memcmp(&chain, &was, sizeof chain) && !decoded.body.data);
        return false;
    }
    check_taken(&was, &chain, &decoded, &e, &ledger->signer[signer].key);
    proto_decoded_release(RECORD_entry, &decoded);
    return audited(at, &chain.run, &e);
}

static void samples(const struct fuzz_sink *out) {
    static const uint8_t signer[LEDGER_ENTRIES] = {
        SIGNER_ROOT, SIGNER_ROOT, SIGNER_ONLINE, SIGNER_ONLINE, SIGNER_ONLINE, SIGNER_ROOT,
        SIGNER_ONLINE2, SIGNER_ONLINE2, SIGNER_ONLINE2, SIGNER_ONLINE, SIGNER_ONLINE2, SIGNER_ROOT};
    for (uint8_t i = 0; i < LEDGER_ENTRIES; i++) {
        char name[] = "entry-a";
        uint8_t head[2] = {i, signer[i]};
        struct proto_buffer b;
        name[6] = (char)('a' + i);
        proto_buffer_init(&b, 1u << 16);
        proto_buffer_append(&b, head, 2);
        proto_buffer_append(&b, ledger->bytes[i].data, ledger->bytes[i].length);
        out->sample(out->arg, name, b.data, b.length);
        proto_buffer_release(&b);
    }
}

const struct fuzz_target fuzz_entry = {"entry", init, take, samples};
