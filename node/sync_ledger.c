/* sync_ledger.c - the run's ledger as this member keeps it: every entry checked and stored, the
 * newest commits decoded. What a commit changes in the state is done in sync_apply.c. */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "node/sync_internal.h"

/* ---- looking up ------------------------------------------------------------------------- */

struct commit *ledger_recent(struct sync *s, uint32_t i) {
    struct ledger *l = &s->ledger;
    if (i >= l->commits_kept) return NULL;
    return &l->commits[(l->commit_count - 1 - i) % SYNC_COMMITS_KEPT];
}

struct commit *ledger_last(struct sync *s) { return ledger_recent(s, 0); }

/* All of them newest first: what is asked for is nearly always the newest. */
struct commit *ledger_commit(struct sync *s, uint32_t fragment, uint64_t round) {
    struct commit *c;
    for (uint32_t i = 0; (c = ledger_recent(s, i)); i++)
        if (c->body.fragment == fragment && c->body.round == round) return c;
    return NULL;
}

struct commit *ledger_commit_at(struct sync *s, uint64_t index) {
    struct commit *c;
    for (uint32_t i = 0; (c = ledger_recent(s, i)) && c->index >= index; i++)
        if (c->index == index) return c;
    return NULL;
}

struct commit *ledger_commit_after(struct sync *s, uint32_t fragment, uint64_t version) {
    struct commit *c;
    for (uint32_t i = 0; (c = ledger_recent(s, i)) && c->index > version; i++)
        if (c->body.fragment == fragment && c->body.base_index == version) return c;
    return NULL;
}

uint64_t ledger_head_version(const struct sync *s) { return s->ledger.head_version; }

/* Each commit names the version before it, so the answer reaches back a little further than what is
 * kept. */
uint64_t ledger_version(struct sync *s, uint32_t fragment, uint64_t index) {
    uint64_t version = s->ledger.last[fragment];
    struct commit *c;
    for (uint32_t i = 0; version > index && (c = ledger_recent(s, i)); i++)
        if (c->body.fragment == fragment) version = c->body.base_index;
    return version <= index ? version : SYNC_MISSING;
}

/* ---- roots ------------------------------------------------------------------------------ */

static struct known_root *find_root(struct sync *s, uint64_t index) {
    struct ledger *l = &s->ledger;
    for (uint32_t i = 0; i < l->root_count && i < SYNC_ROOTS_KEPT; i++)
        if (l->root[i].index == index) return &l->root[i];
    return NULL;
}

bool ledger_root(struct sync *s, uint64_t index, struct digest *out) {
    const struct known_root *known = find_root(s, index);
    if (known) *out = known->root;
    return known != NULL;
}

void ledger_note_root(struct sync *s, uint64_t index, const struct digest *root) {
    struct ledger *l = &s->ledger;
    struct known_root *known = find_root(s, index);
    if (!known) known = &l->root[l->root_count++ % SYNC_ROOTS_KEPT];
    *known = (struct known_root){index, *root};
}

/* ---- contributors ----------------------------------------------------------------------- */

int commit_contributor(const struct commit *c, uint32_t member, const struct digest *root) {
    for (uint32_t i = 0; i < c->body.contributors_count; i++)
        if (c->body.contributors[i].member == member)
            return digest_equal(&c->body.contributors[i].root, root) ? (int)i : -1;
    return -1;
}

bool commit_summed(const struct commit *c, uint32_t k, int contributor) {
    uint64_t end = 0;
    if (contributor < 0) return false;
    for (uint32_t i = 0; i < c->body.summed_count; i++) {
        end += c->body.summed[i].chunks;
        if (k < end) return bitmap_has(c->body.summed[i].set, (uint32_t)contributor);
    }
    return false;
}

bool commit_summed_any(const struct commit *c, int contributor) {
    if (contributor < 0) return false;
    for (uint32_t i = 0; i < c->body.summed_count; i++)
        if (c->body.summed[i].chunks && bitmap_has(c->body.summed[i].set, (uint32_t)contributor))
            return true;
    return false;
}

/* ---- taking entries --------------------------------------------------------------------- */

/* Our coordinator signed it, but a commit that contradicts the state machine must not reach it. */
static int check_commit(struct sync *s, const struct msg_commit *m, struct err *err) {
    uint64_t chunks = 0, covered = 0;
    const struct ledger *l = &s->ledger;
    if (m->fragment >= s->fragment_count)
        return err_set(err, ERR_CORRUPT, "commit of fragment %u, there are %u", m->fragment,
                       s->fragment_count);
    if (m->round != l->rounds[m->fragment] || m->base_index != l->last[m->fragment])
        return err_set(err, ERR_CORRUPT,
                       "commit of fragment %u round %llu on %llu, expected %llu on %llu",
                       m->fragment, (unsigned long long)m->round,
                       (unsigned long long)m->base_index,
                       (unsigned long long)l->rounds[m->fragment],
                       (unsigned long long)l->last[m->fragment]);
    if (outer_encoded_bytes((enum outer_codec)m->codec, 1) == 0)
        return err_set(err, ERR_CORRUPT, "commit of fragment %u round %llu has codec %u",
                       m->fragment, (unsigned long long)m->round, m->codec);
    for (uint32_t i = 0; i < m->summed_count; i++) chunks += m->summed[i].chunks;
    for (uint32_t i = 0; i < m->shards_count; i++) {
        if (m->shards[i].first != covered || m->shards[i].count == 0) break;
        covered += m->shards[i].count;
    }
    if (chunks != s->fragment[m->fragment].count || covered != s->fragment[m->fragment].count)
        return err_set(err, ERR_CORRUPT,
                       "commit of fragment %u round %llu sums %llu and shards %llu of %u chunks",
                       m->fragment, (unsigned long long)m->round, (unsigned long long)chunks,
                       (unsigned long long)covered, s->fragment[m->fragment].count);
    return 0;
}

/* The newest commit pushes the oldest out. */
static int keep_commit(struct sync *s, const struct msg_entry *e, const struct msg_commit *body,
                       struct err *err) {
    struct ledger *l = &s->ledger;
    struct commit *c = &l->commits[l->commit_count % SYNC_COMMITS_KEPT], new = {0};
    if (proto_copy(RECORD_commit, body, &new.body, err)) return -1;
    proto_copy_release(RECORD_commit, &c->body);
    *c = new;
    c->index = e->index;
    c->term = e->term;
    c->seen_ms = s->now;
    l->commit_count++;
    if (l->commits_kept < SYNC_COMMITS_KEPT) l->commits_kept++;
    l->rounds[body->fragment]++;
    l->last[body->fragment] = l->head_version = e->index;
    ledger_note_root(s, body->state_index, &body->state_root);
    if (body->tokens_committed > s->tokens_committed) s->tokens_committed = body->tokens_committed;
    leases_spend(s, c);
    return 0;
}

static int take_commit(struct sync *s, const struct msg_entry *e, struct err *err) {
    struct msg_commit body;
    if (proto_decode(e->body.data, e->body.length, RECORD_commit, &body, err)) return -1;
    int rc = check_commit(s, &body, err);
    if (rc == 0) rc = keep_commit(s, e, &body, err);
    proto_decoded_release(RECORD_commit, &body);
    return rc;
}

/* The commits after the checkpoint never were. What the state of its index looked like is noted: chunks
 * that still have that version need only a new label. */
static int go_back(struct sync *s, uint64_t index, const struct msg_rewind *body, struct err *err) {
    struct ledger *l = &s->ledger;
    const struct msg_checkpoint *to = body->to_count == 1 ? body->to : NULL;
    struct msg_checkpoint copy = {0};
    if (!to || to->at_index > l->head_version)
        return err_set(err, ERR_CORRUPT, "entry %llu goes back to no state of this run",
                       (unsigned long long)index);
    if (proto_copy(RECORD_checkpoint, to, &copy, err)) return -1;
    proto_copy_release(RECORD_checkpoint, &l->rewind.to);
    l->rewind.to = copy;
    l->rewind.index = index;
    for (uint32_t f = 0; f < s->fragment_count; f++)
        l->rewind.base[f] = ledger_version(s, f, to->at_index);
    for (uint32_t f = 0; f < s->fragment_count; f++) l->last[f] = index;
    l->head_version = index;
    l->commits_kept = 0;
    s->tokens_committed = to->tokens_committed;
    ledger_note_root(s, index, &to->state_root);
    return 0;
}

static int take_rewind(struct sync *s, const struct msg_entry *e, struct err *err) {
    struct msg_rewind body;
    if (proto_decode(e->body.data, e->body.length, RECORD_rewind, &body, err)) return -1;
    int rc = go_back(s, e->index, &body, err);
    proto_decoded_release(RECORD_rewind, &body);
    return rc;
}

static int store_entry(struct sync *s, const struct msg_signed_entry *e) {
    struct ledger *l = &s->ledger;
    if (sync_grow(s, &l->entries, l->count, &l->capacity, sizeof *l->entries)) return -1;
    uint8_t *bytes = sync_alloc(s, e->bytes.length, 1);
    if (!bytes) return -1;
    memcpy(bytes, e->bytes.data, e->bytes.length);
    l->entries[l->count] = *e;
    l->entries[l->count++].bytes.data = bytes;
    return 0;
}

/* As the next entry: chain, then contents. On -1 nothing has changed. */
static int take_entry(struct sync *s, const struct msg_signed_entry *e, struct err *err) {
    struct ledger_chain before = s->ledger.chain;
    struct msg_entry entry = {0};
    int rc = ledger_chain_take(&s->ledger.chain, e, &entry, err);
    if (rc == 0 && entry.kind == LEDGER_COMMIT) rc = take_commit(s, &entry, err);
    if (rc == 0 && entry.kind == LEDGER_REWIND) rc = take_rewind(s, &entry, err);
    if (rc == 0 && store_entry(s, e)) return -1; /* no memory: the machine stops */
    if (rc) s->ledger.chain = before;
    proto_decoded_release(RECORD_entry, &entry);
    return rc;
}

/* ---- on disk: blobs of SYNC_LEDGER_SEGMENT entries -------------------------------------- */

static void segment_name(uint32_t segment, char out[32]) {
    snprintf(out, 32, "ledger-%08u", segment);
}

static int save_segment(struct sync *s, uint32_t segment) {
    struct ledger *l = &s->ledger;
    uint32_t first = segment * SYNC_LEDGER_SEGMENT, left = l->count - first;
    struct msg_ledger record = {.entries = l->entries + first,
                                .entries_count = left < SYNC_LEDGER_SEGMENT ? left
                                                                            : SYNC_LEDGER_SEGMENT};
    struct proto_buffer b;
    char name[32];
    segment_name(segment, name);
    proto_buffer_init(&b, (size_t)SYNC_LEDGER_SEGMENT * (PROTO_BLOB_BYTES_MAX + 256));
    int rc = proto_encode(&b, RECORD_ledger, &record, &s->failure);
    if (rc == 0) rc = s->disk.put(s->disk.arg, name, b.data, b.length, &s->failure);
    proto_buffer_release(&b);
    return rc;
}

static int ledger_save(struct sync *s) {
    struct ledger *l = &s->ledger;
    while (l->saved < l->count) {
        uint32_t segment = l->saved / SYNC_LEDGER_SEGMENT,
                 end = (segment + 1) * SYNC_LEDGER_SEGMENT;
        if (save_segment(s, segment)) return -1;
        l->saved = end < l->count ? end : l->count;
    }
    return 0;
}

/* Takes what is right. *full: another segment may follow. */
static int load_segment(struct sync *s, uint32_t segment, bool *full) {
    char name[32];
    uint8_t *bytes;
    size_t length;
    struct msg_ledger record;
    struct err err = {0};
    *full = false;
    segment_name(segment, name);
    if (s->disk.get(s->disk.arg, name, &bytes, &length, &err)) {
        if (err.code == ERR_NOT_FOUND) return 0;
        s->failure = err;
        return -1;
    }
    if (proto_decode(bytes, length, RECORD_ledger, &record, &err) == 0) {
        uint32_t i = 0;
        while (i < record.entries_count && take_entry(s, &record.entries[i], &err) == 0) i++;
        *full = i == SYNC_LEDGER_SEGMENT;
    }
    proto_decoded_release(RECORD_ledger, &record);
    free(bytes);
    return 0;
}

int ledger_load(struct sync *s) {
    bool full = true;
    ledger_chain_init(&s->ledger.chain, &s->config.run);
    if (s->genesis.init_from_count) ledger_note_root(s, 0, &s->genesis.init_from->state_root);
    for (uint32_t i = 0; i < s->genesis.init_spent_count; i++)
        s->tokens_committed += s->genesis.init_spent[i].count * s->genesis.model->sequence;
    s->ledger.rewind.to.tokens_committed = s->tokens_committed; /* until there is a commit */
    for (uint32_t segment = 0; full; segment++)
        if (load_segment(s, segment, &full)) return -1;
    s->ledger.saved = s->ledger.loaded = s->ledger.count;
    return 0;
}

void ledger_release(struct sync *s) {
    struct ledger *l = &s->ledger;
    for (uint32_t i = 0; i < l->count; i++) free((void *)(uintptr_t)l->entries[i].bytes.data);
    free(l->entries);
    for (uint32_t i = 0; i < SYNC_COMMITS_KEPT; i++)
        proto_copy_release(RECORD_commit, &l->commits[i].body);
    proto_copy_release(RECORD_checkpoint, &l->rewind.to);
    *l = (struct ledger){0};
}

/* ---- messages --------------------------------------------------------------------------- */

/* The run went back: work, contributions, leases and plans of what never was are void. */
static int after_rewind(struct sync *s) {
    sync_log(s, SYNC_WARNING, "the run goes back to the state at ledger index %llu",
             (unsigned long long)s->ledger.rewind.to.at_index);
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        plan_release(s, f);
        contribution_drop(s, f);
    }
    s->leases.count = 0;
    sync_checkpoint_undone(s, s->ledger.rewind.to.at_index);
    if (!SYNC_HAS_FAULT(REWIND_KEEPS_WORK))
        trainer_lose_work(s, SYNC_LOSS_STATE, "the run went back to a checkpoint");
    if (s->residual) memset(s->residual, 0, s->config.elements * sizeof *s->residual);
    return catchup_rewind(s);
}

/* Commits came: what was meant for the rounds before them is void. */
static void after_commits(struct sync *s) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        if (plan_is_over(s, f)) plan_release(s, f);
        if (s->contribution[f].encoding && s->contribution[f].base_index != s->ledger.last[f])
            contribution_abort(s, f);
    }
    results_settle(s);
}

int ledger_on_entries(struct sync *s, const struct msg_ledger *msg) {
    uint64_t commits = s->ledger.commit_count, rewind = s->ledger.rewind.index;
    struct err err = {0};
    for (uint32_t i = 0; i < msg->entries_count; i++) {
        if (take_entry(s, &msg->entries[i], &err) == 0 || err.code == ERR_STALE) continue;
        if (s->failure.code) return -1;
        sync_log(s, SYNC_ERROR, "the coordinator's ledger: %.200s", err.msg);
        sync_disconnect(s, "its ledger does not continue ours");
        break;
    }
    if (ledger_save(s)) return -1;
    if (s->ledger.rewind.index != rewind && after_rewind(s)) return -1;
    if (s->ledger.commit_count != commits) after_commits(s);
    return 0;
}

/* ---- showing it ------------------------------------------------------------------------- */

/* One LEDGER frame from entry `from` on; returns how many went into it. */
static uint32_t send_batch(struct sync *s, uint32_t from) {
    const struct ledger *l = &s->ledger;
    uint32_t n = 0;
    for (size_t bytes = 0; from + n < l->count && n < PROTO_LEDGER_BATCH_MAX; n++) {
        bytes += l->entries[from + n].bytes.length + 128;
        if (n && bytes > SYNC_LEDGER_FRAME_BYTES) break;
    }
    struct msg_ledger batch = {.entries = l->entries + from, .entries_count = n};
    if (n) sync_send(s, MSG_LEDGER, 0, &batch);
    return n;
}

/* A coordinator whose store is older than the run takes over what we have. */
void ledger_on_get(struct sync *s, const struct msg_ledger_get *msg) {
    if (msg->from >= s->ledger.count) return;
    sync_log(s, SYNC_WARNING, "the coordinator asks for the ledger from entry %llu on: its store is older",
             (unsigned long long)msg->from);
    for (uint32_t from = (uint32_t)msg->from, n; (n = send_batch(s, from)); from += n) continue;
}

static bool roster_is_signed(struct sync *s, const struct frame *f, const struct msg_roster *msg) {
    const struct ledger_chain *c = &s->ledger.chain;
    for (uint32_t i = c->online_count; i-- > 0;)
        if (proto_verify(&c->online[i], "roster", &s->config.run, f->term, msg->body.data,
                         msg->body.length, &msg->signature))
            return true;
    return false;
}

void ledger_on_roster(struct sync *s, const struct frame *f, const struct msg_roster *msg) {
    struct msg_roster_body body = {0};
    struct err err = {0};
    if (!roster_is_signed(s, f, msg)) {
        sync_log(s, SYNC_ERROR, "a roster that no delegated key has signed is ignored");
    } else if (proto_decode(msg->body.data, msg->body.length, RECORD_roster_body, &body, &err)) {
        sync_log(s, SYNC_ERROR, "a roster is ignored: %.200s", err.msg);
    } else if (body.version >= s->ledger.roster_version) {
        s->ledger.roster_version = body.version;
        sync_act_roster(s, &body);
    }
    proto_decoded_release(RECORD_roster_body, &body);
}
