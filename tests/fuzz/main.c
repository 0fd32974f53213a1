/* main.c - the fuzz targets without libFuzzer:
 *
 *   fuzz list                       names of the targets
 *   fuzz samples TARGET DIR DICT    write its valid samples into DIR, its words into DICT
 *   fuzz replay TARGET FILE...      feed each file; says whether it was taken as valid */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/fuzz/fuzz.h"

#define TARGET(name) &fuzz_##name,
static const struct fuzz_target *const targets[] = {FUZZ_TARGETS(TARGET)};
#define TARGETS (sizeof targets / sizeof *targets)

static const struct fuzz_target *find(const char *name) {
    for (size_t i = 0; i < TARGETS; i++)
        if (!strcmp(targets[i]->name, name)) return targets[i];
    fprintf(stderr, "no target %s\n", name);
    return NULL;
}

static int list(void) {
    for (size_t i = 0; i < TARGETS; i++) puts(targets[i]->name);
    return 0;
}

struct out {
    const char *dir;
    FILE *dict;
    bool failed;
};

static void write_sample(void *arg, const char *name, const void *bytes, size_t length) {
    struct out *out = arg;
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", out->dir, name);
    FILE *f = fopen(path, "wbe");
    bool ok = f && fwrite(bytes, 1, length, f) == length;
    if (f && fclose(f)) ok = false;
    if (!ok) fprintf(stderr, "%s: %s\n", path, strerror(errno));
    out->failed |= !ok;
}

/* A line of libFuzzer's dictionary: "word", anything unusual as \xAB. */
static void write_word(void *arg, const char *text) {
    struct out *out = arg;
    fputc('"', out->dict);
    for (; *text; text++) {
        bool plain = *text >= 0x20 && *text < 0x7f && *text != '"' && *text != '\\';
        fprintf(out->dict, plain ? "%c" : "\\x%02x", (unsigned char)*text);
    }
    fputs("\"\n", out->dict);
}

static int samples(const struct fuzz_target *t, const char *dir, const char *dict) {
    struct out out = {.dir = dir, .dict = fopen(dict, "we")};
    if (!out.dict) {
        perror(dict);
        return 1;
    }
    t->init();
    t->samples(&(struct fuzz_sink){&out, write_sample, write_word});
    return fclose(out.dict) || out.failed ? 1 : 0;
}

static int replay(const struct fuzz_target *t, const char *path) {
    FILE *f = fopen(path, "rbe");
    if (!f || fseek(f, 0, SEEK_END)) {
        perror(path);
        if (f) fclose(f);
        return 1;
    }
    size_t length = (size_t)ftell(f);
    uint8_t *bytes = malloc(length ? length : 1); /* exactly: so a sanitizer sees the end */
    rewind(f);
    int failed = !bytes || fread(bytes, 1, length, f) != length;
    fclose(f);
    if (failed)
        perror(path);
    else
        printf("%s: %s\n", path, t->take(bytes, length) ? "valid" : "refused");
    free(bytes);
    return failed;
}

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "list")) return list();
    const struct fuzz_target *t = argc > 3 ? find(argv[2]) : NULL;
    if (t && argc == 5 && !strcmp(argv[1], "samples")) return samples(t, argv[3], argv[4]);
    if (!t || strcmp(argv[1], "replay") != 0) {
        fprintf(stderr, "usage: fuzz list | samples TARGET DIR DICT | replay TARGET FILE...\n");
        return 2;
    }
    int failed = 0;
    t->init();
    for (int i = 3; i < argc; i++) failed |= replay(t, argv[i]);
    return failed;
}
