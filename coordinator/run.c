/* run.c - opens the folder of a run; see run.h. */
#include "coordinator/run.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ckpt/store.h"
#include "coordinator/aggregator.h"

int run_path(const char *dir, const char *name, char *out, struct err *err) {
    if (snprintf(out, RUN_PATH_BYTES, "%s/%s", dir, name) < RUN_PATH_BYTES) return 0;
    return err_set(err, ERR_CONFIG, "the path of %s is over %d bytes long", name, RUN_PATH_BYTES);
}

static int open_folder(struct run *r, const char *dir, struct err *err) {
    char absolute[PATH_MAX], store[RUN_PATH_BYTES];
    struct stat st;
    if (!realpath(dir, absolute)) return err_set_errno(err, "the run's folder %s", dir);
    if (stat(absolute, &st)) return err_set_errno(err, "the run's folder %s", dir);
    if (!S_ISDIR(st.st_mode)) return err_set(err, ERR_CONFIG, "%s is not a folder", dir);
    if (snprintf(r->dir, sizeof r->dir, "%s", absolute) >= (int)sizeof r->dir)
        return err_set(err, ERR_CONFIG, "the path of the run's folder is too long");
    if (run_path(r->dir, STORE_FILE_NAME, store, err)) return -1;
    if (stat(store, &st))
        return err_set(err, ERR_NOT_FOUND,
                       "%s holds no run; make one: intellect-coordinator init %s --corpus FILE", dir,
                       dir);
    return 0;
}

int run_open(struct run *r, const char *dir, struct err *err) {
    struct err why;
    memset(r, 0, sizeof *r);
    if (open_folder(r, dir, err)) return -1;
    r->store = store_open(r->dir, false, err);
    if (!r->store) return -1;
    if (store_get_document(r->store, STORE_GENESIS, &r->genesis_bytes, &r->genesis_length, &why)) {
        if (why.code != ERR_NOT_FOUND) err_set(err, why.code, "%s", why.msg);
        else err_set(err, ERR_NOT_FOUND, "the run in %s is not sealed yet; do: intellect-coordinator "
                     "init %s --corpus FILE", dir, dir);
        goto failed;
    }
    r->id = digest_of(r->genesis_bytes, r->genesis_length);
    if (proto_decode(r->genesis_bytes, r->genesis_length, RECORD_genesis, &r->genesis, &why)) {
        err_set(err, ERR_CORRUPT, "the store's genesis: %s", why.msg);
        goto failed;
    }
    if (settings_from_genesis(&r->sealed, &r->genesis, err)) goto failed;
    return 0;
failed:
    run_release(r);
    return -1;
}

void run_release(struct run *r) {
    proto_decoded_release(RECORD_genesis, &r->genesis);
    free(r->genesis_bytes);
    store_close(r->store);
    memset(r, 0, sizeof *r);
}

/* The corpus may have moved away or lie on another machine; what was sealed counts. But where it is
 * and is another one now, members would refuse it, so say so here. */
static int check_corpus_unchanged(const struct run *r, struct settings *s, struct err *err) {
    char path[PATH_MAX];
    struct corpus_facts facts;
    struct err ignored;
    if (settings_locate_corpus(s, r->dir, path, sizeof path, &ignored)) {
        memcpy(s->corpus, r->sealed.corpus, sizeof s->corpus);
        return 0;
    }
    if (!*path) return 0; /* behind a network, which `serve` does not wait for: members compare */
    if (corpus_facts_read(&facts, path, err)) return -1;
    if (digest_equal(&facts.manifest_digest, &r->genesis.corpus->manifest_digest)) return 0;
    return err_set(err, ERR_CONFIG, "the corpus %.120s is another one than when the run was sealed; "
                   "bring the old one back, or start a new run", path);
}

int run_check_store(const struct settings *s, struct err *err) {
    if (!ckpt_store_writable(s->checkpoint_url, err)) return 0;
    err_prefix(err, "checkpoint.url");
    return -1;
}

int run_settings(const struct run *r, struct settings *out, struct err *err) {
    char path[RUN_PATH_BYTES], what[200];
    struct corpus_facts facts;
    corpus_facts_from_genesis(&facts, &r->genesis);
    settings_init(out);
    if (run_path(r->dir, SETTINGS_FILE_NAME, path, err) || settings_load(out, path, err)) return -1;
    if (check_corpus_unchanged(r, out, err) || settings_resolve(out, r->dir, &facts, err)) return -1;
    if (run_check_store(out, err)) return -1;
    if (settings_same_sealed(out, &r->sealed, what, sizeof what)) return 0;
    return err_set(err, ERR_CONFIG, "%s: change it back, or, before anybody has joined, seal it with "
                   "`init`", what);
}

/* ---- the core ---------------------------------------------------------------------------------- */

struct loading {
    struct core *core;
    enum core_table table;
};

static int load_row(void *arg, uint64_t key, const uint8_t *value, size_t length, struct err *err) {
    struct loading *l = arg;
    if (l->table != CORE_LEDGER) return core_load(l->core, l->table, key, value, length, err);
    struct msg_signed_entry e = {0};
    int result = proto_decode(value, length, RECORD_signed_entry, &e, err);
    if (result == 0)
        result = core_load(l->core, CORE_LEDGER, key, e.bytes.data, e.bytes.length, err);
    proto_decoded_release(RECORD_signed_entry, &e);
    return result;
}

static int load_tables(struct core *c, struct store *s, struct err *err) {
    static const enum core_table order[] = { CORE_LEDGER, CORE_LEASE, CORE_META };
    for (size_t i = 0; i < sizeof order / sizeof *order; i++) {
        struct loading l = { c, order[i] };
        if (store_each(s, order[i], 0, UINT64_MAX, load_row, &l, err)) {
            if (err && err->code == ERR_PROTOCOL) err->code = ERR_CORRUPT;
            err_prefix(err, "the store does not hold together");
            return -1;
        }
    }
    return 0;
}

struct core *run_core(const struct run *r, struct err *err) {
    char path[RUN_PATH_BYTES];
    struct identity own;
    memset(&own, 0, sizeof own);
    if (run_path(r->dir, AGGREGATOR_IDENTITY, path, err)) return NULL;
    if (identity_load(&own, path, err)) return NULL;
    struct core *c = core_create(&r->genesis, &r->id, &own.key, err);
    identity_release(&own);
    if (c && load_tables(c, r->store, err)) {
        core_destroy(c);
        return NULL;
    }
    return c;
}

/* ---- keys and signatures ----------------------------------------------------------------------- */

/* `rotate` writes the new key, then the store, then puts the key in its place; if it died between the
 * last two, the store says whose turn it is. */
static int finish_rotation(const struct run *r, struct err *err) {
    char next[RUN_PATH_BYTES], path[RUN_PATH_BYTES];
    struct identity id;
    struct ledger_chain chain;
    struct err ignored;
    if (run_path(r->dir, RUN_NEXT_KEY, next, err) || run_path(r->dir, RUN_ONLINE_KEY, path, err))
        return -1;
    if (access(next, F_OK) || identity_load(&id, next, &ignored)) return 0;
    int result = run_chain(r, &chain, err);
    bool is_its_turn = result == 0 && ledger_chain_speaks(&chain, &id.key);
    identity_release(&id);
    if (result) return -1;
    if (!is_its_turn) return 0; /* it died before: `rotate` begins anew */
    return rename(next, path) ? err_set_errno(err, "put %s in its place", next) : 0;
}

int run_keys_load(struct run_keys *k, const struct run *r, struct err *err) {
    char path[RUN_PATH_BYTES];
    size_t length;
    memset(k, 0, sizeof *k);
    if (finish_rotation(r, err)) return -1;
    if (run_path(r->dir, RUN_ONLINE_KEY, path, err) || identity_load(&k->online, path, err)) return -1;
    if (store_get_document(r->store, STORE_DELEGATION, &k->delegation_bytes, &length, err) ||
        proto_decode(k->delegation_bytes, length, RECORD_signed_entry, &k->delegation, err))
        goto failed;
    if (ledger_check_delegation(&r->genesis, &r->id, k->delegation.bytes, &k->delegation.signature,
                                &k->online.key, err)) {
        err_prefix(err, "%s", path);
        goto failed;
    }
    return 0;
failed:
    run_keys_release(k);
    return -1;
}

void run_keys_release(struct run_keys *k) {
    proto_decoded_release(RECORD_signed_entry, &k->delegation);
    free(k->delegation_bytes);
    identity_release(&k->online);
    memset(k, 0, sizeof *k);
}

/* `value` is replaced by a msg_signed_entry. */
static int sign_entry(const struct run *r, const struct run_keys *k, uint64_t term,
                      struct core_write *w, struct err *err) {
    struct msg_signed_entry e = { .bytes = { w->value, w->value_length }, .signature = w->signature };
    struct proto_buffer b;
    if (!w->is_signed)
        proto_sign(&k->online, "ledger", &r->id, term, w->value, w->value_length, &e.signature);
    proto_buffer_init(&b, proto_record_bytes_max(RECORD_signed_entry));
    if (proto_encode(&b, RECORD_signed_entry, &e, err)) {
        proto_buffer_release(&b);
        return -1;
    }
    free(w->value);
    w->value = b.data; /* malloc()ed; the action frees it */
    w->value_length = (uint32_t)b.length;
    return 0;
}

int run_persist(const struct run *r, const struct run_keys *k, uint64_t term, struct core_action *a,
                struct err *err) {
    for (uint32_t i = 0; i < a->write_count; i++)
        if (a->writes[i].table == CORE_LEDGER && sign_entry(r, k, term, &a->writes[i], err)) return -1;
    return store_commit(r->store, term, a->writes, a->write_count, err);
}

/* ---- entries while nobody serves ------------------------------------------------------------- */

static int follow(void *arg, uint64_t key, const uint8_t *value, size_t length, struct err *err) {
    struct msg_signed_entry e = {0};
    struct msg_entry entry = {0};
    (void)key;
    int result = proto_decode(value, length, RECORD_signed_entry, &e, err);
    if (!result) result = ledger_chain_take(arg, &e, &entry, err);
    proto_decoded_release(RECORD_entry, &entry);
    proto_decoded_release(RECORD_signed_entry, &e);
    return result;
}

int run_chain(const struct run *r, struct ledger_chain *chain, struct err *err) {
    ledger_chain_init(chain, &r->id);
    return store_each(r->store, CORE_LEDGER, 0, UINT64_MAX, follow, chain, err);
}

static int encode_entry(const struct run *r, const struct identity *signer,
                        const struct ledger_chain *chain, uint64_t term, const struct run_entry *entry,
                        struct proto_buffer *row, struct err *err) {
    struct proto_buffer bytes;
    proto_buffer_init(&bytes, PROTO_BLOB_BYTES_MAX);
    int result = core_entry_encode(&bytes, chain->next_index, &chain->head, term, entry->kind,
                                   entry->record, entry->body, err);
    if (!result) {
        struct msg_signed_entry e = { .bytes = { bytes.data, (uint32_t)bytes.length } };
        proto_sign(signer, "ledger", &r->id, term, bytes.data, bytes.length, &e.signature);
        result = proto_encode(row, RECORD_signed_entry, &e, err);
    }
    proto_buffer_release(&bytes);
    return result;
}

int run_append(const struct run *r, const struct identity *signer, const struct run_entry *entry,
               const struct core_write *rows, uint32_t row_count, const struct proto_bytes *document,
               uint64_t *index, struct err *err) {
    struct ledger_chain chain;
    struct proto_buffer row;
    uint64_t term;
    if (run_chain(r, &chain, err) || store_raise_term(r->store, &term, err)) return -1;
    struct core_write *writes = calloc((size_t)row_count + 1, sizeof *writes);
    if (!writes) return err_set(err, ERR_MEMORY, "no memory for %u rows", row_count);
    proto_buffer_init(&row, 2 * PROTO_BLOB_BYTES_MAX);
    int result = encode_entry(r, signer, &chain, term, entry, &row, err);
    if (!result) {
        writes[0] = (struct core_write){ .table = CORE_LEDGER, .key = chain.next_index,
                                         .value = row.data, .value_length = (uint32_t)row.length };
        if (row_count) memcpy(writes + 1, rows, row_count * sizeof *rows);
        result = document ? store_commit_document(r->store, term, writes, row_count + 1,
                                                  STORE_DELEGATION, *document, err)
                          : store_commit(r->store, term, writes, row_count + 1, err);
        *index = chain.next_index;
    }
    proto_buffer_release(&row);
    free(writes);
    return result;
}
