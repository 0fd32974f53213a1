/* corpus.h - what a run must know of its corpus before it begins, wherever that lies. */
#ifndef INTELLECT_CKPT_CORPUS_H
#define INTELLECT_CKPT_CORPUS_H

#include <stddef.h>
#include <stdint.h>

#include "proto/settings.h"

#define CORPUS_MANIFEST_NAME "corpus.json"

/* Locate the corpus of `s` (settings_locate_corpus) and read its manifest, from this machine or from a store
 * behind a network, which is waited for. */
int corpus_facts_open(struct settings *s, const char *dir, struct corpus_facts *out, struct err *err);

/* A whole small file beside the manifest of the located corpus: *bytes is for free(), with a NUL behind the n
 * bytes. ERR_NOT_FOUND, ERR_FULL (more than bytes_max), ERR_IO. */
int corpus_file_read(const struct settings *s, const char *name, size_t bytes_max, uint8_t **bytes, size_t *n,
                     struct err *err);

#endif
