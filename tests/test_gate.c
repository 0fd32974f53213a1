/* The gate: who may connect while nobody knows yet who it is. Time is a number here. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <arpa/inet.h>
#include <cmocka.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "proto/proto.h"

#define STRANGERS 64
#define PER_MINUTE 600

static struct gate *gate;
static uint64_t now;
static int evicted[1000], evictions; /* whose, in order */

static int set_up(void **state) {
    struct gate_limits limits = {.strangers_max = STRANGERS, .connects_per_minute = PER_MINUTE};
    (void)state;
    now = 1000000;
    evictions = 0;
    gate = gate_create(&limits, NULL);
    return gate ? 0 : -1;
}

static int tear_down(void **state) {
    (void)state;
    gate_destroy(gate);
    return 0;
}

static struct sockaddr_storage address(const char *text) {
    struct sockaddr_storage a = {0};
    struct sockaddr_in *v4 = (struct sockaddr_in *)(void *)&a;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)(void *)&a;
    a.ss_family = strchr(text, ':') ? AF_INET6 : AF_INET;
    assert_int_equal(inet_pton(a.ss_family, text,
                               a.ss_family == AF_INET6 ? (void *)&v6->sin6_addr
                                                       : (void *)&v4->sin_addr), 1);
    return a;
}

/* An address of the i-th of very many machines. */
static struct sockaddr_storage machine(uint32_t i) {
    struct sockaddr_storage a = {.ss_family = AF_INET};
    ((struct sockaddr_in *)(void *)&a)->sin_addr.s_addr = htonl(0x0b000000u + i);
    return a;
}

static void on_evict(void *arg) { evicted[evictions++] = (int)(intptr_t)arg; }

static struct gate_place *enter(const char *from, int name) {
    struct sockaddr_storage a = address(from);
    return gate_enter(gate, &a, now, on_evict, (void *)(intptr_t)name);
}

static struct gate_place *enter_from(uint32_t i, int name) {
    struct sockaddr_storage a = machine(i);
    return gate_enter(gate, &a, now, on_evict, (void *)(intptr_t)name);
}

/* How many connect at once from there. */
static int crowd(const char *from) {
    int n = 0;
    while (n < 2 * STRANGERS && enter(from, n)) n++;
    return n;
}

static void become_known(const char *from) {
    struct gate_place *p = enter(from, 0);
    assert_non_null(p);
    gate_known(p);
}

/* ---- how many at once -------------------------------------------------------------------------- */

/* 64 silent connections of one machine once kept everybody out for as long as a handshake may take. */
static void one_address_does_not_keep_the_others_out(void **state) {
    (void)state;
    assert_int_equal(crowd("192.0.2.1"), STRANGERS / 8);
    assert_non_null(enter("192.0.2.2", 0));
    assert_int_equal(gate_take_refused(gate), 1);
    assert_int_equal(gate_take_refused(gate), 0);
}

static void who_goes_leaves_room(void **state) {
    struct gate_place *p[STRANGERS / 8];
    (void)state;
    for (int i = 0; i < STRANGERS / 8; i++) assert_non_null(p[i] = enter("192.0.2.1", i));
    assert_null(enter("192.0.2.1", 99));
    gate_leave(p[3]);
    assert_non_null(p[3] = enter("192.0.2.1", 3));
    for (int i = 0; i < STRANGERS / 8; i++) gate_leave(p[i]);
    assert_int_equal(crowd("192.0.2.1"), STRANGERS / 8);
    assert_int_equal(evictions, 0);
}

/* Also where all the others come from addresses of their own, as a botnet does. Those who had time to
 * say who they are give way, the oldest first; those who just came do not. */
static void silent_ones_make_way(void **state) {
    (void)state;
    for (int i = 0; i < STRANGERS - STRANGERS / 4; i++) {
        assert_non_null(enter_from((uint32_t)i, i));
        now += 10;
    }
    assert_null(enter("192.0.2.1", 99));
    now += GATE_TENURE_MS - 10 * (STRANGERS - STRANGERS / 4);
    assert_non_null(enter("192.0.2.1", 100));
    assert_int_equal(evictions, 1);
    assert_int_equal(evicted[0], 0);
    assert_null(enter("192.0.2.1", 101)); /* the next one has had 10 ms less */
    now += 10;
    assert_non_null(enter("192.0.2.1", 102));
    assert_int_equal(evicted[1], 1);
    assert_int_equal(gate_take_refused(gate), 4);
}

/* The machine's own silent ones make way, not somebody else's older ones. */
static void a_crowded_address_makes_its_own_way(void **state) {
    (void)state;
    assert_non_null(enter("192.0.2.7", 700));
    assert_int_equal(crowd("192.0.2.1"), STRANGERS / 8);
    now += GATE_TENURE_MS;
    assert_non_null(enter("192.0.2.1", 100));
    assert_int_equal(evictions, 1);
    assert_int_equal(evicted[0], 0);
}

/* A flood from everywhere: members come back to a quarter of the places that is theirs. */
static void members_get_in_while_the_world_floods(void **state) {
    (void)state;
    become_known("198.51.100.1");
    become_known("198.51.100.2");
    for (uint32_t i = 0; i < 1000; i++) enter_from(i, 0);
    assert_null(enter("192.0.2.1", 0));
    struct gate_place *p[STRANGERS / 4];
    for (int i = 0; i < STRANGERS / 4; i++)
        assert_non_null(p[i] = enter(i % 2 ? "198.51.100.1" : "198.51.100.2", i));
    for (int i = 0; i < STRANGERS / 4; i++) gate_known(p[i]);
    assert_int_equal(evictions, 0);
}

/* And though the flood comes from its own address, a member's machine may crowd more than others, and
 * its silent ones make way for it. */
static void members_behind_a_flooded_address_get_in(void **state) {
    (void)state;
    become_known("198.51.100.1");
    assert_int_equal(crowd("198.51.100.1"), STRANGERS / 2);
    now += GATE_TENURE_MS;
    struct gate_place *p = enter("198.51.100.1", 0);
    assert_non_null(p);
    gate_known(p);
}

/* Those who connected before their address was known count as from a known one afterwards. */
static void counts_stay_right_when_an_address_becomes_known(void **state) {
    struct gate_place *p[4];
    (void)state;
    for (int round = 0; round < 50; round++) {
        for (int i = 0; i < 4; i++) assert_non_null(p[i] = enter_from((uint32_t)round, i));
        gate_known(p[2]);
        gate_leave(p[0]);
        gate_known(p[3]);
        gate_leave(p[1]);
        now += 1000;
    }
    int unknown = 0;
    while (enter_from(1000 + (uint32_t)unknown, 0)) unknown++;
    assert_int_equal(unknown, STRANGERS - STRANGERS / 4);
}

/* ---- what is one address ------------------------------------------------------------------------ */

static void an_ipv6_host_is_its_64_bits(void **state) {
    (void)state;
    char text[64];
    int n = 0;
    for (; n < STRANGERS; n++) {
        snprintf(text, sizeof text, "2001:db8:1:2:%x::%x", (unsigned)n * 77, (unsigned)n + 1);
        if (!enter(text, n)) break;
    }
    assert_int_equal(n, STRANGERS / 8);
    assert_non_null(enter("2001:db8:1:3::1", 0));
}

/* A port that listens on "::" sees IPv4 in IPv6's clothes; all of it together is not one host. */
static void ipv4_keeps_its_address_in_ipv6_clothes(void **state) {
    (void)state;
    assert_int_equal(crowd("::ffff:192.0.2.1"), STRANGERS / 8);
    assert_null(enter("192.0.2.1", 0));
    assert_non_null(enter("::ffff:192.0.2.2", 0));
}

/* ---- how many in a minute ------------------------------------------------------------------------ */

static int comings_and_goings(const char *from, int tries) {
    int n = 0;
    for (int i = 0; i < tries; i++) {
        struct gate_place *p = enter(from, 0);
        if (p) gate_leave(p), n++;
    }
    return n;
}

static void an_address_that_dials_without_end_is_slowed(void **state) {
    (void)state;
    assert_int_equal(comings_and_goings("192.0.2.1", 5000), PER_MINUTE);
    now += 6000;
    assert_int_equal(comings_and_goings("192.0.2.1", 5000), PER_MINUTE / 10);
    now += 3600000; /* no more than a minute's worth is saved up */
    assert_int_equal(comings_and_goings("192.0.2.1", 5000), PER_MINUTE);
    become_known("198.51.100.1"); /* a household of members */
    now += 60000;
    assert_int_equal(comings_and_goings("198.51.100.1", 5000), 4 * PER_MINUTE);
}

/* Handshakes cost us as much as them; from a million addresses no more than from twenty. */
static void all_strangers_together_are_slowed(void **state) {
    int n = 0;
    (void)state;
    become_known("198.51.100.1");
    for (uint32_t i = 0; i < 50u * PER_MINUTE; i++) {
        struct gate_place *p = enter_from(i, 0);
        if (p) gate_leave(p), n++;
    }
    assert_in_range(n, 19 * PER_MINUTE, 20 * PER_MINUTE);
    assert_true(comings_and_goings("198.51.100.1", 100) == 100);
}

/* The table is fixed, and a world of strangers must not push those out who belong here. */
static void known_addresses_are_remembered(void **state) {
    (void)state;
    for (int i = 0; i < 50; i++) {
        char text[32];
        snprintf(text, sizeof text, "198.51.100.%d", i);
        become_known(text);
    }
    for (uint32_t i = 0; i < 200000; i++) {
        struct gate_place *p = enter_from(i, 0);
        if (p) gate_leave(p);
        now += 5;
    }
    for (uint32_t i = 0; i < 1000; i++) enter_from(i, 0); /* the unknowns' places are taken */
    for (int i = 0; i < 50; i++) {
        char text[32];
        snprintf(text, sizeof text, "198.51.100.%d", i);
        struct gate_place *p = enter(text, 0);
        assert_non_null(p);
        gate_known(p);
    }
}

static void lines_are_few(void **state) {
    uint32_t untold = 7;
    (void)state;
    for (int i = 0; i < GATE_LINES_PER_MINUTE; i++) assert_true(gate_may_tell(gate, false, now, &untold));
    assert_int_equal(untold, 0);
    for (int i = 0; i < 1000; i++) assert_false(gate_may_tell(gate, false, now, &untold));
    assert_true(gate_may_tell(gate, true, now, &untold)); /* members' troubles are not drowned */
    now += 60000;
    assert_true(gate_may_tell(gate, false, now, &untold));
    assert_int_equal(untold, 1000);
}

int main(void) {
    if (proto_init(NULL)) return 1;
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(one_address_does_not_keep_the_others_out),
        TEST(who_goes_leaves_room),
        TEST(silent_ones_make_way),
        TEST(a_crowded_address_makes_its_own_way),
        TEST(members_get_in_while_the_world_floods),
        TEST(members_behind_a_flooded_address_get_in),
        TEST(counts_stay_right_when_an_address_becomes_known),
        TEST(an_ipv6_host_is_its_64_bits),
        TEST(ipv4_keeps_its_address_in_ipv6_clothes),
        TEST(an_address_that_dials_without_end_is_slowed),
        TEST(all_strangers_together_are_slowed),
        TEST(known_addresses_are_remembered),
        TEST(lines_are_few),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
