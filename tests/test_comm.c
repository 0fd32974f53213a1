/* The communicator over shared memory: ranks are real processes, as in training. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/comm.h"
#include "kernels/plugin.h"
#include "tests/nccl_stand_in.h"

#define WINDOW 4096u /* the least: 1024 fp32 */
#define LONGEST 5000u
#define WATCHDOG_S 60 /* a rank that hangs is killed by its alarm, and the test fails */

static struct comm_area *make(int tp, int dp, int poison) {
    struct err err = { 0 };
    struct comm_shape shape = { .tp = tp, .dp = dp, .window_bytes = WINDOW, .poison = poison };
    struct comm_area *a = comm_area_create(&shape, &err);
    if (!a) fail_msg("%s", err.msg);
    return a;
}

/* One process a rank, with a mapping of its own; the last words of each lie in shared memory. */
struct words {
    char text[COMM_RANKS_MAX][sizeof(((struct err *)0)->msg)];
    enum err_code code[COMM_RANKS_MAX];
};
static struct words *words;

typedef int rank_main(struct comm_area *a, int rank);

/* Ranks compute on the emulator of a GPU, whose memory they open in each other. To the emulator x and y are
 * the device's memory too. */
static int on_device; /* ON_EACH: a device each, and NCCL's stand-in, tests/cuda/nccl.c */
#define ON_EACH 2

static struct kernels *use_device(struct comm_area *a, int rank, struct err *err) {
    struct kernels *k =
        intellect_cuda_create(KERNELS_PLUGIN_ABI, on_device == ON_EACH ? rank : 0, sizeof(float), 0, err);
    if (!k || !comm_area_use(a, k, err)) return k;
    k->destroy(k);
    return NULL;
}

static int child(int fd, int rank, rank_main *run) {
    struct err err = { 0 };
    alarm(WATCHDOG_S);
    struct comm_area *a = comm_area_open(dup(fd), &err);
    struct kernels *k = NULL;
    if (!a || comm_area_join(a, rank, &err) || (on_device && !(k = use_device(a, rank, &err)))) {
        snprintf(words->text[rank], sizeof words->text[rank], "%s", err.msg);
        words->code[rank] = err.code;
        return 98;
    }
    int rc = run(a, rank);
    if (comm_area_group(a, COMM_WORLD)->check(comm_area_group(a, COMM_WORLD), &err)) {
        snprintf(words->text[rank], sizeof words->text[rank], "%s", err.msg);
        words->code[rank] = err.code;
    }
    if (k) comm_area_unuse(a);
    if (k) k->destroy(k);
    comm_area_destroy(a);
    return rc;
}

static void start(struct comm_area *a, int ranks, rank_main *run, pid_t *pid) {
    fflush(NULL);
    memset(words, 0, sizeof *words);
    for (int r = 0; r < ranks; r++) {
        pid[r] = fork();
        assert_true(pid[r] >= 0);
        if (pid[r] == 0) _exit(child(comm_area_fd(a), r, run));
    }
}

static int end_of(pid_t pid) {
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static void run_all(int tp, int dp, int poison, rank_main *run) {
    pid_t pid[COMM_RANKS_MAX];
    struct comm_area *a = make(tp, dp, poison);
    start(a, tp * dp, run, pid);
    for (int r = 0; r < tp * dp; r++) {
        int end = end_of(pid[r]);
        if (end) fail_msg("rank %d of %d x %d ended with %d: %s", r, tp, dp, end, words->text[r]);
    }
    comm_area_destroy(a);
}

static int set_up(void **state) {
    (void)state;
    if (load_nccl_stand_in()) return -1;
    words = mmap(NULL, sizeof *words, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return words == MAP_FAILED ? -1 : 0;
}

/* ---- what the ranks do ------------------------------------------------------------------------- */

static float value(int rank, size_t i) { return (float)(rank + 1) * 0.1f + (float)(i % 97) * 1e-3f; }

static uint16_t upper(float x) { /* exact for what the tests use it with */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* In rank order, as fp32: not what (a + c) + b would give. */
static float sum_of(int size, size_t i) {
    float sum = value(0, i);
    for (int m = 1; m < size; m++) sum += value(m, i);
    return sum;
}

static float x[COMM_RANKS_MAX * LONGEST], y[COMM_RANKS_MAX * LONGEST];

static int all_reduce_is_the_sum(const struct comm *c, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = value(c->rank, i);
    x[n] = 77;
    c->all_reduce(c, x, n, COMM_FP32);
    for (size_t i = 0; i < n; i++)
        if (x[i] != sum_of(c->size, i)) return 1;
    return x[n] != 77;
}

static int all_gather_has_all(const struct comm *c, size_t n, int in_place) {
    float *own = in_place ? x + (size_t)c->rank * n : y;
    for (size_t i = 0; i < n; i++) own[i] = value(c->rank, i);
    c->all_gather(c, x, own, n, COMM_FP32);
    for (int m = 0; m < c->size; m++)
        for (size_t i = 0; i < n; i++)
            if (x[(size_t)m * n + i] != value(m, i)) return 1;
    return 0;
}

static int reduce_scatter_has_its_row(const struct comm *c, size_t n, int in_place) {
    size_t all = n * (size_t)c->size;
    float *out = in_place ? x + (size_t)c->rank * n : y;
    for (size_t i = 0; i < all; i++) x[i] = value(c->rank, i);
    c->reduce_scatter(c, out, x, n, COMM_FP32);
    for (size_t i = 0; i < n; i++)
        if (out[i] != sum_of(c->size, (size_t)c->rank * n + i)) return 1;
    return 0;
}

static int broadcast_reaches_all(const struct comm *c, size_t n, int root) {
    for (size_t i = 0; i < n; i++) x[i] = value(c->rank, i);
    c->broadcast(c, x, n, COMM_FP32, root);
    for (size_t i = 0; i < n; i++)
        if (x[i] != value(root, i)) return 1;
    return 0;
}

/* bf16 is added in fp32 and rounded once: 1 + size * 2^-8 would be 1 if each sum were rounded. */
static int bf16_is_rounded_once(const struct comm *c, size_t n) {
    uint16_t *b = (uint16_t *)(void *)x;
    for (size_t i = 0; i < n; i++) b[i] = upper(c->rank == 0 ? 1.0f : 0.00390625f);
    c->all_reduce(c, b, n, COMM_BF16);
    float want = 1.0f + (float)(c->size - 1) * 0.00390625f;
    if (c->size % 2 == 0) want += c->size % 4 == 0 ? 0.00390625f : -0.00390625f; /* halfway: to even */
    for (size_t i = 0; i < n; i++)
        if (b[i] != upper(want)) return 1;
    return 0;
}

static int sum_is_double(const struct comm *c) {
    double v[2] = { c->rank == 0 ? 1.0 : 1e-12, c->rank }, want = 1.0;
    for (int m = 1; m < c->size; m++) want += 1e-12;
    c->sum(c, v, 2);
    return v[0] != want || v[1] != c->size * (c->size - 1) / 2;
}

static int group_works(const struct comm *c) {
    static const size_t lengths[] = { 0, 1, 3, 1023, 1024, 1025, 2048, LONGEST - 1 };
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        size_t n = lengths[i];
        if (all_reduce_is_the_sum(c, n)) return 10;
        if (all_gather_has_all(c, n, 0) || all_gather_has_all(c, n, 1)) return 11;
        if (reduce_scatter_has_its_row(c, n, 0) || reduce_scatter_has_its_row(c, n, 1)) return 12;
        if (broadcast_reaches_all(c, n, c->size - 1)) return 13;
        if (bf16_is_rounded_once(c, n)) return 14;
        c->barrier(c);
        if (sum_is_double(c)) return 15;
    }
    return c->check(c, NULL) ? 16 : 0;
}

static int all_groups_work(struct comm_area *a, int rank) {
    const struct comm_shape *s = comm_area_shape(a);
    const struct comm *tp = comm_area_group(a, COMM_TP), *dp = comm_area_group(a, COMM_DP);
    if (tp->size != s->tp || tp->rank != rank % s->tp) return 1;
    if (dp->size != s->dp || dp->rank != rank / s->tp) return 2;
    for (int g = 0; g < COMM_GROUPS; g++) {
        int rc = group_works(comm_area_group(a, (enum comm_group)g));
        if (rc) return rc + 10 * g;
    }
    return 0;
}

/* Members of different groups are told apart: each replica's sum is its own. */
static int groups_are_who_they_should_be(struct comm_area *a, int rank) {
    const struct comm_shape *s = comm_area_shape(a);
    double tp = rank, dp = rank;
    comm_area_group(a, COMM_TP)->sum(comm_area_group(a, COMM_TP), &tp, 1);
    comm_area_group(a, COMM_DP)->sum(comm_area_group(a, COMM_DP), &dp, 1);
    int first = rank / s->tp * s->tp, want_tp = 0, want_dp = 0;
    for (int i = 0; i < s->tp; i++) want_tp += first + i;
    for (int i = 0; i < s->dp; i++) want_dp += rank % s->tp + i * s->tp;
    return tp != want_tp || dp != want_dp;
}

static int many_calls(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_WORLD);
    for (int i = 0; i < 3000; i++) {
        float v = (float)(rank + i);
        c->all_reduce(c, &v, 1, COMM_FP32);
        if (v != (float)(c->size * i + c->size * (c->size - 1) / 2)) return 1;
    }
    return 0;
}

/* ---- sums and places --------------------------------------------------------------------------- */

/* Lengths around a window's end, all groups of several meshes, in place and not. */
static void every_call_gives_what_it_says_on_every_rank(void **state) {
    (void)state;
    static const int mesh[][2] = { { 1, 1 }, { 2, 1 }, { 1, 3 }, { 2, 2 }, { 4, 2 } };
    for (size_t i = 0; i < sizeof mesh / sizeof *mesh; i++) {
        run_all(mesh[i][0], mesh[i][1], 0, all_groups_work);
        run_all(mesh[i][0], mesh[i][1], 1, all_groups_work); /* nobody reads what was poisoned */
        run_all(mesh[i][0], mesh[i][1], 0, groups_are_who_they_should_be);
    }
}

/* The same sums in the same order, bit for bit, over memory of a device; a mesh is larger than a window there
 * too. */
static void a_devices_memory_gives_the_same(void **state) {
    (void)state;
    static const int mesh[][2] = { { 1, 1 }, { 2, 1 }, { 1, 3 }, { 2, 2 } };
    on_device = 1;
    for (size_t i = 0; i < sizeof mesh / sizeof *mesh; i++) {
        run_all(mesh[i][0], mesh[i][1], 1, all_groups_work);
        run_all(mesh[i][0], mesh[i][1], 0, groups_are_who_they_should_be);
    }
    on_device = 0;
}

/* Ranks sleep and wake thousands of times: a lost wake-up would be seen as a rank's watchdog. */
static void ranks_meet_thousands_of_times(void **state) {
    (void)state;
    run_all(4, 1, 0, many_calls);
}

/* ---- what goes wrong --------------------------------------------------------------------------- */

static int calls_other_lengths(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_WORLD);
    c->barrier(c);
    c->all_reduce(c, x, rank == 2 ? 7 : 8, COMM_FP32);
    c->all_reduce(c, x, 8, COMM_FP32); /* does nothing */
    return c->check(c, NULL) ? 0 : 1;
}

static int calls_another_entry(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_DP);
    if (rank == 1) c->broadcast(c, x, 4, COMM_BF16, 1);
    else c->all_gather(c, x, y, 4, COMM_FP32);
    return c->check(c, NULL) ? 0 : 1;
}

/* Half of a mesh in one call and half in another would wait for ever, or compute nonsense. */
static void calls_that_differ_are_named_on_every_rank(void **state) {
    (void)state;
    run_all(3, 1, 0, calls_other_lengths);
    for (int r = 0; r < 3; r++) {
        assert_int_equal(words->code[r], ERR_PROTOCOL);
        assert_string_equal(words->text[r], "call 2 of the world group is all_reduce of 8 fp32 on rank 0 and "
                                            "all_reduce of 7 fp32 on rank 2: a bug");
    }
    run_all(1, 2, 0, calls_another_entry);
    for (int r = 0; r < 2; r++)
        assert_string_equal(words->text[r], "call 1 of the data-parallel group is all_gather of 4 fp32 on "
                                            "rank 0 and broadcast of 4 bf16 from 1 on rank 1: a bug");
}

static int works_until_it_fails(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_TP), *world = comm_area_group(a, COMM_WORLD);
    world->barrier(world);
    if (rank == 3)
        for (;;) pause();
    while (!c->check(c, NULL)) c->all_reduce(c, x, LONGEST, COMM_FP32);
    return 0;
}

/* Rank 3 is killed while rank 2 waits for it in their group and the other replica does not: all end. */
static void a_killed_rank_ends_the_others_with_its_number(void **state) {
    (void)state;
    pid_t pid[4];
    char want[64];
    struct comm_area *a = make(2, 2, 0);
    start(a, 4, works_until_it_fails, pid);
    usleep(200000); /* so that they wait; right in any case */
    kill(pid[3], SIGKILL);
    snprintf(want, sizeof want, "rank 3 of 4 (process %d) died", (int)pid[3]);
    for (int r = 0; r < 3; r++) { /* before it is reaped: a zombie is dead too */
        int end = end_of(pid[r]);
        assert_true(end == 0 || (on_device && end == 98)); /* 98: it had not begun */
        assert_string_equal(words->text[r], want);
    }
    assert_int_equal(end_of(pid[3]), 1000 + SIGKILL);
    comm_area_destroy(a);
}

static void a_killed_rank_ends_those_on_a_device_too(void **state) {
    on_device = 1;
    a_killed_rank_ends_the_others_with_its_number(state);
    on_device = 0;
}

static int learns_why_nothing_began(struct comm_area *a, int rank) {
    struct err err = { 0 };
    if (rank == 1) setenv("EMULATOR_IPC", "0", 1);
    struct kernels *k = use_device(a, rank, &err);
    return !k && strstr(err.msg, "CUDA device 0: memory cannot be shown to another process") ? 0 : 1;
}

/* As in a container without a common /dev/shm: every rank says what the one met. */
static void memory_that_cannot_be_shared_ends_all(void **state) {
    (void)state;
    run_all(2, 1, 0, learns_why_nothing_began);
    run_all(1, 3, 0, learns_why_nothing_began);
    assert_non_null(strstr(words->text[2], "rank 1: "));
}

static int meets_a_device_that_fails(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_TP);
    c->barrier(c); /* all have begun */
    if (rank == 1) setenv("EMULATOR_LAUNCHES", "20", 1);
    while (!c->check(c, NULL)) c->all_reduce(c, x, 100, COMM_FP32);
    return 0;
}

static void a_device_that_fails_ends_all(void **state) {
    (void)state;
    on_device = 1;
    run_all(2, 1, 0, meets_a_device_that_fails);
    on_device = 0;
    for (int r = 0; r < 2; r++)
        assert_non_null(
            strstr(words->text[r], "rank 1: CUDA device 0: training: unspecified launch failure"));
}

/* ---- NCCL ---------------------------------------------------------------------------------------- */

static void with_nccl(int tp, int dp, rank_main *run) {
    on_device = ON_EACH;
    setenv("EMULATOR_DEVICES", "8", 1);
    run_all(tp, dp, 0, run);
    unsetenv("EMULATOR_DEVICES");
    on_device = 0;
}

static void nccl_is_told_the_same(void **state) {
    (void)state;
    with_nccl(2, 1, all_groups_work);
    with_nccl(1, 3, all_groups_work);
    with_nccl(2, 2, all_groups_work);
    with_nccl(2, 2, groups_are_who_they_should_be);
}

static int calls_each_once(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_DP);
    (void)rank;
    c->all_reduce(c, x, 5, COMM_FP32);
    c->all_reduce(c, x, 0, COMM_FP32);
    c->all_gather(c, x, y, 3, COMM_FP32);
    c->all_gather(c, x, y, 3, COMM_BF16);
    c->reduce_scatter(c, y, x, 7, COMM_BF16);
    c->broadcast(c, x, 9, COMM_BYTES, 1);
    c->barrier(c);
    return c->check(c, NULL) != 0;
}

/* In the order of the calls, in elements or bytes (type 1), and nothing else: NCCL has no other check. */
static void nccl_gets_each_call_in_order_with_its_size(void **state) {
    (void)state;
    char path[] = "/tmp/test_comm.XXXXXX", line[120], want[120];
    static const char *const calls[] = { "begin 0 0", "all_reduce 5 7", "all_gather 12 1", "all_gather 6 1",
                                         "reduce_scatter 7 9", "broadcast 9 1", "destroy 0 0" };
    int fd = mkstemp(path), seen[2] = { 0 }, rank;
    setenv("FAKE_NCCL_LOG", path, 1);
    with_nccl(1, 2, calls_each_once);
    unsetenv("FAKE_NCCL_LOG");
    FILE *f = fdopen(fd, "r");
    while (fgets(line, sizeof line, f)) {
        assert_int_equal(sscanf(line, "%d/2", &rank), 1);
        assert_in_range(rank, 0, 1);
        assert_in_range(seen[rank], 0, 6);
        snprintf(want, sizeof want, "%d/2 %s\n", rank, calls[seen[rank]++]);
        assert_string_equal(line, want);
    }
    assert_int_equal(seen[0] + seen[1], 14);
    fclose(f);
    unlink(path);
}

static int steps_until_it_fails(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_TP);
    double v = 1;
    for (int i = 0; !c->check(c, NULL); i++) {
        if (rank == 1 && i == 3) raise(SIGKILL);
        c->all_reduce(c, x, 100, COMM_FP32);
        c->all_reduce(c, x, 100, COMM_FP32);
        c->sum(c, &v, 1);
    }
    return 0;
}

/* The call that it never makes keeps the others' devices busy for ever; they are ended all the same. */
static void a_rank_that_dies_does_not_hold_the_others_in_nccl(void **state) {
    (void)state;
    pid_t pid[3];
    on_device = ON_EACH;
    setenv("EMULATOR_DEVICES", "8", 1);
    struct comm_area *a = make(3, 1, 0);
    start(a, 3, steps_until_it_fails, pid);
    for (int r = 0; r < 3; r += 2) {
        assert_int_equal(end_of(pid[r]), 0);
        assert_non_null(strstr(words->text[r], "rank 1 of 3"));
        assert_non_null(strstr(words->text[r], "died"));
    }
    assert_int_equal(end_of(pid[1]), 1000 + SIGKILL);
    comm_area_destroy(a);
    unsetenv("EMULATOR_DEVICES");
    on_device = 0;
}

/* ---- silence ------------------------------------------------------------------------------------- */

#define SILENCE_MS 400

static int steps_until_one_is_silent(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_DP);
    double v = 1;
    comm_area_watch(a, SILENCE_MS);
    for (uint64_t step = 0; !c->check(c, NULL); step++) {
        comm_area_goes_on(a, step);
        if (rank == 1 && step == 3) raise(SIGSTOP);
        c->all_reduce(c, x, 100, COMM_FP32);
        c->sum(c, &v, 1);
    }
    return 0;
}

/* A stopped rank stands for one that hangs: it lives, and does not come. The others name it and end, also where
 * it is a device that waits. */
static void a_rank_that_hangs_is_named_and_not_waited_for(void **state) {
    (void)state;
    for (int how = 0; how <= ON_EACH; how++) {
        pid_t pid[3];
        char want[120];
        on_device = how;
        setenv("EMULATOR_DEVICES", "8", 1);
        setenv("FAKE_NCCL_MS", "100", 1);
        struct comm_area *a = make(1, 3, 0);
        start(a, 3, steps_until_one_is_silent, pid);
        snprintf(want, sizeof want, "rank 1 of 3 (process %d) says nothing for 0.4 s, at step 3: it is stopped, as by "
                 "SIGSTOP", (int)pid[1]);
        for (int r = 0; r < 3; r += 2) {
            assert_int_equal(end_of(pid[r]), 0);
            assert_string_equal(words->text[r], want);
            assert_int_equal(words->code[r], ERR_TIMEOUT);
        }
        kill(pid[1], SIGKILL);
        assert_int_equal(end_of(pid[1]), 1000 + SIGKILL);
        comm_area_destroy(a);
    }
    unsetenv("FAKE_NCCL_MS");
    unsetenv("EMULATOR_DEVICES");
    on_device = 0;
}

static int is_late_for_a_reason(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_WORLD);
    comm_area_watch(a, SILENCE_MS);
    c->barrier(c);
    if (rank == 1) comm_area_excuse(a, 1);
    if (rank == 1) usleep(3 * SILENCE_MS * 1000);
    if (rank == 1) comm_area_excuse(a, 0);
    for (int i = 0; rank == 2 && i < 12; i++) {
        usleep(SILENCE_MS * 1000 / 4);
        comm_area_goes_on(a, 1);
    }
    c->barrier(c);
    return c->check(c, NULL) != 0;
}

/* It waits for a disk, or has much to compute, and says so. */
static void a_rank_that_says_that_it_goes_on_is_waited_for(void **state) {
    (void)state;
    run_all(3, 1, 0, is_late_for_a_reason);
}

static int steps_for_a_while(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_WORLD);
    (void)rank;
    comm_area_watch(a, SILENCE_MS);
    for (int step = 0; step < 300; step++) {
        usleep(5000);
        c->barrier(c);
    }
    return c->check(c, NULL) != 0;
}

/* Ctrl-Z and fg: none of them has waited all that time. */
static void ranks_that_were_all_stopped_go_on(void **state) {
    (void)state;
    pid_t pid[3];
    struct comm_area *a = make(3, 1, 0);
    start(a, 3, steps_for_a_while, pid);
    usleep(300000);
    for (int r = 0; r < 3; r++) kill(pid[r], SIGSTOP);
    usleep(4 * SILENCE_MS * 1000);
    for (int r = 0; r < 3; r++) kill(pid[r], SIGCONT);
    for (int r = 0; r < 3; r++)
        if (end_of(pid[r])) fail_msg("rank %d: %s", r, words->text[r]);
    comm_area_destroy(a);
}

static int asks_nccl_for_what_does_not_end(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_DP);
    double v = 1;
    (void)rank;
    c->barrier(c); /* all have begun */
    comm_area_watch(a, SILENCE_MS);
    comm_area_goes_on(a, 7);
    c->all_reduce(c, x, 100, COMM_FP32);
    c->sum(c, &v, 1);
    return c->check(c, NULL) ? 0 : 1;
}

/* Nobody is silent: all wait. And where NCCL knows why, it is asked. */
static void what_hangs_between_the_ranks_ends(void **state) {
    (void)state;
    setenv("FAKE_NCCL_FAILS", "hang", 1);
    with_nccl(1, 3, asks_nccl_for_what_does_not_end);
    for (int r = 0; r < 3; r++)
        assert_non_null(strstr(words->text[r], "all 3 ranks wait for their devices for 0.4 s, at step 7"));
    setenv("FAKE_NCCL_FAILS", "async", 1);
    with_nccl(1, 3, asks_nccl_for_what_does_not_end);
    for (int r = 0; r < 3; r++)
        assert_non_null(strstr(words->text[r], "NCCL between ranks: invalid argument: the fake was told to"));
    unsetenv("FAKE_NCCL_FAILS");
}

static int finds_that_one_was_refused(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_TP);
    double v = 1;
    c->barrier(c); /* all have begun */
    if (rank == 1) setenv("FAKE_NCCL_FAILS", "all_reduce", 1);
    c->all_reduce(c, x, 100, COMM_FP32);
    c->sum(c, &v, 1);
    return c->check(c, NULL) ? 0 : 1;
}

static int finds_that_one_did_not_begin(struct comm_area *a, int rank) {
    struct err err = { 0 };
    if (rank == 1) setenv("FAKE_NCCL_FAILS", "begin", 1);
    on_device = ON_EACH;
    struct kernels *k = use_device(a, rank, &err);
    return !k && strstr(err.msg, "rank 1: NCCL begins a group: invalid argument") ? 0 : 1;
}

static void what_nccl_refuses_ends_all(void **state) {
    (void)state;
    with_nccl(3, 1, finds_that_one_was_refused);
    for (int r = 0; r < 3; r++)
        assert_non_null(
            strstr(words->text[r], "rank 1: NCCL all_reduce: invalid argument: the fake was told to"));
    setenv("EMULATOR_DEVICES", "8", 1);
    run_all(1, 3, 0, finds_that_one_did_not_begin);
    unsetenv("EMULATOR_DEVICES");
}

/* One that is too old, or switched off on one rank: all take the windows. */
static void where_one_has_no_nccl_none_takes_it(void **state) {
    (void)state;
    setenv("FAKE_NCCL_FAILS", "begin", 1);
    setenv("FAKE_NCCL_VERSION", "21304", 1);
    with_nccl(2, 2, all_groups_work);
    unsetenv("FAKE_NCCL_VERSION");
    setenv("INTELLECT_NCCL", "0", 1);
    with_nccl(2, 1, all_groups_work);
    unsetenv("INTELLECT_NCCL");
    unsetenv("FAKE_NCCL_FAILS");
}

static int leaves_early(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_WORLD);
    c->barrier(c);
    if (rank == 1) return 0;
    c->barrier(c);
    return c->check(c, NULL) ? 0 : 1;
}

static void a_rank_that_left_is_not_waited_for(void **state) {
    (void)state;
    run_all(2, 1, 0, leaves_early);
    assert_string_equal(words->text[0], "rank 1 left while rank 0 waits for it in a barrier call of the "
                                        "world group");
    assert_string_equal(words->text[1], "");
}

static int gives_up(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_WORLD);
    struct err why;
    err_set(&why, ERR_FULL, "no room for 3 bytes");
    if (rank == 1) comm_area_fail(a, &why);
    else c->all_reduce(c, x, 10, COMM_FP32);
    return c->check(c, NULL) ? 0 : 1;
}

static void a_rank_that_gives_up_says_why_to_all(void **state) {
    (void)state;
    run_all(3, 1, 0, gives_up);
    for (int r = 0; r < 3; r++) {
        assert_int_equal(words->code[r], ERR_FULL);
        assert_string_equal(words->text[r], "rank 1: no room for 3 bytes");
    }
}

/* A rank that could not even begin, for want of memory say. */
static void a_rank_that_dies_before_it_joins_is_not_waited_for(void **state) {
    (void)state;
    struct err err = { 0 };
    struct comm_area *a = make(2, 1, 0);
    pid_t pid = fork();
    if (pid == 0) _exit(0);
    comm_area_expect(a, 1, pid);
    assert_int_equal(comm_area_join(a, 0, &err), -1);
    assert_int_equal(err.code, ERR_IO);
    assert_non_null(strstr(err.msg, "rank 1 of 2"));
    assert_int_equal(end_of(pid), 0);
    comm_area_destroy(a);
}

static void a_rank_is_taken_once(void **state) {
    (void)state;
    struct err err = { 0 };
    struct comm_area *a = make(1, 1, 0);
    struct comm_area *b = comm_area_open(dup(comm_area_fd(a)), &err);
    assert_int_equal(comm_area_join(a, 0, &err), 0);
    assert_int_equal(comm_area_join(b, 0, &err), -1);
    assert_string_equal(err.msg, "rank 0 of 1 is there already");
    assert_int_equal(comm_area_join(b, 1, &err), -1);
    assert_string_equal(err.msg, "rank 1 of 1");
    comm_area_destroy(b);
    comm_area_destroy(a);
}

static void impossible_shapes_and_descriptors_are_refused(void **state) {
    (void)state;
    static const struct comm_shape shapes[] = {
        { .tp = 0, .dp = 1 }, { .tp = 1, .dp = -1 }, { .tp = 13, .dp = 5 }, { .tp = 65, .dp = 1 },
        { .tp = 2, .dp = 1, .window_bytes = 100 }, { .tp = 2, .dp = 1, .window_bytes = (size_t)1 << 40 },
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct err err = { 0 };
        assert_null(comm_area_create(&shapes[i], &err));
        assert_int_equal(err.code, ERR_CONFIG);
    }
    struct err err = { 0 };
    FILE *f = tmpfile();
    for (int i = 0; i < 100000; i++) fputs("nothing\n", f);
    fflush(f);
    assert_null(comm_area_open(dup(fileno(f)), &err));
    assert_int_equal(err.code, ERR_CORRUPT);
    fclose(f);
}

/* ---- poison ------------------------------------------------------------------------------------ */

#define SECRET 1234.5678f

static int sends_secrets(struct comm_area *a, int rank) {
    const struct comm *c = comm_area_group(a, COMM_WORLD);
    (void)rank;
    for (size_t i = 0; i < 900; i++) x[i] = y[i] = SECRET;
    c->all_gather(c, x, y, 900, COMM_FP32);
    c->barrier(c);
    c->barrier(c);
    return 0;
}

static size_t secrets_left(int poison) {
    pid_t pid[2];
    struct comm_area *a = make(2, 1, poison);
    start(a, 2, sends_secrets, pid);
    for (int r = 0; r < 2; r++) assert_int_equal(end_of(pid[r]), 0);
    size_t bytes = (size_t)lseek(comm_area_fd(a), 0, SEEK_END), found = 0;
    const float *p = mmap(NULL, bytes, PROT_READ, MAP_SHARED, comm_area_fd(a), 0);
    assert_true(p != MAP_FAILED);
    for (size_t i = 0; i < bytes / sizeof *p; i++) found += p[i] == SECRET;
    munmap((void *)(uintptr_t)p, bytes);
    comm_area_destroy(a);
    return found;
}

/* What lies in a window after its piece is nobody's; a kernel that read it late would often still find
 * the right numbers. */
static void windows_are_poisoned_once_they_were_read(void **state) {
    (void)state;
    assert_int_equal(secrets_left(0), 2 * 900);
    assert_int_equal(secrets_left(1), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_call_gives_what_it_says_on_every_rank),
        cmocka_unit_test(a_devices_memory_gives_the_same),
        cmocka_unit_test(ranks_meet_thousands_of_times),
        cmocka_unit_test(calls_that_differ_are_named_on_every_rank),
        cmocka_unit_test(a_killed_rank_ends_the_others_with_its_number),
        cmocka_unit_test(a_killed_rank_ends_those_on_a_device_too),
        cmocka_unit_test(memory_that_cannot_be_shared_ends_all),
        cmocka_unit_test(a_device_that_fails_ends_all),
        cmocka_unit_test(nccl_is_told_the_same),
        cmocka_unit_test(nccl_gets_each_call_in_order_with_its_size),
        cmocka_unit_test(a_rank_that_dies_does_not_hold_the_others_in_nccl),
        cmocka_unit_test(a_rank_that_hangs_is_named_and_not_waited_for),
        cmocka_unit_test(a_rank_that_says_that_it_goes_on_is_waited_for),
        cmocka_unit_test(ranks_that_were_all_stopped_go_on),
        cmocka_unit_test(what_hangs_between_the_ranks_ends),
        cmocka_unit_test(what_nccl_refuses_ends_all),
        cmocka_unit_test(where_one_has_no_nccl_none_takes_it),
        cmocka_unit_test(a_rank_that_left_is_not_waited_for),
        cmocka_unit_test(a_rank_that_gives_up_says_why_to_all),
        cmocka_unit_test(a_rank_that_dies_before_it_joins_is_not_waited_for),
        cmocka_unit_test(a_rank_is_taken_once),
        cmocka_unit_test(impossible_shapes_and_descriptors_are_refused),
        cmocka_unit_test(windows_are_poisoned_once_they_were_read),
    };
    return cmocka_run_group_tests(tests, set_up, NULL);
}
