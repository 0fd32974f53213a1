/* test_server.c - the coordinator as its peers see it: a real `serve` in a process of its own, real
 * TLS. Whoever comes with something wrong is told what, and the run goes on for everybody else. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <arpa/inet.h>
#include <cmocka.h>
#include <event2/event.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "proto/address.h"
#include "coordinator/audit.h"
#include "coordinator/commands.h"
#include "coordinator/control.h"
#include "coordinator/run.h"

#define WAIT_MS 5000

static char dir[64], log_path[96];
static pid_t server;
static struct address at;
static struct digest run_id;
static struct event_base *base;

/* ---- the coordinator ------------------------------------------------------------------------------ */

static void pause_ms(int ms) {
    struct timespec t = { ms / 1000, ms % 1000 * 1000000L };
    nanosleep(&t, NULL);
}

static void write_text(const char *path, const char *text) {
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* A command in a process of its own, with its words in the log. */
static pid_t start_command(int (*command)(int, char **), const char *const *arguments) {
    fflush(stdout);
    pid_t pid = fork();
    if (pid) return pid;
    int log = open(log_path, O_WRONLY | O_CREAT | O_APPEND, 0600), argc = 0;
    char *argv[16];
    dup2(log, 1);
    dup2(log, 2);
    while (arguments[argc]) argv[argc] = strdup(arguments[argc]), argc++;
    argv[argc] = NULL;
    exit(command(argc, argv));
}

static void start_server(void) {
    static const char *const arguments[] = { "serve", dir, "--no-aggregator", "--listen",
                                             "127.0.0.1:0", NULL };
    struct err err;
    server = start_command(coordinator_serve, arguments);
    for (int waited = 0; waited < WAIT_MS; waited += 20) {
        json_t *status = control_ask(dir, NULL, &err);
        const char *listen = json_string_value(json_object_get(status, "listen"));
        bool there = listen && address_split(listen, false, &at, &err) == 0 &&
                     json_integer_value(json_object_get(status, "pid")) == server;
        json_decref(status);
        if (there) return;
        pause_ms(20);
    }
    fail_msg("the server does not start, see %s", log_path);
}

/* Its exit code, or -signal. */
static int server_ended(void) {
    int status;
    for (int waited = 0; waited < WAIT_MS; waited += 20) {
        if (waitpid(server, &status, WNOHANG) == server) {
            server = 0;
            return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
        }
        pause_ms(20);
    }
    fail_msg("the server does not end");
    return -1;
}

static bool log_has(const char *text) {
    static char all[1 << 18];
    FILE *f = fopen(log_path, "r");
    size_t n = f ? fread(all, 1, sizeof all - 1, f) : 0;
    if (f) fclose(f);
    all[n] = '\0';
    return strstr(all, text) != NULL;
}

static int set_up(void **state) {
    const char *init[] = { "init", dir, "--corpus", NULL, "--set", "serve.strangers_max=32",
                           "--set", "serve.connects_per_minute=30", NULL };
    char corpus[96];
    int status;
    struct run run;
    struct err err;
    (void)state;
    strcpy(dir, "/tmp/test_server.XXXXXX");
    if (!mkdtemp(dir)) return -1;
    snprintf(log_path, sizeof log_path, "%s.log", dir);
    snprintf(corpus, sizeof corpus, "%s.json", dir);
    write_text(corpus, "{\"format\":1,\"tokenizer\":\"bytes\",\"vocabulary\":256,\"sequence\":128,"
                       "\"samples\":20000}");
    init[3] = corpus;
    pid_t pid = start_command(coordinator_init, init);
    if (waitpid(pid, &status, 0) != pid || status) return -1;
    if (run_open(&run, dir, &err)) return -1;
    run_id = run.id;
    run_release(&run);
    base = event_base_new();
    start_server();
    return 0;
}

static int tear_down(void **state) {
    char command[256];
    (void)state;
    if (server) {
        kill(server, SIGKILL);
        waitpid(server, NULL, 0);
    }
    event_base_free(base);
    snprintf(command, sizeof command, "rm -rf %s %s.json %s", dir, dir, log_path);
    return system(command);
}

/* ---- a peer ------------------------------------------------------------------------------------------ */

struct peer {
    struct identity id;
    struct channel_context *tls;
    struct channel *channel; /* NULL: closed */
    bool open;
    uint32_t seen[256];      /* messages of each type */
    uint64_t term;           /* of the newest frame */
    struct msg_bye bye;      /* the reason is in `reason` */
    char reason[PROTO_TEXT_BYTES_MAX + 1], closed_why[256];
    uint32_t member;
    struct msg_hello_ack ack;
    bool welcome_is_right;
    struct audit ledger;     /* every entry it was sent, checked */
};

static bool on_open(void *arg, struct channel *ch, const struct proto_key *key) {
    struct peer *p = arg;
    (void)ch;
    (void)key;
    p->open = true;
    return true;
}

static void check_welcome(struct peer *p, struct channel *ch, const struct msg_welcome *w) {
    struct digest d = digest_of(w->genesis.data, w->genesis.length);
    struct msg_genesis genesis;
    struct err err;
    assert_true(digest_equal(&d, &run_id));
    assert_int_equal(proto_decode(w->genesis.data, w->genesis.length, RECORD_genesis, &genesis, &err), 0);
    p->welcome_is_right = ledger_check_delegation(&genesis, &run_id, w->delegation,
                                                  &w->delegation_signature, channel_peer_key(ch),
                                                  &err) == 0;
    proto_decoded_release(RECORD_genesis, &genesis);
}

static void on_message(void *arg, struct channel *ch, const struct frame *f, const void *msg) {
    struct peer *p = arg;
    struct err err;
    p->seen[f->type]++;
    p->term = f->term;
    if (f->type == MSG_WELCOME) check_welcome(p, ch, msg);
    if (f->type == MSG_ENROLLED) p->member = ((const struct msg_enrolled *)msg)->member;
    if (f->type == MSG_HELLO_ACK) p->ack = *(const struct msg_hello_ack *)msg;
    if (f->type == MSG_BYE) {
        p->bye = *(const struct msg_bye *)msg;
        proto_str_copy(p->bye.reason, p->reason, sizeof p->reason);
    }
    if (f->type == MSG_LEDGER) {
        const struct msg_ledger *l = msg;
        for (uint32_t i = 0; i < l->entries_count; i++)
            if (audit_take(&p->ledger, &l->entries[i], &err)) fail_msg("%s", err.msg);
    }
}

static void on_close(void *arg, struct channel *ch, const struct err *why) {
    struct peer *p = arg;
    (void)ch;
    p->channel = NULL;
    snprintf(p->closed_why, sizeof p->closed_why, "%s", why->msg);
}

static void dial(struct peer *p) {
    static const struct channel_ops ops = { on_open, on_message, on_close, NULL };
    struct err err;
    p->open = false;
    memset(p->seen, 0, sizeof p->seen);
    p->channel = channel_dial(base, p->tls, at.host, at.port, &ops, p, &err);
    if (!p->channel) fail_msg("%s", err.msg);
}

/* A new identity, connected. */
static void peer_create(struct peer *p) {
    struct err err;
    memset(p, 0, sizeof *p);
    identity_create(&p->id);
    p->tls = channel_context_create(&p->id, &err);
    assert_non_null(p->tls);
    audit_init(&p->ledger, &run_id);
    dial(p);
}

static void peer_destroy(struct peer *p) {
    if (p->channel) channel_close(p->channel, false);
    channel_context_destroy(p->tls);
    audit_release(&p->ledger);
}

static void on_time_over(evutil_socket_t fd, short what, void *arg) {
    (void)fd;
    (void)what;
    *(bool *)arg = true;
}

/* Run the loop until a message of this type came; type 0: until the connection is gone. */
static void wait_for(struct peer *p, uint8_t type) {
    struct timeval patience = { .tv_sec = WAIT_MS / 1000 };
    bool over = false;
    struct event *timer = evtimer_new(base, on_time_over, &over);
    evtimer_add(timer, &patience);
    while (!over && (type ? !p->seen[type] && p->channel : p->channel != NULL))
        event_base_loop(base, EVLOOP_ONCE);
    event_free(timer);
    if (type ? !p->seen[type] : p->channel != NULL)
        fail_msg("no %s came; closed: %s, BYE: %s", type ? proto_type_name(type) : "end", p->closed_why,
                 p->reason);
}

static void say(struct peer *p, uint8_t type, uint64_t session, const void *msg) {
    struct err err;
    if (channel_send(p->channel, type, p->term, session, 0, msg, &err)) fail_msg("%s", err.msg);
}

/* What `intellect-coordinator invite` would do, with a time to live that may be over. */
static struct digest an_invite(uint32_t uses, int64_t lives_ms) {
    struct msg_invite_record record;
    struct digest secret;
    struct timespec now;
    struct err err;
    clock_gettime(CLOCK_REALTIME, &now);
    struct store *s = store_open(dir, false, &err);
    assert_non_null(s);
    store_invite_make(uses, (uint64_t)((int64_t)now.tv_sec * 1000 + lives_ms), false, &secret, &record);
    assert_int_equal(store_invite_add(s, &record, &err), 0);
    store_close(s);
    return secret;
}

static void enrol(struct peer *p, const struct digest *secret) {
    struct msg_enrol m = { .secret = *secret, .name = proto_str("tester"), .aggregate_only = 0 };
    wait_for(p, MSG_WELCOME);
    say(p, MSG_ENROL, 0, &m);
}

static void hello(struct peer *p) {
    struct msg_hello m = { .software = proto_str("test"), .trains = 1, .term_max = p->term };
    say(p, MSG_HELLO, 0, &m);
}

/* A member that was refused nothing: joins, says HELLO, is sent the whole ledger. */
static void somebody_joins(void) {
    struct digest secret = an_invite(1, 60000);
    struct peer p;
    peer_create(&p);
    enrol(&p, &secret);
    wait_for(&p, MSG_ENROLLED);
    hello(&p);
    wait_for(&p, MSG_HELLO_ACK);
    wait_for(&p, MSG_LEDGER);
    wait_for(&p, MSG_ROSTER);
    assert_true(p.ledger.entries >= 3);
    peer_destroy(&p);
}

static void refused(struct peer *p, const char *why) {
    wait_for(p, MSG_BYE);
    assert_int_equal(p->bye.code, ERR_REFUSED);
    /* A key may stand in a newer ledger than a coordinator has that began a moment ago. */
    assert_int_equal(p->bye.final, !strstr(why, "not enrolled"));
    if (!strstr(p->reason, why)) fail_msg("\"%s\" does not say \"%s\"", p->reason, why);
    wait_for(p, 0);
    peer_destroy(p);
}

/* ---- tests --------------------------------------------------------------------------------------------- */

/* Before a node shows its secret it checks whom it talks to; so the first word must be enough. */
static void the_welcome_proves_the_run(void **state) {
    struct peer p;
    (void)state;
    peer_create(&p);
    wait_for(&p, MSG_WELCOME);
    assert_true(p.welcome_is_right);
    assert_int_equal(p.term, 1);
    peer_destroy(&p);
}

static void an_invite_is_bound_to_the_key_that_used_it(void **state) {
    struct digest secret = an_invite(1, 60000);
    struct peer first, second;
    (void)state;
    peer_create(&first);
    enrol(&first, &secret);
    wait_for(&first, MSG_ENROLLED);
    uint32_t member = first.member;
    channel_close(first.channel, true);
    dial(&first); /* the answer may have been lost: the same key asks again */
    enrol(&first, &secret);
    wait_for(&first, MSG_ENROLLED);
    assert_int_equal(first.member, member);
    peer_create(&second);
    enrol(&second, &secret);
    refused(&second, "used");
    peer_destroy(&first);
    somebody_joins();
}

static void an_expired_invite_is_refused(void **state) {
    struct digest secret = an_invite(1, -1000);
    struct peer p;
    (void)state;
    peer_create(&p);
    enrol(&p, &secret);
    refused(&p, "expired");
    somebody_joins();
}

static void a_forged_invite_is_refused(void **state) {
    struct digest secret = an_invite(1, 60000);
    struct peer p;
    (void)state;
    secret.b[12] ^= 1;
    peer_create(&p);
    enrol(&p, &secret);
    refused(&p, "unknown");
    somebody_joins();
}

static void a_key_that_is_not_in_the_roster_is_refused(void **state) {
    struct peer p;
    (void)state;
    peer_create(&p);
    wait_for(&p, MSG_WELCOME);
    hello(&p);
    refused(&p, "not enrolled");
    somebody_joins();
}

/* Its enrolment may be in entries that our store lacks: it may send frames as large as theirs, but nothing
 * that the run's keys did not sign. */
static void a_stranger_with_a_newer_ledger_may_show_it(void **state) {
    static uint8_t forged[PROTO_STRANGER_BYTES_MAX * 4];
    struct msg_signed_entry entry = { .bytes = { forged, sizeof forged } };
    struct msg_ledger ledger = { .entries = &entry, .entries_count = 1 };
    struct msg_hello m = { .software = proto_str("test"), .head_index = 1000, .head_digest = { { 1 } } };
    struct peer p;
    (void)state;
    peer_create(&p);
    wait_for(&p, MSG_WELCOME);
    say(&p, MSG_HELLO, 0, &m);
    wait_for(&p, MSG_LEDGER_GET);
    say(&p, MSG_LEDGER, 0, &ledger);
    wait_for(&p, MSG_BYE);
    assert_int_equal(p.bye.code, ERR_PROTOCOL);
    assert_non_null(strstr(p.reason, "LEDGER: "));
    wait_for(&p, 0);
    peer_destroy(&p);
    somebody_joins();
}

/* The first word after WELCOME is ENROL or HELLO; anything else shows that the peer is no node. */
static void a_message_out_of_order_ends_the_connection(void **state) {
    struct msg_lease_ask ask = { .samples = 5 };
    struct peer p;
    (void)state;
    peer_create(&p);
    wait_for(&p, MSG_WELCOME);
    say(&p, MSG_LEASE_ASK, 0, &ask);
    wait_for(&p, 0);
    peer_destroy(&p);
    somebody_joins();
}

static int connect_from(const char *from) {
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(at.port) };
    struct sockaddr_in here = { .sin_family = AF_INET };
    inet_pton(AF_INET, at.host, &a.sin_addr);
    inet_pton(AF_INET, from, &here.sin_addr);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&here, sizeof here), 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof a), 0);
    return fd;
}

static int connect_raw(void) { return connect_from("127.0.0.1"); }

/* Refused connections end at once; others wait CHANNEL_HANDSHAKE_MS_MAX for a word of TLS. */
static bool is_closed_at_once(int fd) {
    struct pollfd p = { .fd = fd, .events = POLLIN };
    char byte;
    return poll(&p, 1, CHANNEL_HANDSHAKE_MS_MAX / 3) == 1 && read(fd, &byte, 1) <= 0;
}

static void send_raw(const void *bytes, size_t length) {
    int fd = connect_raw();
    char answer[256];
    assert_int_equal(write(fd, bytes, length), length);
    while (read(fd, answer, sizeof answer) > 0) continue;
    close(fd);
}

static void what_is_not_tls_is_named_in_the_log(void **state) {
    static const char http[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    uint8_t noise[4000];
    (void)state;
    randombytes_buf(noise, sizeof noise);
    send_raw(http, sizeof http - 1);
    send_raw(noise, sizeof noise);
    send_raw("ITL1\1\4\0\0\0\0\0\0", 12);
    assert_true(log_has("plain HTTP on the TLS port"));
    assert_true(log_has("does not speak TLS"));
    somebody_joins();
}

/* serve.strangers_max is 32, of one address 4: the fifth is closed at once, and when one goes there is
 * room again. */
static void strangers_of_one_address_are_few(void **state) {
    int fd[5];
    (void)state;
    for (int i = 0; i < 5; i++) fd[i] = connect_raw();
    assert_true(is_closed_at_once(fd[4]));
    for (int i = 0; i < 5; i++) close(fd[i]);
    pause_ms(50);
    somebody_joins();
}

/* A flood from everywhere takes the places of those who are new, not of those whom we know. */
static void members_come_back_while_strangers_fill_the_rest(void **state) {
    int fd[40], refused = 0;
    (void)state;
    somebody_joins();
    for (int i = 0; i < 40; i++) {
        char from[32];
        snprintf(from, sizeof from, "127.0.1.%d", i + 1);
        fd[i] = connect_from(from);
    }
    refused = is_closed_at_once(fd[39]);
    somebody_joins();
    for (int i = 0; i < 40; i++) close(fd[i]);
    assert_true(refused);
}

/* serve.connects_per_minute is 30: one address that dials without end gets no further, though each
 * of its connections is gone before the next. */
static void one_address_may_not_dial_without_end(void **state) {
    (void)state;
    for (int i = 0; i < 40; i++) {
        close(connect_raw());
        pause_ms(3);
    }
    pause_ms(100);
    int fd = connect_raw();
    assert_true(is_closed_at_once(fd));
    close(fd);
    struct err err;
    json_t *status = control_ask(dir, NULL, &err);
    assert_non_null(status);
    json_decref(status);
}

/* What a member was told before the crash is there after it, under a higher term. */
static void a_member_comes_back_after_a_kill_of_the_coordinator(void **state) {
    struct digest secret = an_invite(1, 60000);
    struct peer p;
    (void)state;
    peer_create(&p);
    enrol(&p, &secret);
    wait_for(&p, MSG_ENROLLED);
    kill(server, SIGKILL);
    assert_int_equal(server_ended(), -SIGKILL);
    wait_for(&p, 0);
    start_server();
    dial(&p);
    wait_for(&p, MSG_WELCOME);
    assert_true(p.term > 1);
    hello(&p);
    wait_for(&p, MSG_HELLO_ACK);
    wait_for(&p, MSG_LEDGER);
    assert_int_equal(p.ack.session >> 24, p.term);
    assert_int_equal(p.ledger.entries, 3); /* genesis, delegation, the enrolment */
    assert_int_equal(p.ledger.member_count, 1);
    assert_memory_equal(&p.ledger.member[0].key, &p.id.key, sizeof p.id.key);
    peer_destroy(&p);
}

/* The fence: whoever raised the term in the store has the run; the other may not even answer. */
static void a_coordinator_that_lost_the_term_stops_and_says_nothing(void **state) {
    struct digest secret = an_invite(1, 60000);
    struct peer p;
    struct err err;
    uint64_t term;
    (void)state;
    struct store *s = store_open(dir, false, &err);
    assert_non_null(s);
    assert_int_equal(store_raise_term(s, &term, &err), 0);
    peer_create(&p);
    enrol(&p, &secret);
    wait_for(&p, 0);
    assert_int_equal(p.seen[MSG_ENROLLED], 0);
    assert_int_equal(server_ended(), 1);
    assert_true(log_has("another coordinator took this run over"));
    bool begun;
    assert_int_equal(store_begun(s, &begun, &err), 0);
    assert_false(begun);
    store_close(s);
    peer_destroy(&p);
}

/* It has nothing to write, so nothing else would tell it: its members would stay with it for ever. */
static void a_coordinator_that_only_looks_on_learns_that_it_lost_the_term(void **state) {
    struct err err;
    uint64_t term;
    (void)state;
    struct store *s = store_open(dir, false, &err);
    assert_non_null(s);
    assert_int_equal(store_raise_term(s, &term, &err), 0);
    store_close(s);
    assert_int_equal(server_ended(), 1);
    assert_true(log_has("another coordinator took this run over"));
}

/* The usual soft limit of 1024 open files is a quarter of what members may need. */
static void it_takes_as_many_files_as_it_may(void **state) {
    struct rlimit before, few, now;
    (void)state;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    few = (struct rlimit){ 256, before.rlim_max };
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
    kill(server, SIGKILL);
    assert_int_equal(server_ended(), -SIGKILL);
    start_server();
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_int_equal(prlimit(server, RLIMIT_NOFILE, NULL, &now), 0);
    assert_int_equal(now.rlim_cur, before.rlim_max);
    assert_true(log_has("room for "));
}

static void an_orderly_stop_says_good_bye_for_now(void **state) {
    struct digest secret = an_invite(1, 60000);
    struct peer p;
    (void)state;
    peer_create(&p);
    enrol(&p, &secret);
    wait_for(&p, MSG_ENROLLED);
    hello(&p);
    wait_for(&p, MSG_HELLO_ACK);
    kill(server, SIGTERM);
    wait_for(&p, MSG_BYE);
    assert_int_equal(p.bye.final, 0);
    wait_for(&p, 0);
    assert_int_equal(server_ended(), 0);
    peer_destroy(&p);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(the_welcome_proves_the_run),
        TEST(an_invite_is_bound_to_the_key_that_used_it),
        TEST(an_expired_invite_is_refused),
        TEST(a_forged_invite_is_refused),
        TEST(a_key_that_is_not_in_the_roster_is_refused),
        TEST(a_stranger_with_a_newer_ledger_may_show_it),
        TEST(a_message_out_of_order_ends_the_connection),
        TEST(what_is_not_tls_is_named_in_the_log),
        TEST(strangers_of_one_address_are_few),
        TEST(members_come_back_while_strangers_fill_the_rest),
        TEST(one_address_may_not_dial_without_end),
        TEST(a_member_comes_back_after_a_kill_of_the_coordinator),
        TEST(a_coordinator_that_lost_the_term_stops_and_says_nothing),
        TEST(a_coordinator_that_only_looks_on_learns_that_it_lost_the_term),
        TEST(it_takes_as_many_files_as_it_may),
        TEST(an_orderly_stop_says_good_bye_for_now),
    };
    struct err err;
    if (proto_init(&err)) return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
