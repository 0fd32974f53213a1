/* test_store.c - what the store promised, it keeps; and who lost the term writes nothing more. */
#define _GNU_SOURCE /* memmem */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "coordinator/store.h"

static char dir[64], path[128];

static int fresh_folder(void **state) {
    (void)state;
    strcpy(dir, "/tmp/test_store.XXXXXX");
    if (!mkdtemp(dir)) return -1;
    snprintf(path, sizeof path, "%s/" STORE_FILE_NAME, dir);
    return 0;
}

static int remove_folder(void **state) {
    static const char *const names[] = { STORE_FILE_NAME, STORE_FILE_NAME "-wal",
                                         STORE_FILE_NAME "-shm", "serve.lock" };
    char name[256];
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(name, sizeof name, "%s/%s", dir, names[i]);
        unlink(name);
    }
    return rmdir(dir);
}

static struct store *open_store(void) {
    struct err err;
    struct store *s = store_open(dir, true, &err);
    if (!s) fail_msg("%s", err.msg);
    return s;
}

static struct core_write write_of(enum core_table table, uint64_t key, const char *text) {
    return (struct core_write){ .table = table, .key = key, .value = (uint8_t *)(uintptr_t)text,
                                .value_length = text ? (uint32_t)strlen(text) : 0 };
}

static uint64_t raised(struct store *s) {
    struct err err;
    uint64_t term = 0;
    if (store_raise_term(s, &term, &err)) fail_msg("%s", err.msg);
    return term;
}

/* "" where there is no such row. */
static const char *row(struct store *s, enum core_table table, uint64_t key) {
    static char text[128];
    struct err err;
    uint8_t *value;
    size_t length;
    if (store_get(s, table, key, &value, &length, &err)) {
        assert_int_equal(err.code, ERR_NOT_FOUND);
        return "";
    }
    snprintf(text, sizeof text, "%.*s", (int)length, (const char *)value);
    free(value);
    return text;
}

/* A coordinator that slept while another took over must not write a single row, and must be told
 * so in a way that the server tells apart from a full disk. */
static void a_coordinator_that_was_replaced_writes_nothing(void **state) {
    struct store *old = open_store(), *new = open_store();
    struct core_write w = write_of(CORE_META, 1, "old");
    struct err err;
    (void)state;
    uint64_t before = raised(old);
    assert_int_equal(store_commit(old, before, &w, 1, &err), 0);
    uint64_t after = raised(new);
    assert_true(after > before);
    w = write_of(CORE_META, 1, "too late");
    assert_int_equal(store_commit(old, before, &w, 1, &err), -1);
    assert_int_equal(err.code, ERR_STALE);
    assert_non_null(strstr(err.msg, "another coordinator took this run over"));
    assert_string_equal(row(new, CORE_META, 1), "old");
    w = write_of(CORE_META, 1, "new");
    assert_int_equal(store_commit(new, after, &w, 1, &err), 0);
    store_close(old);
    store_close(new);
}

/* A commit spends leases in the transaction that appends it: half of it would lose samples. */
static void a_transaction_that_fails_leaves_no_row(void **state) {
    struct store *s = open_store();
    uint64_t term = raised(s);
    struct err err;
    struct core_write first = write_of(CORE_LEDGER, 7, "entry 7");
    struct core_write again[] = { write_of(CORE_LEASE, 1, "spent"), write_of(CORE_LEDGER, 7, "other") };
    (void)state;
    assert_int_equal(store_commit(s, term, &first, 1, &err), 0);
    assert_int_equal(store_commit(s, term, again, 2, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "ledger 7"));
    assert_string_equal(row(s, CORE_LEASE, 1), "");
    assert_string_equal(row(s, CORE_LEDGER, 7), "entry 7");
    store_close(s);
}

/* The limit stands in for a full disk: SQLite's write fails halfway. The server then stops; what was
 * there before must still be, and the same write must succeed once there is room. */
static void a_commit_that_the_disk_refuses_changes_nothing(void **state) {
    struct store *s = open_store();
    uint64_t term = raised(s);
    struct err err;
    struct rlimit limit, small = { 0 };
    struct core_write kept = write_of(CORE_META, 1, "kept");
    struct core_write large = { .table = CORE_META, .key = 1, .value_length = 1 << 20 };
    (void)state;
    large.value = calloc(1, large.value_length);
    assert_int_equal(store_commit(s, term, &kept, 1, &err), 0);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    small = (struct rlimit){ .rlim_cur = 200000, .rlim_max = limit.rlim_max };
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    int result = store_commit(s, term, &large, 1, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    assert_int_equal(result, -1);
    assert_true(err.code == ERR_FULL || err.code == ERR_IO);
    assert_string_equal(row(s, CORE_META, 1), "kept");
    assert_int_equal(store_commit(s, term, &large, 1, &err), 0);
    free(large.value);
    store_close(s);
}

static void a_row_without_a_value_is_deleted(void **state) {
    struct store *s = open_store();
    uint64_t term = raised(s);
    struct err err;
    struct core_write w[] = { write_of(CORE_LEASE, 3, "lease"), write_of(CORE_LEASE, 4, "kept") };
    struct core_write gone = write_of(CORE_LEASE, 3, NULL);
    (void)state;
    assert_int_equal(store_commit(s, term, w, 2, &err), 0);
    assert_int_equal(store_commit(s, term, &gone, 1, &err), 0);
    assert_string_equal(row(s, CORE_LEASE, 3), "");
    assert_string_equal(row(s, CORE_LEASE, 4), "kept");
    store_close(s);
}

/* What is announced after store_commit() returned must be there when the process dies right then:
 * the child ends without closing anything, as kill -9 would end it. */
static void what_was_committed_survives_a_kill(void **state) {
    struct err err;
    (void)state;
    store_close(open_store());
    pid_t child = fork();
    if (child == 0) {
        struct store *s = store_open(dir, false, &err);
        uint64_t term;
        struct core_write w = write_of(CORE_LEDGER, 0, "promised");
        if (s && !store_raise_term(s, &term, &err) && !store_commit(s, term, &w, 1, &err))
            kill(getpid(), SIGKILL);
        _exit(1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status));
    struct store *s = open_store();
    uint64_t term;
    assert_string_equal(row(s, CORE_LEDGER, 0), "promised");
    assert_int_equal(store_term(s, &term, &err), 0);
    assert_int_equal(term, 1);
    store_close(s);
}

/* keys[0] counts those behind it; the third ends the walk. */
static int note_key(void *arg, uint64_t key, const uint8_t *value, size_t length, struct err *err) {
    uint64_t *keys = arg;
    (void)value;
    (void)length;
    (void)err;
    keys[++keys[0]] = key;
    return keys[0] == 3 ? 42 : 0;
}

static void rows_come_in_key_order_within_the_range(void **state) {
    struct store *s = open_store();
    uint64_t term = raised(s), keys[8] = { 0 };
    struct err err;
    struct core_write w[] = { write_of(CORE_LEDGER, 300, "c"), write_of(CORE_LEDGER, 2, "a"),
                              write_of(CORE_LEDGER, 70, "b"), write_of(CORE_LEDGER, 1, "before") };
    (void)state;
    assert_int_equal(store_commit(s, term, w, 4, &err), 0);
    assert_int_equal(store_each(s, CORE_LEDGER, 2, UINT64_MAX, note_key, keys, &err), 42);
    assert_int_equal(keys[1], 2);
    assert_int_equal(keys[2], 70);
    assert_int_equal(keys[3], 300);
    store_close(s);
}

static struct digest invite(struct store *s, uint32_t uses, uint64_t expires_ms) {
    struct msg_invite_record record;
    struct digest secret;
    struct err err;
    store_invite_make(uses, expires_ms, false, &secret, &record);
    if (store_invite_add(s, &record, &err)) fail_msg("%s", err.msg);
    return secret;
}

static void an_invite_is_found_by_its_secret_alone(void **state) {
    struct store *s = open_store();
    struct digest secret = invite(s, 3, 5000), other = secret;
    struct core_invite found;
    struct err err;
    (void)state;
    other.b[31] ^= 1;
    assert_int_equal(store_invite_find(s, &secret, 4999, &found, &err), 0);
    assert_true(found.found && !found.expired);
    assert_int_equal(found.record.uses_left, 3);
    assert_int_equal(store_invite_find(s, &secret, 5000, &found, &err), 0);
    assert_true(found.found && found.expired);
    assert_int_equal(store_invite_find(s, &other, 0, &found, &err), 0);
    assert_false(found.found);
    store_close(s);
}

/* The secret itself must not be in the file: whoever reads a backup could join with it. */
static void the_store_has_no_secret_in_it(void **state) {
    struct store *s = open_store();
    struct digest secret = invite(s, 1, 5000);
    (void)state;
    store_close(s); /* the last one to close writes the WAL back */
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    static uint8_t bytes[1 << 20];
    size_t n = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    assert_true(n > 4096);
    assert_null(memmem(bytes, n, secret.b, sizeof secret.b));
}

/* `invite` writes from another process while the coordinator commits; neither may lose a row. */
static void invites_and_commits_do_not_disturb_each_other(void **state) {
    enum { ROWS = 40 };
    struct store *s = open_store();
    uint64_t term = raised(s);
    struct err err;
    (void)state;
    pid_t child = fork();
    if (child == 0) {
        struct store *own = store_open(dir, false, &err);
        struct msg_invite_record record = { .uses_left = 1, .expires_ms = 9 };
        for (int i = 0; own && i < ROWS; i++) {
            memset(record.secret_digest.b, i + 1, sizeof record.secret_digest.b);
            if (store_invite_add(own, &record, &err)) _exit(1);
        }
        _exit(own ? 0 : 1);
    }
    for (uint64_t i = 0; i < ROWS; i++) {
        struct core_write w = write_of(CORE_LEDGER, i, "entry");
        if (store_commit(s, term, &w, 1, &err)) fail_msg("%s", err.msg);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    for (int i = 0; i < ROWS; i++) {
        struct digest d;
        memset(d.b, i + 1, sizeof d.b);
        assert_string_not_equal(row(s, CORE_INVITE, store_invite_id(&d)), "");
    }
    assert_string_equal(row(s, CORE_LEDGER, ROWS - 1), "entry");
    store_close(s);
}

static void overwrite(long offset, const char *bytes, size_t length) {
    FILE *f = fopen(path, "r+");
    assert_non_null(f);
    fseek(f, offset, SEEK_SET);
    fwrite(bytes, 1, length, f);
    fclose(f);
}

static void a_file_that_is_no_store_is_refused(void **state) {
    struct err err;
    (void)state;
    FILE *f = fopen(path, "w");
    for (int i = 0; i < 1000; i++) fputs("this is no database\n", f);
    fclose(f);
    assert_null(store_open(dir, false, &err));
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_non_null(strstr(err.msg, STORE_FILE_NAME));
}

static void a_damaged_page_is_found_by_the_check(void **state) {
    struct store *s = open_store();
    uint64_t term = raised(s);
    struct err err;
    char noise[600];
    (void)state;
    for (uint64_t i = 0; i < 100; i++) {
        struct core_write w = write_of(CORE_LEDGER, i, "an entry of some length, to fill pages with");
        assert_int_equal(store_commit(s, term, &w, 1, &err), 0);
    }
    assert_int_equal(store_check(s, &err), 0);
    store_close(s);
    memset(noise, 0xee, sizeof noise);
    overwrite(4096, noise, sizeof noise); /* the root page of the first table */
    s = store_open(dir, false, &err);
    if (s) assert_int_equal(store_check(s, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    store_close(s);
}

static void a_newer_schema_is_refused_with_both_numbers(void **state) {
    struct err err;
    (void)state;
    store_close(open_store());
    overwrite(60, "\0\0\0\7", 4); /* user_version, SQLite file format 1.3 */
    assert_null(store_open(dir, false, &err));
    assert_int_equal(err.code, ERR_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "schema version 7"));
}

static void a_missing_store_is_made_only_when_asked(void **state) {
    struct err err;
    struct stat st;
    (void)state;
    assert_null(store_open(dir, false, &err));
    assert_int_equal(err.code, ERR_NOT_FOUND);
    assert_int_equal(stat(path, &st), -1);
    store_close(open_store());
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600); /* it has leases and invites in it */
}

/* Two coordinators on one folder would fence each other out in turns; say it before. */
static void a_second_lock_names_the_process_that_has_the_first(void **state) {
    struct err err;
    int first, second;
    char pid[32];
    (void)state;
    assert_int_equal(store_lock(dir, &first, &err), 0);
    assert_int_equal(store_lock(dir, &second, &err), -1);
    assert_int_equal(err.code, ERR_REFUSED);
    snprintf(pid, sizeof pid, "process %ld ", (long)getpid());
    assert_non_null(strstr(err.msg, pid));
    close(first);
    assert_int_equal(store_lock(dir, &second, &err), 0);
    close(second);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, fresh_folder, remove_folder)
int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(a_coordinator_that_was_replaced_writes_nothing),
        TEST(a_transaction_that_fails_leaves_no_row),
        TEST(a_commit_that_the_disk_refuses_changes_nothing),
        TEST(a_row_without_a_value_is_deleted),
        TEST(what_was_committed_survives_a_kill),
        TEST(rows_come_in_key_order_within_the_range),
        TEST(an_invite_is_found_by_its_secret_alone),
        TEST(the_store_has_no_secret_in_it),
        TEST(invites_and_commits_do_not_disturb_each_other),
        TEST(a_file_that_is_no_store_is_refused),
        TEST(a_damaged_page_is_found_by_the_check),
        TEST(a_newer_schema_is_refused_with_both_numbers),
        TEST(a_missing_store_is_made_only_when_asked),
        TEST(a_second_lock_names_the_process_that_has_the_first),
    };
    struct err err;
    if (proto_init(&err)) return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
