/* settings.h - run.yaml: what a person may set, with its default, its unit and what breaks at both
 * ends. One table (settings.c) drives reading, checking, comparing and the commented file.
 *
 * A key that is absent has its default; the defaults of `model` and `inner` come from the preset,
 * those of a schedule from the corpus. Most settings are sealed into the genesis by `init`, whose
 * digest is the run's name, so they cannot change afterwards; those under `serve` may. */
#ifndef INTELLECT_PROTO_SETTINGS_H
#define INTELLECT_PROTO_SETTINGS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "proto/proto.h"

#define SETTINGS_FILE_NAME "run.yaml"
#define SETTINGS_BYTES_MAX (64u << 10) /* ten times the file with every key and comment */
#define SETTINGS_MAX 96

struct settings {
    /* run */
    char name[64 + 1];
    /* model */
    char preset[32];
    struct msg_model model;
    uint64_t init_seed;
    float init_std;
    char from[PROTO_URL_BYTES_MAX + 1]; /* URL of a checkpoint whose state is the initial one; "" = the seed's */
    /* corpus */
    char corpus[PROTO_URL_BYTES_MAX + 1]; /* manifest: path or URL */
    uint64_t shuffle_seed;
    /* inner, outer; times in milliseconds here, in seconds in the file */
    char mode[16]; /* outer.mode: the defaults of the outer settings; not in the genesis, which has what they are */
    struct msg_inner inner;
    struct msg_outer outer;
    /* checkpoint */
    char checkpoint_url[PROTO_URL_BYTES_MAX + 1];
    uint8_t checkpoint_bf16;                   /* checkpoint.weights; not sealed */
    /* serve: not sealed */
    char listen[PROTO_ADDRESS_BYTES_MAX + 8];  /* HOST:PORT */
    char address[PROTO_ADDRESS_BYTES_MAX + 8]; /* HOST or HOST:PORT by which members reach us; "" = listen */
    uint32_t aggregator_port;                  /* 0 = any */
    uint32_t strangers_max;                    /* connections not yet known to be members' */
    uint32_t stranger_seconds;
    uint32_t connects_per_minute;              /* of one address */

    bool given[SETTINGS_MAX];                  /* stands in the file or came by settings_set() */
};

/* What the corpus' manifest says; see node/data.h for the format. */
struct corpus_facts {
    char tokenizer[64];
    uint32_t vocabulary, sequence;
    uint64_t samples;
    struct digest manifest_digest;
};

/* Nothing given. */
void settings_init(struct settings *s);
/* Was the setting that is kept in this field of s given? */
bool settings_given(const struct settings *s, const void *field);
/* As if a person had written what stands there: settings_save() writes it as a line. */
void settings_mark_given(struct settings *s, const void *field);
/* The same of all settings that are kept in these bytes of s. */
void settings_mark_all_given(struct settings *s, const void *first, size_t bytes);

/* Take in a file, or text (path is only for messages). ERR_CONFIG: "run.yaml line 12: ..." with the
 * key and what is allowed; ERR_NOT_FOUND, ERR_IO. */
int settings_load(struct settings *s, const char *path, struct err *err);
int settings_parse(struct settings *s, const char *path, const char *text, size_t length,
                   struct err *err);

/* "section.key=value", as in run.yaml. ERR_CONFIG as above, with "--set" in place of the line. */
int settings_set(struct settings *s, const char *assignment, struct err *err);

/* Read corpus.json. ERR_NOT_FOUND, ERR_CONFIG (not a corpus; says what is missing). */
int corpus_facts_read(struct corpus_facts *out, const char *path, struct err *err);
/* The same of its bytes; `where` is for messages. */
int corpus_facts_parse(struct corpus_facts *out, const char *text, size_t length, const char *where,
                       struct err *err);
#define CORPUS_MANIFEST_BYTES_MAX (64u << 20)

/* The network of a checkpoint that a model begins with, as if a person had written it, where nobody
 * wrote otherwise. Its sequence is the corpus' (NULL: the model's), at most the model's. */
void settings_take_model(struct settings *s, const struct msg_model *m, const struct corpus_facts *corpus);

/* Turn s->corpus (a path below dir, or anywhere, or a file:// URL; the manifest or its folder) into
 * the manifest's file:// URL with an absolute path, and *path into that path. A URL behind a network
 * stays as it is, and *path is empty. ERR_NOT_FOUND, ERR_CONFIG (another scheme). */
int settings_locate_corpus(struct settings *s, const char *dir, char *path, size_t path_size,
                           struct err *err);

/* Fill in every setting that was not given, then check all of them together: the network, the
 * schedule, that the corpus fits both. ERR_CONFIG names the key.
 *
 * dir     absolute path of the run's folder.
 * corpus  NULL where there is none yet: what depends on it stays 0 and is not checked. */
int settings_resolve(struct settings *s, const char *dir, const struct corpus_facts *corpus,
                     struct err *err);

/* Write run.yaml: every key with its explanation; what was given as a line, all else commented out
 * with its default. Replaces the file atomically. ERR_IO, ERR_FULL. */
int settings_save(const struct settings *s, const char *path, struct err *err);

/* ---- the genesis ------------------------------------------------------------------------------ */

/* The lists of a msg_genesis point into this. */
struct settings_genesis {
    struct msg_genesis genesis;
    struct msg_checkpoint from; /* the caller fills in and points init_from at it where settings.from is given */
    struct msg_range spent[PROTO_INIT_SPENT_MAX]; /* likewise, for init_spent */
    const char *other_data;     /* why init_spent stays empty although there is a checkpoint */
    struct msg_corpus corpus;
    struct msg_model model;
    struct msg_inner inner;
    struct msg_outer outer;
};
/* Borrows the strings of s and corpus. root_key and created_ms are the caller's to fill in. */
void settings_to_genesis(const struct settings *s, const struct corpus_facts *corpus,
                         struct settings_genesis *out);

/* The way back, for comparing: only the sealed settings are filled in. ERR_UNSUPPORTED (version),
 * ERR_CORRUPT. */
int settings_from_genesis(struct settings *s, const struct msg_genesis *genesis, struct err *err);
void corpus_facts_from_genesis(struct corpus_facts *out, const struct msg_genesis *genesis);

/* The first sealed setting in which two resolved settings differ. Returns true when there is none;
 * else `what` receives "outer.quorum: 2 in run.yaml, 3 in the sealed run". */
bool settings_same_sealed(const struct settings *file, const struct settings *sealed, char *what,
                          size_t what_size);

#endif
