/* sync_catchup.c - chunks of state that no results can bring forward come from members who have
 * them, each checked against the agreed root of its version; a fresh run's first state is
 * derived from the genesis. The same file serves them to others, and moves AdamW's second
 * moments to a joiner. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "node/sync_internal.h"

/* ---- what is needed --------------------------------------------------------------------- */

/* Neighbours mostly have the same version. */
bool catchup_busy(struct sync *s) {
    uint64_t seen[PROTO_FRAGMENTS_MAX];
    bool have[PROTO_FRAGMENTS_MAX] = {false};
    if (state_current(s)) return false;
    for (uint32_t c = 0; c < s->chunk_count; c++) {
        uint32_t f = s->place[c].fragment;
        if (have[f] && seen[f] == s->state.version[c]) continue;
        if (apply_waits_for_donors(s, c)) return true;
        have[f] = true;
        seen[f] = s->state.version[c];
    }
    return false;
}

/* Contributions were made from a wrong anchor. */
static void forget_work(struct sync *s) {
    s->state.told = false;
    for (uint32_t f = 0; f < s->fragment_count; f++) contribution_drop(s, f);
    trainer_lose_work(s, SYNC_LOSS_STATE, "the state is being fetched anew");
    s->catchup.progress_ms = s->now;
}

void catchup_forget_state(struct sync *s) {
    state_forget(s);
    forget_work(s);
}

static void catchup_forget_chunks(struct sync *s, const uint8_t *chunks) {
    state_forget_chunks(s, chunks);
    forget_work(s);
}

static void drop_ready(struct catchup *cu) {
    for (uint32_t i = 0; i < cu->ready_count; i++) free(cu->ready[i].data);
    cu->ready_count = cu->verified_count = 0;
    cu->window = 0;
}

void catchup_release(struct sync *s) {
    drop_ready(&s->catchup);
    free(s->catchup.ready);
    free(s->catchup.asked);
    free(s->trainer.moments_in);
    s->trainer.moments_in = NULL;
}

static size_t state_bytes(const struct sync *s, uint32_t chunk) {
    return 2 * sizeof(float) * chunk_elements(s, chunk);
}

/* ---- donors ----------------------------------------------------------------------------- */

void catchup_set_donors(struct sync *s, const struct msg_address *list, uint32_t count,
                        bool replace) {
    struct catchup *cu = &s->catchup;
    peer_set_addresses(s, list, count);
    if (replace) cu->donor_count = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t k = 0;
        while (k < cu->donor_count && cu->donors[k] != list[i].member) k++;
        if (k < cu->donor_count || list[i].member == s->config.member) continue;
        if (cu->donor_count == SYNC_DONORS_MAX) { /* the newest are the likeliest to be alive */
            memmove(cu->donors, cu->donors + 1, (SYNC_DONORS_MAX - 1) * sizeof *cu->donors);
            cu->donor_count--;
        }
        cu->donors[cu->donor_count++] = list[i].member;
    }
}

static void forget_questions(struct sync *s) {
    struct catchup *cu = &s->catchup;
    for (uint32_t c = 0; cu->outstanding && c < s->chunk_count; c++) {
        if (!proto_set_has(cu->asked, c)) continue;
        proto_set_del(cu->asked, c);
        cu->outstanding--;
        cu->window -= state_bytes(s, c);
    }
    cu->asked_ms = 0;
}

static uint32_t donor_now(const struct catchup *cu) {
    return cu->donors[cu->turn % cu->donor_count];
}

/* Who has dialled us may have it, too: a member behind NAT, whom the coordinator can name to nobody. */
static void add_open_peers(struct sync *s) {
    struct catchup *cu = &s->catchup;
    for (uint32_t i = 0; i < s->peer_count && cu->donor_count < SYNC_DONORS_MAX; i++) {
        uint32_t k = 0;
        while (k < cu->donor_count && cu->donors[k] != s->peers[i]->id) k++;
        if (s->peers[i]->open && k == cu->donor_count) cu->donors[cu->donor_count++] = s->peers[i]->id;
    }
}

/* What was asked for is not coming. */
static void next_donor(struct sync *s) {
    struct catchup *cu = &s->catchup;
    uint32_t named = cu->donor_count;
    forget_questions(s);
    cu->turn++;
    if (!named || cu->turn % named) return;
    add_open_peers(s); /* nobody who was named had it */
    cu->turn = cu->donor_count > named ? named : 0;
    if (cu->turn == 0) cu->rest_ms = s->now + s->outer->heartbeat_ms; /* not at once again */
}

void catchup_on_root(struct sync *s, const struct msg_root *msg) {
    ledger_note_root(s, msg->index, &msg->root); /* chunks that came too early are judged in the pump */
}

/* The state it goes back to: from what is here, the checkpoint, or members that have it by then. */
int catchup_rewind(struct sync *s) {
    struct catchup *cu = &s->catchup;
    struct digest root;
    if (cu->asked) forget_questions(s);
    drop_ready(cu);
    cu->no_origin = false;
    cu->origin_ms = 0;
    cu->progress_ms = s->now;
    s->state.told = false;
    if (state_rewind(s)) return -1;
    if (s->state.whole && ledger_root(s, s->state.index, &root) &&
        !digest_equal(&root, &s->state.root))
        catchup_forget_state(s);
    return s->failure.code ? -1 : 0;
}

/* The referee knows which chunks are wrong, or that some are; they are wrong in what we made of them since,
 * too. */
int catchup_on_resync(struct sync *s, const struct msg_resync *msg) {
    const struct past_state *ours = state_past(s, msg->index);
    catchup_set_donors(s, msg->donors, msg->donors_count, true);
    ledger_note_root(s, msg->index, &msg->root);
    if (!ours || digest_equal(&ours->root, &msg->root)) {
        for (uint32_t i = 0; ours && i < msg->donors_count; i++) peer_link(s, msg->donors[i].member);
        return 0; /* they may be who needs it from us, behind NAT: they ask when there is a link */
    }
    bool some = msg->wrong.length == bitmap_bytes(s->chunk_count) &&
                bitmap_next(msg->wrong.data, s->chunk_count) >= 0;
    sync_log(s, SYNC_ERROR, "our state at ledger index %llu is not the run's: fetching %s anew",
             (unsigned long long)msg->index, some ? "what differs" : "it");
    if (some) catchup_forget_chunks(s, msg->wrong.data);
    else catchup_forget_state(s);
    return s->failure.code ? -1 : 0;
}

void catchup_on_leaves_get(struct sync *s, const struct msg_state_leaves_get *msg) {
    const struct past_state *then = state_past(s, msg->index);
    struct msg_state_leaves leaves = {.index = msg->index,
                                      .leaves = then ? then->leaf : NULL,
                                      .leaves_count = then ? s->chunk_count : 0};
    sync_send(s, MSG_STATE_LEAVES, 0, &leaves);
}

/* ---- asking ----------------------------------------------------------------------------- */

static bool is_ready(const struct catchup *cu, uint32_t chunk) {
    for (uint32_t i = 0; i < cu->ready_count; i++)
        if (cu->ready[i].chunk == chunk) return true;
    return false;
}

/* A donor's state is of use from here on: what came later can be applied to it. */
static uint64_t index_min(struct sync *s) {
    const struct commit *c;
    uint64_t min = s->ledger.rewind.index;
    for (uint32_t i = 0; (c = ledger_recent(s, i)); i++) {
        if (c->unavailable) return c->index;
        min = c->index;
    }
    return min;
}

static void ask_donor(struct sync *s, struct peer *p) {
    struct catchup *cu = &s->catchup;
    size_t bytes = bitmap_bytes(s->chunk_count);
    uint8_t *chunks = sync_alloc(s, bytes, 1);
    if (!chunks) return;
    uint32_t n = 0;
    for (uint32_t c = 0; c < s->chunk_count && cu->window < SYNC_WINDOW_BYTES; c++) {
        if (proto_set_has(cu->asked, c) || !apply_waits_for_donors(s, c) || is_ready(cu, c))
            continue;
        proto_set_add(cu->asked, c);
        proto_set_add(chunks, c);
        cu->outstanding++;
        cu->window += state_bytes(s, c);
        n++;
    }
    struct msg_state_get get = {.index_min = index_min(s),
                                .chunks = {chunks, (uint32_t)bytes}};
    if (n) {
        peer_send(s, p, MSG_STATE_GET, s->term, 0, &get, bytes);
        cu->asked_ms = s->now;
    }
    free(chunks);
}

/* A donor that does not answer is left for the next; when none has anything for long, only the
 * coordinator can name others. */
static void ask_donors(struct sync *s) {
    struct catchup *cu = &s->catchup;
    if (s->now - cu->progress_ms >= 2 * (uint64_t)s->outer->silence_ms_max) {
        cu->progress_ms = s->now;
        if (s->connected) sync_disconnect(s, "no donor has the state; asking for others");
        return;
    }
    if (cu->donor_count == 0) add_open_peers(s);
    if (cu->donor_count == 0) return;
    if (cu->asked_ms && s->now - cu->asked_ms >= 2 * s->outer->heartbeat_ms) next_donor(s);
    if (s->now < cu->rest_ms || (cu->outstanding && cu->window > SYNC_WINDOW_BYTES / 2)) return;
    struct peer *p = peer_link(s, donor_now(cu));
    if (p && p->open) ask_donor(s, p);
    else if (!peer_reachable(s, donor_now(cu))) next_donor(s);
    else if (!cu->asked_ms) cu->asked_ms = s->now; /* the link is being made */
}

/* ---- judging ---------------------------------------------------------------------------- */

enum verdict { IS_RIGHT, IS_WRONG, IS_EARLY, IS_USELESS };

static enum verdict judge(struct sync *s, const struct donor_chunk *d) {
    struct digest root;
    if (d->index > ledger_head_version(s)) return IS_EARLY;
    uint64_t version = ledger_version(s, s->place[d->chunk].fragment, d->index);
    if (version == SYNC_MISSING) return IS_USELESS; /* from before a rewind, or too long ago */
    if (version != d->version) return IS_WRONG;
    if (!ledger_root(s, d->index, &root)) return IS_EARLY;
    size_t half = chunk_elements(s, d->chunk) * sizeof(float);
    struct digest leaf = digest_leaf2(d->chunk, d->data, half, d->data + half, half);
    bool right = digest_tree_verify(&root, &leaf, d->chunk, s->chunk_count, d->path, d->path_count);
    return right ? IS_RIGHT : IS_WRONG;
}

static void forget_chunk(struct sync *s, uint32_t i) {
    struct catchup *cu = &s->catchup;
    cu->window -= state_bytes(s, cu->ready[i].chunk);
    cu->verified_count -= cu->ready[i].verified;
    free(cu->ready[i].data);
    cu->ready[i] = cu->ready[--cu->ready_count];
}

/* Chunk i of what was received: keep it or not. */
static void judge_chunk(struct sync *s, uint32_t i) {
    struct catchup *cu = &s->catchup;
    struct donor_chunk *d = &cu->ready[i];
    struct peer *p = peer_find(s, d->peer);
    switch (judge(s, d)) {
    case IS_RIGHT:
        d->verified = true;
        cu->verified_count++;
        cu->progress_ms = s->now;
        return;
    case IS_EARLY:
        if (s->now - d->came_ms < SYNC_EARLY_HEARTBEATS * (uint64_t)s->outer->heartbeat_ms) return;
        break; /* the donor has a newer one by now */
    case IS_WRONG:
        forget_chunk(s, i);
        if (p && p->open) peer_close(s, p, "a chunk of its state is not the run's");
        return;
    case IS_USELESS: break;
    }
    forget_chunk(s, i);
}

static void judge_early(struct sync *s) {
    struct catchup *cu = &s->catchup;
    for (uint32_t i = cu->ready_count; i-- > 0;)
        if (i < cu->ready_count && !cu->ready[i].verified) judge_chunk(s, i);
}

/* What came neither way is brought forward from what the own disk has, by the results of commits. */
static void say_catching_up(struct sync *s, bool begins) {
    struct catchup *cu = &s->catchup;
    unsigned long long index = ledger_head_version(s);
    if (begins) {
        cu->from_members = cu->from_origin = 0;
        sync_log(s, SYNC_INFO, "catching up to ledger index %llu: %u of %u chunks are missing", index,
                 s->state.missing, s->chunk_count);
    } else {
        sync_log(s, SYNC_INFO,
                 "caught up to ledger index %llu: %u chunks from members, %u from %s, the others were here",
                 index, cu->from_members, cu->from_origin,
                 s->ledger.rewind.index || s->genesis.init_from_count ? "the checkpoint" : "the seed");
    }
}

void catchup_pump(struct sync *s) {
    struct catchup *cu = &s->catchup;
    bool busy = catchup_busy(s);
    if (cu->ready_count > cu->verified_count) judge_early(s);
    if (busy != cu->busy && s->ledger.commit_count) say_catching_up(s, busy);
    cu->busy = busy;
    if (!s->synced || !busy) {
        cu->progress_ms = s->now;
        return;
    }
    if (!cu->asked && !(cu->asked = sync_alloc(s, bitmap_bytes(s->chunk_count), 1))) return;
    cu->initialising = s->ledger.head_version == s->ledger.rewind.index && s->state.missing > 0 &&
                       s->now >= cu->origin_ms;
    if (!cu->initialising) ask_donors(s);
}

/* ---- answers ---------------------------------------------------------------------------- */

static bool keep_chunk(struct sync *s, const struct peer *p, const struct msg_state *msg) {
    struct catchup *cu = &s->catchup;
    if (sync_grow(s, &cu->ready, cu->ready_count, &cu->ready_capacity, sizeof *cu->ready))
        return false;
    struct donor_chunk *d = &cu->ready[cu->ready_count];
    *d = (struct donor_chunk){.chunk = msg->chunk,
                              .peer = p->id,
                              .version = msg->version,
                              .index = msg->index,
                              .came_ms = s->now,
                              .path_count = msg->path_count,
                              .data = sync_alloc(s, msg->data.length, 1)};
    if (!d->data) return false;
    if (msg->path_count) memcpy(d->path, msg->path, msg->path_count * sizeof *msg->path);
    memcpy(d->data, msg->data.data, msg->data.length);
    cu->window += msg->data.length;
    cu->ready_count++;
    return true;
}

/* Also one that took longer than we wait for an answer: from a slow donor no other would ever come. */
static bool is_welcome(struct sync *s, uint32_t chunk) {
    const struct catchup *cu = &s->catchup;
    return proto_set_has(cu->asked, chunk) ||
           (apply_waits_for_donors(s, chunk) && !is_ready(cu, chunk) && cu->window < SYNC_WINDOW_BYTES);
}

void catchup_on_state(struct sync *s, struct peer *p, const struct msg_state *msg) {
    struct catchup *cu = &s->catchup;
    if (!cu->asked || msg->chunk >= s->chunk_count || !is_welcome(s, msg->chunk)) return;
    if (proto_set_has(cu->asked, msg->chunk)) {
        proto_set_del(cu->asked, msg->chunk);
        cu->outstanding--;
        cu->window -= state_bytes(s, msg->chunk);
        cu->asked_ms = s->now;
    }
    uint64_t have = s->state.version[msg->chunk];
    if (msg->data.length != state_bytes(s, msg->chunk) || msg->path_count > DIGEST_PATH_MAX) {
        peer_close(s, p, "a chunk of its state has another size");
        return;
    }
    if (have != SYNC_MISSING && msg->version <= have) return;
    if (keep_chunk(s, p, msg)) judge_chunk(s, cu->ready_count - 1);
}

void catchup_on_none(struct sync *s, struct peer *p, const struct msg_none *msg) {
    (void)msg;
    if (s->catchup.donor_count && s->catchup.asked && donor_now(&s->catchup) == p->id)
        next_donor(s);
}

bool catchup_owes(const struct sync *s, uint32_t member) {
    const struct catchup *cu = &s->catchup;
    return cu->outstanding && cu->donor_count && donor_now(cu) == member;
}

void catchup_ask_again(struct sync *s, const struct peer *p) {
    if (catchup_owes(s, p->id)) forget_questions(s);
}

void catchup_on_peer_closed(struct sync *s, const struct peer *p) {
    if (s->catchup.donor_count && s->catchup.asked && donor_now(&s->catchup) == p->id)
        next_donor(s);
    if (s->trainer.moments_in && s->trainer.moments_peer == p->id)
        moments_on_none(s, peer_find(s, p->id));
}

/* ---- storing ---------------------------------------------------------------------------- */

bool catchup_has_work(struct sync *s) {
    const struct catchup *cu = &s->catchup;
    if (!trainer_takes_changes(s)) return false;
    if (cu->initialising && s->state.missing) return true;
    return cu->verified_count &&
           (cu->outstanding == 0 ||
            (uint64_t)cu->verified_count * s->chunk_elements >= SYNC_BATCH_ELEMENTS);
}

static void store_chunk(struct sync *s, uint32_t chunk, const float *anchor,
                        const float *momentum) {
    size_t first = chunk_first(s, chunk), n = chunk_elements(s, chunk);
    bool was_missing = s->state.version[chunk] == SYNC_MISSING,
         summed = apply_summed_here(s, chunk);
    if (trainer_follows(s) && was_missing) trainer_lose_work(s, SYNC_LOSS_STATE, "a chunk of the state was lost");
    memcpy(s->scratch2, s->state.anchor + first, n * sizeof *anchor);
    memcpy(s->state.anchor + first, anchor, n * sizeof *anchor);
    memcpy(s->state.momentum + first, momentum, n * sizeof *momentum);
    if (SYNC_HAS_FAULT(MOMENTUM_NOT_JOINED)) memset(s->state.momentum + first, 0, n * sizeof *momentum);
    apply_follow(s, chunk, summed);
}

/* Verified ones first, and they by chunk. */
static int by_chunk(const void *a, const void *b) {
    const struct donor_chunk *x = a, *y = b;
    if (x->verified != y->verified) return x->verified ? -1 : 1;
    return x->chunk < y->chunk ? -1 : x->chunk > y->chunk;
}

/* Results may have brought a chunk forward while a donor was sending it. */
static void drop_outdated(struct sync *s) {
    struct catchup *cu = &s->catchup;
    for (uint32_t i = cu->ready_count; i-- > 0;) {
        uint64_t version = s->state.version[cu->ready[i].chunk];
        if (version != SYNC_MISSING && cu->ready[i].version <= version) forget_chunk(s, i);
    }
}

static int store_ready(struct sync *s) {
    struct catchup *cu = &s->catchup;
    uint32_t chunks[SYNC_BATCH_CHUNKS], n, most = SYNC_BATCH_ELEMENTS / s->chunk_elements + 1;
    uint64_t versions[SYNC_BATCH_CHUNKS];
    drop_outdated(s);
    n = cu->verified_count;
    if (most > SYNC_BATCH_CHUNKS) most = SYNC_BATCH_CHUNKS;
    if (n > most) n = most;
    if (n == 0) return 0;
    qsort(cu->ready, cu->ready_count, sizeof *cu->ready, by_chunk);
    for (uint32_t i = 0; i < n; i++) {
        chunks[i] = cu->ready[i].chunk;
        versions[i] = cu->ready[i].version;
        if (SYNC_HAS_FAULT(JOIN_MISSES_COMMIT))
            versions[i] = s->ledger.last[s->place[chunks[i]].fragment];
    }
    if (state_change_begin(s, chunks, n)) return -1;
    for (uint32_t i = 0; i < n; i++) {
        const float *data = (const float *)(const void *)cu->ready[i].data;
        store_chunk(s, chunks[i], data, data + chunk_elements(s, chunks[i]));
        cu->window -= state_bytes(s, chunks[i]);
        free(cu->ready[i].data);
    }
    memmove(cu->ready, cu->ready + n, (cu->ready_count - n) * sizeof *cu->ready);
    cu->ready_count -= n;
    cu->verified_count -= n;
    cu->from_members += n;
    return state_change_end(s, chunks, versions, n);
}

/* How long nothing is asked of a checkpoint that cannot be had here, and of one that is being read. */
#define ORIGIN_ABSENT_MS 60000
#define ORIGIN_BUSY_MS SYNC_TICK_MS

/* Of the first state, or that of the newest rewind. 1: it cannot be had here now. */
static int load_chunk(struct sync *s, uint32_t chunk) {
    const struct ledger *l = &s->ledger;
    size_t first = chunk_first(s, chunk), count = chunk_elements(s, chunk);
    struct err err = {0};
    if (s->config.load(s->config.load_arg, l->rewind.index ? &l->rewind.to : NULL, first, count,
                       s->state.anchor + first, s->state.momentum + first, &err) == 0)
        return 0;
    if (err.code == ERR_NOT_FOUND || err.code == ERR_TIMEOUT) {
        struct catchup *cu = &s->catchup;
        bool absent = err.code == ERR_NOT_FOUND;
        if (absent && !cu->no_origin) sync_log(s, SYNC_INFO, "asking members for the state: %.200s", err.msg);
        cu->no_origin |= absent;
        cu->origin_ms = s->now + (absent ? ORIGIN_ABSENT_MS : ORIGIN_BUSY_MS);
        if (!absent) cu->progress_ms = s->now; /* it is on its way, whether members have it or not */
        return 1;
    }
    s->failure = err;
    return -1;
}

static int initialise(struct sync *s) {
    uint32_t chunks[SYNC_BATCH_CHUNKS] = {0}, n = 0;
    uint64_t versions[SYNC_BATCH_CHUNKS];
    size_t elements = 0;
    for (uint32_t c = 0;
         c < s->chunk_count && n < SYNC_BATCH_CHUNKS && elements < SYNC_WORK_ELEMENTS; c++) {
        if (s->state.version[c] != SYNC_MISSING) continue;
        versions[n] = s->ledger.rewind.index;
        chunks[n++] = c;
        elements += chunk_elements(s, c);
    }
    if (state_change_begin(s, chunks, n)) return -1;
    uint32_t loaded = 0;
    int r = 0;
    while (loaded < n && !r)
        if (!(r = load_chunk(s, chunks[loaded]))) loaded++;
    s->catchup.from_origin += loaded;
    if (r < 0 || (loaded && state_change_end(s, chunks, versions, loaded))) return -1;
    if (s->state.missing == 0 || loaded < n) s->catchup.initialising = false;
    return 0;
}

int catchup_work(struct sync *s) {
    uint64_t progress = s->progress;
    if (s->catchup.initialising ? initialise(s) : store_ready(s)) return -1;
    if (s->progress != progress) apply_arrived(s);
    return 0;
}

/* ---- serving the state ------------------------------------------------------------------ */

void catchup_on_state_get(struct sync *s, struct peer *p, const struct msg_state_get *msg) {
    size_t bytes = bitmap_bytes(s->chunk_count);
    if (msg->chunks.length != bytes) {
        peer_close(s, p, "it asks for a state of another size");
        return;
    }
    if (!p->states && !(p->states = sync_alloc(s, bytes, 1))) return;
    for (size_t i = 0; i < bytes; i++) p->states[i] |= msg->chunks.data[i];
    p->states_min = msg->index_min;
}

static void end_states(struct peer *p) {
    free(p->states);
    p->states = NULL;
}

static void send_state(struct sync *s, struct peer *p, uint32_t chunk) {
    struct msg_digest_item path[DIGEST_PATH_MAX];
    size_t first = chunk_first(s, chunk), half = chunk_elements(s, chunk) * sizeof(float);
    uint8_t *data = sync_alloc(s, 2 * half, 1);
    if (!data) return;
    memcpy(data, s->state.anchor + first, half);
    memcpy(data + half, s->state.momentum + first, half);
    struct msg_state state = {
        .chunk = chunk,
        .version = s->state.version[chunk],
        .index = s->state.index,
        .path = path,
        .path_count = (uint32_t)digest_tree_path(s->state.leaf, s->chunk_count, chunk, path),
        .data = {data, (uint32_t)(2 * half)},
    };
    peer_send(s, p, MSG_STATE, s->term, 0, &state, 2 * half);
    free(data);
}

/* While a commit is being applied here there is no root to show: the asker waits. */
bool catchup_send_state(struct sync *s, struct peer *p) {
    if (!p->states) return false;
    if (!s->state.whole || s->state.index < p->states_min) {
        if (!catchup_busy(s)) return false;
        peer_none(s, p, MSG_STATE_GET, s->term, 0, 0, 0, "catching up itself");
        end_states(p);
        return false;
    }
    int64_t chunk = bitmap_next(p->states, s->chunk_count);
    if (chunk < 0) {
        end_states(p);
        return false;
    }
    proto_set_del(p->states, (uint32_t)chunk);
    send_state(s, p, (uint32_t)chunk);
    return true;
}

/* ---- second moments: serving ------------------------------------------------------------ */

void moments_refuse_all(struct sync *s) {
    for (uint32_t i = 0; i < s->peer_count; i++) {
        struct peer *p = s->peers[i];
        if (p->moments && p->open)
            peer_none(s, p, MSG_MOMENTS_GET, s->term, 0, 0, 0, "no trainer here has any");
        p->moments = false;
    }
}

void moments_on_get(struct sync *s, struct peer *p) {
    struct trainer *t = &s->trainer;
    p->moments = true;
    p->moments_next = 0;
    if (t->state != TRAINER_TRAINING || t->want_moments || t->steps == 0) {
        moments_refuse_all(s);
    } else if (!t->moments && !t->exporting) {
        sync_act(s, SYNC_ACT_TRAINER_MOMENTS_EXPORT);
        t->exporting = true;
    }
}

void trainer_on_moments(struct sync *s, const struct sync_event *ev) {
    struct trainer *t = &s->trainer;
    if (!t->exporting) return;
    t->exporting = false;
    t->moments = ev->local;
    t->export_steps = ev->steps;
    if (!ev->local || ev->steps == 0) {
        t->moments = NULL;
        moments_refuse_all(s);
    }
}

bool moments_send_next(struct sync *s, struct peer *p) {
    struct trainer *t = &s->trainer;
    if (!p->moments || !t->moments) return false;
    uint32_t chunk = p->moments_next++;
    size_t bytes = chunk_elements(s, chunk) * sizeof(float);
    struct msg_moments msg = {
        .chunk = chunk,
        .steps = t->export_steps,
        .data = {(const uint8_t *)(t->moments + chunk_first(s, chunk)), (uint32_t)bytes}};
    peer_send(s, p, MSG_MOMENTS, s->term, 0, &msg, bytes);
    if (p->moments_next < s->chunk_count) return true;
    p->moments = false;
    for (uint32_t i = 0; i < s->peer_count; i++)
        if (s->peers[i]->moments) return true;
    t->moments = NULL; /* everybody is served: the next who asks gets newer ones */
    return true;
}

/* ---- second moments: fetching ----------------------------------------------------------- */

void moments_abort(struct sync *s) {
    struct trainer *t = &s->trainer;
    free(t->moments_in);
    t->moments_in = NULL;
    t->moments_got = 0;
    t->moments_peer = 0;
    t->want_moments = false;
}

/* The next member to ask: any that can be reached, in the order we came to know them. */
static struct peer *next_source(struct sync *s) {
    for (; s->trainer.moments_next < s->peer_count; s->trainer.moments_next++) {
        struct peer *p = s->peers[s->trainer.moments_next];
        if (p->open || p->port) return p;
    }
    return NULL;
}

static void ask_moments(struct sync *s, struct peer *p) {
    struct trainer *t = &s->trainer;
    if (!t->moments_in &&
        !(t->moments_in = sync_alloc(s, s->config.elements, sizeof *t->moments_in)))
        return;
    peer_send(s, p, MSG_MOMENTS_GET, s->term, 0, &(struct msg_moments_get){0}, 0);
    t->moments_peer = p->id;
    t->moments_got = 0;
    t->moments_ms = s->now;
}

/* Before the first step of a trainer without moments, in a run that has had steps: it is worth a
 * moment's wait, but nothing depends on it. */
bool moments_pending(struct sync *s) {
    struct trainer *t = &s->trainer;
    if (t->want_moments && t->steps) moments_abort(s);
    if (!t->want_moments) return false;
    if (t->moments_in && t->moments_got == s->chunk_count) return false;
    if (!s->synced) return false; /* it goes on with what it has */
    bool worth_it = s->ledger.commit_count > 0 && t->moments_tries < SYNC_MOMENTS_TRIES_MAX;
    struct peer *p = worth_it ? next_source(s) : NULL;
    if (!p) {
        moments_abort(s);
        return false;
    }
    if (t->moments_ms == 0) t->moments_ms = s->now;
    if (s->now - t->moments_ms >= 2 * (uint64_t)s->outer->heartbeat_ms) {
        moments_on_none(s, p);
    } else if (t->moments_peer != p->id && peer_link(s, p->id) && p->open) {
        ask_moments(s, p);
    }
    return t->want_moments;
}

void moments_on_none(struct sync *s, struct peer *p) {
    struct trainer *t = &s->trainer;
    if (!t->want_moments || (t->moments_peer && t->moments_peer != p->id)) return;
    t->moments_tries++;
    t->moments_next++;
    t->moments_peer = 0;
    t->moments_got = 0;
    t->moments_ms = 0;
}

static bool moments_make_sense(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!isfinite(x[i]) || x[i] < 0) return false;
    return true;
}

void moments_on_chunk(struct sync *s, struct peer *p, const struct msg_moments *msg) {
    struct trainer *t = &s->trainer;
    if (!t->moments_in || t->moments_peer != p->id || msg->chunk != t->moments_got ||
        msg->chunk >= s->chunk_count)
        return;
    size_t first = chunk_first(s, msg->chunk), n = chunk_elements(s, msg->chunk);
    bool fits = msg->data.length == n * sizeof(float) && msg->steps > 0;
    if (fits) memcpy(t->moments_in + first, msg->data.data, n * sizeof(float));
    if (!fits || !moments_make_sense(t->moments_in + first, n)) {
        peer_close(s, p, "its second moments are none");
        return;
    }
    t->moments_got++;
    t->moments_steps = msg->steps;
    t->moments_ms = s->now;
}
