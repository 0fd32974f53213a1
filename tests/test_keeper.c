/* The agent's hand on its trainer process. This program is its own trainer: the keeper starts the
 * running executable, and how that behaves is said by an environment variable. */
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
#include <event2/event.h>

#include "node/keeper.h"

#define BEHAVIOUR "TEST_TRAINER"

/* ---- the trainer ----------------------------------------------------------------------------- */

static int trainer(int fd) {
    const char *how = getenv(BEHAVIOUR);
    struct segment *s = segment_open(fd, NULL);
    struct segment_message m;
    if (!s || !how) return 2;
    if (!strcmp(how, "dies")) {
        segment_destroy(s);
        return 3;
    }
    if (!strcmp(how, "cannot") || !strcmp(how, "loses its device")) {
        m = (struct segment_message){ .type = *how == 'c' ? SEGMENT_FAILED : SEGMENT_DEVICE_FAILED,
                                      .code = ERR_CONFIG };
        snprintf(m.text, sizeof m.text, "no such corpus");
        segment_send(s, &m);
        segment_destroy(s);
        return 1;
    }
    const char *policy = getenv("OMP_WAIT_POLICY");
    m = (struct segment_message){ .type = SEGMENT_UP,
                                  .steps = policy && !strcmp(policy, "passive") };
    segment_send(s, &m);
    segment_send(s,
                 &(struct segment_message){ .type = SEGMENT_STEP, .samples = (uint64_t)getpid() });
    for (;;) {
        if (!segment_receive(s, &m))
            segment_wait(s, 1000);
        else if (m.type == SEGMENT_STOP && strcmp(how, "stubborn"))
            break;
    }
    segment_destroy(s);
    return 0;
}

/* ---- the agent ------------------------------------------------------------------------------- */

struct watched {
    struct event_base *base;
    struct keeper *keeper;
    int starts, ends, ups, steps;
    uint64_t up_steps;
    char why[128];
    struct err gave_up;
    bool kills; /* the first trainer, when it has taken a step */
    const char *then; /* how trainers after the first behave */
};

static void on_message(void *arg, const struct segment_message *m) {
    struct watched *w = arg;
    if (m->type == SEGMENT_UP) {
        w->ups++;
        w->up_steps = m->steps;
    }
    if (m->type != SEGMENT_STEP) return;
    w->steps++;
    assert_int_equal(m->samples, keeper_pid(w->keeper));
    if (w->kills && w->starts == 1)
        kill(keeper_pid(w->keeper), SIGKILL);
    else
        keeper_stop(w->keeper);
}

static void on_start(void *arg, pid_t pid) {
    struct watched *w = arg;
    assert_int_equal(pid, keeper_pid(w->keeper));
    w->starts++;
    if (w->then) setenv(BEHAVIOUR, w->then, 1);
}

static void on_end(void *arg, const char *why, uint32_t wait_ms) {
    struct watched *w = arg;
    snprintf(w->why, sizeof w->why, "%s", why);
    w->ends++;
    if (!wait_ms) event_base_loopbreak(w->base);
}

static void on_give_up(void *arg, const struct err *why) {
    struct watched *w = arg;
    w->gave_up = *why;
}

static const struct keeper_ops callbacks = { .on_message = on_message, .on_start = on_start,
                                             .on_end = on_end, .on_give_up = on_give_up };

static void keep_then(struct watched *w, const char *how, const char *then, bool kills) {
    static const uint8_t genesis[] = "genesis";
    struct segment_setup setup = { .elements = 1000, .chunk_elements = 100,
                                   .genesis = { genesis, sizeof genesis } };
    *w = (struct watched){ .base = event_base_new(), .kills = kills, .then = then };
    struct err err = {0};
    setenv(BEHAVIOUR, how, 1);
    w->keeper = keeper_create(w->base, &setup, 1000, &callbacks, w, &err);
    if (!w->keeper) fail_msg("%s", err.msg);
    event_base_dispatch(w->base);
}

static void keep(struct watched *w, const char *how, bool kills) { keep_then(w, how, NULL, kills); }

static void let_go(struct watched *w) {
    keeper_destroy(w->keeper);
    event_base_free(w->base);
}

/* kill -9 of the trainer costs a restart and nothing else; the next one gets a clean segment. */
static void a_killed_trainer_is_started_again(void **state) {
    (void)state;
    struct watched w;
    keep(&w, "works", true);
    assert_int_equal(w.starts, 2);
    assert_int_equal(w.ends, 2);
    assert_int_equal(w.ups, 2);
    assert_int_equal(keeper_restarts(w.keeper), 1);
    assert_int_equal(w.gave_up.code, ERR_NONE);
    assert_string_equal(w.why, "exit status 0");
    let_go(&w);
}

/* OpenMP's threads must not spin on cores that the agent and other programs need; libgomp reads
 * this before main(), so it must be in the environment that the trainer starts with. */
static void threads_of_the_trainer_wait_passively(void **state) {
    (void)state;
    setenv("OMP_WAIT_POLICY", "active", 1);
    struct watched w;
    keep(&w, "works", false);
    unsetenv("OMP_WAIT_POLICY");
    assert_int_equal(w.up_steps, 1);
    assert_int_equal(w.starts, 1);
    let_go(&w);
}

/* A machine that cannot train must not start trainers for ever; its owner must read why. */
static void it_gives_up_after_fast_failures(void **state) {
    (void)state;
    struct watched w;
    keep(&w, "dies", false);
    assert_int_equal(w.starts, KEEPER_FAILURES_MAX);
    assert_int_equal(w.gave_up.code, ERR_IO);
    assert_non_null(strstr(w.gave_up.msg, "exit status 3"));
    let_go(&w);
}

static void what_will_fail_again_is_tried_once(void **state) {
    (void)state;
    struct watched w;
    keep(&w, "cannot", false);
    assert_int_equal(w.starts, 1);
    assert_int_equal(w.gave_up.code, ERR_CONFIG);
    assert_string_equal(w.gave_up.msg, "no such corpus");
    let_go(&w);
}

/* A GPU that was lost may be back when its driver has started again, and until then may not be there at all;
 * one that fails time and again is bad, and its owner reads how. */
static void a_lost_device_is_tried_again_some_times(void **state) {
    (void)state;
    struct watched w;
    keep_then(&w, "loses its device", "works", false);
    assert_int_equal(w.starts, 2);
    assert_int_equal(w.steps, 1);
    assert_int_equal(w.gave_up.code, ERR_NONE);
    let_go(&w);
    keep_then(&w, "loses its device", "cannot", false);
    assert_int_equal(w.starts, KEEPER_DEVICE_FAILURES_MAX);
    assert_string_equal(w.gave_up.msg, "the device failed 3 times and is given up: no such corpus");
    let_go(&w);
}

/* An agent that ends at once, as after a second Ctrl-C, leaves no process behind. */
static void destroying_kills_what_does_not_stop(void **state) {
    (void)state;
    struct segment_setup setup = { .elements = 1000, .chunk_elements = 100 };
    struct watched w = { .base = event_base_new() };
    setenv(BEHAVIOUR, "stubborn", 1);
    w.keeper = keeper_create(w.base, &setup, 1000, &callbacks, &w, NULL);
    assert_non_null(w.keeper);
    while (!w.steps) event_base_loop(w.base, EVLOOP_ONCE);
    pid_t pid = keeper_pid(w.keeper);
    let_go(&w);
    assert_int_equal(kill(pid, 0), -1);
}

int main(int argc, char **argv) {
    if (argc == 4 && !strcmp(argv[1], "trainer")) return trainer(atoi(argv[3]));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_killed_trainer_is_started_again),
        cmocka_unit_test(a_lost_device_is_tried_again_some_times),
        cmocka_unit_test(threads_of_the_trainer_wait_passively),
        cmocka_unit_test(it_gives_up_after_fast_failures),
        cmocka_unit_test(what_will_fail_again_is_tried_once),
        cmocka_unit_test(destroying_kills_what_does_not_stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
