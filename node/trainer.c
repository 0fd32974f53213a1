/* trainer.c - the trainer process; see trainer.h. One loop: take all commands, then do one inner
 * step, or wait. A command is thus always carried out between two steps. */
#include "node/trainer.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "kernels/kernels.h"
#include "node/data.h"
#include "node/device.h"
#include "node/engine.h"
#include "node/mesh.h"
#include "node/saver.h"
#include "node/segment.h"
#include "node/sync.h"
#include "proto/model.h"
#include "proto/proto.h"

#define RANGES_MAX 4096u
#define WAIT_MS 500

struct range {
    uint64_t start, count;
};

struct trainer {
    struct segment *segment;
    struct mesh mesh;
    struct msg_genesis genesis;
    struct kernels *kernels;
    struct err why_no_gpu; /* where auto took the CPU */
    struct err lost;       /* how the device failed, else ERR_NONE */
    struct engine *engine;
    struct data *data;
    struct saver *saver;
    uint8_t *fragment_of;  /* [chunks]: the fragment that a chunk is synchronised in */
    int32_t *tokens;       /* [batch, sequence + 1] */
    float *scratch;        /* [chunk_elements] */
    float *exchange;       /* [elements] that all ranks see, NULL where there is one */
    struct range range[RANGES_MAX]; /* what to train on, in this order */
    uint32_t range_count;
    uint64_t queued;       /* samples in them */
    uint64_t consumed;     /* samples since the last RESET */
    double queued_at_s;    /* when samples last came */
    double stepped_s, data_s; /* in steps, and of that waiting for the corpus */
    uint64_t position;     /* the run's committed tokens, as last told */
    uint64_t tokens_since; /* own, since then */
    uint32_t contributors;
    bool has_parameters, frozen, stop;
    uint32_t bad_steps;
    double saved_at_s;
    uint64_t saved_steps;
};

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* The agent may be stopped or busy: wait for room, but not for a dead agent (PR_SET_PDEATHSIG). */
static void tell(struct trainer *t, const struct segment_message *m) {
    if (t->mesh.rank > 0) return;
    while (!segment_send(t->segment, m)) usleep(10000);
}

static int fail_as(struct trainer *t, enum segment_type type, const struct err *err);

/* A slot is read or filled by all ranks: it changes hands when the last one is done. What a device has written
 * that failed meanwhile is nobody's. */
static void tell_after_all(struct trainer *t, const struct segment_message *m) {
    t->mesh.world->barrier(t->mesh.world);
    if (t->kernels->check(t->kernels, &t->lost)) fail_as(t, SEGMENT_DEVICE_FAILED, &t->lost);
    else tell(t, m);
}

static void note(struct trainer *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void note(struct trainer *t, const char *format, ...) {
    struct segment_message m = { .type = SEGMENT_NOTE };
    va_list args;
    va_start(args, format);
    vsnprintf(m.text, sizeof m.text, format, args);
    va_end(args);
    tell(t, &m);
}

static int fail_as(struct trainer *t, enum segment_type type, const struct err *err) {
    struct segment_message m = { .type = type, .code = err->code };
    snprintf(m.text, sizeof m.text, "%.*s", (int)sizeof m.text - 1, err->msg);
    tell(t, &m);
    return 1;
}

/* What failed at the start will fail again: the agent need not try. */
static int fail(struct trainer *t, const struct err *err) { return fail_as(t, SEGMENT_FAILED, err); }

/* ---- start ----------------------------------------------------------------------------------- */

static int check_corpus(const struct trainer *t, struct err *err) {
    const struct data_info *info = data_info(t->data);
    const struct msg_model *model = t->genesis.model;
    const struct msg_corpus *corpus = t->genesis.corpus;
    if (info->sequence != model->sequence)
        return err_set(err, ERR_CONFIG, "the corpus has samples of %u tokens, the model wants %u",
                       info->sequence, model->sequence);
    if (info->vocabulary > model->vocabulary)
        return err_set(err, ERR_CONFIG, "the corpus has a vocabulary of %u, the model of %u",
                       info->vocabulary, model->vocabulary);
    if (info->samples != corpus->samples)
        return err_set(err, ERR_CONFIG, "the corpus has %llu samples, the run says %llu",
                       (unsigned long long)info->samples, (unsigned long long)corpus->samples);
    return 0;
}

static int make_fragments(struct trainer *t, struct err *err) {
    const struct msg_outer *outer = t->genesis.outer;
    if (!(t->fragment_of = calloc(segment_chunks(t->segment), 1)))
        return err_set(err, ERR_MEMORY, "no memory for a table of fragments");
    return proto_model_fragments(t->genesis.model, outer->chunk_elements, outer->fragments,
                                 t->fragment_of, err);
}

/* Moments of an earlier life. Anything wrong with the file costs moments, nothing else. */
static void load_inner_state(struct trainer *t) {
    struct err err = {0};
    uint64_t tag;
    const char *path = segment_setup(t->segment)->inner_state;
    if (engine_load(t->engine, path, &tag, &err) && err.code != ERR_NOT_FOUND)
        note(t, "starting without moments: %.200s", err.msg);
}

const char *trainer_precision_name(int precision) {
    static const char *const names[] = { "fp32", "bf16", "bf16-stochastic" };
    return precision >= 0 && precision < 3 ? names[precision] : NULL;
}

static struct kernels *create_kernels(struct trainer *t, struct err *err) {
    const struct segment_setup *setup = segment_setup(t->segment);
    return device_create(device_of_rank(setup->device, t->mesh.rank), setup->precision,
                         mesh_threads(&t->mesh, setup->threads), t->mesh.ranks, &t->why_no_gpu, err);
}

static void on_layer(void *segment) { segment_beat(segment); }

static int set_up(struct trainer *t, struct err *err) {
    const struct segment_setup *setup = segment_setup(t->segment);
    if (proto_decode(setup->genesis.data, setup->genesis.length, RECORD_genesis, &t->genesis, err))
        return -1;
    const struct msg_genesis *g = &t->genesis;
    if (g->model_count != 1 || g->inner_count != 1 || g->outer_count != 1 || g->corpus_count != 1)
        return err_set(err, ERR_CORRUPT, "the genesis lacks model, inner, outer or corpus");
    t->data = data_open(setup->corpus, &g->corpus->manifest_digest, g->corpus->shuffle_seed, err);
    if (!t->data) {
        err_prefix(err, "corpus");
        return -1;
    }
    if (check_corpus(t, err)) return -1;
    if (!(t->kernels = create_kernels(t, err)) || mesh_use(&t->mesh, t->kernels, err)) return -1;
    const struct engine_mesh where = { .world = t->mesh.world, .tensor = t->mesh.tensor, .data = t->mesh.data,
                                       .shard = (enum engine_shard)setup->shard,
                                       .activation_bytes = setup->activation_bytes,
                                       .offload = (enum engine_offload)setup->offload };
    if (!(t->engine = engine_create_rank(g->model, g->inner, t->kernels, &where, err))) {
        device_name_holders(t->kernels, err);
        return -1;
    }
    engine_set_document_end(t->engine, data_info(t->data)->document_end);
    if (t->mesh.rank == 0) engine_set_watch(t->engine, on_layer, t->segment);
    const char *state = t->mesh.rank == 0 ? setup->inner_state : NULL;
    if (!(t->saver = saver_create(t->engine, state, t->mesh.state, err))) return -1;
    if (t->mesh.state) t->exchange = t->mesh.state + 3 * setup->elements;
    if (make_fragments(t, err)) return -1;
    t->tokens = calloc((size_t)g->inner->batch * (g->model->sequence + 1), sizeof *t->tokens);
    t->scratch = calloc(setup->chunk_elements, sizeof *t->scratch);
    if (!t->tokens || !t->scratch) return err_set(err, ERR_MEMORY, "no memory for a batch");
    load_inner_state(t);
    t->mesh.world->barrier(t->mesh.world); /* one that could not do all that has said so */
    return t->mesh.world->check(t->mesh.world, err);
}

static void tear_down(struct trainer *t) {
    saver_destroy(t->saver);
    engine_destroy(t->engine);
    mesh_unuse(&t->mesh);
    if (t->kernels) t->kernels->destroy(t->kernels);
    data_close(t->data);
    proto_decoded_release(RECORD_genesis, &t->genesis);
    free(t->fragment_of);
    free(t->tokens);
    free(t->scratch);
}

/* ---- inner steps ----------------------------------------------------------------------------- */

/* Take `want` samples off the front of the ranges, this rank's share of them into t->tokens. */
static int take_samples(struct trainer *t, uint32_t want, struct err *err) {
    size_t width = t->genesis.model->sequence + 1;
    uint32_t used = 0, first, share;
    engine_share(t->engine, want, &first, &share);
    for (uint32_t i = 0; i < want; i++) {
        struct range *r = &t->range[used];
        bool own = i >= first && i < first + share;
        if (own && data_sample(t->data, r->start, t->tokens + (i - first) * width, err)) return -1;
        r->start++;
        if (--r->count == 0) used++;
    }
    memmove(t->range, t->range + used, (t->range_count - used) * sizeof *t->range);
    t->range_count -= used;
    t->queued -= want;
    t->consumed += want;
    return 0;
}

/* Train on `samples` of what is queued. -1: the trainer cannot go on. */
static int step(struct trainer *t, uint32_t samples, struct err *err) {
    uint64_t position = t->position + t->tokens_since * (t->contributors ? t->contributors : 1);
    struct engine_result r;
    struct err why = {0};
    double begin = now_s();
    if (take_samples(t, samples, err)) return -1;
    t->data_s += now_s() - begin;
    if (!engine_step(t->engine, t->tokens, samples, position, &r, &why)) {
        t->bad_steps = 0;
    } else if (t->mesh.world->check(t->mesh.world, err)) {
        return -1;
    } else if (why.code != ERR_CORRUPT) { /* not the batch's fault: it would fail for every other one */
        fail_as(t, SEGMENT_DEVICE_FAILED, &why);
        *err = why;
        return -1;
    } else if (++t->bad_steps > TRAINER_BAD_STEPS_MAX) {
        *err = why;
        err_prefix(err, "%u steps in a row", t->bad_steps);
        return -1;
    } else {
        note(t, "skipped a batch: %.200s", why.msg);
        r = (struct engine_result){ .tokens = (uint64_t)samples * t->genesis.model->sequence };
    }
    double took = now_s() - begin + 1e-9;
    t->stepped_s += took;
    t->tokens_since += r.tokens;
    tell(t, &(struct segment_message){
                .type = SEGMENT_STEP, .samples = t->consumed, .steps = engine_steps(t->engine), .loss = r.loss,
                .tokens_per_s = (double)r.tokens / took, .data_share = t->data_s / t->stepped_s });
    return 0;
}

/* ---- commands -------------------------------------------------------------------------------- */

static void forget_samples(struct trainer *t) {
    t->range_count = 0;
    t->queued = 0;
}

static int on_samples(struct trainer *t, const struct segment_message *m, struct err *err) {
    if (m->count == 0) return 0;
    if (t->range_count == RANGES_MAX)
        return err_set(err, ERR_FULL, "more than %u ranges of samples are queued", RANGES_MAX);
    t->range[t->range_count++] = (struct range){ m->start, m->count };
    t->queued += m->count;
    t->queued_at_s = now_s();
    return 0;
}

static void chunk_range(const struct trainer *t, uint32_t c, size_t *first, size_t *n) {
    const struct segment_setup *setup = segment_setup(t->segment);
    *first = (size_t)c * setup->chunk_elements;
    *n = setup->elements - *first < setup->chunk_elements ? (size_t)setup->elements - *first
                                                          : setup->chunk_elements;
}

/* Only the copy happens here, so that training goes on soon: the agent encodes from the slot. */
static int on_freeze(struct trainer *t, const struct segment_message *m, struct err *err) {
    float *out = segment_out(t->segment, SEGMENT_OUT_PARAMETERS);
    if (m->fragment >= t->genesis.outer->fragments)
        return err_set(err, ERR_PROTOCOL, "the agent asked for fragment %u of %u", m->fragment,
                       t->genesis.outer->fragments);
    if (t->has_parameters && !t->frozen && t->queued > 0 && t->queued < t->genesis.inner->batch &&
        step(t, (uint32_t)t->queued, err))
        return -1;
    for (uint32_t c = 0; c < segment_chunks(t->segment); c++) {
        size_t first, n;
        if (t->fragment_of[c] != m->fragment) continue;
        chunk_range(t, c, &first, &n);
        engine_params_read(t->engine, first, n, out + first);
    }
    if (m->wait) t->frozen = true;
    tell_after_all(t, &(struct segment_message){ .type = SEGMENT_FROZEN, .fragment = m->fragment,
                                       .samples = t->consumed,
                                       .steps = engine_steps(t->engine) });
    return 0;
}

/* The run's place in the schedule of learning rates; own tokens move it until the next commit. */
static void take_position(struct trainer *t, const struct segment_message *m) {
    t->position = m->tokens;
    t->contributors = m->contributors;
    t->tokens_since = 0;
}

/* Every chunk as its op says; the rest of the vector stays. Ranks read their parts of it for all, and each
 * writes what it holds. */
static void on_apply(struct trainer *t, const struct segment_message *m) {
    const float *in = segment_in(t->segment);
    const uint8_t *ops = segment_ops(t->segment);
    size_t first, n;
    for (uint32_t c = 0; t->exchange && c < segment_chunks(t->segment); c++) {
        if (ops[c] == SYNC_OP_KEEP) continue;
        chunk_range(t, c, &first, &n);
        engine_params_read(t->engine, first, n, t->exchange + first);
    }
    t->mesh.world->barrier(t->mesh.world);
    for (uint32_t c = 0; c < segment_chunks(t->segment); c++) {
        if (ops[c] == SYNC_OP_KEEP) continue;
        chunk_range(t, c, &first, &n);
        if (t->exchange) memcpy(t->scratch, t->exchange + first, n * sizeof *t->scratch);
        else engine_params_read(t->engine, first, n, t->scratch);
        if (ops[c] == SYNC_OP_MIX)
            outer_mix(t->scratch, in + first, n, t->genesis.outer->alpha);
        else
            for (size_t i = 0; i < n; i++) t->scratch[i] += in[first + i];
        engine_params_write(t->engine, first, n, t->scratch);
    }
    t->frozen = false;
    take_position(t, m);
    tell_after_all(t, &(struct segment_message){ .type = SEGMENT_APPLIED });
}

static void on_reset(struct trainer *t, const struct segment_message *m) {
    engine_params_write(t->engine, 0, engine_elements(t->engine), segment_in(t->segment));
    forget_samples(t);
    t->has_parameters = true;
    t->frozen = false;
    t->consumed = 0;
    take_position(t, m);
    tell_after_all(t, &(struct segment_message){ .type = SEGMENT_APPLIED });
}

static void on_moments_export(struct trainer *t) {
    uint64_t count = 0;
    engine_second_moments_read(t->engine, 0, engine_elements(t->engine),
                               segment_out(t->segment, SEGMENT_OUT_MOMENTS), &count);
    tell_after_all(t, &(struct segment_message){ .type = SEGMENT_MOMENTS, .steps = count });
}

/* They come from another member: values that cannot be moments are refused, and it starts fresh. */
static void on_moments_import(struct trainer *t, const struct segment_message *m) {
    struct err err = {0};
    engine_reset_moments(t->engine);
    if (engine_second_moments_write(t->engine, 0, engine_elements(t->engine),
                                    segment_in(t->segment), m->steps, &err)) {
        engine_reset_moments(t->engine);
        note(t, "starting without moments: %.200s", err.msg);
    }
    tell_after_all(t, &(struct segment_message){ .type = SEGMENT_APPLIED });
}

static int on_command(struct trainer *t, const struct segment_message *m, struct err *err) {
    switch (m->type) {
    case SEGMENT_SAMPLES: return on_samples(t, m, err);
    case SEGMENT_FREEZE: return on_freeze(t, m, err);
    case SEGMENT_APPLY: on_apply(t, m); return 0;
    case SEGMENT_RESET: on_reset(t, m); return 0;
    case SEGMENT_CONTINUE: t->frozen = false; return 0;
    case SEGMENT_MOMENTS_EXPORT: on_moments_export(t); return 0;
    case SEGMENT_MOMENTS_IMPORT: on_moments_import(t, m); return 0;
    case SEGMENT_STOP: t->stop = true; return 0;
    default: return err_set(err, ERR_PROTOCOL, "the agent sent an unknown command (%u)", m->type);
    }
}

/* ---- the loop -------------------------------------------------------------------------------- */

/* How many samples to train on now; 0 = wait. */
static uint32_t samples_due(const struct trainer *t) {
    uint32_t batch = t->genesis.inner->batch;
    if (!t->has_parameters || t->frozen) return 0;
    if (t->queued >= batch) return batch;
    return now_s() - t->queued_at_s > TRAINER_PARTIAL_S ? (uint32_t)t->queued : 0;
}

static void save(struct trainer *t, int (*how)(struct saver *, uint64_t, struct err *)) {
    struct err err = {0};
    t->saved_at_s = now_s();
    t->saved_steps = engine_steps(t->engine);
    if (how(t->saver, t->position, &err)) note(t, "moments not saved: %.200s", err.msg);
}

/* What rank 0 has all ranks do next, itself included. */
struct order {
    enum { ORDER_COMMAND, ORDER_STEP, ORDER_SAVE, ORDER_END } what;
    uint32_t samples;               /* STEP */
    struct segment_message command; /* COMMAND */
};

/* -1: the trainer cannot go on. */
static int carry_out(struct trainer *t, const struct order *o, struct err *err) {
    switch (o->what) {
    case ORDER_COMMAND:
        if (on_command(t, &o->command, err)) return -1;
        if (t->lost.code != ERR_NONE) *err = t->lost;
        return t->lost.code == ERR_NONE ? 0 : -1;
    case ORDER_STEP: return step(t, o->samples, err);
    case ORDER_SAVE: save(t, saver_begin); return 0;
    case ORDER_END: break;
    }
    if (t->has_parameters && engine_steps(t->engine) != t->saved_steps) save(t, saver_finish);
    return 0;
}

static int order(struct trainer *t, const struct order *o, struct err *err) {
    struct order copy = *o;
    t->mesh.world->broadcast(t->mesh.world, &copy, sizeof copy, COMM_BYTES, 0);
    if (t->mesh.world->check(t->mesh.world, err)) return -1;
    return carry_out(t, o, err);
}

static int follow(struct trainer *t, struct err *err) {
    struct order o;
    do {
        t->mesh.world->broadcast(t->mesh.world, &o, sizeof o, COMM_BYTES, 0);
        if (t->mesh.world->check(t->mesh.world, err) || carry_out(t, &o, err)) return -1;
    } while (o.what != ORDER_END);
    return 0;
}

/* A batch that does not fit at once. */
static void say_parts(const struct trainer *t, char *text, size_t size) {
    const struct segment_setup *setup = segment_setup(t->segment);
    const struct msg_inner *inner = t->genesis.inner;
    const struct engine_shape shape = { t->mesh.tp, t->mesh.dp, (enum engine_shard)setup->shard,
                                        setup->activation_bytes, (enum engine_offload)setup->offload };
    struct engine_memory needs;
    engine_plan(t->genesis.model, inner, t->kernels, &shape, &needs);
    uint32_t at_once = needs.micro_batch * (uint32_t)t->mesh.dp;
    if (at_once < inner->batch) snprintf(text, size, "; %u of %u samples at once", at_once, inner->batch);
}

static void say_offload(const struct trainer *t, char *text, size_t size) {
    if (segment_setup(t->segment)->offload != ENGINE_OFFLOAD_OPTIMIZER) return;
    snprintf(text, size, t->kernels->outer ? "; moments in the host's memory"
                                           : "; --offload changes nothing, the CPU's memory is the host's");
}

static void say_up(struct trainer *t) {
    struct segment_message up = { .type = SEGMENT_UP, .steps = engine_steps(t->engine) };
    const char *description = t->kernels->description;
    if (t->mesh.ranks == 1 && t->why_no_gpu.code != ERR_NONE)
        snprintf(up.text, sizeof up.text, "%s; no GPU: %.150s", description, t->why_no_gpu.msg);
    else if (t->mesh.ranks == 1) snprintf(up.text, sizeof up.text, "%s", description);
    else
        snprintf(up.text, sizeof up.text, "%s; %d ranks, tensor-parallel %d by data-parallel %d (shard: %s)",
                 description, t->mesh.ranks, t->mesh.tp, t->mesh.dp,
                 engine_shard_name(segment_setup(t->segment)->shard));
    say_parts(t, up.text + strlen(up.text), sizeof up.text - strlen(up.text));
    say_offload(t, up.text + strlen(up.text), sizeof up.text - strlen(up.text));
    tell(t, &up);
}

/* What was not written yet when the next save began would be overwritten. */
static void await_saver(struct trainer *t) {
    while (saver_busy(t->saver)) usleep(1000);
}

static int lead(struct trainer *t, struct err *err) {
    struct order o = { .what = ORDER_COMMAND };
    say_up(t);
    for (;;) {
        while (!t->stop && segment_receive(t->segment, &o.command)) {
            segment_set_busy(t->segment, true);
            if (order(t, &o, err)) return -1;
        }
        if (t->stop) break;
        uint32_t samples = samples_due(t);
        if (samples == 0) {
            segment_set_busy(t->segment, false);
            segment_wait(t->segment, WAIT_MS);
            continue;
        }
        segment_set_busy(t->segment, true);
        if (order(t, &(struct order){ .what = ORDER_STEP, .samples = samples }, err)) return -1;
        if (now_s() - t->saved_at_s > TRAINER_SAVE_S && !saver_busy(t->saver) &&
            order(t, &(struct order){ .what = ORDER_SAVE }, err))
            return -1;
    }
    await_saver(t);
    return order(t, &(struct order){ .what = ORDER_END }, err);
}

static int serve(struct trainer *t, struct err *err) {
    t->saved_at_s = now_s();
    t->saved_steps = engine_steps(t->engine);
    return t->mesh.rank == 0 ? lead(t, err) : follow(t, err);
}

/* A trainer must not outlive its agent, nor end before it on a Ctrl-C or SIGTERM sent to both. */
static int bind_to_agent(const struct segment_setup *setup) {
    signal(SIGINT, SIG_IGN);
    signal(SIGTERM, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != setup->agent) return -1;
    prctl(PR_SET_NAME, "intellect-train");
    setpriority(PRIO_PROCESS, 0, setup->nice); /* where it fails, the trainer is less polite */
    return 0;
}

int trainer_main(int fd) {
    struct err err = {0};
    struct trainer *t = calloc(1, sizeof *t);
    if (!t || !(t->segment = segment_open(fd, &err)) || bind_to_agent(segment_setup(t->segment))) {
        if (t) segment_destroy(t->segment);
        free(t);
        return 2;
    }
    const struct segment_setup *setup = segment_setup(t->segment);
    int tp = setup->tp ? setup->tp : 1, dp = setup->dp ? setup->dp : 1, rc = 0;
    /* a saved state, and the exchange */
    size_t shared = tp * dp > 1 ? 4 * (size_t)setup->elements * sizeof(float) : 0;
    if (mesh_start(&t->mesh, tp, dp, shared, &err) || set_up(t, &err)) {
        mesh_fail(&t->mesh, &err);
        rc = fail(t, &err);
    } else if (serve(t, &err)) {
        mesh_fail(&t->mesh, &err);
        note(t, "the trainer ends: %.200s", err.msg);
        rc = 1;
    }
    tear_down(t);
    mesh_end(&t->mesh, rc);
    segment_destroy(t->segment);
    free(t);
    return rc;
}
