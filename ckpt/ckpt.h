/* ckpt.h - a checkpoint: the state of a run at one ledger index, as objects in a store, with a
 * signed manifest that is put last; so a checkpoint is there whole or not at all. Who wants one,
 * and when, is not known here. The format is described in docs/checkpoint.md.
 *
 *   STORE/latest                                  names the newest complete checkpoint
 *   STORE/step-000000000042/                      the ledger index, 12 digits
 *     config.json generation_config.json          Hugging Face: LlamaForCausalLM opens the folder
 *     tokenizer.json tokenizer_config.json        the former where the writer had it
 *     model-00001-of-00002.safetensors ...        the weights: the anchor, or it rounded to bf16
 *     model.safetensors.index.json
 *     anchor-00001-of-00002.safetensors ...       the anchor, fp32, where the weights are bf16
 *     anchor.safetensors.index.json
 *     momentum-00001-of-00002.safetensors ...     the outer momentum, fp32, same tensor names
 *     momentum.safetensors.index.json
 *     cursor.json                                 spent samples, tokens, round, ledger index
 *     genesis.bin ledger.bin                      what makes the state checkable
 *     manifest.sig manifest.json                  every object with size and BLAKE2b; last */
#ifndef INTELLECT_CKPT_H
#define INTELLECT_CKPT_H

#include "ckpt/store.h"
#include "proto/err.h"
#include "proto/messages.h"

/* Like Hugging Face's default: a file never grows over this, except for one tensor alone. */
#define CKPT_SHARD_BYTES 5000000000ull
/* Above this a caller that has a choice should wait before it puts more; see below. */
#define CKPT_BACKLOG_BYTES (64u << 20)
#define CKPT_MANIFEST_BYTES_MAX PROTO_BLOB_BYTES_MAX
#define CKPT_LEDGER_BYTES_MAX (1u << 30)
#define CKPT_PREFIX_BYTES_MAX 63
#define CKPT_TOKENIZER_JSON_BYTES_MAX (32u << 20)

/* "step-000000000042": the folder of the checkpoint at a ledger index, below the store's URL. */
void ckpt_prefix(uint64_t index, char out[CKPT_PREFIX_BYTES_MAX + 1]);

/* The URL of that checkpoint, as it stands in the ledger: settings ("?endpoint=...") stay at the end.
 * ERR_CONFIG when it would be too long. */
int ckpt_url(const char *store_url, uint64_t index, char out[PROTO_URL_BYTES_MAX + 1],
             struct err *err);

/* The way back: the store of a checkpoint's URL. A URL that does not end in the checkpoint's folder is
 * the store's already. */
void ckpt_store_url(const char *url, uint64_t index, char out[PROTO_URL_BYTES_MAX + 1]);

/* ---- writing -----------------------------------------------------------------------------------
 * Made for an event loop that must not stop. The caller hands over element ranges of the canonical
 * vector in any order and speed, each element once. Instead of keeping a copy of the state, it
 * hands a chunk over right before a new commit overwrites it; the rest when it has time:
 *
 *   w = ckpt_writer_create(store, &meta, 0, err)
 *   before chunk c changes:   if (ckpt_writer_wants(w, first, n)) ckpt_writer_put(w, first, n, ...)
 *   when idle:                if (ckpt_writer_backlog_bytes(w) < CKPT_BACKLOG_BYTES) put another
 *   all put:                  ckpt_writer_finish(w)                   CKPT_TAKING -> CKPT_FINISHING
 *   fd readable, poll says:   CKPT_UNSIGNED: send ckpt_writer_manifest() away to be signed
 *   signature came:           ckpt_writer_publish(w, ...)              -> CKPT_PUBLISHING
 *   fd readable, poll says:   CKPT_PUBLISHED
 *   ckpt_writer_destroy(w)    at any time: removes everything unless it is published. It waits for the
 *                             thread; who must not calls ckpt_writer_stop(w) first, and this once
 *                             ckpt_writer_over(w)
 *
 * A thread of the writer's own syncs, hashes (reading back what the store has, which must have the state
 * root: else ERR_CORRUPT) and publishes; it runs at low priority and blocks all signals. Calls below do no more on the caller's thread than
 * copy bytes into the page cache, or into memory where the store is behind a network: 0.1 to 1.5 ms per MiB,
 * more where every core is busy, so where a stall hurts, hand over half a megabyte at a time. All calls come
 * from one thread. */

/* What the published weights are. */
enum ckpt_weights {
    CKPT_FP32, /* the anchor itself */
    CKPT_BF16  /* it rounded to the nearest, ties to even; it lies beside them: 2 bytes more a parameter */
};

/* What to write beside the tensors. All of it is copied or encoded by ckpt_writer_create. */
struct ckpt_meta {
    uint64_t index;           /* ledger index whose state this is */
    enum ckpt_weights weights;
    struct digest state_root; /* of the digest tree over anchor and momentum at that index */
    uint64_t round;
    uint64_t tokens_committed;
    /* Samples spent by commits up to index; any order, adjacent ranges are joined. */
    const struct msg_range *spent;
    uint32_t spent_count;
    /* The encoded msg_genesis: names the run, the model, the tokenizer and the root key. */
    struct proto_bytes genesis;
    /* Consecutive entries as signed, the last one that with `index`; at least that one. */
    const struct msg_signed_entry *ledger;
    uint32_t ledger_count;
    struct proto_bytes tokenizer_json; /* the file of a tokenizer that is not "bytes"; empty: it is named alone */
    bool shared; /* others send parts and look at them, where the store can be shared; see ckpt_writer_note */
};

enum ckpt_state {
    CKPT_TAKING,     /* ranges are being put */
    CKPT_FINISHING,  /* syncing and hashing */
    CKPT_UNSIGNED,   /* the manifest is ready to be signed */
    CKPT_PUBLISHING, /* manifest and `latest` are on their way */
    CKPT_PUBLISHED,  /* the end: a reader can open it */
    CKPT_FAILED      /* the end: ckpt_writer_poll says why */
};

struct ckpt_writer;

/* Begin the checkpoint of meta->index and reserve its space.
 *
 * store        borrowed until ckpt_writer_destroy.
 * shard_bytes  limit of one safetensors file; 0 = CKPT_SHARD_BYTES. Smaller files make more
 *              objects, larger ones longer uploads to start again.
 * Leftovers of an earlier attempt at the same index are removed first; that attempt, should it
 * still live somewhere, fails with ERR_STALE and harms nothing.
 * Where the store is behind a network it is not asked here: what it says comes from ckpt_writer_poll.
 * Returns NULL: ERR_REFUSED (the checkpoint exists), ERR_FULL (msg says how many bytes it needs),
 * ERR_CORRUPT (genesis, ledger or ranges make no sense), ERR_IO. */
struct ckpt_writer *ckpt_writer_create(struct ckpt_store *store, const struct ckpt_meta *meta,
                                       uint64_t shard_bytes, struct err *err);

/* Stop, wait for the thread (at most the fsync it is in) and free. What was not published is
 * removed from the store as far as possible without waiting for a network; ckpt_prune finds the
 * rest. Where the store is behind one and the writer was still at it, or had failed because of it, the
 * store can only be closed afterwards. NULL is fine. */
void ckpt_writer_destroy(struct ckpt_writer *w);

/* Stop without waiting. The thread ends soon, and removes what there is to be removed. */
void ckpt_writer_stop(struct ckpt_writer *w);
/* Has the thread ended, so that ckpt_writer_destroy() waits for nothing? */
bool ckpt_writer_over(struct ckpt_writer *w);

/* Is any of the elements [first, first + n) still to be put? False once the writer failed. */
bool ckpt_writer_wants(const struct ckpt_writer *w, uint64_t first, uint64_t n);

/* Hand over elements [first, first + n): fp32 anchor and momentum, n each, taken before return.
 * ERR_REFUSED: one of them was put before, or the range is outside the vector; nothing was
 * written. Another error is the end of this checkpoint (state CKPT_FAILED). */
int ckpt_writer_put(struct ckpt_writer *w, uint64_t first, size_t n, const float *anchor,
                    const float *momentum, struct err *err);

/* Bytes put that are not yet known to be on disk, or sent where that is our own business. */
uint64_t ckpt_writer_backlog_bytes(const struct ckpt_writer *w);

/* Every element is there: start to sync and hash. ERR_REFUSED names the first element missing. */
int ckpt_writer_finish(struct ckpt_writer *w, struct err *err);

/* An eventfd, owned by the writer, that becomes readable when the state changed. */
int ckpt_writer_fd(const struct ckpt_writer *w);

/* The state; makes the fd unreadable again. On CKPT_FAILED, *err is filled. */
enum ckpt_state ckpt_writer_poll(struct ckpt_writer *w, struct err *err);

/* Parts that others may send, and look at once they are there, by URLs in which the writer's key does not
 * stand. Whenever the fd is readable take all notes. The writer has all bytes on its own disk and does
 * itself what nobody else does; it also looks at one part of each file that others have looked at. */
enum ckpt_note_kind {
    CKPT_NOTE_SEND,  /* somebody may send this part; then ckpt_writer_settle */
    CKPT_NOTE_CHECK, /* somebody, not who sent it, may look at it; likewise */
    CKPT_NOTE_LOOKED /* the writer has, and it is right */
};
struct ckpt_note {
    enum ckpt_note_kind kind;
    uint32_t number;       /* the part's; the same in all notes */
    const char *object;    /* the file's name; the writer's memory */
    uint64_t first;        /* the first element that is in it */
    struct ckpt_part part; /* not of CKPT_NOTE_LOOKED */
};
bool ckpt_writer_note(struct ckpt_writer *w, struct ckpt_note *out);
/* The answer: done, or nobody will. */
void ckpt_writer_settle(struct ckpt_writer *w, uint32_t number, bool done);
/* Nobody answers any more: what is with others and all else is the writer's. */
void ckpt_writer_alone(struct ckpt_writer *w);

/* The manifest as it must be signed (purpose "manifest"), in CKPT_UNSIGNED. The writer's memory. */
const void *ckpt_writer_manifest(const struct ckpt_writer *w, size_t *length);

/* Publish, in CKPT_UNSIGNED: manifest.sig, then manifest.json, then `latest`, which never moves
 * back to a lower ledger index.
 *
 * term, signature, key  of the coordinator that signed the manifest's bytes.
 * delegation            encoded msg_delegation of key, with the root key's signature of it.
 * ERR_REFUSED, and the state stays CKPT_UNSIGNED, where the chain from the genesis' root key to
 * the signature does not hold: nothing is published that a reader would refuse. */
int ckpt_writer_publish(struct ckpt_writer *w, uint64_t term, const struct proto_sig *signature,
                        const struct proto_key *key, struct proto_bytes delegation,
                        const struct proto_sig *delegation_signature, struct err *err);

/* ---- the bytes of a part --------------------------------------------------------------------------------
 * Every member has the state, and so the bytes of every tensor file; a part of one follows from a range of
 * it. */

struct ckpt_image;

/* The tensor files of a checkpoint; weights and shard_bytes as the writer has them. NULL: ERR_MEMORY. */
struct ckpt_image *ckpt_image_create(const struct msg_model *m, enum ckpt_weights weights,
                                     uint64_t shard_bytes,
                                     struct err *err);
void ckpt_image_destroy(struct ckpt_image *im); /* NULL is fine */

/* Which elements of which vector bytes of a file hold. */
struct ckpt_piece {
    uint32_t file;
    bool momentum;         /* else the anchor */
    uint64_t header;       /* so many bytes of the file's header come before them: all to its end */
    uint64_t first, count; /* elements; at least one */
};
/* ERR_REFUSED: no such file, not inside it, or an element is cut in two. */
int ckpt_image_find(const struct ckpt_image *im, const char *name, uint64_t offset, uint64_t bytes,
                    struct ckpt_piece *out, struct err *err);
/* Write what elements [first, first + n) of the piece are into `out`, which has room for all of the part. The
 * header comes with the piece's first element. */
void ckpt_image_fill(const struct ckpt_image *im, const struct ckpt_piece *p, uint64_t first, size_t n,
                     const float *values, uint8_t *out);

/* ---- parts by URL -------------------------------------------------------------------------------------
 * A member sends and reads parts of a checkpoint without a key, each by a URL that the writer signed. */

struct ckpt_courier;

/* store_url: of the run's store. A URL that leads anywhere else is not followed: who runs the coordinator has no
 * say in what this machine asks of other servers. ERR_CONFIG, ERR_MEMORY. */
struct ckpt_courier *ckpt_courier_create(const char *store_url, struct err *err);
void ckpt_courier_destroy(struct ckpt_courier *c); /* nothing may be under way. NULL is fine */
void ckpt_courier_cancel(struct ckpt_courier *c);  /* from any thread: what is under way ends soon */

bool ckpt_courier_follows(const struct ckpt_courier *c, const char *url); /* is it in the run's store? */

/* Have these p->bytes bytes the digest? ERR_CORRUPT: no. */
int ckpt_part_matches(const struct ckpt_part *p, const void *bytes, struct err *err);

/* Send a part, or read one into `room`, which has its size, and look at its digest. They wait for the network, from
 * any thread. Only URLs in the run's store are followed, https ones, and http on this machine. ERR_REFUSED: the
 * store does not take this URL (any more), or it is no such URL; ERR_CORRUPT: other bytes than those; ERR_TIMEOUT, ERR_IO. */
int ckpt_courier_send(struct ckpt_courier *c, const struct ckpt_part *p, const void *bytes, struct err *err);
int ckpt_courier_check(struct ckpt_courier *c, const struct ckpt_part *p, void *room, struct err *err);

/* ---- retention ---------------------------------------------------------------------------------
 * Which checkpoints a store has, and which of them stay. All of it takes long; any thread. */

/* One folder step-*; only some of it where a writer is at it or has crashed. */
struct ckpt_entry {
    char prefix[CKPT_PREFIX_BYTES_MAX + 1];
    uint64_t index, bytes;
    int64_t modified_s;     /* of its newest object, by the store's clock */
    bool complete;          /* has its manifest */
    bool latest, pinned;
    bool kept;              /* by ckpt_retain */
};

/* All of them, newest index first, into *out, the caller's (free). */
int ckpt_list(struct ckpt_store *store, struct ckpt_entry **out, uint32_t *count, struct err *err);

/* Keep a checkpoint whatever ckpt_prune is told, by an object pins/step-*; or not any more. To do it
 * twice is fine. ERR_NOT_FOUND: there is no such checkpoint to pin. */
int ckpt_pin(struct ckpt_store *store, uint64_t index, bool pinned, struct err *err);

struct ckpt_retention {
    uint32_t last;   /* so many of the newest complete ones stay; 0: all */
    uint64_t every;  /* of the complete ones in each so many ledger indices the oldest stays too; 0: none */
    int64_t stale_s; /* an incomplete one stays until nothing in it has changed for so long: a writer may
                        be at it. 0: only where nobody writes */
};

/* Decide, without a store: sets `kept`. What is pinned or `latest` stays in any case. The oldest of
 * each `every` is one that stayed before, however often this is done. */
void ckpt_retain(const struct ckpt_retention *how, int64_t now_s, struct ckpt_entry *e, uint32_t count);

/* Remove what does not stay, the oldest first, each as a whole and its manifest first; half-done
 * uploads of crashed writers among it. Right before, pin and `latest` are looked at once more.
 * removed  may be NULL; called after each. */
int ckpt_prune(struct ckpt_store *store, const struct ckpt_retention *how,
               void (*removed)(void *arg, const struct ckpt_entry *e), void *arg, struct err *err);

/* ---- reading ----------------------------------------------------------------------------------- */

struct ckpt;

/* CKPT_WEIGHTS: what Hugging Face's tools read; CKPT_ANCHOR: what the run goes on from, fp32. They are the
 * same files where the weights are fp32, and in a plain folder. */
enum ckpt_which { CKPT_WEIGHTS, CKPT_ANCHOR, CKPT_MOMENTUM };

/* Open a checkpoint.
 *
 * url  of a checkpoint, of a store (then `latest` decides) or of a plain Hugging Face Llama folder;
 *      a path without "://" is a folder.
 * run  the run it must belong to, or NULL: then the signature only shows that the checkpoint is
 *      what the root key in its own genesis.bin stands for. A plain folder has no run: refused.
 * Checked here: the signatures (root key, delegation, online key, manifest), the size of every
 * object, digests of the small ones, safetensors headers against the model. Not checked: digests
 * of tensor data and ledger, see ckpt_verify().
 * Returns NULL: ERR_NOT_FOUND (nothing there, or no manifest), ERR_CORRUPT or ERR_TRUNCATED (msg
 * names object and numbers), ERR_REFUSED (another run, bad signature), ERR_UNSUPPORTED (a model
 * that is no plain Llama; msg names the key of config.json). */
struct ckpt *ckpt_open(const char *url, const struct digest *run, struct err *err);
/* The same in an open store (or a checkpoint's folder opened as one), borrowed until ckpt_close: who waits
 * for neither this nor what is read can cancel the store. */
struct ckpt *ckpt_open_at(struct ckpt_store *store, const struct digest *run, struct err *err);
void ckpt_close(struct ckpt *c); /* NULL is fine */

/* A Hugging Face folder without manifest: no momentum, cursor, ledger or digests. */
bool ckpt_is_plain(const struct ckpt *c);

/* The folder's URL, with `latest` resolved. */
const char *ckpt_where(const struct ckpt *c);

/* The network, from config.json. */
const struct msg_model *ckpt_model(const struct ckpt *c);

/* What the weights' first tensor is: "fp32", "fp16" or "bf16". */
const char *ckpt_weights_name(const struct ckpt *c);

/* Name of the tokenizer ("bytes", "bpe-..."), or "" where a plain folder does not say it in our words. */
const char *ckpt_tokenizer(const struct ckpt *c);

/* Its tokenizer.json, for free(). ERR_NOT_FOUND: the checkpoint has none. */
int ckpt_tokenizer_json(const struct ckpt *c, char **json, size_t *n, struct err *err);

/* Elements [first, first + n) of the canonical vector as fp32 into out; fp16 and bf16 files are
 * widened. The range must lie inside the vector. ERR_NOT_FOUND: momentum of a plain folder.
 * May be called from several threads at once. */
int ckpt_read(const struct ckpt *c, enum ckpt_which which, uint64_t first, size_t n, float *out,
              struct err *err);

/* How far reading whole objects has come: bytes done of all objects' total, and how many of them
 * came from the store in this call. */
struct ckpt_progress {
    const char *object;
    uint64_t done, total, read;
};
/* Returns false to end it, which then fails with ERR_REFUSED. */
typedef bool ckpt_progress_fn(void *arg, const struct ckpt_progress *now);

/* Check every object against its digest, that ledger.bin ends in the ledger head, that anchor and
 * momentum have the state root, and that weights beside an anchor are it in bf16. Reads all once, in
 * blocks; memory: 416 bytes a chunk of the state.
 * progress  may be NULL; called before each object and after each block.
 * ERR_CORRUPT or ERR_TRUNCATED: msg names the first wrong object and the starts of both digests. ERR_NOT_FOUND
 * on a plain folder, which has no digests. */
int ckpt_verify(const struct ckpt *c, ckpt_progress_fn *progress, void *arg, struct err *err);

/* The same for the files of one vector alone, before something is made of it. A plain folder has no
 * digests and passes. */
int ckpt_verify_vector(const struct ckpt *c, enum ckpt_which which, struct err *err);

/* The root of the digest tree over anchor and momentum in chunks of so many elements, as a run with such chunks
 * has it; momentum that a plain folder does not have is zero. Reads all, and hashes it on all cores. */
int ckpt_root(const struct ckpt *c, uint32_t chunk_elements, struct digest *root, struct err *err);

/* What the manifest says. Only for a checkpoint (asserts that it is not plain). */
struct ckpt_facts {
    struct digest run, state_root, ledger_head, manifest; /* manifest: digest of its bytes */
    uint64_t index, round, tokens_committed;
    struct proto_key signer;
    uint64_t term;
};
const struct ckpt_facts *ckpt_facts(const struct ckpt *c);

/* The decoded genesis (NULL on a plain folder), and its bytes. */
const struct msg_genesis *ckpt_genesis(const struct ckpt *c);
struct proto_bytes ckpt_genesis_bytes(const struct ckpt *c);

/* What the manifest names; none on a plain folder. The name is the checkpoint's memory. */
uint32_t ckpt_object_count(const struct ckpt *c);
const char *ckpt_object(const struct ckpt *c, uint32_t i, uint64_t *bytes, struct digest *digest);

/* Spent samples, ascending and disjoint. The checkpoint's memory. */
const struct msg_range *ckpt_spent(const struct ckpt *c, uint32_t *count);

/* The signed ledger entries; the first call reads and checks the digest. The checkpoint's memory,
 * not to be called from two threads. Their signatures are the caller's to check (ledger_chain). */
int ckpt_ledger(struct ckpt *c, const struct msg_signed_entry **entries, uint32_t *count,
                struct err *err);

/* Fetch everything into the folder `dir`, which is then this checkpoint: manifest.json is put last,
 * every digest checked before. A plain folder is fetched too, its sizes alone checked.
 *
 * dir       made where it is missing. What an earlier call left there is taken up: objects that are
 *           whole are read and kept, one that was begun goes on where it ended.
 * progress  may be NULL.
 * ERR_REFUSED: in dir is something else under one of the names, or another fetch is at work.
 * ERR_FULL: no space, noticed before an object is begun. After any failure call it again. */
int ckpt_fetch(const struct ckpt *c, const char *dir, ckpt_progress_fn *progress, void *arg, struct err *err);

/* Write a plain Hugging Face folder of a model that belongs to no run: what stands in `dir`, if anything, is
 * exchanged for it once it is whole and on the disk.
 *
 * read  gives elements [first, first + n) of the canonical vector, in order, in blocks. -1 ends it.
 * ERR_FULL: no space, noticed before a file is begun. A failure leaves `dir` as it was. */
struct ckpt_folder {
    const struct msg_model *model;
    float init_std;                     /* for config.json alone */
    enum ckpt_weights weights;
    const char *tokenizer;              /* its name, as ckpt_tokenizer() */
    struct proto_bytes tokenizer_json;  /* the file of one that is not "bytes"; empty: none */
    uint64_t shard_bytes;               /* as ckpt_writer_create() */
    int (*read)(void *arg, uint64_t first, size_t n, float *out, struct err *err);
    void *arg;
};
int ckpt_folder_write(const struct ckpt_folder *f, const char *dir, struct err *err);

/* Remove a folder and all files in it. Nothing there is fine; a folder within stays, and is an error. */
int ckpt_folder_remove(const char *dir, struct err *err);

/* Copy what makes a Hugging Face folder (tensors, index, config, tokenizer) into the new or empty
 * folder `dir`: no momentum, cursor, ledger or signature. Digests are checked on the way.
 * ERR_REFUSED: dir has something in it. A failed export leaves an empty folder. */
int ckpt_export(const struct ckpt *c, const char *dir, struct err *err);

/* Is there no such folder, or nothing in it? ERR_REFUSED names what is. */
int ckpt_check_empty(const char *dir, struct err *err);

#endif
