/* data.h - a corpus: tokenised files, a manifest that says what they are, and the order in which
 * samples are drawn. Who trains on which sample is the coordinator's business (leases).
 *
 * A folder holds corpus.json (the manifest), tokens-00000.bin, tokens-00001.bin, ... (uint16 or
 * uint32, little-endian, one file per text) and heldout.bin. The manifest:
 *
 *   { "format": 1, "tokenizer": "bytes", "vocabulary": 256, "dtype": "uint16", "sequence": 128,
 *     "files": [ { "name": "tokens-00000.bin", "tokens": N, "samples": S, "blake2b": HEX }, ... ],
 *     "samples": sum of S, "heldout": { "name": "heldout.bin", "tokens": N, "blake2b": HEX } }
 *
 * and, where a text is several documents, "document_end": the id of the token that is each document's
 * last. Nothing in the token files changes by it, windows go across documents; it tells the network
 * to keep them apart (struct model_objective). All trainers of a run do, for the run's genesis has the
 * manifest's digest.
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

struct data;

struct data_info {
    char tokenizer[64];
    uint32_t vocabulary;
    uint32_t sequence;
    int32_t document_end;    /* -1: none */
    uint32_t files;
    uint64_t samples;        /* sample indices are [0, samples) */
    uint64_t tokens;         /* in all files, without the held-out ones */
    uint64_t heldout_tokens;
    struct digest manifest_digest; /* BLAKE2b-256 of corpus.json as it stands */
};

/* Tokenise text files into `out_dir` (made if missing) and write the manifest last. A corpus that is
 * there already is replaced by a whole one or not at all.
 *
 * files              [n] paths, read in blocks.
 * tokenizer          a name for tokenizer_find().
 * sequence           tokens of a sample, > 0.
 * heldout_fraction   in [0, 0.5]: the share of each file kept apart at its end.
 * document_end       token after which a new document begins; -1 for none.
 * info               filled from what was written; may be NULL.
 *
 * Returns 0, or -1 with ERR_CONFIG (a text too short for one sample: msg names the file, its tokens
 * and what one sample needs; flags out of range), ERR_NOT_FOUND, ERR_IO or ERR_FULL. */
int data_prepare(const char *out_dir, const char *const *files, uint32_t n, const char *tokenizer,
                 uint32_t sequence, double heldout_fraction, int32_t document_end,
                 struct data_info *info, struct err *err);

/* Open a corpus. The manifest, the size of every file and the held-out file are checked at once. So
 * are the other files' digests where the corpus has at most DATA_CHECK_AT_OPEN_BYTES_MAX; those of a
 * larger one are checked file by file, before the first sample of a file is handed out.
 *
 * manifest_url   a path, or file://PATH, of corpus.json or of the folder that holds it.
 * expected       digest the manifest must have; NULL to take it as it is.
 * shuffle_seed   of the run's sample order (genesis).
 *
 * Keeps no file open and no text in memory: a sample is one pread.
 * Returns the corpus, or NULL with ERR_NOT_FOUND, ERR_CORRUPT (manifest or file; msg says which),
 * ERR_TRUNCATED, ERR_UNSUPPORTED (a format, dtype or scheme this build does not know). */
#define DATA_CHECK_AT_OPEN_BYTES_MAX ((uint64_t)2 << 30)
struct data *data_open(const char *manifest_url, const struct digest *expected,
                       uint64_t shuffle_seed, struct err *err);
void data_close(struct data *d); /* NULL is fine */

const struct data_info *data_info(const struct data *d);

/* Sample `index` in the run's order: sequence + 1 tokens, each in [0, vocabulary), into tokens_out.
 * Thread-safe. Returns 0, or -1 with ERR_CONFIG where index is not in [0, samples) (it comes from
 * the coordinator), ERR_IO, ERR_NOT_FOUND, ERR_TRUNCATED or ERR_CORRUPT where the file is no longer
 * what the manifest says. */
int data_sample(struct data *d, uint64_t index, int32_t *tokens_out, struct err *err);

/* Held-out tokens [first, first + n) into out; *got is how many there were before the end. Errors
 * as data_sample. */
int data_heldout(const struct data *d, uint64_t first, size_t n, int32_t *out, size_t *got,
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
