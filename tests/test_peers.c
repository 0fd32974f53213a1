/* Links between members, over real TLS on loopback, all ends on one event loop. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <event2/event.h>

#include "node/peers.h"

#define ENDS 3 /* member i + 1 is end i */

struct end {
    struct identity identity;
    struct channel_context *ctx;
    struct peers *peers;
    struct listener *listener;
    uint16_t port;
    int opens, closes, messages, complaints;
    uint64_t last;     /* what the last message said */
    char why[128];
};

static struct event_base *base;
static struct end end[ENDS];
static bool timed_out;

/* ---- the ends -------------------------------------------------------------------------------- */

static void on_open(void *arg, uint32_t member) {
    (void)member;
    ((struct end *)arg)->opens++;
}
static void on_message(void *arg, uint32_t member, const struct frame *f, const void *msg) {
    struct end *e = arg;
    (void)member;
    assert_int_equal(f->type, MSG_MOMENTS_GET);
    e->messages++;
    e->last = ((const struct msg_moments_get *)msg)->fragment;
}
static void on_close(void *arg, uint32_t member, const char *why) {
    struct end *e = arg;
    (void)member;
    e->closes++;
    snprintf(e->why, sizeof e->why, "%s", why);
}
static void on_drained(void *arg, uint32_t member) { (void)arg, (void)member; }
static void on_complaint(void *arg, const char *text) {
    struct end *e = arg;
    e->complaints++;
    snprintf(e->why, sizeof e->why, "%.127s", text);
}
static const struct peers_ops callbacks = { .on_open = on_open, .on_message = on_message,
                                            .on_close = on_close, .on_drained = on_drained,
                                            .on_complaint = on_complaint };

static void on_accept(void *arg, int fd) { peers_accept(((struct end *)arg)->peers, fd); }

static void tell_roster(int of, int members) {
    struct msg_member member[ENDS] = {0};
    for (int i = 0; i < members; i++)
        member[i] = (struct msg_member){ .member = (uint32_t)i + 1, .key = end[i].identity.key,
                                         .name = proto_str("m") };
    struct msg_roster_body roster = { .members = member, .members_count = (uint32_t)members };
    assert_int_equal(peers_set_roster(end[of].peers, &roster, NULL), 0);
}

static int set_up(void **state) {
    (void)state;
    memset(end, 0, sizeof end);
    base = event_base_new();
    for (int i = 0; i < ENDS; i++) {
        struct end *e = &end[i];
        identity_create(&e->identity);
        e->ctx = channel_context_create(&e->identity, NULL);
        e->peers = peers_create(base, e->ctx, (uint32_t)i + 1, &callbacks, e, NULL);
        e->listener = listener_create(base, "127.0.0.1", &e->port, on_accept, e, NULL);
        if (!e->ctx || !e->peers || !e->listener) return -1;
    }
    for (int i = 0; i < ENDS; i++) tell_roster(i, ENDS);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    for (int i = 0; i < ENDS; i++) {
        listener_destroy(end[i].listener);
        peers_destroy(end[i].peers);
    }
    event_base_dispatch(base); /* connections that are still being closed */
    for (int i = 0; i < ENDS; i++) {
        channel_context_destroy(end[i].ctx);
        identity_release(&end[i].identity);
    }
    event_base_free(base);
    return 0;
}

static void on_timeout(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what, (void)arg;
    timed_out = true;
}

/* Turn the loop until the condition holds. */
#define UNTIL(condition)                                                                           \
    do {                                                                                           \
        struct timeval limit = { .tv_sec = 10 };                                                   \
        timed_out = false;                                                                         \
        struct event *timer = evtimer_new(base, on_timeout, NULL);                                 \
        evtimer_add(timer, &limit);                                                                \
        while (!(condition) && !timed_out) event_base_loop(base, EVLOOP_ONCE);                     \
        event_free(timer);                                                                         \
        if (timed_out) fail_msg("never: %s", #condition);                                          \
    } while (0)

static void dial(int from, int to) {
    peers_dial(end[from].peers, (uint32_t)to + 1, "127.0.0.1", end[to].port);
}

static void say(int from, int to, uint32_t what) {
    struct msg_moments_get m = { .fragment = what };
    peers_send(end[from].peers, (uint32_t)to + 1, MSG_MOMENTS_GET, 1, 0, 0, &m);
}

/* ---- tests ----------------------------------------------------------------------------------- */

/* A member behind NAT only dials; what the other one has to say must come over that connection. */
static void one_dial_serves_both_directions(void **state) {
    (void)state;
    dial(0, 1);
    UNTIL(end[0].opens && end[1].opens);
    say(0, 1, 11);
    say(1, 0, 22);
    UNTIL(end[1].messages && end[0].messages);
    assert_int_equal(end[1].last, 11);
    assert_int_equal(end[0].last, 22);
    assert_int_equal(peers_count(end[0].peers), 1);
    dial(0, 1); /* there is a link: nothing happens */
    say(0, 1, 12);
    UNTIL(end[1].messages == 2);
    assert_int_equal(end[0].opens, 1);
}

/* Both hold results that the other needs, so both dial at once. Whatever order things open in, both
 * must end up able to send, and what is sent after the last OPEN must arrive. */
static void members_that_dial_each_other_stay_connected(void **state) {
    (void)state;
    dial(0, 1);
    dial(1, 0);
    UNTIL(end[0].opens == 2 && end[1].opens == 2);
    assert_int_equal(end[0].closes, 1);
    say(0, 1, 5);
    say(1, 0, 6);
    UNTIL(end[0].messages == 1 && end[1].messages == 1);
    assert_int_equal(peers_count(end[0].peers), 1);
    assert_int_equal(peers_count(end[1].peers), 1);
}

/* A member that was killed and started again dials anew while its old connection still looks alive
 * here: sync must hear of the break, since what was queued for the old one is lost. */
static void a_member_that_dials_again_replaces_its_old_link(void **state) {
    (void)state;
    dial(0, 1);
    UNTIL(end[1].opens == 1);
    struct end *reborn = &end[2];
    channel_context_destroy(reborn->ctx);
    peers_destroy(reborn->peers);
    reborn->ctx = channel_context_create(&end[0].identity, NULL);
    reborn->peers = peers_create(base, reborn->ctx, 1, &callbacks, reborn, NULL);
    tell_roster(2, 2);
    dial(2, 1);
    UNTIL(end[1].opens == 2);
    assert_int_equal(end[1].closes, 1);
    say(1, 0, 77);
    UNTIL(reborn->messages == 1);
    assert_int_equal(end[0].messages, 0);
    UNTIL(end[0].closes == 1); /* the old one was closed by member 2 */
}

/* Only the roster says who is a member. Its key proves who somebody is, so nobody answers for
 * another. */
static void strangers_and_impostors_are_refused(void **state) {
    (void)state;
    tell_roster(1, 1); /* member 2 does not know member 3, nor itself */
    dial(2, 1);
    UNTIL(end[2].closes == 1);
    assert_int_equal(end[1].opens, 0);
    assert_int_equal(end[1].complaints, 1);
    assert_non_null(strstr(end[1].why, "not in the roster"));
    peers_dial(end[0].peers, 2, "127.0.0.1", end[2].port); /* member 3 answers there */
    UNTIL(end[0].closes == 1);
    assert_int_equal(end[0].opens, 0);
}

/* A revoked member is cut off at once, and sync is told. */
static void leaving_the_roster_closes_the_link(void **state) {
    (void)state;
    dial(0, 1);
    UNTIL(end[0].opens && end[1].opens);
    struct msg_member only_self = { .member = 2,
                                    .key = end[1].identity.key,
                                    .name = proto_str("m") };
    struct msg_roster_body roster = { .members = &only_self, .members_count = 1 };
    assert_int_equal(peers_set_roster(end[1].peers, &roster, NULL), 0);
    UNTIL(end[1].closes == 1 && end[0].closes == 1);
    assert_string_equal(end[1].why, "no longer in the roster");
}

/* sync waits for OPEN or CLOSED after each dial and each send: one of them must come. */
static void what_cannot_be_reached_is_told(void **state) {
    (void)state;
    uint16_t port = end[1].port;
    listener_destroy(end[1].listener);
    end[1].listener = NULL;
    peers_dial(end[0].peers, 2, "127.0.0.1", port);
    UNTIL(end[0].closes == 1);
    say(0, 1, 1);
    UNTIL(end[0].closes == 2);
    assert_string_equal(end[0].why, "no link");
    peers_dial(end[0].peers, 2, "no host of that name.invalid", 1);
    UNTIL(end[0].closes == 3);
    end[1].listener = listener_create(base, "127.0.0.1", &end[1].port, on_accept, &end[1], NULL);
}

int main(void) {
    if (proto_init(NULL)) return 1;
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(one_dial_serves_both_directions),
        TEST(members_that_dial_each_other_stay_connected),
        TEST(a_member_that_dials_again_replaces_its_old_link),
        TEST(strangers_and_impostors_are_refused),
        TEST(leaving_the_roster_closes_the_link),
        TEST(what_cannot_be_reached_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
