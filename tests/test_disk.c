/* The disk of a node: what survives the death of a process, and what a reader may never see. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "node/disk.h"
#include "node/home.h"

static char folder[64];

static int make_folder(void **state) {
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/test-disk-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state) {
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

static struct disk open_disk(void) {
    struct disk d;
    struct err err = {0};
    if (disk_open(folder, &d, &err)) fail_msg("%s", err.msg);
    return d;
}

/* An agent that is killed -9 between two commits goes on from its mapped anchor: every store that
 * was made must be there, without any flush. */
static void a_mapped_array_survives_kill_9(void **state) {
    (void)state;
    int pipes[2];
    assert_int_equal(pipe(pipes), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (!pid) {
        struct disk d;
        bool created = false;
        if (disk_open(folder, &d, NULL)) _exit(1);
        uint32_t *a = d.map(d.arg, "anchor", 1 << 20, &created, NULL);
        if (!a || !created) _exit(1);
        for (uint32_t i = 0; i < (1 << 20) / 4; i++) a[i] = i ^ 0x5a5a;
        if (write(pipes[1], "x", 1) != 1) _exit(1);
        pause();
    }
    char c;
    close(pipes[1]);
    assert_int_equal(read(pipes[0], &c, 1), 1);
    kill(pid, SIGKILL);
    int status;
    waitpid(pid, &status, 0);
    assert_true(WIFSIGNALED(status));
    close(pipes[0]);
    struct disk d = open_disk();
    bool created = true;
    uint32_t *a = d.map(d.arg, "anchor", 1 << 20, &created, NULL);
    assert_non_null(a);
    assert_false(created);
    for (uint32_t i = 0; i < (1 << 20) / 4; i++)
        if (a[i] != (i ^ 0x5a5a)) fail_msg("element %u", i);
    disk_close(&d);
}

/* A new array must be zero: version 0 of a chunk is told by it. And the same name is the same
 * memory. */
static void a_new_array_is_zero_and_has_one_address(void **state) {
    (void)state;
    struct disk d = open_disk();
    bool created = false;
    uint8_t *a = d.map(d.arg, "momentum", 10000, &created, NULL);
    assert_true(created);
    for (int i = 0; i < 10000; i++) assert_int_equal(a[i], 0);
    assert_ptr_equal(d.map(d.arg, "momentum", 10000, &created, NULL), a);
    assert_false(created);
    a[9999] = 7;
    assert_int_equal(d.flush(d.arg, "momentum", 5000, 5000, NULL), 0);
    disk_close(&d);
}

/* The state of another model must not be taken for this one's. */
static void an_array_of_another_size_is_refused(void **state) {
    (void)state;
    struct disk d = open_disk();
    struct err err = {0};
    assert_non_null(d.map(d.arg, "anchor", 8192, NULL, NULL));
    disk_close(&d);
    d = open_disk();
    assert_null(d.map(d.arg, "anchor", 4096, NULL, &err));
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "8192"));
    disk_close(&d);
}

/* Removing gives the space back at once and forgets: a later array of that name is a new one. */
static void removing_a_mapped_array_forgets_it(void **state) {
    (void)state;
    struct disk d = open_disk();
    bool created;
    uint8_t *a = d.map(d.arg, "result-1", 4096, &created, NULL);
    a[0] = 1;
    d.remove(d.arg, "result-1");
    a = d.map(d.arg, "result-1", 4096, &created, NULL);
    assert_true(created);
    assert_int_equal(a[0], 0);
    d.remove(d.arg, "nothing-of-that-name");
    disk_close(&d);
}

static void a_record_comes_back_as_it_was_put(void **state) {
    (void)state;
    struct disk d = open_disk();
    struct err err = {0};
    uint8_t *out;
    size_t length;
    assert_int_equal(d.get(d.arg, "index", &out, &length, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    assert_int_equal(d.put(d.arg, "index", "first", 5, NULL), 0);
    assert_int_equal(d.put(d.arg, "index", "the second", 10, NULL), 0);
    assert_int_equal(d.get(d.arg, "index", &out, &length, NULL), 0);
    assert_int_equal(length, 10);
    assert_memory_equal(out, "the second", 10);
    free(out);
    assert_int_equal(d.put(d.arg, "index", NULL, 0, NULL), 0);
    assert_int_equal(d.get(d.arg, "index", &out, &length, NULL), 0);
    assert_int_equal(length, 0);
    free(out);
    disk_close(&d);
}

/* The index names the versions of all chunks: half of an old and half of a new one would be a
 * state that never was. A writer is killed at random moments; each time one whole record must be
 * there. */
static void a_record_is_never_seen_in_halves(void **state) {
    (void)state;
    enum { BYTES = 200000 };
    struct disk d = open_disk();
    uint8_t *bytes = malloc(BYTES);
    memset(bytes, 0, BYTES);
    assert_int_equal(d.put(d.arg, "index", bytes, BYTES, NULL), 0);
    for (int life = 0; life < 20; life++) {
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0)
            for (uint8_t v = 1;; v++) { /* until it is killed */
                memset(bytes, v, BYTES);
                d.put(d.arg, "index", bytes, BYTES, NULL);
            }
        usleep((useconds_t)(1000 + 997 * life));
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        uint8_t *out;
        size_t length;
        assert_int_equal(d.get(d.arg, "index", &out, &length, NULL), 0);
        assert_int_equal(length, BYTES);
        for (int i = 1; i < BYTES; i++)
            if (out[i] != out[0]) fail_msg("life %d: byte %d is of another record", life, i);
        free(out);
    }
    free(bytes);
    disk_close(&d);
}

/* What a killed writer left half-written takes space and would never be looked at again. */
static void leftovers_are_removed_at_the_next_start(void **state) {
    (void)state;
    char path[128];
    snprintf(path, sizeof path, "%s/.new-anchor", folder);
    int fd = open(path, O_WRONLY | O_CREAT, 0600);
    close(fd);
    struct disk d = open_disk();
    assert_int_equal(access(path, F_OK), -1);
    disk_close(&d);
}

/* ---- the home folder ------------------------------------------------------------------------- */

/* Two agents on one home would sign as the same member with two states. */
static void a_home_has_one_user_at_a_time(void **state) {
    (void)state;
    struct home first, second;
    struct err err = {0};
    char path[128];
    struct stat st;
    snprintf(path, sizeof path, "%s/a/b", folder);
    assert_int_equal(home_open(&first, path, NULL), 0);
    assert_true(first.identity_new);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
    assert_int_equal(home_open(&second, path, &err), -1);
    assert_int_equal(err.code, ERR_REFUSED);
    struct proto_key key = first.identity.key;
    home_release(&first);
    assert_int_equal(home_open(&second, path, NULL), 0);
    assert_false(second.identity_new);
    assert_memory_equal(&second.identity.key, &key, sizeof key);
    home_release(&second);
}

static void the_run_of_a_home_comes_back(void **state) {
    (void)state;
    struct home h;
    struct home_run out, run = { .port = 7400, .member = 3, .aggregate_only = true,
                                 .genesis_bytes = 5 };
    struct err err = {0};
    assert_int_equal(home_open(&h, folder, NULL), 0);
    assert_int_equal(home_run_load(&h, &out, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    snprintf(run.host, sizeof run.host, "example.org");
    snprintf(run.name, sizeof run.name, "a \"quoted\" name");
    run.genesis = malloc(5);
    memcpy(run.genesis, "\x01\x02\xff\x00\x7f", 5);
    run.run = digest_of(run.genesis, 5);
    assert_int_equal(home_run_save(&h, &run, NULL), 0);
    assert_int_equal(home_run_load(&h, &out, NULL), 0);
    assert_string_equal(out.host, run.host);
    assert_string_equal(out.name, run.name);
    assert_int_equal(out.port, 7400);
    assert_int_equal(out.member, 3);
    assert_true(out.aggregate_only);
    assert_int_equal(out.genesis_bytes, 5);
    assert_memory_equal(out.genesis, run.genesis, 5);
    home_run_release(&out);
    home_run_release(&run);
    home_release(&h);
}

/* A person may edit run.json; what is wrong must be named, and a genesis of another run not be
 * used. */
static void a_damaged_run_file_is_named(void **state) {
    (void)state;
    static const char *bad[][2] = {
        { "{", "line 1" },
        { "{\"format\":2}", "format 2" },
        { "{\"format\":1,\"host\":7}", "\"host\"" },
        { "{\"format\":1,\"host\":\"h\",\"port\":99999}", "\"port\"" },
    };
    struct home h;
    assert_int_equal(home_open(&h, folder, NULL), 0);
    struct disk d = open_disk();
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct home_run out;
        struct err err = {0};
        assert_int_equal(d.put(d.arg, "run.json", bad[i][0], strlen(bad[i][0]), NULL), 0);
        assert_int_equal(home_run_load(&h, &out, &err), -1);
        if (!strstr(err.msg, bad[i][1])) fail_msg("\"%s\" does not name %s", err.msg, bad[i][1]);
    }
    disk_close(&d);
    home_release(&h);
}

int main(void) {
    if (proto_init(NULL)) return 1;
#define TEST(f) cmocka_unit_test_setup_teardown(f, make_folder, remove_folder)
    const struct CMUnitTest tests[] = {
        TEST(a_mapped_array_survives_kill_9),
        TEST(a_new_array_is_zero_and_has_one_address),
        TEST(an_array_of_another_size_is_refused),
        TEST(removing_a_mapped_array_forgets_it),
        TEST(a_record_comes_back_as_it_was_put),
        TEST(a_record_is_never_seen_in_halves),
        TEST(leftovers_are_removed_at_the_next_start),
        TEST(a_home_has_one_user_at_a_time),
        TEST(the_run_of_a_home_comes_back),
        TEST(a_damaged_run_file_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
