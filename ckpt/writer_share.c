/* writer_share.c - parts that others send and look at; see writer.h and ckpt.h, "ckpt_writer_note". */
#include "ckpt/writer.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

/* ---- parts that others send and look at -------------------------------------------------------- */

/* With the mutex. */
static void leave_note(struct ckpt_writer *w, const struct ckpt_note *n) {
    while (w->note_count == NOTES_MAX && !w->abort) pthread_cond_wait(&w->changed, &w->mutex);
    if (w->abort) return;
    w->note[(w->note_first + w->note_count++) % NOTES_MAX] = *n;
    writer_notify(w);
}

static int make_note(struct ckpt_writer *w, uint32_t i, enum ckpt_note_kind kind, struct ckpt_note *n,
                     struct err *err) {
    const struct file *f = w->part[i].file;
    const struct ckpt_store_ops *ops = w->store->ops;
    struct ckpt_piece piece;
    *n = (struct ckpt_note){.kind = kind, .number = i, .object = f->of->name};
    if (kind == CKPT_NOTE_LOOKED) return 0;
    if (kind == CKPT_NOTE_SEND ? ops->upload_offer(f->upload, w->part[i].number, &n->part, err)
                               : ops->upload_check(f->upload, w->part[i].number, &n->part, err))
        return -1;
    if (ckpt_image_find(w->image, n->object, n->part.offset, n->part.bytes, &piece, err)) return -1;
    n->first = piece.first;
    return 0;
}

/* The next part to be given to others; parts if there is none just now. With the mutex. */
static uint32_t next_open(struct ckpt_writer *w, enum ckpt_note_kind kind, uint32_t from) {
    while (from < w->parts &&
           (w->part[from].turn != TURN_OPEN ||
            (kind == CKPT_NOTE_SEND && !w->store->ops->upload_whole(w->part[from].file->upload,
                                                                    w->part[from].number))))
        from++;
    return from;
}

/* What nobody else takes we send, some at a time. How many are on their way; -1: it failed. With the
 * mutex. */
static int send_ours(struct ckpt_writer *w, struct err *err) {
    const struct ckpt_store_ops *ops = w->store->ops;
    uint32_t under_way = 0, most = w->store->streams ? w->store->streams : 1;
    for (uint32_t i = 0; i < w->parts; i++) {
        struct shared *s = &w->part[i];
        if (s->turn == TURN_SENDING && ops->upload_sent(s->file->upload, s->number)) s->turn = TURN_OVER;
        under_way += s->turn == TURN_SENDING;
    }
    for (uint32_t i = 0; i < w->parts && under_way < most; i++) {
        struct shared *s = &w->part[i];
        bool ours = s->turn == TURN_OURS ||
                    (w->alone && s->turn == TURN_OPEN && ops->upload_whole(s->file->upload, s->number));
        if (!ours) continue;
        if (ops->upload_send(s->file->upload, s->number, err)) return -1;
        s->turn = TURN_SENDING;
        under_way++;
    }
    return (int)under_way;
}

/* Is it clear of each part what becomes of it? Of a part that we look at, not before all others are. */
static bool all_clear(const struct ckpt_writer *w, enum ckpt_note_kind kind) {
    for (uint32_t i = 0; i < w->parts; i++)
        if (w->part[i].turn != TURN_OVER && !(kind == CKPT_NOTE_CHECK &&
                                              (w->part[i].turn == TURN_OURS || w->alone)))
            return false;
    return w->state != CKPT_TAKING;
}

/* Until something changes. Our own sender tells nobody when it is done with a part. */
static void wait_for_change(struct ckpt_writer *w, bool sending) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 50000000;
    if (until.tv_nsec >= 1000000000) until.tv_nsec -= 1000000000, until.tv_sec++;
    if (sending) pthread_cond_timedwait(&w->changed, &w->mutex, &until);
    else pthread_cond_wait(&w->changed, &w->mutex);
}

int writer_let_others(struct ckpt_writer *w, enum ckpt_note_kind kind, struct err *err) {
    int r = 0;
    pthread_mutex_lock(&w->mutex);
    for (uint32_t i = 0; i < w->parts; i++) w->part[i].turn = TURN_OPEN;
    w->room = NOTES_MAX;
    while (!r && !w->abort && w->state != CKPT_FAILED && !all_clear(w, kind)) {
        int sending = kind == CKPT_NOTE_SEND ? send_ours(w, err) : 0;
        if ((r = sending < 0 ? -1 : 0)) break;
        bool more = w->with_others < w->room || (w->with_others < NOTES_MAX &&
                                                 (uint32_t)sending < w->store->streams);
        uint32_t i = w->alone || !more ? w->parts : next_open(w, kind, 0);
        if (i == w->parts) {
            if (!all_clear(w, kind)) wait_for_change(w, sending > 0);
            continue;
        }
        struct ckpt_note note;
        w->part[i].turn = TURN_THEIRS;
        w->with_others++;
        pthread_mutex_unlock(&w->mutex);
        r = make_note(w, i, kind, &note, err);
        pthread_mutex_lock(&w->mutex);
        if (!r) leave_note(w, &note);
    }
    pthread_mutex_unlock(&w->mutex);
    return r || writer_aborted(w, err) ? -1 : 0;
}

/* What the store has must be what we put. */
static int look_at(struct ckpt_writer *w, uint32_t i, struct err *err) {
    const struct file *f = w->part[i].file;
    struct ckpt_part p;
    if (writer_aborted(w, err) || w->store->ops->upload_check(f->upload, w->part[i].number, &p, err))
        return -1;
    uint8_t *bytes = malloc((size_t)p.bytes);
    if (!bytes) return err_set(err, ERR_MEMORY, "%s: out of memory for a part", w->prefix);
    int r = object_get(w->store, f->name, p.offset, bytes, (size_t)p.bytes, err);
    if (!r && (r = ckpt_part_matches(&p, bytes, err)))
        err_prefix(err, "%.100s: the store gives back other bytes in part %u", f->name,
                   w->part[i].number + 1);
    free(bytes);
    return r;
}

int writer_look(struct ckpt_writer *w, struct err *err) {
    uint32_t draw = 0;
    ssize_t got = getrandom(&draw, sizeof draw, 0);
    (void)got; /* the first part of each then */
    int r = 0;
    for (uint32_t i = 0; !r && i < w->parts; i++) {
        const struct file *f = w->part[i].file;
        bool drawn = i - f->first_part == draw % f->parts;
        if (w->part[i].turn == TURN_OVER && !drawn) continue;
        struct ckpt_note note;
        if ((r = look_at(w, i, err))) break;
        make_note(w, i, CKPT_NOTE_LOOKED, &note, NULL);
        pthread_mutex_lock(&w->mutex);
        leave_note(w, &note);
        pthread_mutex_unlock(&w->mutex);
    }
    return r;
}

/* ---- the caller's side ---------------------------------------------------------------------------- */

bool ckpt_writer_note(struct ckpt_writer *w, struct ckpt_note *out) {
    pthread_mutex_lock(&w->mutex);
    bool any = w->note_count > 0;
    if (any) {
        *out = w->note[w->note_first];
        w->note_first = (w->note_first + 1) % NOTES_MAX;
        w->note_count--;
        pthread_cond_broadcast(&w->changed);
    }
    pthread_mutex_unlock(&w->mutex);
    return any;
}

void ckpt_writer_settle(struct ckpt_writer *w, uint32_t number, bool done) {
    pthread_mutex_lock(&w->mutex);
    if (number < w->parts && w->part[number].turn == TURN_THEIRS) {
        w->part[number].turn = done ? TURN_OVER : TURN_OURS;
        w->with_others--;
        w->room = done ? w->with_others + 1 : w->with_others;
        pthread_cond_broadcast(&w->changed);
    }
    pthread_mutex_unlock(&w->mutex);
}

void ckpt_writer_alone(struct ckpt_writer *w) {
    pthread_mutex_lock(&w->mutex);
    w->alone = true;
    w->with_others = 0;
    for (uint32_t i = 0; i < w->parts; i++)
        if (w->part[i].turn == TURN_THEIRS) w->part[i].turn = TURN_OURS;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->mutex);
}
