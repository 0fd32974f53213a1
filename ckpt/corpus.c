/* corpus.c - the small files of a corpus; see corpus.h. */
#include "ckpt/corpus.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "ckpt/internal.h"

/* The folder of the manifest; settings of a URL stay at its end. */
static void folder_of(const char *url, char out[PROTO_URL_BYTES_MAX + 1]) {
    size_t end = ckpt_store_remote(url) ? strcspn(url, "?") : strlen(url), n = end;
    const char *name = CORPUS_MANIFEST_NAME;
    size_t length = strlen(name);
    if (!ckpt_store_remote(url)) /* it has been located: a file, of whatever name */
        while (n > 0 && url[n - 1] != '/') n--;
    else if (n > length && !strncmp(url + n - length, name, length))
        n -= length;
    while (n > 1 && url[n - 1] == '/') n--;
    snprintf(out, PROTO_URL_BYTES_MAX + 1, "%.*s%s", (int)n, url, url + end);
}

int corpus_file_read(const struct settings *s, const char *name, size_t bytes_max, uint8_t **bytes, size_t *n,
                     struct err *err) {
    char folder[PROTO_URL_BYTES_MAX + 1];
    struct ckpt_blob b = {0};
    folder_of(s->corpus, folder);
    struct ckpt_store *store = ckpt_store_open(folder, false, err);
    if (!store) return -1;
    int r = object_read(store, name, bytes_max, &b, err);
    store->ops->close(store);
    if (r) {
        err_prefix(err, "corpus %.150s", folder);
        return -1;
    }
    b.data[b.length] = 0;
    *bytes = b.data;
    *n = b.length;
    return 0;
}

int corpus_facts_open(struct settings *s, const char *dir, struct corpus_facts *out, struct err *err) {
    char path[PATH_MAX];
    uint8_t *text;
    size_t n;
    if (settings_locate_corpus(s, dir, path, sizeof path, err)) return -1;
    if (*path) return corpus_facts_read(out, path, err);
    if (corpus_file_read(s, CORPUS_MANIFEST_NAME, CORPUS_MANIFEST_BYTES_MAX, &text, &n, err)) return -1;
    int r = corpus_facts_parse(out, (const char *)text, n, s->corpus, err);
    free(text);
    return r;
}
