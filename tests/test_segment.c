/* The shared segment: an agent and a trainer in two processes, messages and slots between them. */
#define _GNU_SOURCE
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

#include "node/segment.h"

#define ELEMENTS 10000u
#define MESSAGES 100000u

static struct segment *make(void) {
    static const uint8_t genesis[] = "genesis";
    struct err err = {0};
    struct segment_setup setup = { .elements = ELEMENTS, .chunk_elements = 3000,
                                   .genesis = { genesis, sizeof genesis }, .threads = 3 };
    snprintf(setup.corpus, sizeof setup.corpus, "/corpus");
    struct segment *s = segment_create(&setup, &err);
    if (!s) fail_msg("%s", err.msg);
    return s;
}

/* A trainer inherits the descriptors under their numbers; here by fork() alone. */
static pid_t fork_trainer(struct segment *agent, int (*run)(struct segment *s)) {
    int fds[SEGMENT_FDS];
    segment_fds(agent, fds);
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid) return pid;
    struct segment *s = segment_open(fds[0], NULL);
    _exit(s ? run(s) : 99);
}

static int wait_for(pid_t pid) {
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

/* ---- what the trainers of these tests do ----------------------------------------------------- */

static int checks_setup(struct segment *s) {
    const struct segment_setup *setup = segment_setup(s);
    return setup->elements == ELEMENTS && setup->threads == 3 && segment_chunks(s) == 4 &&
                   setup->agent == getppid() && !strcmp(setup->corpus, "/corpus") &&
                   setup->genesis.length == 8 && !memcmp(setup->genesis.data, "genesis", 8)
               ? 0 : 1;
}

/* Answers each command with its number doubled, and stops at STOP. */
static int doubles(struct segment *s) {
    struct segment_message m;
    for (uint64_t expected = 0;;) {
        if (!segment_receive(s, &m)) {
            segment_wait(s, 1000);
            continue;
        }
        if (m.type == SEGMENT_STOP) return 0;
        if (m.start != expected++) return 1;
        m = (struct segment_message){ .type = SEGMENT_STEP, .samples = 2 * m.start };
        while (!segment_send(s, &m)) usleep(100);
    }
}

/* Adds the in slot to each out slot it is asked for. */
static int adds(struct segment *s) {
    struct segment_message m;
    for (;;) {
        if (!segment_receive(s, &m)) {
            segment_wait(s, 1000);
            continue;
        }
        if (m.type == SEGMENT_STOP) return 0;
        float *out = segment_out(s, SEGMENT_OUT_PARAMETERS);
        for (uint32_t i = 0; i < ELEMENTS; i++) out[i] += segment_in(s)[i];
        segment_send(s, &(struct segment_message){ .type = SEGMENT_FROZEN });
    }
}

/* ---- tests ----------------------------------------------------------------------------------- */

/* All that a trainer knows at start comes this way, and its parent's id must be the agent's, or it
 * would train on without one. */
static void trainer_sees_the_setup_in_another_mapping(void **state) {
    (void)state;
    struct segment *s = make();
    assert_int_equal(wait_for(fork_trainer(s, checks_setup)), 0);
    segment_destroy(s);
}

/* Both rings run full and empty many times over: no message may be lost, doubled or reordered,
 * since a lost FREEZE stops a node for ever. */
static void rings_keep_every_message_in_order(void **state) {
    (void)state;
    struct segment *s = make();
    pid_t pid = fork_trainer(s, doubles);
    struct segment_message m;
    for (uint64_t sent = 0, got = 0; got < MESSAGES;) {
        while (sent < MESSAGES &&
               segment_send(s, &(struct segment_message){ .type = SEGMENT_SAMPLES, .start = sent }))
            sent++;
        if (!segment_receive(s, &m)) {
            segment_wait(s, 1000);
            continue;
        }
        assert_int_equal(m.type, SEGMENT_STEP);
        assert_int_equal(m.samples, 2 * got);
        got++;
    }
    segment_send(s, &(struct segment_message){ .type = SEGMENT_STOP });
    assert_int_equal(wait_for(pid), 0);
    segment_destroy(s);
}

/* A slot's contents must be there when the message that hands it over is: seen as whole rounds of
 * values, never a mixture. */
static void a_slot_is_whole_when_its_message_arrives(void **state) {
    (void)state;
    struct segment *s = make();
    pid_t pid = fork_trainer(s, adds);
    struct segment_message m;
    for (int round = 1; round <= 200; round++) {
        for (uint32_t i = 0; i < ELEMENTS; i++) segment_in(s)[i] = (float)(i % 7);
        segment_send(s, &(struct segment_message){ .type = SEGMENT_FREEZE });
        while (!segment_receive(s, &m)) segment_wait(s, 1000);
        for (uint32_t i = 0; i < ELEMENTS; i++)
            if (segment_out(s, SEGMENT_OUT_PARAMETERS)[i] != (float)(round * (int)(i % 7)))
                fail_msg("round %d, element %u", round, i);
    }
    segment_send(s, &(struct segment_message){ .type = SEGMENT_STOP });
    assert_int_equal(wait_for(pid), 0);
    segment_destroy(s);
}

/* An agent that writes into a ring nobody reads must be told, and not overwrite. */
static void a_full_ring_refuses_and_stays_intact(void **state) {
    (void)state;
    struct segment *s = make();
    uint32_t n = 0;
    while (segment_send(s, &(struct segment_message){ .type = SEGMENT_SAMPLES, .start = n })) n++;
    assert_int_equal(n, SEGMENT_RING_MESSAGES);
    assert_int_equal(segment_untaken(s), n);
    int fds[SEGMENT_FDS];
    segment_fds(s, fds);
    int copy = dup(fds[0]);
    struct segment *trainer = segment_open(copy, NULL);
    assert_non_null(trainer);
    struct segment_message m;
    for (uint32_t i = 0; i < n; i++) {
        assert_true(segment_receive(trainer, &m));
        assert_int_equal(m.start, i);
    }
    assert_false(segment_receive(trainer, &m));
    assert_int_equal(segment_taken(s), n);
    assert_true(segment_send(s, &(struct segment_message){ .type = SEGMENT_STOP }));
    segment_destroy(trainer);
    segment_destroy(s);
}

/* A trainer that was killed leaves commands behind; the next one must not find them. */
static void reset_forgets_what_a_dead_trainer_left(void **state) {
    (void)state;
    struct segment *s = make();
    pid_t pid = fork_trainer(s, doubles);
    for (uint64_t i = 0; i < 100; i++)
        segment_send(s, &(struct segment_message){ .type = SEGMENT_SAMPLES, .start = i });
    kill(pid, SIGKILL);
    assert_int_equal(wait_for(pid), 1000 + SIGKILL);
    segment_reset(s);
    struct segment_message m;
    assert_false(segment_receive(s, &m));
    assert_int_equal(segment_untaken(s), 0);
    pid = fork_trainer(s, doubles);
    segment_send(s, &(struct segment_message){ .type = SEGMENT_SAMPLES, .start = 0 });
    while (!segment_receive(s, &m)) segment_wait(s, 1000);
    assert_int_equal(m.samples, 0);
    segment_send(s, &(struct segment_message){ .type = SEGMENT_STOP });
    assert_int_equal(wait_for(pid), 0);
    segment_destroy(s);
}

static void beats_of_every_trainer_add_up(void **state) {
    (void)state;
    struct segment *s = make();
    for (int life = 1; life <= 2; life++) {
        int fds[SEGMENT_FDS];
        segment_fds(s, fds);
        int copy = dup(fds[0]);
        struct segment *trainer = segment_open(copy, NULL);
        segment_beat(trainer);
        segment_beat(trainer);
        assert_int_equal(segment_beats(s), 2 * life);
        segment_destroy(trainer);
        segment_reset(s);
    }
    segment_destroy(s);
}

/* `intellect-node trainer --fd 0` by hand must end in a message, not in a crash. */
static void a_descriptor_that_is_no_segment_is_refused(void **state) {
    (void)state;
    struct err err = {0};
    int small = memfd_create("small", 0), large = memfd_create("large", 0);
    assert_int_equal(ftruncate(large, 64 << 20), 0);
    assert_null(segment_open(small, &err));
    assert_int_equal(err.code, ERR_CORRUPT);
    err = (struct err){0};
    assert_null(segment_open(large, &err));
    assert_int_equal(err.code, ERR_CORRUPT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(trainer_sees_the_setup_in_another_mapping),
        cmocka_unit_test(rings_keep_every_message_in_order),
        cmocka_unit_test(a_slot_is_whole_when_its_message_arrives),
        cmocka_unit_test(a_full_ring_refuses_and_stays_intact),
        cmocka_unit_test(reset_forgets_what_a_dead_trainer_left),
        cmocka_unit_test(beats_of_every_trainer_add_up),
        cmocka_unit_test(a_descriptor_that_is_no_segment_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
