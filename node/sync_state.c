/* sync_state.c - anchor and momentum as mapped arrays, with a version and a digest per chunk,
 * and the journal that makes a change of several chunks safe against a crash at any moment:
 *
 *   1. the old bytes of the chunks are put in the array "journal" and flushed
 *   2. the arrays are changed and flushed
 *   3. their entries in the index are changed and flushed
 *
 * At start every chunk is hashed. One that is not what its entry says was caught between 1 and
 * 3: the journal has it as it was. Without a copy there it is missing, and other members have
 * it. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "node/sync_internal.h"

/* An entry fills a disk sector's eighth, so it is torn only by a broken disk; `check` finds that
 * too. */
struct index_entry {
    uint64_t version;
    struct digest leaf;
    uint64_t check;
    uint8_t unused[16];
};
struct index_header {
    char magic[8];
    uint64_t elements, chunk_elements;
    uint8_t unused[40];
};
_Static_assert(sizeof(struct index_entry) == 64 && sizeof(struct index_header) == 64,
               "sizes on disk");

struct journal_head {
    char magic[8];
    uint64_t count;
    struct digest digest; /* of what stands above and of all struct journal_chunk */
};
struct journal_chunk {
    uint64_t chunk, version;
    struct digest leaf;
};

/* ---- the index -------------------------------------------------------------------------- */

static struct index_entry *entry_of(struct sync *s, uint32_t chunk) {
    return (struct index_entry *)(void *)(s->state.index_map + sizeof(struct index_header)) + chunk;
}

static uint64_t entry_check(const struct index_entry *e) {
    struct digest d = digest_of(e, offsetof(struct index_entry, check));
    uint64_t check;
    memcpy(&check, d.b, sizeof check);
    return check;
}

static struct digest leaf_of(struct sync *s, uint32_t chunk) {
    size_t first = chunk_first(s, chunk), bytes = chunk_elements(s, chunk) * sizeof(float);
    return digest_leaf2(chunk, s->state.anchor + first, bytes, s->state.momentum + first, bytes);
}

static void set_entry(struct sync *s, uint32_t chunk, uint64_t version, const struct digest *leaf) {
    struct index_entry e = {.version = version, .leaf = *leaf};
    e.check = entry_check(&e);
    *entry_of(s, chunk) = e;
    s->state.version[chunk] = version;
    s->state.leaf[chunk].digest = *leaf;
}

static void set_missing(struct sync *s, uint32_t chunk) {
    set_entry(s, chunk, SYNC_MISSING, &(struct digest){{0}});
}

static int flush_index(struct sync *s, uint32_t first, uint32_t count) {
    return s->disk.flush(s->disk.arg, "index",
                         sizeof(struct index_header) + first * sizeof(struct index_entry),
                         count * sizeof(struct index_entry), &s->failure);
}

/* The leaves of many chunks as they are now, on several threads. */
static void leaves_of(struct sync *s, const uint32_t *chunks, uint32_t count, struct digest_piece *piece) {
    for (uint32_t i = 0; i < count; i++) {
        size_t first = chunk_first(s, chunks[i]),
               bytes = chunk_elements(s, chunks[i]) * sizeof(float);
        piece[i] = (struct digest_piece){.index = chunks[i],
                                         .a = s->state.anchor + first,
                                         .a_length = bytes,
                                         .b = s->state.momentum + first,
                                         .b_length = bytes};
    }
    digest_leaves(piece, count, 0);
}

/* ---- flushing runs of neighbours -------------------------------------------------------- */

static int flush_arrays(struct sync *s, uint32_t first, uint32_t count) {
    size_t begin = chunk_first(s, first), last = first + count - 1;
    size_t end = chunk_first(s, (uint32_t)last) + chunk_elements(s, (uint32_t)last);
    size_t offset = begin * sizeof(float), bytes = (end - begin) * sizeof(float);
    if (s->disk.flush(s->disk.arg, "anchor", offset, bytes, &s->failure)) return -1;
    return s->disk.flush(s->disk.arg, "momentum", offset, bytes, &s->failure);
}

static int for_runs(struct sync *s, const uint32_t *chunks, uint32_t count,
                    int (*flush)(struct sync *s, uint32_t first, uint32_t count)) {
    for (uint32_t i = 0, n; i < count; i += n) {
        for (n = 1; i + n < count && chunks[i + n] == chunks[i] + n; n++) continue;
        if (flush(s, chunks[i], n)) return -1;
    }
    return 0;
}

/* ---- the journal ------------------------------------------------------------------------ */

/* It is overwritten from change to change: when one begins, the one before is durable. One that is torn has
 * another digest, or values that are not those of their leaves; then no chunk has been changed under it. */

static uint32_t journal_chunks_max(const struct sync *s) {
    uint32_t n = SYNC_BATCH_ELEMENTS / s->chunk_elements + 1;
    if (n > SYNC_BATCH_CHUNKS) n = SYNC_BATCH_CHUNKS;
    return n < s->chunk_count ? n : s->chunk_count;
}

static size_t journal_bytes_max(const struct sync *s) {
    return sizeof(struct journal_head) +
           journal_chunks_max(s) *
               (sizeof(struct journal_chunk) + 2 * sizeof(float) * (size_t)s->chunk_elements);
}

static uint8_t *journal_map(struct sync *s, bool *created) {
    return s->disk.map(s->disk.arg, "journal", journal_bytes_max(s), created, &s->failure);
}

static uint8_t *append(uint8_t *at, const void *bytes, size_t length) {
    memcpy(at, bytes, length);
    return at + length;
}

/* The chunk that stands at `at`, if it ends before `end`; *next: what comes after it. */
static bool journal_next(const struct sync *s, const uint8_t *at, const uint8_t *end,
                         struct journal_chunk *jc, const uint8_t **next) {
    if ((size_t)(end - at) < sizeof *jc) return false;
    memcpy(jc, at, sizeof *jc);
    if (jc->chunk >= s->chunk_count) return false;
    size_t bytes = 2 * sizeof(float) * chunk_elements(s, (uint32_t)jc->chunk);
    if ((size_t)(end - at) - sizeof *jc < bytes) return false;
    *next = at + sizeof *jc + bytes;
    return true;
}

/* Of all but the values, for which each chunk's leaf stands. False: it is no journal. */
static bool journal_digest(const struct sync *s, const uint8_t *journal, struct digest *out) {
    struct journal_head head;
    struct journal_chunk jc;
    struct digest_stream d;
    const uint8_t *at = journal + sizeof head, *end = journal + journal_bytes_max(s);
    memcpy(&head, journal, sizeof head);
    digest_stream_init(&d);
    digest_stream_update(&d, &head, offsetof(struct journal_head, digest));
    for (uint64_t i = 0; i < head.count; i++) {
        if (!journal_next(s, at, end, &jc, &at)) return false;
        digest_stream_update(&d, &jc, sizeof jc);
    }
    *out = digest_stream_final(&d);
    return true;
}

/* Returns how long it is. */
static size_t fill_journal(struct sync *s, uint8_t *journal, const uint32_t *chunks,
                           uint32_t count) {
    struct journal_head head = {.magic = "ITLJRNL"};
    uint8_t *at = journal + sizeof head;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t c = chunks[i];
        if (s->state.version[c] == SYNC_MISSING) continue;
        struct journal_chunk jc = {
            .chunk = c, .version = s->state.version[c], .leaf = s->state.leaf[c].digest};
        size_t bytes = chunk_elements(s, c) * sizeof(float);
        at = append(at, &jc, sizeof jc);
        at = append(at, s->state.anchor + chunk_first(s, c), bytes);
        at = append(at, s->state.momentum + chunk_first(s, c), bytes);
        head.count++;
    }
    append(journal, &head, sizeof head);
    bool ours = journal_digest(s, journal, &head.digest);
    assert(ours);
    append(journal, &head, sizeof head);
    return (size_t)(at - journal);
}

static bool has_something(const struct sync *s, const uint32_t *chunks, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        if (s->state.version[chunks[i]] != SYNC_MISSING) return true;
    return false;
}

int state_change_begin(struct sync *s, const uint32_t *chunks, uint32_t count) {
    bool created;
    for (uint32_t i = 0; s->before_change && i < count; i++)
        s->before_change(s->before_change_arg, chunks[i]);
    if (!has_something(s, chunks, count)) return 0;
    assert(count <= journal_chunks_max(s));
    uint8_t *journal = journal_map(s, &created);
    if (!journal) return -1;
    return s->disk.flush(s->disk.arg, "journal", 0, fill_journal(s, journal, chunks, count), &s->failure);
}

int state_change_end(struct sync *s, const uint32_t *chunks, const uint64_t *versions,
                     uint32_t count) {
    struct digest_piece piece[SYNC_BATCH_CHUNKS];
    if (for_runs(s, chunks, count, flush_arrays)) return -1;
    leaves_of(s, chunks, count, piece);
    for (uint32_t i = 0; i < count; i++) set_entry(s, chunks[i], versions[i], &piece[i].leaf);
    if (for_runs(s, chunks, count, flush_index)) return -1;
    state_survey(s);
    s->progress++;
    return 0;
}

/* ---- at start --------------------------------------------------------------------------- */

static int restore_chunk(struct sync *s, const struct journal_chunk *jc, const uint8_t *anchor,
                         const uint8_t *momentum) {
    uint32_t c = (uint32_t)jc->chunk;
    size_t first = chunk_first(s, c), bytes = chunk_elements(s, c) * sizeof(float);
    memcpy(s->state.anchor + first, anchor, bytes);
    memcpy(s->state.momentum + first, momentum, bytes);
    struct digest leaf = leaf_of(s, c);
    if (!digest_equal(&leaf, &jc->leaf)) return 0; /* it was wrong before: still missing */
    if (flush_arrays(s, c, 1)) return -1;
    set_entry(s, c, jc->version, &leaf);
    return flush_index(s, c, 1);
}

/* Chunks of the journal that are missing now. */
static int restore(struct sync *s) {
    struct journal_head head;
    struct journal_chunk jc;
    struct digest d;
    bool created;
    const uint8_t *journal = journal_map(s, &created);
    if (!journal) return -1;
    memcpy(&head, journal, sizeof head);
    if (memcmp(head.magic, "ITLJRNL", sizeof head.magic) || !journal_digest(s, journal, &d) ||
        !digest_equal(&d, &head.digest))
        return 0;
    const uint8_t *at = journal + sizeof head, *end = journal + journal_bytes_max(s), *next;
    for (uint64_t i = 0; i < head.count && journal_next(s, at, end, &jc, &next); i++, at = next) {
        const uint8_t *anchor = at + sizeof jc;
        size_t bytes = chunk_elements(s, (uint32_t)jc.chunk) * sizeof(float);
        if (s->state.version[jc.chunk] == SYNC_MISSING &&
            restore_chunk(s, &jc, anchor, anchor + bytes))
            return -1;
    }
    return 0;
}

/* Believe the index only where the arrays say the same. */
static bool is_there(struct sync *s, uint32_t chunk) {
    struct index_entry e = *entry_of(s, chunk);
    return e.check == entry_check(&e) && e.version != SYNC_MISSING;
}

static void check_batch(struct sync *s, uint32_t *chunks, uint32_t count) {
    struct digest_piece piece[SYNC_BATCH_CHUNKS];
    leaves_of(s, chunks, count, piece);
    for (uint32_t i = 0; i < count; i++) {
        struct index_entry e = *entry_of(s, chunks[i]);
        if (digest_equal(&piece[i].leaf, &e.leaf)) set_entry(s, chunks[i], e.version, &e.leaf);
        else set_missing(s, chunks[i]);
    }
}

static void check_chunks(struct sync *s) {
    uint32_t chunks[SYNC_BATCH_CHUNKS], n = 0;
    for (uint32_t c = 0; c < s->chunk_count; c++) {
        if (is_there(s, c)) chunks[n++] = c;
        else set_missing(s, c);
        if (n < SYNC_BATCH_CHUNKS && c + 1 < s->chunk_count) continue;
        check_batch(s, chunks, n);
        n = 0;
    }
}

static int open_arrays(struct sync *s) {
    struct state *st = &s->state;
    size_t bytes = s->config.elements * sizeof(float);
    struct index_header want = {
        .magic = "ITLINDX", .elements = s->config.elements, .chunk_elements = s->chunk_elements};
    size_t index_bytes = sizeof want + s->chunk_count * sizeof(struct index_entry);
    bool created;
    if (!(st->anchor = s->disk.map(s->disk.arg, "anchor", bytes, &created, &s->failure)) ||
        !(st->momentum = s->disk.map(s->disk.arg, "momentum", bytes, &created, &s->failure)) ||
        !(st->index_map = s->disk.map(s->disk.arg, "index", index_bytes, &created, &s->failure)))
        return -1;
    if (!memcmp(st->index_map, &want, sizeof want)) return 0;
    memset(st->index_map, 0, index_bytes); /* new, or of another chunk size */
    memcpy(st->index_map, &want, sizeof want);
    return s->disk.flush(s->disk.arg, "index", 0, index_bytes, &s->failure);
}

int state_open(struct sync *s) {
    struct state *st = &s->state;
    st->version = sync_alloc(s, s->chunk_count, sizeof *st->version);
    st->leaf = sync_alloc(s, s->chunk_count, sizeof *st->leaf);
    if (s->failure.code || open_arrays(s)) return -1;
    check_chunks(s);
    state_survey(s);
    if (st->missing && restore(s)) return -1;
    state_survey(s);
    /* What the process before us wrote and did not flush is durable before anybody hears that we have it. */
    if (st->missing < s->chunk_count &&
        (flush_arrays(s, 0, s->chunk_count) || flush_index(s, 0, s->chunk_count)))
        return -1;
    return state_rewind(s); /* it may have died before that was done */
}

void state_release(struct sync *s) {
    for (uint32_t i = 0; i < SYNC_STATES_KEPT; i++) free(s->state.past[i].leaf);
    free(s->state.version);
    free(s->state.leaf);
}

/* ---- looking ---------------------------------------------------------------------------- */

/* The newest version says what all the others should be. */
static bool is_whole(struct sync *s, uint64_t newest) {
    uint64_t want[PROTO_FRAGMENTS_MAX] = {0};
    for (uint32_t f = 0; f < s->fragment_count; f++) want[f] = ledger_version(s, f, newest);
    for (uint32_t c = 0; c < s->chunk_count; c++)
        if (s->state.version[c] != want[s->place[c].fragment]) return false;
    return true;
}

const struct past_state *state_past(const struct sync *s, uint64_t index) {
    for (uint32_t i = 0; i < SYNC_STATES_KEPT; i++)
        if (s->state.past[i].leaf && s->state.past[i].index == index) return &s->state.past[i];
    return NULL;
}

static void keep_past(struct sync *s) {
    struct state *st = &s->state;
    const struct past_state *newest = state_past(s, st->index);
    if (newest && digest_equal(&newest->root, &st->root)) return;
    struct past_state *p = &st->past[st->past_next++ % SYNC_STATES_KEPT];
    if (!p->leaf && !(p->leaf = sync_alloc(s, s->chunk_count, sizeof *p->leaf))) return;
    memcpy(p->leaf, st->leaf, s->chunk_count * sizeof *p->leaf);
    p->index = st->index;
    p->root = st->root;
}

/* What was true of the states before is not true of what comes now. */
static void forget_past(struct sync *s) {
    for (uint32_t i = 0; i < SYNC_STATES_KEPT; i++) {
        free(s->state.past[i].leaf);
        s->state.past[i] = (struct past_state){0};
    }
    s->state.known = false;
}

void state_survey(struct sync *s) {
    struct state *st = &s->state;
    uint64_t newest = 0;
    st->missing = 0;
    for (uint32_t c = 0; c < s->chunk_count; c++) {
        st->missing += st->version[c] == SYNC_MISSING;
        if (st->version[c] != SYNC_MISSING && st->version[c] > newest) newest = st->version[c];
    }
    st->whole = st->missing == 0 && is_whole(s, newest);
    if (!st->whole) return;
    st->known = true;
    st->index = newest;
    st->root = digest_tree_root(st->leaf, s->chunk_count);
    keep_past(s);
}

bool state_current(struct sync *s) {
    return s->state.whole && s->state.index == ledger_head_version(s);
}

int state_forget(struct sync *s) {
    for (uint32_t c = 0; c < s->chunk_count; c++) set_missing(s, c);
    s->disk.remove(s->disk.arg, "journal"); /* its copies are as doubtful */
    forget_past(s);
    state_survey(s);
    return flush_index(s, 0, s->chunk_count);
}

int state_rewind(struct sync *s) {
    const struct ledger *l = &s->ledger;
    bool changed = false;
    for (uint32_t c = 0; c < s->chunk_count; c++) {
        uint64_t version = s->state.version[c], base = l->rewind.base[s->place[c].fragment];
        struct digest leaf = s->state.leaf[c].digest;
        if (version == SYNC_MISSING || version >= l->rewind.index) continue;
        if (version == base) set_entry(s, c, l->rewind.index, &leaf);
        else set_missing(s, c);
        changed = true;
    }
    if (!changed) return 0;
    s->disk.remove(s->disk.arg, "journal");
    forget_past(s);
    state_survey(s);
    return flush_index(s, 0, s->chunk_count);
}

int state_forget_chunks(struct sync *s, const uint8_t *chunks) {
    s->disk.remove(s->disk.arg, "journal");
    forget_past(s);
    for (uint32_t c = 0; c < s->chunk_count; c++) {
        if (!proto_set_has(chunks, c)) continue;
        set_missing(s, c);
        if (flush_index(s, c, 1)) return -1;
    }
    state_survey(s);
    return 0;
}
