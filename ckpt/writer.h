/* writer.h - what the files of the writer share; for nobody else. writer.c is the caller's side: creating one,
 * handing ranges over, asking how it is. writer_work.c is what the writer's own thread does, one straight story:
 * small objects, syncing, completing, hashing, publishing. writer_share.c gives parts to others, and takes back
 * what they leave. */
#ifndef INTELLECT_CKPT_WRITER_H
#define INTELLECT_CKPT_WRITER_H

#include <pthread.h>

#include "ckpt/internal.h"

#define SMALL_MAX 16
#define NOTES_MAX 32 /* parts that are with others at a time, and what the caller has not taken yet */
#define CLAIM_BYTES 16

/* A tensor file on its way. */
struct file {
    char name[CKPT_NAME_BYTES_MAX + 1]; /* with the prefix */
    const struct image_file *of;
    struct ckpt_upload *upload;
    uint64_t dirty_bytes; /* put and not synced, where the store does not say it; under the mutex */
    bool completed;
    uint32_t first_part, parts; /* of the writer's; 0: too small to be shared */
};

/* A part that others may send and look at. */
/* OURS: nobody else will; SENDING: we do; OVER: it is done, by others or sent by us. */
enum turn { TURN_OPEN, TURN_THEIRS, TURN_OURS, TURN_SENDING, TURN_OVER };
struct shared {
    struct file *file;
    uint32_t number; /* in the file */
    enum turn turn;  /* first of sending, then of looking; under the mutex */
};

struct small {
    const char *name;
    struct ckpt_blob blob;
    bool put;
};

struct range {
    uint64_t first, end;
};

struct ckpt_writer {
    struct ckpt_store *store;
    char prefix[CKPT_PREFIX_BYTES_MAX + 1];
    uint8_t claim[CLAIM_BYTES];
    struct msg_genesis genesis;
    uint64_t elements;
    struct manifest manifest; /* objects in the order they were added; digests come in the end */

    enum ckpt_weights weights;
    struct ckpt_image *image;
    struct file *file; /* of the image's */
    uint32_t files;
    uint16_t *narrow; /* room for as many elements as ever came at once */
    size_t narrow_room;
    struct small small[SMALL_MAX];
    uint32_t small_count;

    struct shared *part; /* NULL: nothing is shared */
    uint32_t parts;

    struct range *taken; /* ascending, disjoint, not touching; the caller's thread only */
    size_t taken_count, taken_capacity;

    struct ckpt_blob manifest_bytes;
    struct manifest_sig sig;
    bool manifest_tried; /* from here on it may be there, and we remove nothing */
    bool settled;        /* what was put stays, or is removed again */

    int event;
    pthread_t thread;
    bool thread_runs, joined;
    pthread_mutex_t mutex; /* guards all from `state` on and every dirty_bytes */
    pthread_cond_t changed;
    enum ckpt_state state;
    bool alone; /* nobody answers for parts any more */
    uint32_t with_others, room; /* parts; and how many others seem to have room for */
    struct ckpt_note note[NOTES_MAX]; /* a ring */
    uint32_t note_first, note_count;
    bool abort, putting, ended; /* the caller's thread is in put_part; the worker waits for nothing more */
    struct err failure;
};

/* ---- writer.c ---- */
void writer_notify(struct ckpt_writer *w);
enum ckpt_state writer_state(const struct ckpt_writer *w);
/* The first failure is the one that counts. */
void writer_enter(struct ckpt_writer *w, enum ckpt_state state, const struct err *why);
bool writer_aborted(struct ckpt_writer *w, struct err *err);
/* The file worth a sync: with much in it, or the fullest of many with little, once all together hold the
 * caller up; else NULL. Under the mutex. */
struct file *writer_most_dirty(struct ckpt_writer *w);

/* ---- writer_work.c ---- */
int writer_start(struct ckpt_writer *w, struct err *err);
/* What an unfinished attempt left goes. ERR_REFUSED: this checkpoint is there. */
int writer_clear_folder(struct ckpt_writer *w, struct err *err);
/* All that an attempt without an end put or began, once. */
void writer_remove_everything(struct ckpt_writer *w);

/* ---- writer_share.c ---- */
/* Give all parts to others as far as they have room, send the rest, and wait for what becomes of them. While
 * ranges come, a part is given once it is whole. Where one came back, no more are offered than others have,
 * and one more whenever one of theirs is done or our own sender has room for it. */
int writer_let_others(struct ckpt_writer *w, enum ckpt_note_kind kind, struct err *err);
/* We look at what nobody else did, and at one part of each file, whoever did: drawn now, so nobody knew
 * which. */
int writer_look(struct ckpt_writer *w, struct err *err);

#endif
