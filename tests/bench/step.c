/* step.c - the outer step of 256 MB of fp32 between members on the loopback, encrypted, with what it took of
 * processors, memory and disk, and the least that its arithmetic, hashing and encryption take by themselves.
 *
 * What compares with PCCL's all-reduce is "all-reduce": from the moment when everybody's fp32 parameters are
 * there until everybody can have the mean in fp32. In it: pseudo-gradient and error feedback, encoding,
 * digests, READY signed and on disk, the plan, the exchange, the exact sum, the second holder's copy, both on
 * disk, the commit in the coordinator's store and ledger, and the result decoded (by its time alone: here it
 * is decoded where it is applied). Not in it: the outer optimizer, journal and state on disk, the digests of
 * the state, the trainer's taking over; they are in "READY to applied". PCCL has none but encoding, exchange,
 * sum and decoding. */
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

/* PCCL's all-reduce, 8 bit, between processes of such a machine, not encrypted: from everybody's fp32 vector
 * until everybody has the result in fp32. MB/s of fp32. */
static double pccl_rate(int members) { return members == 2 ? 959 : 401; }

static enum outer_codec codec; /* of contributions and results */

/* ---- the floor ------------------------------------------------------------------------------- */

/* What one core does by itself, as sync does it. */
#define PIECE ((size_t)8 * OUTER_BLOCK)
#define FAR_CHUNKS 16 /* arrays of so many fall out of the caches, as anchor and residual do */
struct parts {
    uint8_t *bytes, *out;
    size_t encoded, at;
    float *x, *far[4];
    int64_t sum[CHUNK];
};

static int part_hash(void *arg, struct err *err) {
    struct parts *p = arg;
    (void)err;
    p->out[0] ^= digest_leaf(p->at, p->bytes, p->encoded).b[0];
    return 0;
}

/* Of the next chunk: pseudo-gradient, encoded, what was lost. */
static int part_encode(void *arg, struct err *err) {
    struct parts *p = arg;
    float absmax;
    double norm2;
    size_t first = p->at++ % FAR_CHUNKS * CHUNK;
    for (size_t i = 0; i < CHUNK; i += PIECE) {
        uint8_t *out = p->out + outer_encoded_bytes(codec, i);
        float *far[4];
        for (int j = 0; j < 4; j++) far[j] = p->far[j] + first + i;
        outer_pseudo_gradient(p->x, far[0], far[1], far[2], PIECE);
        if (outer_encode(out, p->x, PIECE, codec, err) ||
            outer_residual(far[3], p->x, out, outer_encoded_bytes(codec, PIECE), PIECE, codec,
                           err))
            return -1;
    }
    return outer_measure(p->out, p->encoded, CHUNK, codec, &absmax, &norm2, err);
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
    float absmax;
    double norm2;
    if (outer_measure(p->bytes, p->encoded, CHUNK, codec, &absmax, &norm2, err)) return -1;
    return outer_accumulate(p->sum, p->bytes, p->encoded, CHUNK, codec, 1, 1, 30, err);
}

static int part_mean(void *arg, struct err *err) {
    struct parts *p = arg;
    outer_mean(p->x, p->sum, CHUNK, 3, 30);
    return outer_encode(p->out, p->x, CHUNK, codec, err);
}

static int part_decode(void *arg, struct err *err) {
    struct parts *p = arg;
    return outer_decode(p->far[p->at++ % 4], p->bytes, p->encoded, CHUNK, codec, err);
}

static int part_apply(void *arg, struct err *err) {
    struct parts *p = arg;
    size_t first = p->at++ % FAR_CHUNKS * CHUNK;
    if (outer_decode(p->x, p->bytes, p->encoded, CHUNK, codec, err)) return -1;
    outer_nesterov(p->far[0] + first, p->far[1] + first, p->x, CHUNK, 0.01f, 0.9f);
    return 0;
}

/* Seconds of one core, for the whole vector: encode it, hash and encrypt its encoded form, add a
 * contribution, divide and encode, decode a result, apply one, hash the state. */
struct floor_parts {
    double encode, hash, encrypt, add, mean, decode, apply, hash_state;
};

#define PARTS 7
static int measure_parts(double elements, struct floor_parts *f, struct err *err) {
    size_t encoded = outer_encoded_bytes(codec, CHUNK);
    static struct parts p;
    p = (struct parts){.bytes = take_memory(encoded), .out = take_memory(encoded), .encoded = encoded,
                       .x = take_floats(CHUNK, 1, 1)};
    for (int i = 0; i < 4; i++) p.far[i] = take_floats(FAR_CHUNKS * CHUNK, 1e-4f, 2 + (uint64_t)i);
    struct task task[PARTS] = {{part_hash, &p, NULL}, {part_encrypt, &p, NULL}, {part_add, &p, NULL},
                               {part_mean, &p, NULL}, {part_decode, &p, NULL}, {part_apply, &p, NULL},
                               {part_encode, &p, NULL}};
    struct series s[PARTS];
    if (outer_encode(p.bytes, p.x, CHUNK, codec, err) || time_on_core(task, s, PARTS, 0.4, err))
        return -1;
    double chunks = elements / CHUNK;
    *f = (struct floor_parts){.hash = chunks * smallest(&s[0]),
                              .encrypt = chunks * smallest(&s[1]), .add = chunks * smallest(&s[2]),
                              .mean = chunks * smallest(&s[3]), .decode = chunks * smallest(&s[4]),
                              .apply = chunks * smallest(&s[5]), .encode = chunks * smallest(&s[6])};
    f->hash_state = f->hash * 8 * CHUNK / (double)encoded;
    free(p.bytes);
    free(p.out);
    free(p.x);
    for (int i = 0; i < 4; i++) free(p.far[i]);
    return 0;
}

static double floor_ready(const struct floor_parts *f, int members) {
    return members * (f->encode + f->hash);
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
    struct series reduced, commit, fetched, applied, ready, frozen, cpu, cpu_encode, cpu_sum, cpu_fetch,
        cpu_apply, disk, sent;
};

static void measure_member(const struct fleet_moment *step, struct measured *m) {
    const struct fleet_moment *begin = &step[FLEET_FROZEN], *end = &step[FLEET_APPLIED];
    series_add(&m->cpu, end->cpu_s - begin->cpu_s);
    series_add(&m->cpu_encode, step[FLEET_READY].cpu_s - begin->cpu_s);
    series_add(&m->cpu_sum, step[FLEET_COMMITTED].cpu_s - step[FLEET_READY].cpu_s);
    if (step[FLEET_FETCHED].at_s > 0)
        series_add(&m->cpu_fetch, step[FLEET_FETCHED].cpu_s - step[FLEET_COMMITTED].cpu_s);
    series_add(&m->cpu_apply, end->cpu_s - step[FLEET_COMMITTED].cpu_s);
    series_add(&m->disk, end->disk_s - begin->disk_s);
    series_add(&m->sent, (double)(end->sent_bytes - begin->sent_bytes) / MB);
}

static void measure(const struct fleet *f, double decode_s, struct measured *m) {
    *m = (struct measured){{0}};
    for (uint32_t r = 1; r < f->rounds; r++) {
        double plan = first_of(f, r, FLEET_PLAN), applied = last_of(f, r, FLEET_APPLIED);
        series_add(&m->commit, first_of(f, r, FLEET_COMMITTED) - plan);
        double fetched = last_of(f, r, FLEET_FETCHED), commit = last_of(f, r, FLEET_COMMITTED);
        double everywhere = fetched > commit ? fetched : commit;
        series_add(&m->reduced, everywhere + decode_s - last_of(f, r, FLEET_FROZEN));
        series_add(&m->fetched, everywhere - plan);
        series_add(&m->applied, applied - plan);
        series_add(&m->ready, applied - last_of(f, r, FLEET_READY));
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
    int n = f->members, cores = b->cores < n ? b->cores : n;
    struct series second = {1, {1}}, least = {1, {floor_commit(parts, n) / cores}}, all = least;
    char text[64], reference[64];
    all.value[0] += floor_ready(parts, n) / cores + n * parts->decode / cores;
    snprintf(reference, sizeof reference, "its parts alone, %d cores", cores);
    snprintf(text, sizeof text, "outer step, %s, all-reduce", name);
    row_rate(b, text, "MB/s", megabytes, &m->reduced, "PCCL, not encrypted", pccl_rate(n), &second);
    row_note(b, "all have fp32, to all can have the mean in fp32; with digests, agreement, on two disks");
    row_note(b, "%u shards of %u contributions, %.0f MB of fp32; best %.2f s", fewest_shards(f),
             f->member[0].round[1].contributors, megabytes, smallest(&m->reduced));
    row_rate(b, "    the same", "MB/s", megabytes, &m->reduced, reference, megabytes, &all);
    row_rate(b, "    PLAN to commit", "MB/s", megabytes, &m->commit, reference, megabytes, &least);
    row_rate(b, "    PLAN to the result everywhere", "MB/s", megabytes, &m->fetched, NULL, 0, NULL);
    least.value[0] += floor_apply(parts, n) / cores;
    row_rate(b, "    PLAN to applied by all", "MB/s", megabytes, &m->applied, reference, megabytes, &least);
    row_rate(b, "    READY to applied by all", "MB/s", megabytes, &m->ready, NULL, 0, NULL);
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

static void add_costs(struct bench *b, const struct fleet *f, const struct floor_parts *parts,
                      const struct measured *m) {
    struct series peak = {0}, anonymous = {0};
    for (int i = 0; i < f->members; i++) {
        series_add(&peak, (double)f->member[i].memory.peak_bytes / MB);
        series_add(&anonymous, (double)f->member[i].memory.anonymous_bytes / MB);
    }
    struct series ready = {1, {floor_ready(parts, f->members) / f->members}},
                  commit = {1, {floor_commit(parts, f->members) / f->members}},
                  apply = {1, {floor_apply(parts, f->members) / f->members}};
    row_value(b, "    processor, a member and round", "s", &m->cpu, 0);
    row_time(b, "        frozen to READY", "s", 1, &m->cpu_encode, "its parts alone", &ready);
    row_time(b, "        READY to commit", "s", 1, &m->cpu_sum, "its parts alone", &commit);
    note_profile(b, f, 0);
    if (m->cpu_fetch.count) row_value(b, "        commit to its last result", "s", &m->cpu_fetch, 0);
    row_time(b, "        commit to applied", "s", 1, &m->cpu_apply, "its parts alone", &apply);
    note_profile(b, f, 1);
    row_note(b,
             "parts, whole vector, one core: encode %.3f s, digest %.3f, encrypt %.3f, add %.3f, mean %.3f, "
             "decode %.3f, apply %.3f, digest of the state %.3f",
             parts->encode, parts->hash, parts->encrypt, parts->add, parts->mean, parts->decode,
             parts->apply, parts->hash_state);
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
        snprintf(home, sizeof home, "%.230s/member-%d", homes, i);
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
    int members = what & ~(STEP_ON_DISK | STEP_FP4);
    bool on_disk = what & STEP_ON_DISK;
    const char *list[SETTINGS_MAX_HERE] = {NULL};
    char quorum[32], folder[300], homes[FLEET_PATH_BYTES] = "/dev/shm/intellect-bench-XXXXXX",
         name[32];
    struct floor_parts parts;
    struct measured m;
    int n = 0;
    while (settings[n]) list[n] = settings[n], n++;
    snprintf(quorum, sizeof quorum, "outer.quorum=%d", members);
    list[n++] = quorum;
    codec = what & STEP_FP4 ? OUTER_FP4 : OUTER_INT8;
    if (codec == OUTER_FP4) list[n++] = "outer.contribution_codec=fp4", list[n++] = "outer.result_codec=fp4";
    snprintf(folder, sizeof folder, "%s/step-%d", b->folder, what);
    if (on_disk) snprintf(homes, sizeof homes, "%.240s", folder);
    else if (!mkdtemp(homes)) return err_set_errno(err, "%s", homes);
    struct fleet *f = fleet_create(&(struct fleet_config){.folder = folder, .settings = list}, err);
    int rc = f ? run_rounds(f, members, homes, err) : -1;
    if (!rc) rc = measure_parts((double)f->member[0].elements, &parts, err);
    if (!rc) {
        snprintf(name, sizeof name, "%d members%s%s", members, codec == OUTER_FP4 ? ", fp4" : "", on_disk ? ", on disk" : "");
        measure(f, parts.decode, &m);
        add_rates(b, f, name, &parts, &m);
        add_costs(b, f, &parts, &m);
    }
    fleet_destroy(f);
    if (!rc && !b->keep) remove_folder(folder);
    if (!on_disk) remove_folder(homes);
    return rc;
}
