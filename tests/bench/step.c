/* step.c - the outer step of 256 MB of fp32 between members on the loopback, encrypted: from the PLAN
 * to the commit, and until everybody has the new state; with what it took of processors, memory and
 * disk, and the least that its hashing, encryption and arithmetic take by themselves. */
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "kernels/kernels.h"
#include "proto/proto.h"
#include "tests/bench/bench.h"
#include "tests/bench/fleet.h"

#define ROUNDS 3 /* and one before that is not counted: connections are made, memory is touched */
#define HURRY_AFTER_S 120 /* on a machine that is busy: one */
#define ROUND_S_MAX 120.0

/* 64 Mi parameters, all in matrices of some MiB. */
static const char *const settings[] = {
    "model.layers=4", "model.width=1024", "model.heads=16", "model.kv_heads=16", "model.ffn=4074",
    "model.vocabulary=256", "model.sequence=64", "model.tied=true", "inner.batch=1",
    "outer.mode=diloco", "outer.inner_steps=1", "outer.ramp_rounds=0",
    "outer.checkpoint_rounds=1000000", NULL};
#define SETTINGS_MAX_HERE 24

/* PCCL's all-reduce, 8 bit, between processes of such a machine, not encrypted: until everybody has the
 * result. MB/s of fp32. */
static double pccl_rate(int members) { return members == 2 ? 959 : 401; }

/* ---- the floor ------------------------------------------------------------------------------- */

/* What one core does by itself. */
struct parts {
    uint8_t *bytes, *out;
    size_t encoded;
    float *x, *y;
    int64_t *sum;
};

static int part_hash(void *arg, struct err *err) {
    struct parts *p = arg;
    (void)err;
    p->out[0] ^= digest_leaf(1, p->bytes, p->encoded).b[0];
    return 0;
}

#define RECORD_BYTES 16384 /* of TLS */
static int part_encrypt(void *arg, struct err *err) {
    struct parts *p = arg;
    static uint8_t key[32], nonce[12], tag[16];
    EVP_CIPHER_CTX *c = EVP_CIPHER_CTX_new();
    int n, ok = c && EVP_EncryptInit_ex(c, EVP_aes_128_gcm(), NULL, key, nonce);
    for (size_t at = 0; ok && at + RECORD_BYTES <= p->encoded; at += RECORD_BYTES) {
        memcpy(nonce, &at, sizeof at);
        ok = EVP_EncryptInit_ex(c, NULL, NULL, NULL, nonce) &&
             EVP_EncryptUpdate(c, p->out, &n, p->bytes + at, RECORD_BYTES) &&
             EVP_EncryptFinal_ex(c, p->out, &n) &&
             EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_GCM_GET_TAG, sizeof tag, tag);
    }
    EVP_CIPHER_CTX_free(c);
    return ok ? 0 : err_set(err, ERR_UNSUPPORTED, "AES-GCM failed");
}

static int part_add(void *arg, struct err *err) {
    struct parts *p = arg;
    return outer_accumulate(p->sum, p->bytes, p->encoded, CHUNK, OUTER_INT8, 1, 1, 30, err);
}

static int part_mean(void *arg, struct err *err) {
    struct parts *p = arg;
    outer_mean(p->x, p->sum, CHUNK, 3, 30);
    return outer_encode(p->out, p->x, CHUNK, OUTER_INT8, err);
}

static int part_apply(void *arg, struct err *err) {
    struct parts *p = arg;
    if (outer_decode(p->x, p->bytes, p->encoded, CHUNK, OUTER_INT8, err)) return -1;
    outer_nesterov(p->y, p->y, p->x, CHUNK, 0.01f, 0.9f);
    return 0;
}

/* Seconds of one core, for the whole vector: hash and encrypt its encoded form, add a contribution,
 * divide and encode, apply a result, hash the state. */
struct floor_parts {
    double hash, encrypt, add, mean, apply, hash_state;
};

static int measure_parts(double elements, struct floor_parts *f, struct err *err) {
    size_t encoded = outer_encoded_bytes(OUTER_INT8, CHUNK);
    struct parts p = {take_memory(encoded), take_memory(encoded), encoded, take_floats(CHUNK, 1, 1),
                      take_floats(CHUNK, 1, 2), take_memory(CHUNK * sizeof(int64_t))};
    struct task task[] = {{part_hash, &p, NULL}, {part_encrypt, &p, NULL}, {part_add, &p, NULL},
                          {part_mean, &p, NULL}, {part_apply, &p, NULL}};
    struct series s[5];
    memset(p.sum, 0, CHUNK * sizeof *p.sum);
    if (outer_encode(p.bytes, p.x, CHUNK, OUTER_INT8, err) ||
        time_on_core(task, s, 5, 0.2, err))
        return -1;
    double chunks = elements / CHUNK;
    *f = (struct floor_parts){.hash = chunks * smallest(&s[0]), .encrypt = chunks * smallest(&s[1]),
                              .add = chunks * smallest(&s[2]), .mean = chunks * smallest(&s[3]),
                              .apply = chunks * smallest(&s[4])};
    f->hash_state = f->hash * 8 * CHUNK / (double)encoded;
    free(p.bytes);
    free(p.out);
    free(p.x);
    free(p.y);
    free(p.sum);
    return 0;
}

/* All members together: everybody aggregates 1/N and holds another 1/N. Encryption counts twice,
 * as what is sent is read too. */
static double floor_commit(const struct floor_parts *f, int members) {
    double n = members;
    return (n - 1) * (f->hash + 2 * f->encrypt) + n * f->add + f->mean + f->hash + /* summed */
           f->hash + 2 * f->encrypt; /* copied to holders */
}

static double floor_apply(const struct floor_parts *f, int members) {
    double n = members;
    return (n - 2) * (f->hash + 2 * f->encrypt) + n * (f->apply + f->hash_state);
}

/* ---- the rounds ------------------------------------------------------------------------------ */

static double first_of(const struct fleet *f, uint32_t round, enum fleet_step step) {
    double first = 1e300;
    for (int i = 0; i < f->members; i++) {
        double at = f->member[i].round[round].step[step].at_s;
        if (at > 0 && at < first) first = at;
    }
    return first;
}

static double last_of(const struct fleet *f, uint32_t round, enum fleet_step step) {
    double last = 0;
    for (int i = 0; i < f->members; i++) {
        double at = f->member[i].round[round].step[step].at_s;
        if (at > last) last = at;
    }
    return last;
}

struct measured {
    struct series commit, fetched, applied, frozen, cpu, cpu_encode, cpu_sum, cpu_apply, disk, sent;
};

static void measure_member(const struct fleet_moment *step, struct measured *m) {
    const struct fleet_moment *begin = &step[FLEET_FROZEN], *end = &step[FLEET_APPLIED];
    series_add(&m->cpu, end->cpu_s - begin->cpu_s);
    series_add(&m->cpu_encode, step[FLEET_READY].cpu_s - begin->cpu_s);
    series_add(&m->cpu_sum, step[FLEET_COMMITTED].cpu_s - step[FLEET_READY].cpu_s);
    series_add(&m->cpu_apply, end->cpu_s - step[FLEET_COMMITTED].cpu_s);
    series_add(&m->disk, end->disk_s - begin->disk_s);
    series_add(&m->sent, (double)(end->sent_bytes - begin->sent_bytes) / MB);
}

static void measure(const struct fleet *f, struct measured *m) {
    *m = (struct measured){{0}};
    for (uint32_t r = 1; r < f->rounds; r++) {
        double plan = first_of(f, r, FLEET_PLAN), applied = last_of(f, r, FLEET_APPLIED);
        series_add(&m->commit, first_of(f, r, FLEET_COMMITTED) - plan);
        double fetched = last_of(f, r, FLEET_FETCHED), commit = last_of(f, r, FLEET_COMMITTED);
        series_add(&m->fetched, (fetched > commit ? fetched : commit) - plan);
        series_add(&m->applied, applied - plan);
        series_add(&m->frozen, applied - first_of(f, r, FLEET_FROZEN));
        for (int i = 0; i < f->members; i++) measure_member(f->member[i].round[r].step, m);
    }
}

/* Where members' uplinks seem to be very different, not all of them sum. */
static uint32_t fewest_shards(const struct fleet *f) {
    uint32_t fewest = UINT32_MAX;
    for (uint32_t r = 1; r < f->rounds; r++)
        if (f->member[0].round[r].shards < fewest) fewest = f->member[0].round[r].shards;
    return fewest;
}

static void add_rates(struct bench *b, const struct fleet *f, const char *name,
                      const struct floor_parts *parts, const struct measured *m) {
    double megabytes = 4 * (double)f->member[0].elements / MB;
    int cores = b->cores < f->members ? b->cores : f->members;
    struct series second = {1, {1}}, least = {1, {floor_commit(parts, f->members) / cores}};
    char text[64], reference[64];
    snprintf(text, sizeof text, "outer step, %s, PLAN to commit", name);
    row_rate(b, text, "MB/s", megabytes, &m->commit, "PCCL, not encrypted", pccl_rate(f->members),
             &second);
    row_note(b, "%u shards of %u contributions, %.0f MB of fp32; best %.2f s", fewest_shards(f),
             f->member[0].round[1].contributors, megabytes, smallest(&m->commit));
    snprintf(reference, sizeof reference, "its parts alone, %d cores", cores);
    row_rate(b, "    the same", "MB/s", megabytes, &m->commit, reference, megabytes, &least);
    row_rate(b, "    PLAN to the result everywhere", "MB/s", megabytes, &m->fetched,
             "PCCL, not encrypted", pccl_rate(f->members), &second);
    row_rate(b, "    PLAN to applied by all", "MB/s", megabytes, &m->applied,
             "PCCL, not encrypted", pccl_rate(f->members), &second);
    least.value[0] += floor_apply(parts, f->members) / cores;
    row_rate(b, "    the same", "MB/s", megabytes, &m->applied, reference, megabytes, &least);
    row_rate(b, "    frozen to applied by all", "MB/s", megabytes, &m->frozen, NULL, 0, NULL);
}

/* "hashing 50 %, TLS 2 %", of all members, and the functions where most was. */
static void note_profile(struct bench *b, const struct fleet *f, int phase) {
    static const char *const places[] = {"hashing", "TLS", "codec", "kernel", "copying", "other"};
    const struct fleet_profile *first = &f->member[0].profile_of[phase];
    char text[200] = "";
    uint32_t all = 0;
    for (int j = 0; j < f->members; j++) all += f->member[j].profile_of[phase].samples;
    for (int i = 0; i < FLEET_PLACES && all; i++) {
        uint32_t here = 0;
        for (int j = 0; j < f->members; j++) here += f->member[j].profile_of[phase].place[i];
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s %.0f %%", i ? ", " : "",
                 places[i], 100.0 * here / all);
    }
    for (uint32_t i = 0; i < first->functions && i < 4; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s%.24s %.0f %%",
                 i ? ", " : "; ", first->function[i].name,
                 100.0 * first->function[i].samples / first->samples);
    if (all) row_note(b, "%s", text);
}

static void add_costs(struct bench *b, const struct fleet *f, const struct measured *m) {
    struct series peak = {0}, anonymous = {0};
    for (int i = 0; i < f->members; i++) {
        series_add(&peak, (double)f->member[i].memory.peak_bytes / MB);
        series_add(&anonymous, (double)f->member[i].memory.anonymous_bytes / MB);
    }
    row_value(b, "    processor, a member and round", "s", &m->cpu, 0);
    row_value(b, "        frozen to READY", "s", &m->cpu_encode, 0);
    row_value(b, "        READY to commit", "s", &m->cpu_sum, 0);
    note_profile(b, f, 0);
    row_value(b, "        commit to applied", "s", &m->cpu_apply, 0);
    note_profile(b, f, 1);
    row_value(b, "    waiting for the disk, a member and round", "s", &m->disk, 0);
    row_value(b, "    sent to peers, a member and round", "MB", &m->sent, 0);
    row_value(b, "    peak memory of a member, with mapped files", "MB", &peak, 0);
    row_value(b, "    memory of its own in the end", "MB", &anonymous, 0);
    row_note(b, "of both, the trainer that is played here has %.0f MB",
             2 * 4 * (double)f->member[0].elements / MB);
}

static int run_rounds(struct fleet *f, int members, const char *homes, struct err *err) {
    char home[FLEET_PATH_BYTES];
    for (int i = 0; i < members; i++) {
        snprintf(home, sizeof home, "%.240s/member-%d", homes, i);
        if (fleet_add(f, home, true, err) < 0) return -1;
    }
    f->rounds = 1 + (elapsed_s() > HURRY_AFTER_S ? 1 : ROUNDS);
    for (uint32_t r = 1; r <= f->rounds; r++)
        if (fleet_wait(f, r, ROUND_S_MAX, err)) return -1;
    for (int i = 0; i < members; i++)
        if (fleet_end(f, i, err)) return -1;
    return 0;
}

int bench_step(struct bench *b, int what, struct err *err) {
    int members = what % STEP_ON_DISK;
    bool on_disk = what >= STEP_ON_DISK;
    const char *list[SETTINGS_MAX_HERE] = {NULL};
    char quorum[32], folder[300], homes[FLEET_PATH_BYTES] = "/dev/shm/intellect-bench-XXXXXX",
         name[32];
    struct floor_parts parts;
    struct measured m;
    int n = 0;
    while (settings[n]) list[n] = settings[n], n++;
    snprintf(quorum, sizeof quorum, "outer.quorum=%d", members);
    list[n] = quorum;
    snprintf(folder, sizeof folder, "%s/step-%d", b->folder, what);
    if (on_disk) snprintf(homes, sizeof homes, "%.240s", folder);
    else if (!mkdtemp(homes)) return err_set_errno(err, "%s", homes);
    struct fleet *f = fleet_create(&(struct fleet_config){.folder = folder, .settings = list}, err);
    int rc = f ? run_rounds(f, members, homes, err) : -1;
    if (!rc) rc = measure_parts((double)f->member[0].elements, &parts, err);
    if (!rc) {
        snprintf(name, sizeof name, "%d members%s", members, on_disk ? ", on disk" : "");
        measure(f, &m);
        add_rates(b, f, name, &parts, &m);
        add_costs(b, f, &m);
    }
    fleet_destroy(f);
    if (!rc && !b->keep) remove_folder(folder);
    if (!on_disk) remove_folder(homes);
    return rc;
}
