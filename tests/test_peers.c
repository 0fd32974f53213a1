/* Links between members, over real TLS on loopback, all ends on one event loop. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <event2/event.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "node/links.h"
#include "proto/channel.h"

#define ENDS 3 /* member i + 1 is end i */

struct end {
    struct identity identity;
    struct channel_context *ctx;
    struct peers *peers;
    struct listener *listener;
    uint16_t port;
    int opens, closes, messages, complaints, drains;
    uint64_t last;     /* what the last message said */
    int chunks, chunks_before_last; /* those that came, in all and before that message */
    int too_early;     /* chunks that came before what was said before them */
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
    if (f->type == MSG_CHUNK) {
        e->chunks++;
        if (((const struct msg_chunk *)msg)->weight > (uint64_t)e->messages) e->too_early++;
        return;
    }
    assert_int_equal(f->type, MSG_MOMENTS_GET);
    e->messages++;
    e->chunks_before_last = e->chunks;
    e->last = ((const struct msg_moments_get *)msg)->fragment;
}
static void on_close(void *arg, uint32_t member, const char *why) {
    struct end *e = arg;
    (void)member;
    e->closes++;
    snprintf(e->why, sizeof e->why, "%s", why);
}
static void on_drained(void *arg, uint32_t member) {
    (void)member;
    ((struct end *)arg)->drains++;
}
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

/* weight: how many messages were said before. */
static void send_chunk(int from, int to, uint32_t bytes, uint64_t weight) {
    static uint8_t data[1 << 20];
    struct msg_chunk m = { .weight = weight, .data = { data, bytes } };
    peers_send(end[from].peers, (uint32_t)to + 1, MSG_CHUNK, 1, 0, 0, &m);
}

static int lanes_of(int of, int other) {
    struct link *l = links_current(end[of].peers, (uint32_t)other + 1);
    int n = 0;
    for (int i = 0; l && i <= PEERS_LANES_MAX; i++) n += l->lane[i] && l->lane[i]->open;
    return n;
}

static int links_of(int of) {
    int n = 0;
    for (struct link *l = end[of].peers->links; l; l = l->next) n++;
    return n;
}

/* A link from 1 to 2 with `bulk` bulk connections. */
static void connect_with(uint32_t bulk) {
    for (int i = 0; i < ENDS; i++) peers_set_bulk_lanes(end[i].peers, bulk);
    dial(0, 1);
    UNTIL(lanes_of(0, 1) == (int)bulk + 1 && lanes_of(1, 0) == (int)bulk + 1);
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

/* In an all-to-all everybody dials everybody in the same moment. One link stays, the same for both, and
 * what is sent after the last OPEN arrives. */
static void members_that_dial_each_other_end_with_one_link(void **state) {
    (void)state;
    for (int i = 0; i < ENDS; i++) peers_set_bulk_lanes(end[i].peers, 2);
    dial(0, 1);
    dial(1, 0);
    UNTIL(end[0].opens && end[1].opens && links_of(0) == 1 && links_of(1) == 1 &&
          lanes_of(0, 1) == 3 && lanes_of(1, 0) == 3);
    assert_true(links_current(end[0].peers, 2)->outbound); /* the lower id's */
    assert_int_equal(end[0].opens, end[0].closes + 1);
    assert_int_equal(end[1].opens, end[1].closes + 1);
    assert_true(end[0].opens <= 2 && end[1].opens <= 2);
    say(0, 1, 5);
    say(1, 0, 6);
    UNTIL(end[0].messages == 1 && end[1].messages == 1);
    assert_int_equal(peers_count(end[0].peers), 1);
    assert_int_equal(peers_count(end[1].peers), 1);
}

/* Questions and answers do not wait for tensor data: neither with connections of its own for that, nor
 * where one connection has to do. */
static void control_does_not_wait_for_bulk(void **state) {
    (void)state;
    for (uint32_t lanes = 0; lanes <= 3; lanes += 3) {
        end[1].chunks = end[1].messages = 0;
        connect_with(lanes);
        for (int i = 0; i < 60; i++) send_chunk(0, 1, 1 << 20, 0);
        say(0, 1, 7);
        UNTIL(end[1].messages == 1 && end[1].chunks == 60);
        assert_in_range(end[1].chunks_before_last, 0, 15);
        UNTIL(end[0].drains);
        peers_close(end[0].peers, 2);
        UNTIL(lanes_of(1, 0) == 0);
    }
}

/* RESULT_LEAVES, then RESULTs that are checked by them: a chunk that came first would be thrown away. */
static void bulk_waits_for_what_was_said_before_it(void **state) {
    (void)state;
    connect_with(3);
    uint64_t said = 0;
    for (int i = 0; i < 600; i++) {
        if (i % 5 == 0) say(0, 1, (uint32_t)++said);
        send_chunk(0, 1, i % 4 ? 100 : 300000, said);
        if (i % 100 == 99) event_base_loop(base, EVLOOP_NONBLOCK);
    }
    UNTIL(end[1].chunks == 600);
    assert_int_equal(end[1].messages, said);
    assert_int_equal(end[1].last, said);
    assert_int_equal(end[1].too_early, 0);
}

static void bulk_is_spread_over_its_connections(void **state) {
    (void)state;
    connect_with(3);
    for (int i = 0; i < 60; i++) send_chunk(0, 1, 1 << 20, 0);
    UNTIL(end[1].chunks == 60);
    struct link *l = links_current(end[1].peers, 1);
    for (int i = 1; i <= 3; i++)
        assert_in_range(channel_received_bytes(l->lane[i]->channel), 5 << 20, 40 << 20);
    assert_in_range(channel_received_bytes(l->lane[0]->channel), 0, 1000);
}

/* What was queued on it is lost, and nobody can say what that was: so all of the link is, and both
 * sides hear of it. Then they connect again. */
static void a_broken_bulk_connection_ends_the_link(void **state) {
    (void)state;
    connect_with(2);
    shutdown(links_current(end[0].peers, 2)->lane[2]->channel->fd, SHUT_RDWR);
    UNTIL(end[0].closes == 1 && end[1].closes == 1);
    assert_int_equal(links_of(0), 0);
    assert_int_equal(links_of(1), 0);
    connect_with(2);
    send_chunk(1, 0, 1000, 0);
    UNTIL(end[0].chunks == 1);
}

/* Where the other side takes no more connections a link does without them. */
static void a_link_without_its_bulk_connections_works(void **state) {
    (void)state;
    peers_set_bulk_lanes(end[0].peers, 3);
    dial(0, 1);
    UNTIL(end[0].opens == 1);
    listener_destroy(end[1].listener);
    end[1].listener = NULL;
    for (int i = 0; i < 10; i++) send_chunk(0, 1, 100000, 0);
    say(1, 0, 3);
    UNTIL(end[1].chunks == 10 && end[0].messages == 1);
    assert_int_equal(end[0].closes, 0);
    end[1].listener = listener_create(base, "127.0.0.1", &end[1].port, on_accept, &end[1], NULL);
    UNTIL(lanes_of(0, 1) == 4); /* and takes them up when they can be had */
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

/* The same where it was we who had dialled: its new life has another number, so this is no case of two
 * who dial each other. */
static void a_member_born_again_replaces_the_link_to_its_former_life(void **state) {
    (void)state;
    dial(0, 1);
    UNTIL(end[0].opens == 1 && end[1].opens == 1);
    struct end *reborn = &end[2];
    channel_context_destroy(reborn->ctx);
    peers_destroy(reborn->peers);
    reborn->ctx = channel_context_create(&end[1].identity, NULL);
    reborn->peers = peers_create(base, reborn->ctx, 2, &callbacks, reborn, NULL);
    tell_roster(2, 2);
    dial(2, 0);
    UNTIL(end[0].opens == 2);
    say(0, 1, 88);
    UNTIL(reborn->messages == 1);
    assert_int_equal(end[1].messages, 0);
    assert_int_equal(links_of(0), 1);
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

static struct channel *bare;
static int bare_closed;
static bool bare_open(void *arg, struct channel *ch, const struct proto_key *key) {
    (void)arg, (void)key;
    bare = ch;
    return true;
}
static void bare_message(void *arg, struct channel *ch, const struct frame *f, const void *msg) {
    (void)arg, (void)ch, (void)f, (void)msg;
}
static void bare_close(void *arg, struct channel *ch, const struct err *why) {
    (void)arg, (void)ch, (void)why;
    bare = NULL;
    bare_closed++;
}
static const struct channel_ops bare_ops = { bare_open, bare_message, bare_close, NULL };

/* A member's connection whose first word is `type`. */
static void first_word(uint8_t type, const void *msg) {
    bare = NULL;
    bare_closed = 0;
    assert_non_null(channel_dial(base, end[0].ctx, "127.0.0.1", end[1].port, &bare_ops, NULL, NULL));
    UNTIL(bare);
    assert_int_equal(channel_send(bare, type, 0, 0, 0, msg, NULL), 0);
    UNTIL(bare_closed);
}

/* A member's key opens the door; what it says then is as foreign as all else from outside. */
static void a_wrong_first_word_ends_the_connection(void **state) {
    struct msg_moments_get get = {0};
    struct msg_link lost = { .process = 1, .number = 77, .lane = 1 };
    struct msg_link many = { .process = 1, .number = 77, .lane = 4000000000u };
    struct msg_after after = { .control = UINT64_MAX };
    (void)state;
    first_word(MSG_MOMENTS_GET, &get);
    assert_non_null(strstr(end[1].why, "first word is not LINK"));
    first_word(MSG_LINK, &lost);
    assert_non_null(strstr(end[1].why, "belongs to no link"));
    first_word(MSG_LINK, &many);
    assert_non_null(strstr(end[1].why, "too many connections"));
    first_word(MSG_AFTER, &after);
    assert_int_equal(end[1].opens, 0);
    assert_int_equal(end[1].messages, 0);
    assert_null(end[1].peers->guests);
}

/* Tensor data has no place but where it belongs, nor have words about order on the control lane. */
static void words_on_the_wrong_lane_end_the_link(void **state) {
    struct msg_after after = { .control = 1 };
    struct msg_moments_get get = {0};
    (void)state;
    connect_with(1);
    struct link *l = links_current(end[0].peers, 2);
    channel_send(l->lane[0]->channel, MSG_AFTER, 0, 0, 0, &after, NULL);
    UNTIL(end[1].closes == 1 && end[0].closes == 1);
    connect_with(1);
    l = links_current(end[0].peers, 2);
    channel_send(l->lane[1]->channel, MSG_MOMENTS_GET, 0, 0, 0, &get, NULL);
    UNTIL(end[1].closes == 2 && end[0].closes == 2);
    assert_int_equal(end[1].messages, 0);
}

/* 64 silent connections once kept all members out for 10 seconds. */
static void silent_strangers_do_not_keep_members_out(void **state) {
    int fd[400];
    (void)state;
    for (int i = 0; i < 400; i++) {
        struct sockaddr_in here = { .sin_family = AF_INET,
                                    .sin_addr.s_addr = htonl(0x7f000005u + (uint32_t)i / 200) };
        struct sockaddr_in there = { .sin_family = AF_INET, .sin_port = htons(end[1].port),
                                     .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
        fd[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_int_equal(bind(fd[i], (struct sockaddr *)&here, sizeof here), 0);
        assert_int_equal(connect(fd[i], (struct sockaddr *)&there, sizeof there), 0);
        if (i % 50 == 49) event_base_loop(base, EVLOOP_NONBLOCK);
    }
    dial(0, 1);
    UNTIL(end[0].opens == 1 && end[1].opens == 1);
    int guests = 0;
    for (struct lane *l = end[1].peers->guests; l; l = l->next) guests++;
    assert_in_range(guests, 1, PEERS_STRANGERS_MAX / 4);
    for (int i = 0; i < 400; i++) close(fd[i]);
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
        TEST(members_that_dial_each_other_end_with_one_link),
        TEST(control_does_not_wait_for_bulk),
        TEST(bulk_waits_for_what_was_said_before_it),
        TEST(bulk_is_spread_over_its_connections),
        TEST(a_broken_bulk_connection_ends_the_link),
        TEST(a_link_without_its_bulk_connections_works),
        TEST(a_member_born_again_replaces_the_link_to_its_former_life),
        TEST(a_wrong_first_word_ends_the_connection),
        TEST(words_on_the_wrong_lane_end_the_link),
        TEST(silent_strangers_do_not_keep_members_out),
        TEST(a_member_that_dials_again_replaces_its_old_link),
        TEST(strangers_and_impostors_are_refused),
        TEST(leaving_the_roster_closes_the_link),
        TEST(what_cannot_be_reached_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
