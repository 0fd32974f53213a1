/* solo.c - training alone; see solo.h. All ranks run through the same steps; whether there is another one,
 * and whether it is saved, rank 0 tells them. */
#include "node/solo.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "ckpt/ckpt.h"
#include "kernels/kernels.h"
#include "node/curve.h"
#include "node/data.h"
#include "node/engine.h"
#include "node/file.h"
#include "node/layout.h"
#include "node/mesh.h"
#include "node/model.h"
#include "node/saver.h"
#include "node/tokenizer.h"
#include "node/trainer.h"
#include "proto/model.h"

#define PATH_BYTES 4096
#define INIT_BLOCK ((size_t)1 << 20)
#define PROGRESS_S 1.0

struct solo {
    const struct solo_options *options;
    const struct settings *settings;
    struct solo_result *result;
    char genesis[PATH_BYTES], state[PATH_BYTES], csv[PATH_BYTES];
    int lock;
    struct mesh mesh;
    struct kernels *kernels;
    struct err why_no_gpu; /* where auto took the CPU */
    struct engine *engine;
    struct data *data;
    struct saver *saver;
    struct curve *curve;       /* rank 0's */
    int32_t *tokens;           /* [batch, sequence + 1] */
    uint64_t done, total, end; /* batches: done, of the schedule, of this call */
    uint32_t bad_steps;
    uint64_t trained_tokens;   /* in this call */
    double began_s, waited_s, shown_s;
};

static volatile sig_atomic_t asked_to_stop;

static void on_signal(int number) {
    (void)number;
    asked_to_stop = 1;
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

uint64_t solo_steps(const struct settings *s) {
    uint64_t tokens = (uint64_t)s->inner.batch * s->model.sequence;
    return s->inner.total_tokens / tokens + (s->inner.total_tokens % tokens != 0);
}

/* ---- the folder -------------------------------------------------------------------------------- */

static int take_folder(struct solo *s, struct err *err) {
    char path[PATH_BYTES];
    const char *out = s->options->out;
    if (strlen(out) > PATH_BYTES - 16) return err_set(err, ERR_CONFIG, "the path of the folder is too long");
    if (mkdir(out, 0755) && errno != EEXIST) return err_set_errno(err, "make %.150s", out);
    snprintf(s->genesis, sizeof s->genesis, "%s/genesis", out);
    snprintf(s->state, sizeof s->state, "%s/state", out);
    snprintf(s->csv, sizeof s->csv, "%s/loss.csv", out);
    snprintf(path, sizeof path, "%s/lock", out);
    s->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (s->lock < 0) return err_set_errno(err, "%.150s", path);
    if (flock(s->lock, LOCK_EX | LOCK_NB))
        return err_set(err, ERR_REFUSED, "another process trains in %.150s", out);
    return 0;
}

static int write_genesis(const struct solo *s, const struct corpus_facts *corpus, struct err *err) {
    struct settings_genesis g;
    struct proto_buffer b;
    settings_to_genesis(s->settings, corpus, &g);
    proto_buffer_init(&b, PROTO_BLOB_BYTES_MAX);
    int rc = proto_encode(&b, RECORD_genesis, &g.genesis, err);
    int fd = rc ? -1 : open(s->genesis, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (rc == 0 && fd < 0) rc = err_set_errno(err, "create %.150s", s->genesis);
    if (rc == 0) rc = file_write(fd, b.data, b.length, s->genesis, err);
    if (fd >= 0) close(fd);
    proto_buffer_release(&b);
    return rc;
}

/* What else a run has settings for (its name, outer steps, where things lie) may be another. */
static int compare_genesis(const struct solo *s, const struct corpus_facts *corpus,
                           const struct msg_genesis *g, struct err *err) {
    struct settings *sealed = malloc(2 * sizeof *sealed);
    char what[200];
    if (!sealed) return err_set(err, ERR_MEMORY, "no memory to compare settings");
    struct settings *now = sealed + 1;
    int rc = settings_from_genesis(sealed, g, err);
    if (rc == 0) {
        *now = *s->settings;
        now->outer = sealed->outer;
        memcpy(now->name, sealed->name, sizeof now->name);
        memcpy(now->corpus, sealed->corpus, sizeof now->corpus);
        memcpy(now->checkpoint_url, sealed->checkpoint_url, sizeof now->checkpoint_url);
        if (!settings_same_sealed(now, sealed, what, sizeof what))
            rc = err_set(err, ERR_CONFIG, "%.100s was begun with other settings: %.120s; take another folder",
                         s->options->out, what);
        else if (!digest_equal(&corpus->manifest_digest, &g->corpus->manifest_digest))
            rc = err_set(err, ERR_CONFIG, "%.100s was begun with another corpus; take another folder",
                         s->options->out);
    }
    free(sealed);
    return rc;
}

/* The settings that the folder was begun with must be these. */
static int check_genesis(const struct solo *s, const struct corpus_facts *corpus, struct err *err) {
    struct stat st;
    struct msg_genesis g;
    if (stat(s->state, &st) && errno == ENOENT) return write_genesis(s, corpus, err);
    int fd = open(s->genesis, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st)) {
        if (fd >= 0) close(fd);
        return err_set_errno(err, "%.150s", s->genesis);
    }
    size_t n = st.st_size < (off_t)PROTO_BLOB_BYTES_MAX ? (size_t)st.st_size : PROTO_BLOB_BYTES_MAX;
    uint8_t *bytes = malloc(n + 1);
    int rc = bytes ? file_read(fd, bytes, n, s->genesis, err) : err_set(err, ERR_MEMORY, "no memory");
    close(fd);
    if (rc == 0 && (rc = proto_decode(bytes, (uint32_t)n, RECORD_genesis, &g, err)) == 0) {
        rc = compare_genesis(s, corpus, &g, err);
        proto_decoded_release(RECORD_genesis, &g);
    }
    free(bytes);
    return rc;
}

/* ---- states that are kept ---------------------------------------------------------------------- */

static void kept_name(const struct solo *s, uint64_t step, char out[PATH_BYTES]) {
    snprintf(out, PATH_BYTES, "%s/state-%llu", s->options->out, (unsigned long long)step);
}

/* Another name for what was saved of this step: the next save replaces the first one. */
static int keep(const struct solo *s, uint64_t step, struct err *err) {
    char name[PATH_BYTES];
    if (!s->options->keep || s->mesh.rank > 0) return 0;
    kept_name(s, step, name);
    return !link(s->state, name) || errno == EEXIST ? 0 : err_set_errno(err, "keep %.150s", name);
}

/* The last one before the step that is replayed; 0: none. */
static int newest_before(const struct solo *s, uint64_t step, uint64_t *found, struct err *err) {
    DIR *d = opendir(s->options->out);
    unsigned long long n;
    int used;
    if (!d) return err_set_errno(err, "%.150s", s->options->out);
    *found = 0;
    for (struct dirent *e; (e = readdir(d));)
        if (sscanf(e->d_name, "state-%llu%n", &n, &used) == 1 && !e->d_name[used] && n < step && n > *found)
            *found = n;
    closedir(d);
    return 0;
}

/* ---- start ------------------------------------------------------------------------------------- */

static int create_kernels(struct solo *s, struct err *err) {
    s->kernels = device_create(device_of_rank(s->options->device, s->mesh.rank), s->options->precision,
                               mesh_threads(&s->mesh, s->options->threads), s->mesh.ranks, &s->why_no_gpu, err);
    return s->kernels ? mesh_use(&s->mesh, s->kernels, err) : -1;
}

/* From a checkpoint where model.from names one, else from the seed; each rank what it holds. */
static int first_parameters(struct solo *s, struct err *err) {
    const struct settings *set = s->settings;
    size_t n = engine_elements(s->engine);
    struct ckpt *c = *set->from ? ckpt_open(set->from, NULL, err) : NULL;
    float *block = malloc(INIT_BLOCK * sizeof *block);
    int rc = *set->from && !c ? -1 : block ? 0 : err_set(err, ERR_MEMORY, "no memory for first parameters");
    if (rc == 0 && c && !proto_model_same_shapes(ckpt_model(c), &set->model))
        rc = err_set(err, ERR_CONFIG, "model.from %.150s has tensors of other shapes than section `model`",
                     set->from);
    if (rc == 0 && c) rc = ckpt_verify_vector(c, CKPT_ANCHOR, err);
    for (size_t at = 0, some; rc == 0 && at < n; at += some) {
        some = n - at < INIT_BLOCK ? n - at : INIT_BLOCK;
        if (c) rc = ckpt_read(c, CKPT_ANCHOR, at, some, block, err);
        else model_init_elements(&set->model, set->init_std, set->init_seed, at, some, block);
        if (rc == 0) engine_params_write(s->engine, at, some, block);
    }
    free(block);
    ckpt_close(c);
    return rc;
}

static int load_to_replay(struct solo *s, struct err *err) {
    char name[PATH_BYTES];
    uint64_t before;
    kept_name(s, s->options->replay, name);
    if (access(name, R_OK))
        return err_set_errno(err, "what step %llu came to is not known (--keep keeps it): %.150s",
                             (unsigned long long)s->options->replay, name);
    if (newest_before(s, s->options->replay, &before, err)) return -1;
    if (before == 0) return first_parameters(s, err);
    kept_name(s, before, name);
    return engine_load(s->engine, name, &s->done, err);
}

static int load(struct solo *s, struct err *err) {
    struct err why = { 0 };
    if (s->options->replay) return load_to_replay(s, err);
    if (!engine_load(s->engine, s->state, &s->done, &why)) return keep(s, s->done, err);
    if (why.code == ERR_NOT_FOUND) return first_parameters(s, err);
    *err = why;
    return -1;
}

static void comes_to_layer(void *arg) {
    struct solo *s = arg;
    mesh_goes_on(&s->mesh, s->done);
}

static int set_up(struct solo *s, const struct corpus_facts *corpus, struct err *err) {
    const struct settings *set = s->settings;
    const struct engine_mesh where = { .world = s->mesh.world, .tensor = s->mesh.tensor, .data = s->mesh.data,
                                       .shard = (enum engine_shard)s->options->shard,
                                       .activation_bytes = s->options->activation_bytes,
                                       .offload = (enum engine_offload)s->options->offload };
    s->data = data_open(set->corpus, &corpus->manifest_digest, set->shuffle_seed, err);
    if (!s->data || create_kernels(s, err)) return -1;
    s->engine = engine_create_rank(&set->model, &set->inner, s->kernels, &where, err);
    if (!s->engine) {
        device_name_holders(s->kernels, err);
        return -1;
    }
    engine_set_document_end(s->engine, data_info(s->data)->document_end);
    engine_set_watch(s->engine, comes_to_layer, s);
    s->saver = saver_create(s->engine, s->mesh.rank == 0 ? s->state : NULL, s->mesh.state, err);
    s->tokens = calloc((size_t)set->inner.batch * (set->model.sequence + 1), sizeof *s->tokens);
    if (!s->tokens) return err_set(err, ERR_MEMORY, "no memory for a batch");
    mesh_excuse(&s->mesh, true);
    if (!s->saver || load(s, err)) return -1;
    mesh_excuse(&s->mesh, false);
    if (s->mesh.rank == 0 && !s->options->replay && !(s->curve = curve_open(s->csv, s->done, err))) return -1;
    s->mesh.world->barrier(s->mesh.world);
    return s->mesh.world->check(s->mesh.world, err);
}

static void tear_down(struct solo *s) {
    curve_close(s->curve);
    saver_destroy(s->saver);
    engine_destroy(s->engine);
    mesh_unuse(&s->mesh);
    if (s->kernels) s->kernels->destroy(s->kernels);
    data_close(s->data);
    free(s->tokens);
}

/* ---- steps ------------------------------------------------------------------------------------- */

/* The run's order of samples: pass after pass over the corpus, each in another one. */
static uint64_t sample_at(const struct solo *s, uint64_t i) {
    uint64_t samples = data_info(s->data)->samples, pass = i / samples;
    return pass == 0 ? i : data_permute(s->settings->shuffle_seed + pass, samples, i % samples);
}

static int read_batch(struct solo *s, uint64_t batch, struct err *err) {
    uint32_t first, share, B = s->settings->inner.batch;
    size_t width = s->settings->model.sequence + 1;
    double began = now_s();
    engine_share(s->engine, B, &first, &share);
    for (uint32_t i = 0; i < share; i++)
        if (data_sample(s->data, sample_at(s, batch * B + first + i), s->tokens + i * width, err)) return -1;
    s->waited_s += now_s() - began;
    return 0;
}

static void show(struct solo *s, const struct engine_result *r, double seconds) {
    double now = now_s();
    if (s->options->quiet || (now - s->shown_s < PROGRESS_S && s->done != s->end)) return;
    s->shown_s = now;
    printf("step %llu of %llu  loss %.4f  norm %.3g  lr %.3g  %.0f tokens/s\n", (unsigned long long)s->done,
           (unsigned long long)s->total, r->loss, r->grad_norm, r->lr, (double)r->tokens / (seconds + 1e-9));
    fflush(stdout);
}

static int record(struct solo *s, const struct engine_result *r, double seconds, struct err *err) {
    uint64_t tokens = (uint64_t)s->settings->inner.batch * s->settings->model.sequence;
    const struct curve_row row = { .step = s->done, .tokens = s->done * tokens, .loss = r->loss,
                                   .grad_norm = r->grad_norm, .lr = r->lr, .seconds = seconds };
    s->trained_tokens += r->tokens;
    s->result->loss = r->loss;
    if (s->mesh.rank > 0) return 0;
    show(s, r, seconds);
    return s->curve ? curve_add(s->curve, &row, err) : 0;
}

/* A step that is not finite is skipped, its samples with it; some in a row are the end. */
static int step(struct solo *s, struct err *err) {
    const struct msg_inner *in = &s->settings->inner;
    uint64_t position = s->done * in->batch * s->settings->model.sequence;
    struct engine_result r;
    struct err why = { 0 };
    double began = now_s();
    mesh_goes_on(&s->mesh, s->done);
    mesh_excuse(&s->mesh, true); /* a corpus may lie behind a network */
    if (read_batch(s, s->done, err)) return -1;
    mesh_excuse(&s->mesh, false);
    int bad = engine_step(s->engine, s->tokens, in->batch, position, &r, &why) != 0;
    if (bad && (why.code != ERR_CORRUPT || ++s->bad_steps > TRAINER_BAD_STEPS_MAX)) {
        *err = why;
        return -1;
    }
    s->done++;
    if (!bad) {
        s->bad_steps = 0;
        return record(s, &r, now_s() - began, err);
    }
    if (s->mesh.rank == 0) fprintf(stderr, "skipped batch %llu: %s\n", (unsigned long long)s->done, why.msg);
    return 0;
}

/* What all ranks do next. */
enum next { NEXT_STEP, NEXT_SAVE, NEXT_END };

/* A disk may be slow: the ranks that wait meanwhile do not count that. */
static void await_saver(struct solo *s) {
    mesh_excuse(&s->mesh, true);
    while (saver_busy(s->saver)) usleep(1000);
    mesh_excuse(&s->mesh, false);
}

static enum next decide(struct solo *s, uint64_t saved) {
    if (s->done >= s->end || asked_to_stop) return NEXT_END;
    bool due = !s->options->replay && s->done - saved >= s->options->save_steps;
    if (due && s->options->keep) await_saver(s); /* none is left out */
    return due && !saver_busy(s->saver) ? NEXT_SAVE : NEXT_STEP;
}

/* At the end nothing may still be written when the ranks copy their state anew. */
static int save_last(struct solo *s, uint64_t saved, struct err *err) {
    if (s->mesh.rank == 0) await_saver(s);
    s->mesh.world->barrier(s->mesh.world);
    if (saved != UINT64_MAX && saved != s->done && keep(s, saved, err)) return -1;
    mesh_excuse(&s->mesh, true);
    if (saved != s->done && saver_finish(s->saver, s->done, err)) return -1;
    mesh_excuse(&s->mesh, false);
    return keep(s, s->done, err);
}

/* What was computed again, beside what was kept. */
static int compare(struct solo *s, struct err *err) {
    char again[PATH_BYTES], kept[PATH_BYTES];
    if (s->done != s->end)
        return err_set(err, ERR_REFUSED, "stopped at step %llu", (unsigned long long)s->done);
    snprintf(again, sizeof again, "%s/replayed", s->options->out);
    kept_name(s, s->end, kept);
    struct engine_snapshot *now = engine_snapshot_create(s->engine, s->mesh.state, err);
    int rc = !now || engine_snapshot_take(now, s->engine, s->done, err) ? -1 : 0;
    if (rc == 0 && s->mesh.rank == 0)
        rc = engine_snapshot_write(now, again, err) ||
             engine_state_compare(&s->settings->model, again, kept, err);
    engine_snapshot_destroy(now);
    if (s->mesh.rank == 0) unlink(again);
    return rc ? -1 : 0;
}

static int train(struct solo *s, struct err *err) {
    const struct comm *world = s->mesh.world;
    uint64_t saved = s->done ? s->done : UINT64_MAX; /* a run of no step is saved too */
    for (;;) {
        uint32_t next = s->mesh.rank == 0 ? decide(s, saved == UINT64_MAX ? 0 : saved) : 0;
        world->broadcast(world, &next, sizeof next, COMM_BYTES, 0);
        if (world->check(world, err)) return -1;
        if (next == NEXT_END) break;
        if (next == NEXT_STEP && step(s, err)) return -1;
        if (next == NEXT_SAVE && saved != UINT64_MAX && keep(s, saved, err)) return -1;
        if (next == NEXT_SAVE && saver_begin(s->saver, s->done, err)) return -1;
        if (next == NEXT_SAVE) saved = s->done;
    }
    return s->options->replay ? compare(s, err) : save_last(s, saved, err);
}

/* Mean loss of the first held-out windows, a batch at a time. */
static int evaluate(struct solo *s, struct err *err) {
    uint32_t B = s->settings->inner.batch, first, share;
    size_t T = s->settings->model.sequence, width = T + 1, got;
    uint64_t tokens = data_info(s->data)->heldout_tokens, windows = tokens ? (tokens - 1) / T : 0, count = 0;
    double sum = 0, loss;
    if (windows > s->options->heldout_samples) windows = s->options->heldout_samples;
    for (uint64_t w = 0; w < windows; w += B) {
        uint32_t n = windows - w < B ? (uint32_t)(windows - w) : B;
        engine_share(s->engine, n, &first, &share);
        for (uint32_t i = 0; i < share; i++)
            if (data_heldout(s->data, (w + first + i) * T, width, s->tokens + i * width, &got, err))
                return -1;
        if (engine_eval_loss(s->engine, s->tokens, n, &loss, err)) return -1;
        sum += loss * n;
        count += n;
    }
    s->result->heldout = count ? sum / (double)count : NAN;
    return 0;
}

/* ---- the model --------------------------------------------------------------------------------- */

static int read_params(void *arg, uint64_t first, size_t n, float *out, struct err *err) {
    const struct solo *s = arg;
    (void)err;
    if (s->mesh.state) memcpy(out, s->mesh.state + first, n * sizeof *out);
    else engine_params_read(s->engine, (size_t)first, n, out);
    return 0;
}

static int write_folder(const struct solo *s, struct err *err) {
    char dir[PATH_BYTES + 8];
    struct tokenizer *t = data_tokenizer(s->data, err);
    if (!t) return -1;
    struct ckpt_folder f = { .model = &s->settings->model, .init_std = s->settings->init_std,
                             .weights = s->settings->checkpoint_bf16 ? CKPT_BF16 : CKPT_FP32,
                             .tokenizer = tokenizer_name(t), .read = read_params, .arg = (void *)(uintptr_t)s };
    size_t n;
    const char *json = tokenizer_json(t, &n);
    if (json) f.tokenizer_json = (struct proto_bytes){ (const uint8_t *)json, (uint32_t)n };
    snprintf(dir, sizeof dir, "%s/model", s->options->out);
    int rc = ckpt_folder_write(&f, dir, err);
    tokenizer_close(t);
    return rc;
}

/* Ranks put what they hold where rank 0 reads it. */
static int write_model(struct solo *s, struct err *err) {
    const struct comm *world = s->mesh.world;
    if (s->mesh.state) engine_params_read(s->engine, 0, engine_elements(s->engine), s->mesh.state);
    world->barrier(world);
    if (world->check(world, err)) return -1;
    mesh_excuse(&s->mesh, true);
    int rc = s->mesh.rank == 0 ? write_folder(s, err) : 0;
    mesh_excuse(&s->mesh, false);
    return rc;
}

/* ---- a rank's life ----------------------------------------------------------------------------- */

static void say_start(const struct solo *s) {
    if (s->options->quiet || s->mesh.rank > 0) return;
    printf("%.2f million parameters, %s; %d ranks, tensor-parallel %d by data-parallel %d (shard: %s)\n",
           (double)engine_elements(s->engine) / 1e6, s->kernels->description, s->mesh.ranks, s->mesh.tp,
           s->mesh.dp, engine_shard_name(s->options->shard));
    if (s->why_no_gpu.code != ERR_NONE) printf("no GPU: %s\n", s->why_no_gpu.msg);
    printf("%s at step %llu of %llu, in %s\n", s->done ? "goes on" : "begins", (unsigned long long)s->done,
           (unsigned long long)s->total, s->options->out);
    fflush(stdout);
}

static void sum_up(struct solo *s) {
    double took = now_s() - s->began_s;
    struct solo_result *r = s->result;
    r->steps = s->done;
    r->steps_total = s->total;
    r->tokens = s->done * s->settings->inner.batch * s->settings->model.sequence;
    r->stopped = asked_to_stop;
    r->tokens_per_s = (double)s->trained_tokens / (took + 1e-9);
    r->data_share = s->waited_s / (took + 1e-9);
}

static int live(struct solo *s, const struct corpus_facts *corpus, struct err *err) {
    if (set_up(s, corpus, err)) return -1;
    s->total = solo_steps(s->settings);
    uint64_t end = s->options->replay ? s->options->replay : s->options->stop_after;
    s->end = end && end < s->total ? end : s->total;
    say_start(s);
    s->began_s = now_s();
    int rc = train(s, err);
    sum_up(s);
    if (rc || s->options->replay) return rc;
    return (s->done == s->end && write_model(s, err)) || evaluate(s, err) ? -1 : 0;
}

/* Rank 0 tells the caller what went wrong. Where it is the one that hangs, nobody would. */
static void speak_for_the_first(const struct solo *s, const struct err *err) {
    if (s->mesh.rank == 1 && err->code == ERR_TIMEOUT && !strncmp(err->msg, "rank 0 ", 7))
        fprintf(stderr, "train: %s; the other ranks have ended\n", err->msg);
}

int solo_run(const struct solo_options *options, const struct settings *settings,
             const struct corpus_facts *corpus, struct solo_result *result, struct err *err) {
    struct solo s = { .options = options, .settings = settings, .result = result, .lock = -1 };
    size_t elements = (size_t)proto_model_elements(&settings->model);
    size_t shared = options->tp * options->dp > 1 ? 3 * elements * sizeof(float) : 0;
    int rc = -1;
    *result = (struct solo_result){ .loss = NAN, .heldout = NAN };
    asked_to_stop = 0;
    if (layout_check(&settings->model, options->tp, err)) return -1;
    if (take_folder(&s, err) || check_genesis(&s, corpus, err)) goto out;
    if (!mesh_start(&s.mesh, options->tp, options->dp, shared, err)) {
        mesh_watch(&s.mesh, options->silence_s * 1000);
        if (s.mesh.rank == 0) {
            signal(SIGINT, on_signal);
            signal(SIGTERM, on_signal);
            if (signal(SIGHUP, SIG_IGN) != SIG_IGN) signal(SIGHUP, on_signal); /* but not under nohup */
        }
        rc = live(&s, corpus, err);
    }
    if (rc) mesh_fail(&s.mesh, err);
    if (rc) speak_for_the_first(&s, err);
    tear_down(&s);
    mesh_end(&s.mesh, rc ? 1 : 0);
out:
    if (s.lock >= 0) close(s.lock);
    return rc;
}
