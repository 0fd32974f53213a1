/* ledger.c - follows the hash-chained, signed ledger entry by entry. What an entry means for the
 * run is not judged here; who may have written it, and where it stands, is. */
#include <string.h>

#include "proto/proto.h"

void ledger_chain_init(struct ledger_chain *c, const struct digest *run) {
    *c = (struct ledger_chain){.run = *run};
}

/* Entry 0 carries the root key that everything else hangs from, and is trusted because the digest
 * of its body is the name everybody joined by. */
static int read_genesis(const struct ledger_chain *c, const struct msg_entry *e,
                        struct proto_key *root_key, struct err *err) {
    struct msg_genesis genesis;
    struct digest run = digest_of(e->body.data, e->body.length);
    if (e->kind != LEDGER_GENESIS)
        return err_set(err, ERR_CORRUPT, "ledger entry 0 is not a genesis");
    if (e->term != 0 || !digest_is_zero(&e->previous))
        return err_set(err, ERR_CORRUPT, "ledger entry 0 has a term or a predecessor");
    if (!digest_equal(&run, &c->run)) {
        char got[DIGEST_HEX_BYTES], want[DIGEST_HEX_BYTES];
        digest_hex(&run, got);
        digest_hex(&c->run, want);
        return err_set(err, ERR_CORRUPT, "the genesis is of run %.16s..., not of %.16s...", got,
                       want);
    }
    if (proto_decode(e->body.data, e->body.length, RECORD_genesis, &genesis, err)) {
        err_prefix(err, "ledger entry 0");
        if (err && err->code == ERR_PROTOCOL) err->code = ERR_CORRUPT;
        return -1;
    }
    *root_key = genesis.root_key;
    proto_decoded_release(RECORD_genesis, &genesis);
    return 0;
}

static int check_place(const struct ledger_chain *c, const struct msg_entry *e, struct err *err) {
    if (e->index < c->next_index)
        return err_set(err, ERR_STALE, "ledger entry %llu is already here",
                       (unsigned long long)e->index);
    if (e->index > c->next_index)
        return err_set(err, ERR_CORRUPT, "ledger entry %llu came, %llu is next",
                       (unsigned long long)e->index, (unsigned long long)c->next_index);
    if (e->index == 0) return 0;
    if (e->kind == LEDGER_GENESIS)
        return err_set(err, ERR_CORRUPT, "ledger entry %llu is a second genesis",
                       (unsigned long long)e->index);
    if (!digest_equal(&e->previous, &c->head))
        return err_set(err, ERR_CORRUPT,
                       "ledger entry %llu does not follow the one before it: another history",
                       (unsigned long long)e->index);
    if (e->term < c->term)
        return err_set(err, ERR_CORRUPT, "ledger entry %llu has term %llu after term %llu",
                       (unsigned long long)e->index, (unsigned long long)e->term,
                       (unsigned long long)c->term);
    return 0;
}

static bool signed_by(const struct ledger_chain *c, const struct proto_key *key,
                      const struct msg_signed_entry *e, uint64_t term) {
    return proto_verify(key, "ledger", &c->run, term, e->bytes.data, e->bytes.length,
                        &e->signature);
}

static int check_signature(const struct ledger_chain *c, const struct proto_key *root_key,
                           const struct msg_signed_entry *e, const struct msg_entry *entry,
                           struct err *err) {
    unsigned long long index = entry->index;
    if (entry->kind == LEDGER_GENESIS || entry->kind == LEDGER_DELEGATION) {
        if (signed_by(c, root_key, e, entry->term)) return 0;
        return err_set(err, ERR_CORRUPT, "ledger entry %llu is not signed by the root key", index);
    }
    /* Newest first: an older key signs again only after a failover. */
    for (uint32_t i = c->online_count; i-- > 0;)
        if (signed_by(c, &c->online[i], e, entry->term)) return 0;
    return err_set(err, ERR_CORRUPT,
                   "ledger entry %llu is not signed by any of the %u delegated keys", index,
                   c->online_count);
}

static int retire(struct ledger_chain *c, uint32_t number) {
    for (uint32_t i = 0; i < c->online_count; i++) {
        if (c->number[i] != number) continue;
        c->online_count--;
        memmove(&c->online[i], &c->online[i + 1], (c->online_count - i) * sizeof *c->online);
        memmove(&c->number[i], &c->number[i + 1], (c->online_count - i) * sizeof *c->number);
        return 0;
    }
    return -1;
}

int ledger_chain_delegate(struct ledger_chain *c, const struct msg_delegation *d, struct err *err) {
    unsigned long long index = c->next_index;
    if (!digest_equal(&d->run, &c->run))
        return err_set(err, ERR_CORRUPT, "ledger entry %llu delegates for another run", index);
    if (d->number <= c->number_max)
        return err_set(err, ERR_CORRUPT, "ledger entry %llu: delegation %u after delegation %u", index,
                       d->number, c->number_max);
    if (d->retires && retire(c, d->retires))
        return err_set(err, ERR_CORRUPT, "ledger entry %llu retires delegation %u, which is not in force",
                       index, d->retires);
    if (c->online_count == LEDGER_ONLINE_KEYS_MAX)
        return err_set(err, ERR_FULL, "the ledger delegates to more than %d keys",
                       LEDGER_ONLINE_KEYS_MAX);
    c->number[c->online_count] = c->number_max = d->number;
    c->online[c->online_count++] = d->key;
    return 0;
}

static int take_delegation(struct ledger_chain *c, const struct msg_entry *e, struct err *err) {
    struct msg_delegation d;
    if (proto_decode(e->body.data, e->body.length, RECORD_delegation, &d, err)) {
        err_prefix(err, "ledger entry %llu", (unsigned long long)e->index);
        if (err && err->code == ERR_PROTOCOL) err->code = ERR_CORRUPT;
        return -1;
    }
    return ledger_chain_delegate(c, &d, err);
}

bool ledger_chain_speaks(const struct ledger_chain *c, const struct proto_key *key) {
    for (uint32_t i = 0; i < c->online_count; i++)
        if (memcmp(&c->online[i], key, sizeof *key) == 0) return true;
    return false;
}

int ledger_chain_take(struct ledger_chain *c, const struct msg_signed_entry *e,
                      struct msg_entry *decoded, struct err *err) {
    struct msg_entry entry;
    struct proto_key root_key = c->root_key;
    memset(decoded, 0, sizeof *decoded);
    if (proto_decode(e->bytes.data, e->bytes.length, RECORD_entry, &entry, err)) {
        err_prefix(err, "ledger entry %llu", (unsigned long long)c->next_index);
        if (err && err->code == ERR_PROTOCOL) err->code = ERR_CORRUPT;
        return -1;
    }
    if (check_place(c, &entry, err)) return -1;
    if (entry.index == 0 && read_genesis(c, &entry, &root_key, err)) return -1;
    if (check_signature(c, &root_key, e, &entry, err)) return -1;
    if (entry.kind == LEDGER_DELEGATION && take_delegation(c, &entry, err)) return -1;
    c->root_key = root_key;
    c->head = LEDGER_DIGEST(e);
    c->term = entry.term;
    c->next_index++;
    *decoded = entry;
    return 0;
}

int ledger_check_delegation(const struct msg_genesis *genesis, const struct digest *run,
                            struct proto_bytes delegation, const struct proto_sig *sig,
                            const struct proto_key *key, struct err *err) {
    struct msg_delegation d;
    if (!proto_verify(&genesis->root_key, "delegation", run, 0, delegation.data, delegation.length,
                      sig))
        return err_set(err, ERR_REFUSED,
                       "the coordinator's delegation is not signed by the run's root key");
    if (proto_decode(delegation.data, delegation.length, RECORD_delegation, &d, err)) return -1;
    if (!digest_equal(&d.run, run))
        return err_set(err, ERR_REFUSED, "the delegation is for another run");
    if (memcmp(&d.key, key, sizeof *key) != 0)
        return err_set(err, ERR_REFUSED,
                       "the delegation is for another key than the coordinator proved");
    return 0;
}

/* ---- bodies ------------------------------------------------------------------------------------- */

static const enum proto_record record_of_kind[] = {
    [LEDGER_GENESIS] = RECORD_genesis,       [LEDGER_DELEGATION] = RECORD_delegation,
    [LEDGER_ENROLMENT] = RECORD_enrolment,   [LEDGER_REVOCATION] = RECORD_revocation,
    [LEDGER_COMMIT] = RECORD_commit,         [LEDGER_CHECKPOINT] = RECORD_checkpoint,
    [LEDGER_QUARANTINE] = RECORD_quarantine, [LEDGER_REWIND] = RECORD_rewind,
};
#define KINDS (sizeof record_of_kind / sizeof *record_of_kind)

int ledger_body_decode(const struct msg_entry *e, union ledger_body *body, struct err *err) {
    memset(body, 0, sizeof *body);
    if (e->kind >= KINDS)
        return err_set(err, ERR_CORRUPT, "unknown kind %u", e->kind);
    return proto_decode(e->body.data, e->body.length, record_of_kind[e->kind], body, err);
}

void ledger_body_release(const struct msg_entry *e, union ledger_body *body) {
    if (e->kind < KINDS) proto_decoded_release(record_of_kind[e->kind], body);
}

const char *ledger_kind_name(uint8_t kind) {
    return kind < KINDS ? proto_record_name(record_of_kind[kind]) : NULL;
}
