/* choices.c - see choices.h. The file is ours, and its folder any program's of this user: what is not as it
 * was written is ignored whole. */
#define _GNU_SOURCE
#include "kernels/cuda/choices.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#define PATH_BYTES 4096
#define LINE_BYTES 320
#define HEAD "intellect products 1"

struct choice {
    struct choice_key key;
    uint64_t algorithm[CHOICES_WORDS];
    float us; /* for people */
};

struct choices {
    char path[PATH_BYTES]; /* "": nothing is kept */
    char head[LINE_BYTES];
    size_t count;
    struct choice choice[CHOICES_MAX];
};

/* ---- the file's name ----------------------------------------------------------------------------------- */

static int folder_of(char out[PATH_BYTES]) {
    const char *own = getenv("INTELLECT_CACHE"), *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int n = -1;
    if (own && *own) n = snprintf(out, PATH_BYTES, "%s", own);
    else if (xdg && *xdg == '/') n = snprintf(out, PATH_BYTES, "%s/intellect", xdg);
    else if (home && *home == '/') n = snprintf(out, PATH_BYTES, "%s/.cache/intellect", home);
    return n > 0 && n < PATH_BYTES - LINE_BYTES;
}

static void make_folder(char *path) {
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(path, 0700); /* what is wrong shows when the file is made */
        *slash = '/';
    }
    mkdir(path, 0700);
}

static void name_file(struct choices *c, size_t version, const char *device) {
    char name[64], *p = name;
    for (const char *d = device; *d && p < name + sizeof name - 1; d++)
        *p++ = (char)(isalnum((unsigned char)*d) ? *d : '-');
    *p = '\0';
    snprintf(c->head, sizeof c->head, HEAD " cuBLASLt %zu %s\n", version, name);
    if (!folder_of(c->path)) {
        c->path[0] = '\0';
        return;
    }
    make_folder(c->path);
    size_t n = strlen(c->path);
    snprintf(c->path + n, sizeof c->path - n, "/products-%zu-%s.txt", version, name);
}

/* ---- lines --------------------------------------------------------------------------------------------- */

static uint64_t add_to_crc(uint64_t crc, const char *line) {
    return crc32((uLong)crc, (const Bytef *)line, (uInt)strlen(line));
}
#define CRC_START 0u /* as crc32() begins */

static void write_crc(char line[LINE_BYTES], uint64_t crc) {
    snprintf(line, LINE_BYTES, "crc32 %08" PRIx64 "\n", crc);
}

static void write_choice(char line[LINE_BYTES], const struct choice *c) {
    const struct choice_key *k = &c->key;
    int n = snprintf(line, LINE_BYTES, "%d %d %d %d %d %d %d %d", k->m, k->n, k->k, k->transposed_a,
                     k->transposed_b, k->bf16, k->wide, k->alignment);
    for (int i = 0; i < CHOICES_WORDS; i++)
        n += snprintf(line + n, LINE_BYTES - (size_t)n, " %016" PRIx64, c->algorithm[i]);
    snprintf(line + n, LINE_BYTES - (size_t)n, " %.1f\n", (double)c->us);
}

static int read_choice(const char *line, struct choice *c) {
    struct choice_key *k = &c->key;
    int at = 0, used = 0;
    if (sscanf(line, "%d %d %d %d %d %d %d %d%n", &k->m, &k->n, &k->k, &k->transposed_a, &k->transposed_b,
               &k->bf16, &k->wide, &k->alignment, &at) != 8)
        return -1;
    for (int i = 0; i < CHOICES_WORDS; i++, at += used)
        if (sscanf(line + at, " %16" SCNx64 "%n", &c->algorithm[i], &used) != 1) return -1;
    return sscanf(line + at, " %f", &c->us) == 1 ? 0 : -1;
}

static struct choice *find(const struct choices *c, const struct choice_key *key) {
    for (size_t i = 0; i < c->count; i++)
        if (!memcmp(&c->choice[i].key, key, sizeof *key)) return (struct choice *)&c->choice[i];
    return NULL;
}

/* ---- the file ------------------------------------------------------------------------------------------ */

/* Into `found`, whose head says whose file it must be. 0 also if there is none; -1 with why it is ignored. */
static int read_lines(struct choices *found, FILE *f, char why[160]) {
    char line[LINE_BYTES], last[LINE_BYTES];
    uint64_t crc = CRC_START;
    int whole = 0;
    for (size_t n = 0; fgets(line, sizeof line, f); n++) {
        write_crc(last, crc);
        whole = !strcmp(line, last);
        if (whole) break;
        crc = add_to_crc(crc, line);
        if (n == 0 && !strncmp(line, HEAD, sizeof HEAD - 1) && strcmp(line, found->head) != 0) {
            snprintf(why, 160, "is of another library or device: %.100s", line + sizeof HEAD);
            return -1;
        }
        if (n > 0 && (found->count == CHOICES_MAX || read_choice(line, &found->choice[found->count++])))
            break;
    }
    if (whole && !fgets(line, sizeof line, f)) return 0;
    snprintf(why, 160, "is damaged");
    return -1;
}

static int read_file(struct choices *found, char why[160]) {
    FILE *f = *found->path ? fopen(found->path, "re") : NULL;
    found->count = 0;
    if (!f) return 0;
    int rc = read_lines(found, f, why);
    fclose(f);
    if (rc) found->count = 0;
    return rc;
}

static void write_file(const struct choices *c) {
    char other[PATH_BYTES + 32], line[LINE_BYTES];
    uint64_t crc = add_to_crc(CRC_START, c->head);
    snprintf(other, sizeof other, "%s.%d", c->path, (int)getpid());
    FILE *f = fopen(other, "we");
    if (!f) return;
    fputs(c->head, f);
    for (size_t i = 0; i < c->count; i++) {
        write_choice(line, &c->choice[i]);
        crc = add_to_crc(crc, line);
        fputs(line, f);
    }
    write_crc(line, crc);
    fputs(line, f);
    int bad = ferror(f);
    if (fclose(f) || bad || rename(other, c->path)) unlink(other);
}

struct choices *choices_open(size_t version, const char *device, char why[160]) {
    struct choices *c = calloc(1, sizeof *c);
    char reason[160] = "";
    why[0] = '\0';
    if (!c) return NULL;
    name_file(c, version, device);
    if (read_file(c, reason)) {
        const char *slash = strrchr(c->path, '/');
        snprintf(why, 160, "%.60s %.90s", slash + 1, reason);
        why[strcspn(why, "\n")] = '\0';
    }
    return c;
}

void choices_close(struct choices *c) { free(c); }

int choices_find(const struct choices *c, const struct choice_key *key, uint64_t algorithm[CHOICES_WORDS]) {
    const struct choice *found = find(c, key);
    if (found) memcpy(algorithm, found->algorithm, sizeof found->algorithm);
    return found != NULL;
}

/* What others kept meanwhile comes first, then what is the own. */
static void merge(struct choices *into, const struct choices *own) {
    for (size_t i = 0; i < own->count; i++)
        if (into->count < CHOICES_MAX && !find(into, &own->choice[i].key))
            into->choice[into->count++] = own->choice[i];
}

static void put(struct choices *c, const struct choice *won, const uint64_t *refused) {
    struct choice *there = find(c, &won->key);
    if (there && refused && !memcmp(there->algorithm, refused, sizeof there->algorithm)) *there = *won;
    if (!there && c->count < CHOICES_MAX) c->choice[c->count++] = *won;
}

void choices_keep(struct choices *c, const struct choice_key *key, uint64_t algorithm[CHOICES_WORDS],
                  const uint64_t *refused, float us) {
    struct choice won = { .key = *key, .us = us };
    char lock[PATH_BYTES + 8], ignored[160];
    struct choices *now = malloc(sizeof *now);
    if (!now) return;
    memcpy(won.algorithm, algorithm, sizeof won.algorithm);
    memcpy(now, c, sizeof *now);
    snprintf(lock, sizeof lock, "%s.lock", c->path);
    int fd = *c->path ? open(lock, O_CREAT | O_RDWR | O_CLOEXEC, 0600) : -1;
    if (fd >= 0 && flock(fd, LOCK_EX)) close(fd), fd = -1;
    read_file(now, ignored);
    put(now, &won, refused);
    merge(now, c);
    if (fd >= 0) {
        write_file(now);
        close(fd);
    }
    memcpy(c, now, sizeof *c);
    free(now);
    choices_find(c, key, algorithm);
}
