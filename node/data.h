/* data.h - a corpus: tokenised files, a manifest that says what they are, and the order in which
 * samples are drawn. The format is described in docs/data.md. Who trains on which sample is the
 * coordinator's business (leases).
 *
 * A folder holds corpus.json (the manifest), tokens-00000.bin, tokens-00001.bin, ... (uint16 or
 * uint32, little-endian) and heldout.bin.
 *
 * Where the manifest names a token that ends documents, a token file holds many, each with that token
 * as its last. Windows go across documents; it tells the network to keep them apart (struct
 * model_objective). All trainers of a run do, for the run's genesis has the manifest's digest. Without
 * it a token file is one text.
 *
 * A sample is sequence + 1 neighbouring tokens of one file, whose first `sequence` are inputs and
 * last `sequence` targets. Window j of a file starts at j * sequence: windows share one token, as
 * target of one and first input of the next, so each token is a target once. A file of N tokens
 * has (N - 1) / sequence windows; the rest at its end is not used.
 *
 * The held-out text is the end of each file, cut off before the windows are laid: it lies in a file
 * that no sample index reaches. */
#ifndef INTELLECT_NODE_DATA_H
#define INTELLECT_NODE_DATA_H

#include "proto/err.h"
#include "proto/messages.h"

#include <stddef.h>
#include <stdint.h>

#define DATA_MANIFEST_NAME "corpus.json"
#define DATA_FILES_MAX 65536
#define DATA_PARTS_MAX 1024
#define DATA_WEIGHTS_MAX 65536u

struct data;
struct tokenizer;

struct data_info {
    char tokenizer[64];
    uint32_t vocabulary;
    uint32_t sequence;
    int32_t document_end;    /* -1: none */
    uint32_t parts;          /* of a mixture; 0: it is none */
    uint32_t files;
    uint64_t samples;        /* sample indices are [0, samples) */
    uint64_t tokens;         /* in all files, without the held-out ones */
    uint64_t heldout_tokens;
    struct digest manifest_digest; /* BLAKE2b-256 of corpus.json as it stands */
};

struct data_progress;

/* How texts become a corpus. */
struct data_recipe {
    const char *tokenizer;    /* for tokenizer_open(); what looks like a special token in a text is text */
    uint32_t sequence;        /* tokens of a sample, > 0 */
    double heldout_fraction;  /* in [0, 0.5]: the share of each token file kept apart at its end */
    /* The token that ends a document, as its id in digits or as the text of an added token: it is put after
     * each one that does not end in it, and documents share token files. "none": each text is a token file of
     * its own, and no text may be JSON lines. NULL: what the tokenizer calls the end of a text, or "none". */
    const char *document_end;
    const char *field;        /* of a JSON line that is the text; NULL: "text" */
    unsigned threads;         /* that tokenise; 0: one per core. The result is the same */
    uint64_t file_tokens;     /* a token file of many documents ends after so many; 0: DATA_FILE_TOKENS */
    /* Called often, by the caller's thread; may be NULL. */
    void (*progress)(void *arg, const struct data_progress *now);
    void *progress_arg;
};
#define DATA_FILE_TOKENS ((uint64_t)1 << 28)

struct data_progress {
    uint64_t bytes, bytes_total; /* of the files as they lie on the disk, packed or not */
    uint64_t tokens, documents;
};

/* Tokenise texts into `out_dir` (made if missing) and write the manifest last. A corpus that is there already
 * is replaced by a whole one or not at all.
 *
 * paths  [n] files and folders, for source_list_fill(): JSON lines, else text, a document each;
 *        packed or not.
 * info   filled from what was written; may be NULL.
 *
 * A document's ids are those of the whole of it, however large; in memory are a few MB per thread.
 * Returns 0, or -1 with ERR_CONFIG (a text too short for one sample: msg names the file, its tokens
 * and what one sample needs; a recipe out of range), ERR_CORRUPT or ERR_TRUNCATED (a packed file, or a line
 * that is no JSON with such a field: msg names file and line), ERR_UNSUPPORTED (the tokenizer; a line too
 * long), ERR_NOT_FOUND, ERR_IO or ERR_FULL. */
int data_prepare(const char *out_dir, const char *const *paths, uint32_t n, const struct data_recipe *recipe,
                 struct data_info *info, struct err *err);

/* Several corpora as one: `out_dir` (made if missing) gets a manifest that names them, and their tokenizer.json.
 *
 * part     [n] of one tokenizer, sequence and document end. Of as many samples in a row as the weights are
 *          in all, without their common divisor, each part has its weight, in an order that the run's seed
 *          gives. A part that has come to its end begins anew in another order.
 * samples  of the mixture; 0: so many that no sample comes twice.
 * info     as data_prepare().
 * Returns 0, or -1 with ERR_CONFIG (parts that do not fit together, weights over DATA_WEIGHTS_MAX in all) or
 * as data_open(). */
struct data_mix_part {
    const char *corpus; /* as for data_open(); a path is written down as the way from out_dir */
    uint32_t weight;    /* > 0 */
};
int data_mix(const char *out_dir, const struct data_mix_part *part, uint32_t n, uint64_t samples,
             struct data_info *info, struct err *err);

/* Open a corpus. The manifest, the size of every file and the held-out file are checked at once. So
 * are the other files' digests where the corpus has at most DATA_CHECK_AT_OPEN_BYTES_MAX; those of a
 * larger one are checked file by file, before the first sample of a file is handed out.
 *
 * manifest_url   a path, file://PATH, https://... or s3://... of corpus.json or of the folder that holds it.
 * expected       digest the manifest must have; NULL to take it as it is.
 * shuffle_seed   of the run's sample order (genesis).
 *
 * Keeps no file open and no text in memory: a sample is one pread. Behind a network samples come in blocks,
 * each checked by a digest, several at a time, and are kept in a cache on the disk (node/data_cache.h); sizes
 * and digests are not checked before. A mixture opens its parts.
 * Returns the corpus, or NULL with ERR_NOT_FOUND, ERR_CORRUPT (manifest or file; msg says which),
 * ERR_TRUNCATED, ERR_UNSUPPORTED (a format or dtype this build does not know), ERR_CONFIG (a URL). */
#define DATA_CHECK_AT_OPEN_BYTES_MAX ((uint64_t)2 << 30)
struct data *data_open(const char *manifest_url, const struct digest *expected,
                       uint64_t shuffle_seed, struct err *err);
void data_close(struct data *d); /* NULL is fine */

const struct data_info *data_info(const struct data *d);

/* The tokenizer of its ids, for tokenizer_close(): the tokenizer.json beside the manifest. NULL with ERR_CORRUPT where it is another one than the manifest says, or as tokenizer_open(). */
struct tokenizer *data_tokenizer(const struct data *d, struct err *err);

/* Sample `index` in the run's order: sequence + 1 tokens, each in [0, vocabulary), into tokens_out.
 * A function of the manifest, the seed and the index alone. Where samples are asked for one after the other,
 * threads read on ahead from the second one on.
 * Thread-safe. Returns 0, or -1 with ERR_CONFIG where index is not in [0, samples) (it comes from
 * the coordinator), ERR_IO, ERR_NOT_FOUND, ERR_TIMEOUT, ERR_TRUNCATED or ERR_CORRUPT where the file is no
 * longer what the manifest says. */
int data_sample(struct data *d, uint64_t index, int32_t *tokens_out, struct err *err);

/* How long data_sample() took, all calls together. */
double data_waited_s(const struct data *d);

/* Held-out tokens [first, first + n) into out; *got is how many there were before the end. Errors
 * as data_sample. */
int data_heldout(struct data *d, uint64_t first, size_t n, int32_t *out, size_t *got,
                 struct err *err);

/* Training tokens of one file in the order of its text, for statistics about the corpus. file is in
 * [0, info.files), checked by assert; the rest as data_heldout, after the file's digest was
 * checked. */
int data_text(struct data *d, uint32_t file, uint64_t first, size_t n, int32_t *out, size_t *got,
              struct err *err);

/* The permutation behind data_sample: where `index` in [0, n) goes under `seed`. A bijection of
 * [0, n) without tables: a balanced Feistel network of DATA_PERMUTE_ROUNDS rounds over the smallest
 * even number of bits that holds n, walked until it lands below n (at most 4 tries on average;
 * Black and Rogaway 2002). The round function is splitmix64's finaliser. n > 0. */
#define DATA_PERMUTE_ROUNDS 8
uint64_t data_permute(uint64_t seed, uint64_t n, uint64_t index);

#endif
