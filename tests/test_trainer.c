/* The trainer process, driven through its segment as the agent does it, with a network small enough
 * to train in milliseconds. */
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "node/data.h"
#include "node/model.h"
#include "node/segment.h"
#include "node/sync.h"
#include "node/trainer.h"
#include "proto/model.h"

#define BATCH 4
#define SEQUENCE 16
#define CHUNK 1000
#define FRAGMENTS 2
#define ALPHA 0.5f

static char folder[64];
static struct proto_buffer genesis;
static struct msg_model model = { .layers = 1, .width = 16, .heads = 2, .kv_heads = 2, .ffn = 32,
                                  .vocabulary = 256, .sequence = SEQUENCE, .rope_theta = 1e4,
                                  .norm_eps = 1e-5, .tied = 1 };
static size_t elements;
static float *initial;

static void write_corpus(struct data_info *info) {
    char path[128], out[128];
    const char *file = path;
    struct err err = {0};
    snprintf(path, sizeof path, "%s/text", folder);
    snprintf(out, sizeof out, "%s/corpus", folder);
    FILE *f = fopen(path, "w");
    for (int i = 0; i < 500; i++) fprintf(f, "line %d of a text to train on\n", i * i);
    fclose(f);
    struct data_recipe recipe = { .tokenizer = "bytes", .sequence = SEQUENCE, .heldout_fraction = 0.1 };
    if (data_prepare(out, &file, 1, &recipe, info, &err)) fail_msg("%s", err.msg);
}

/* A folder with a corpus, and the genesis of a run on it. */
static int set_up(void **state) {
    (void)state;
    struct err err = {0};
    struct data_info info;
    snprintf(folder, sizeof folder, "/tmp/test-trainer-XXXXXX");
    if (proto_init(NULL) || !mkdtemp(folder)) return -1;
    write_corpus(&info);
    struct msg_inner inner = { .batch = BATCH, .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                               .clip = 1.0, .total_tokens = 1000000 };
    struct msg_outer outer = { .chunk_elements = CHUNK, .fragments = FRAGMENTS, .alpha = ALPHA,
                               .heartbeat_ms = 500, .silence_ms_max = 5000 };
    struct msg_corpus corpus = { .manifest_url = proto_str("unused"),
                                 .tokenizer = proto_str("bytes"),
                                 .manifest_digest = info.manifest_digest,
                                 .samples = info.samples };
    struct msg_genesis g = { .version = 1,
                             .name = proto_str("test"),
                             .model = &model,
                             .model_count = 1,
                             .inner = &inner,
                             .inner_count = 1,
                             .outer = &outer,
                             .outer_count = 1,
                             .corpus = &corpus,
                             .corpus_count = 1,
                             .init_std = 0.02f,
                             .checkpoint_url = proto_str("unused") };
    proto_buffer_init(&genesis, PROTO_BLOB_BYTES_MAX);
    if (proto_encode(&genesis, RECORD_genesis, &g, &err)) fail_msg("%s", err.msg);
    elements = (size_t)proto_model_elements(&model);
    initial = malloc(elements * sizeof *initial);
    model_init_elements(&model, 0.02f, 1, 0, elements, initial);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    char command[128];
    proto_buffer_release(&genesis);
    free(initial);
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

/* All tests are run once more for a mesh of ranks. */
static int tp = 1, dp = 1, shard;
static uint64_t activation_bytes;

static struct segment *make_segment_for(int precision) {
    struct segment_setup setup = { .elements = elements, .chunk_elements = CHUNK,
                                   .tp = tp, .dp = dp, .shard = shard,
                                   .genesis = { genesis.data, (uint32_t)genesis.length },
                                   .threads = 1, .precision = precision,
                                   .activation_bytes = activation_bytes };
    snprintf(setup.corpus, sizeof setup.corpus, "%s/corpus", folder);
    snprintf(setup.inner_state, sizeof setup.inner_state, "%s/inner.state", folder);
    struct segment *s = segment_create(&setup, NULL);
    assert_non_null(s);
    return s;
}

static struct segment *make_segment(void) {
    return make_segment_for(TRAINER_FP32);
}

static pid_t start(struct segment *s) {
    int fds[SEGMENT_FDS];
    segment_fds(s, fds);
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (!pid) _exit(trainer_main(fds[0]));
    return pid;
}

static void tell(struct segment *s, struct segment_message m) { assert_true(segment_send(s, &m)); }

/* The next message of this type; steps on the way are counted in *steps, which may be NULL. */
static struct segment_message expect(struct segment *s, uint32_t type, int *steps) {
    struct segment_message m;
    for (int tries = 0; tries < 200;) {
        if (!segment_receive(s, &m)) {
            tries += !segment_wait(s, 100);
            continue;
        }
        if (m.type == type) return m;
        if (m.type == SEGMENT_STEP && steps) ++*steps;
        if (m.type == SEGMENT_FAILED || m.type == SEGMENT_NOTE) fail_msg("trainer: %s", m.text);
    }
    fail_msg("no message of type %u came", type);
    return m;
}

static void reset(struct segment *s) {
    memcpy(segment_in(s), initial, elements * sizeof *initial);
    tell(s, (struct segment_message){ .type = SEGMENT_RESET, .contributors = 1 });
    expect(s, SEGMENT_APPLIED, NULL);
}

/* One fragment's chunks come to the out slot; wait: and the trainer stands still then. */
static struct segment_message freeze_fragment(struct segment *s, uint32_t fragment, bool wait,
                                              int *steps) {
    tell(s, (struct segment_message){ .type = SEGMENT_FREEZE, .fragment = fragment, .wait = wait });
    struct segment_message m = expect(s, SEGMENT_FROZEN, steps);
    assert_int_equal(m.fragment, fragment);
    return m;
}

/* All fragments, so that the whole vector lies in the out slot. */
static struct segment_message freeze(struct segment *s, int *steps) {
    for (uint32_t f = 1; f < FRAGMENTS; f++) freeze_fragment(s, f, true, steps);
    return freeze_fragment(s, 0, true, steps);
}

static void stop(struct segment *s, pid_t pid) {
    int status;
    tell(s, (struct segment_message){ .type = SEGMENT_STOP });
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* A claim that does not match what was trained spends samples nobody saw, or sees them twice:
 * counts must be exact, the batch that is not full included. */
static void it_trains_on_what_it_was_given_and_counts_it(void **state) {
    (void)state;
    struct segment *s = make_segment();
    pid_t pid = start(s);
    expect(s, SEGMENT_UP, NULL);
    reset(s);
    tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = 5, .count = 3 });
    tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = 20, .count = 7 });
    assert_int_equal(expect(s, SEGMENT_STEP, NULL).samples, BATCH);
    assert_int_equal(expect(s, SEGMENT_STEP, NULL).samples, 2 * BATCH);
    int steps = 0;
    struct segment_message m = freeze(s, &steps);
    assert_int_equal(m.samples, 10);
    assert_int_equal(steps, 1);
    assert_int_equal(m.steps, 3);
    assert_memory_not_equal(segment_out(s, SEGMENT_OUT_PARAMETERS), initial,
                            elements * sizeof(float));
    stop(s, pid);
    segment_destroy(s);
}

/* The run's state is fp32 for all: a member that computes in bf16 gives an anchor back as it came, bit for
 * bit, and one without the rest of its weights what is nearest to it. */
static void precision_is_a_members_own_affair(void **state) {
    (void)state;
    for (int precision = TRAINER_FP32; precision <= TRAINER_BF16_STOCHASTIC; precision++) {
        struct segment *s = make_segment_for(precision);
        pid_t pid = start(s);
        const float *out = segment_out(s, SEGMENT_OUT_PARAMETERS);
        struct segment_message up = expect(s, SEGMENT_UP, NULL);
        assert_int_equal(!strstr(up.text, "bf16"), precision == TRAINER_FP32);
        assert_int_equal(!strstr(up.text, "stochastic"), precision != TRAINER_BF16_STOCHASTIC);
        reset(s);
        freeze(s, NULL);
        size_t same = 0;
        for (size_t i = 0; i < elements; i++) {
            same += out[i] == initial[i];
            assert_true(fabsf(out[i] - initial[i]) <= fabsf(initial[i]) / 256);
        }
        assert_int_equal(same == elements, precision != TRAINER_BF16_STOCHASTIC);
        tell(s, (struct segment_message){ .type = SEGMENT_CONTINUE });
        tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = 0, .count = BATCH });
        assert_true(expect(s, SEGMENT_STEP, NULL).loss < 6); /* ln 256 is 5.5 */
        stop(s, pid);
        segment_destroy(s);
    }
}

/* Without overlap a frozen member must not train on: its work would be in no contribution. */
static void a_frozen_trainer_waits_until_it_is_told(void **state) {
    (void)state;
    struct segment *s = make_segment();
    pid_t pid = start(s);
    struct segment_message m;
    expect(s, SEGMENT_UP, NULL);
    reset(s);
    tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = 0, .count = BATCH });
    expect(s, SEGMENT_STEP, NULL);
    freeze(s, NULL);
    tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = BATCH, .count = BATCH });
    usleep(100000);
    assert_false(segment_receive(s, &m));
    tell(s, (struct segment_message){ .type = SEGMENT_CONTINUE });
    assert_int_equal(expect(s, SEGMENT_STEP, NULL).samples, 2 * BATCH);
    stop(s, pid);
    segment_destroy(s);
}

/* The commit decides what becomes of own work: a mixed chunk takes the anchor over but for alpha, an
 * added one keeps its work and moves with the anchor. */
static void apply_mixes_adds_and_keeps(void **state) {
    (void)state;
    struct segment *s = make_segment();
    pid_t pid = start(s);
    float *out = segment_out(s, SEGMENT_OUT_PARAMETERS);
    expect(s, SEGMENT_UP, NULL);
    reset(s);
    for (size_t i = 0; i < elements; i++) segment_in(s)[i] = 0.25f;
    segment_ops(s)[0] = SYNC_OP_MIX;
    segment_ops(s)[1] = SYNC_OP_ADD;
    for (uint32_t c = 2; c < segment_chunks(s); c++) segment_ops(s)[c] = SYNC_OP_KEEP;
    tell(s, (struct segment_message){ .type = SEGMENT_APPLY, .contributors = 1 });
    freeze(s, NULL);
    for (size_t i = 0; i < elements; i++) {
        float mixed = ALPHA * initial[i] + (1 - ALPHA) * 0.25f;
        float expected = i < CHUNK ? mixed : i < 2 * CHUNK ? initial[i] + 0.25f : initial[i];
        if (fabsf(out[i] - expected) > 1e-6f) fail_msg("element %zu is %g, not %g", i, out[i], expected);
    }
    stop(s, pid);
    segment_destroy(s);
}

/* With overlap a round takes as long as it takes and the device works all the time. */
static void a_freeze_that_does_not_wait_lets_training_go_on(void **state) {
    (void)state;
    struct segment *s = make_segment();
    pid_t pid = start(s);
    float *out = segment_out(s, SEGMENT_OUT_PARAMETERS);
    expect(s, SEGMENT_UP, NULL);
    reset(s);
    tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = 0, .count = BATCH });
    expect(s, SEGMENT_STEP, NULL);
    tell(s, (struct segment_message){ .type = SEGMENT_FREEZE, .fragment = 1 });
    tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = 8, .count = 2 * BATCH });
    assert_int_equal(expect(s, SEGMENT_FROZEN, NULL).samples, BATCH);
    float *copy = malloc(elements * sizeof *copy);
    memcpy(copy, out, elements * sizeof *copy);
    assert_int_equal(expect(s, SEGMENT_STEP, NULL).samples, 2 * BATCH);
    assert_int_equal(expect(s, SEGMENT_STEP, NULL).samples, 3 * BATCH);
    assert_memory_equal(out, copy, elements * sizeof *copy); /* frozen bytes never change */
    free(copy);
    stop(s, pid);
    segment_destroy(s);
}

/* The agent may still be encoding one fragment when another is frozen: only the named one's chunks may be
 * written, and all of them, or a contribution would mix the parameters of two moments. */
static void a_freeze_writes_its_fragment_and_nothing_else(void **state) {
    (void)state;
    struct segment *s = make_segment();
    pid_t pid = start(s);
    float *out = segment_out(s, SEGMENT_OUT_PARAMETERS);
    uint8_t fragment[64];
    assert_int_equal(proto_model_fragments(&model, CHUNK, FRAGMENTS, fragment, NULL), 0);
    expect(s, SEGMENT_UP, NULL);
    reset(s);
    for (size_t i = 0; i < elements; i++) out[i] = 1234.5f;
    freeze_fragment(s, 1, false, NULL);
    for (size_t i = 0; i < elements; i++) {
        float expected = fragment[i / CHUNK] == 1 ? initial[i] : 1234.5f;
        if (out[i] != expected) fail_msg("element %zu is %g, not %g", i, out[i], expected);
    }
    stop(s, pid);
    segment_destroy(s);
}

/* Work that was done after the freeze belongs to the next contribution: where the commit is mixed in, alpha
 * of it stays, and the batch after it continues from there. */
static void a_commit_is_mixed_into_parameters_that_moved_on(void **state) {
    (void)state;
    struct segment *s = make_segment();
    pid_t pid = start(s);
    float *out = segment_out(s, SEGMENT_OUT_PARAMETERS);
    expect(s, SEGMENT_UP, NULL);
    reset(s);
    freeze_fragment(s, 0, false, NULL);
    tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = 0, .count = BATCH });
    expect(s, SEGMENT_STEP, NULL);
    freeze(s, NULL);
    float *local = malloc(elements * sizeof *local);
    memcpy(local, out, elements * sizeof *local);
    for (size_t i = 0; i < elements; i++) segment_in(s)[i] = 0.25f;
    memset(segment_ops(s), SYNC_OP_MIX, segment_chunks(s));
    tell(s, (struct segment_message){ .type = SEGMENT_APPLY, .contributors = 1 });
    freeze(s, NULL);
    for (size_t i = 0; i < elements; i++) {
        float expected = ALPHA * local[i] + (1 - ALPHA) * 0.25f;
        if (fabsf(out[i] - expected) > 1e-6f) fail_msg("element %zu: %g, not %g", i, out[i], expected);
    }
    free(local);
    stop(s, pid);
    segment_destroy(s);
}

/* The agent subtracts counts of two moments from each other; one that starts again in between would
 * claim samples that nobody saw. */
static void samples_are_counted_from_the_last_reset(void **state) {
    (void)state;
    struct segment *s = make_segment();
    pid_t pid = start(s);
    expect(s, SEGMENT_UP, NULL);
    reset(s);
    static const enum sync_op ops[] = { SYNC_OP_ADD, SYNC_OP_MIX, SYNC_OP_KEEP };
    uint64_t next = 0;
    for (int i = 0; i < 3; i++) {
        tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = next, .count = BATCH });
        next += BATCH;
        assert_int_equal(expect(s, SEGMENT_STEP, NULL).samples, next);
        assert_int_equal(freeze(s, NULL).samples, next);
        memset(segment_in(s), 0, elements * sizeof(float));
        memset(segment_ops(s), ops[i], segment_chunks(s));
        tell(s, (struct segment_message){ .type = SEGMENT_APPLY, .contributors = 1 });
        expect(s, SEGMENT_APPLIED, NULL);
    }
    reset(s);
    tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = next, .count = BATCH });
    assert_int_equal(expect(s, SEGMENT_STEP, NULL).samples, BATCH);
    stop(s, pid);
    segment_destroy(s);
}

/* A joiner starts with another member's second moments, and a restart with its own. */
static void moments_travel_and_survive_a_restart(void **state) {
    (void)state;
    struct segment *s = make_segment();
    char path[128];
    snprintf(path, sizeof path, "%s/inner.state", folder);
    unlink(path);
    pid_t pid = start(s);
    assert_int_equal(expect(s, SEGMENT_UP, NULL).steps, 0);
    reset(s);
    tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = 0, .count = 2 * BATCH });
    expect(s, SEGMENT_STEP, NULL);
    expect(s, SEGMENT_STEP, NULL);
    tell(s, (struct segment_message){ .type = SEGMENT_MOMENTS_EXPORT });
    assert_int_equal(expect(s, SEGMENT_MOMENTS, NULL).steps, 2);
    float *moments = malloc(elements * sizeof *moments);
    memcpy(moments, segment_out(s, SEGMENT_OUT_MOMENTS), elements * sizeof *moments);
    stop(s, pid);

    segment_reset(s);
    pid = start(s);
    assert_int_equal(expect(s, SEGMENT_UP, NULL).steps, 2);
    tell(s, (struct segment_message){ .type = SEGMENT_MOMENTS_EXPORT });
    expect(s, SEGMENT_MOMENTS, NULL);
    assert_memory_equal(segment_out(s, SEGMENT_OUT_MOMENTS), moments, elements * sizeof *moments);
    for (size_t i = 0; i < elements; i++) segment_in(s)[i] = 0.5f;
    tell(s, (struct segment_message){ .type = SEGMENT_MOMENTS_IMPORT, .steps = 9 });
    expect(s, SEGMENT_APPLIED, NULL);
    tell(s, (struct segment_message){ .type = SEGMENT_MOMENTS_EXPORT });
    assert_int_equal(expect(s, SEGMENT_MOMENTS, NULL).steps, 9);
    assert_true(segment_out(s, SEGMENT_OUT_MOMENTS)[elements / 2] == 0.5f);
    stop(s, pid);
    free(moments);
    segment_destroy(s);
}

/* Where leases end in less than a batch and nobody asks for a freeze, the end of the run must not
 * wait for ever. */
static void the_rest_of_the_data_is_trained_without_a_freeze(void **state) {
    (void)state;
    struct segment *s = make_segment();
    pid_t pid = start(s);
    expect(s, SEGMENT_UP, NULL);
    reset(s);
    tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = 0, .count = BATCH - 1 });
    assert_int_equal(expect(s, SEGMENT_STEP, NULL).samples, BATCH - 1);
    stop(s, pid);
    segment_destroy(s);
}

/* Memory is the member's own affair, as precision is: the batch goes in parts, and says so. */
static void a_batch_without_room_goes_in_parts(void **state) {
    (void)state;
    double loss[2];
    for (int parts = 0; parts <= 1; parts++) {
        activation_bytes = (uint64_t)parts;
        struct segment *s = make_segment();
        pid_t pid = start(s);
        bool says = strstr(expect(s, SEGMENT_UP, NULL).text, " samples at once") != NULL;
        assert_int_equal(says, parts && BATCH > (uint32_t)dp);
        reset(s);
        tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = 0, .count = BATCH });
        loss[parts] = expect(s, SEGMENT_STEP, NULL).loss;
        stop(s, pid);
        segment_destroy(s);
    }
    activation_bytes = 0;
    assert_true(fabs(loss[0] - loss[1]) < 1e-5);
}

/* A text file changed under a running corpus, or a wrong --corpus: the person must read why. */
static void a_corpus_that_is_not_the_runs_is_reported(void **state) {
    (void)state;
    struct segment_setup setup = { .elements = elements, .chunk_elements = CHUNK,
                                   .genesis = { genesis.data, (uint32_t)genesis.length } };
    snprintf(setup.corpus, sizeof setup.corpus, "%s/nowhere", folder);
    struct segment *s = segment_create(&setup, NULL);
    pid_t pid = start(s);
    struct segment_message m = expect(s, SEGMENT_FAILED, NULL);
    assert_non_null(strstr(m.text, "nowhere"));
    assert_int_equal(m.code, ERR_NOT_FOUND);
    int status;
    waitpid(pid, &status, 0);
    assert_int_equal(WEXITSTATUS(status), 1);
    segment_destroy(s);
}

/* An agent that is killed -9 leaves nobody behind who holds the device and the samples. */
static void it_dies_with_its_agent(void **state) {
    (void)state;
    int pipes[2];
    assert_int_equal(pipe(pipes), 0);
    fflush(NULL);
    pid_t agent = fork();
    if (!agent) {
        struct segment *s = make_segment();
        struct segment_message m;
        start(s); /* inherits the pipe: it is open as long as one of the two lives */
        while (!segment_receive(s, &m)) segment_wait(s, 100);
        if (write(pipes[1], "x", 1) != 1) _exit(1);
        pause();
    }
    char c;
    close(pipes[1]);
    assert_int_equal(read(pipes[0], &c, 1), 1);
    kill(agent, SIGKILL);
    waitpid(agent, NULL, 0);
    alarm(20);
    assert_int_equal(read(pipes[0], &c, 1), 0);
    alarm(0);
    close(pipes[0]);
}

/* The first child of a process, or 0. */
static pid_t child_of(pid_t pid) {
    char path[64];
    int child = 0;
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)pid, (int)pid);
    FILE *f = fopen(path, "r");
    if (f && fscanf(f, "%d", &child) != 1) child = 0;
    if (f) fclose(f);
    return child;
}

/* The agent starts all of them anew: so the trainer has to end, and say why, whichever rank it was. */
static void a_rank_that_dies_ends_the_trainer(void **state) {
    (void)state;
    struct segment *s = make_segment();
    pid_t pid = start(s);
    int status;
    struct segment_message m = {0};
    expect(s, SEGMENT_UP, NULL);
    reset(s);
    pid_t rank = child_of(pid);
    assert_true(rank > 0);
    kill(rank, SIGKILL);
    tell(s, (struct segment_message){ .type = SEGMENT_SAMPLES, .start = 0, .count = 400 });
    alarm(60);
    while (m.type != SEGMENT_NOTE)
        if (!segment_receive(s, &m)) segment_wait(s, 100);
    assert_non_null(strstr(m.text, "the trainer ends: rank 1 of "));
    assert_non_null(strstr(m.text, "died"));
    assert_int_equal(waitpid(pid, &status, 0), pid);
    alarm(0);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    segment_destroy(s);
}

int main(void) {
    static const int meshes[][3] = { { 1, 1, 0 }, { 1, 2, 1 }, { 2, 2, 3 } };
    const struct CMUnitTest dying[] = { cmocka_unit_test(a_rank_that_dies_ends_the_trainer) };
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(it_trains_on_what_it_was_given_and_counts_it),
        cmocka_unit_test(precision_is_a_members_own_affair),
        cmocka_unit_test(a_frozen_trainer_waits_until_it_is_told),
        cmocka_unit_test(apply_mixes_adds_and_keeps),
        cmocka_unit_test(a_freeze_that_does_not_wait_lets_training_go_on),
        cmocka_unit_test(a_freeze_writes_its_fragment_and_nothing_else),
        cmocka_unit_test(a_commit_is_mixed_into_parameters_that_moved_on),
        cmocka_unit_test(samples_are_counted_from_the_last_reset),
        cmocka_unit_test(a_batch_without_room_goes_in_parts),
        cmocka_unit_test(moments_travel_and_survive_a_restart),
        cmocka_unit_test(the_rest_of_the_data_is_trained_without_a_freeze),
        cmocka_unit_test(a_corpus_that_is_not_the_runs_is_reported),
        cmocka_unit_test(it_dies_with_its_agent),
    };
    int failed = 0;
    for (size_t i = 0; i < sizeof meshes / sizeof *meshes; i++) {
        tp = meshes[i][0], dp = meshes[i][1], shard = meshes[i][2];
        printf("%d x %d ranks\n", tp, dp);
        failed += cmocka_run_group_tests(tests, set_up, tear_down);
        if (tp * dp > 1) failed += cmocka_run_group_tests(dying, set_up, tear_down);
    }
    return failed;
}
