/* store.c - the store in one SQLite file, in WAL mode with synchronous=FULL: a transaction is on
 * disk when COMMIT returns, and readers in other processes never wait for the writer. */
#include "coordinator/store.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define STORE_SCHEMA_VERSION 1
#define STORE_APPLICATION_ID 0x49544c31 /* "ITL1" */

struct store {
    sqlite3 *db;
    char path[4096];
};

static const char *const table_name[CORE_TABLES] = {
    [CORE_LEDGER] = "ledger", [CORE_LEASE] = "lease", [CORE_INVITE] = "invite",
    [CORE_META] = "meta",
};

static const char *const schema =
    "CREATE TABLE ledger(key INTEGER PRIMARY KEY, value BLOB NOT NULL);"
    "CREATE TABLE lease(key INTEGER PRIMARY KEY, value BLOB NOT NULL);"
    "CREATE TABLE invite(key INTEGER PRIMARY KEY, value BLOB NOT NULL);"
    "CREATE TABLE meta(key INTEGER PRIMARY KEY, value BLOB NOT NULL);"
    "CREATE TABLE document(key INTEGER PRIMARY KEY, value BLOB NOT NULL);"
    "CREATE TABLE term(key INTEGER PRIMARY KEY CHECK (key = 1), term INTEGER NOT NULL);"
    "INSERT INTO term VALUES(1, 0);";

/* ---- SQLite's errors ----------------------------------------------------------------------- */

static enum err_code code_of(int rc) {
    switch (rc & 0xff) {
    case SQLITE_FULL: return ERR_FULL;
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB: return ERR_CORRUPT;
    case SQLITE_NOMEM: return ERR_MEMORY;
    default: return ERR_IO;
    }
}

/* True when rc is an error, which *err then tells: what was asked, SQLite's words, where. */
static bool sqlite_failed(struct store *s, int rc, const char *what, int line, struct err *err) {
    if (rc == SQLITE_OK || rc == SQLITE_ROW || rc == SQLITE_DONE) return false;
    err_set(err, code_of(rc), "store %s: %s: %s (store.c:%d)", s->path, what, sqlite3_errmsg(s->db),
            line);
    return true;
}
#define SQLITE_FAILED(s, call, err) sqlite_failed(s, call, #call, __LINE__, err)

static int run(struct store *s, const char *sql, struct err *err) {
    int rc = sqlite3_exec(s->db, sql, NULL, NULL, NULL);
    return sqlite_failed(s, rc, sql, __LINE__, err) ? -1 : 0;
}

static sqlite3_stmt *prepare(struct store *s, struct err *err, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static sqlite3_stmt *prepare(struct store *s, struct err *err, const char *format, ...) {
    char sql[256];
    va_list ap;
    va_start(ap, format);
    vsnprintf(sql, sizeof sql, format, ap);
    va_end(ap);
    sqlite3_stmt *stmt = NULL;
    int rc = sqlite3_prepare_v2(s->db, sql, -1, &stmt, NULL);
    return sqlite_failed(s, rc, sql, __LINE__, err) ? NULL : stmt;
}

/* Run a prepared statement that gives no rows, and finish it. */
static int finish(struct store *s, sqlite3_stmt *stmt, struct err *err) {
    if (!stmt) return -1;
    int failed = SQLITE_FAILED(s, sqlite3_step(stmt), err);
    sqlite3_finalize(stmt);
    return failed ? -1 : 0;
}

/* The transaction's end: whatever failed is undone, and the first error is kept. */
static int end_transaction(struct store *s, int result, struct err *err) {
    if (result == 0) result = run(s, "COMMIT", err);
    if (result != 0) sqlite3_exec(s->db, "ROLLBACK", NULL, NULL, NULL);
    return result;
}

/* ---- opening ------------------------------------------------------------------------------- */

static int pragma_get(struct store *s, const char *name, int64_t *value, struct err *err) {
    sqlite3_stmt *stmt = prepare(s, err, "PRAGMA %s", name);
    if (!stmt) return -1;
    int failed = SQLITE_FAILED(s, sqlite3_step(stmt), err);
    *value = sqlite3_column_int64(stmt, 0);
    sqlite3_finalize(stmt);
    return failed ? -1 : 0;
}

static int create_schema(struct store *s, struct err *err) {
    char pragma[128];
    snprintf(pragma, sizeof pragma, "PRAGMA application_id=%d; PRAGMA user_version=%d;",
             STORE_APPLICATION_ID, STORE_SCHEMA_VERSION);
    if (run(s, "BEGIN IMMEDIATE", err)) return -1;
    int64_t version = 0; /* another process may have been quicker */
    int result = pragma_get(s, "user_version", &version, err);
    if (result == 0 && version == 0) result = run(s, schema, err) || run(s, pragma, err) ? -1 : 0;
    return end_transaction(s, result, err);
}

static int check_schema(struct store *s, bool create, struct err *err) {
    int64_t id, version;
    if (pragma_get(s, "application_id", &id, err) || pragma_get(s, "user_version", &version, err))
        return -1;
    if (id == 0 && version == 0)
        return create ? create_schema(s, err)
                      : err_set(err, ERR_NOT_FOUND, "the store %s is empty", s->path);
    if (id != STORE_APPLICATION_ID)
        return err_set(err, ERR_CORRUPT, "%s is SQLite, but no store of a coordinator", s->path);
    if (version > STORE_SCHEMA_VERSION)
        return err_set(err, ERR_UNSUPPORTED,
                       "%s has schema version %lld, this program knows up to %d", s->path,
                       (long long)version, STORE_SCHEMA_VERSION);
    return 0;
}

/* SQLite would create the file readable for everybody; its WAL inherits the mode. */
static int make_private_file(const char *path, bool create, struct err *err) {
    int fd = open(path, O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0), 0600);
    if (fd < 0) return err_set_errno(err, "open the store %s", path);
    close(fd);
    return 0;
}

struct store *store_open(const char *dir, bool create, struct err *err) {
    struct store *s = calloc(1, sizeof *s);
    if (!s) {
        err_set(err, ERR_MEMORY, "no memory for a store");
        return NULL;
    }
    if (snprintf(s->path, sizeof s->path, "%s/" STORE_FILE_NAME, dir) >= (int)sizeof s->path) {
        err_set(err, ERR_CONFIG, "the path of the store is too long");
        goto failed;
    }
    if (make_private_file(s->path, create, err)) goto failed;
    if (SQLITE_FAILED(s, sqlite3_open_v2(s->path, &s->db, SQLITE_OPEN_READWRITE, NULL), err))
        goto failed;
    sqlite3_busy_timeout(s->db, STORE_BUSY_MS_MAX);
    sqlite3_extended_result_codes(s->db, 1);
    if (run(s, "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA trusted_schema=OFF;", err))
        goto failed;
    if (check_schema(s, create, err)) goto failed;
    return s;
failed:
    store_close(s);
    return NULL;
}

void store_close(struct store *s) {
    if (!s) return;
    int rc = sqlite3_close(s->db);
    assert(rc == SQLITE_OK); /* else a statement was not finalised */
    free(s);
}

int store_check(struct store *s, struct err *err) {
    sqlite3_stmt *stmt = prepare(s, err, "PRAGMA quick_check(1)");
    if (!stmt) return -1;
    int result = SQLITE_FAILED(s, sqlite3_step(stmt), err) ? -1 : 0;
    const char *says = result ? NULL : (const char *)sqlite3_column_text(stmt, 0);
    if (says && strcmp(says, "ok") != 0) {
        char first_line[160];
        snprintf(first_line, sizeof first_line, "%.*s", (int)strcspn(says, "\n"), says);
        result = err_set(err, ERR_CORRUPT, "the store %s is damaged: %s", s->path, first_line);
    }
    sqlite3_finalize(stmt);
    return result;
}

/* ---- reading ------------------------------------------------------------------------------- */

static int get_row(struct store *s, const char *table, uint64_t key, uint8_t **value,
                   size_t *length, struct err *err) {
    sqlite3_stmt *stmt = prepare(s, err, "SELECT value FROM %s WHERE key = ?", table);
    if (!stmt) return -1;
    sqlite3_bind_int64(stmt, 1, (sqlite3_int64)key);
    int rc = sqlite3_step(stmt), result = -1;
    if (sqlite_failed(s, rc, "read", __LINE__, err)) goto out;
    if (rc == SQLITE_DONE) {
        err_set(err, ERR_NOT_FOUND, "the store has no %s %llu", table, (unsigned long long)key);
        goto out;
    }
    *length = (size_t)sqlite3_column_bytes(stmt, 0);
    *value = malloc(*length ? *length : 1);
    if (!*value) {
        err_set(err, ERR_MEMORY, "no memory for %s %llu", table, (unsigned long long)key);
        goto out;
    }
    if (*length) memcpy(*value, sqlite3_column_blob(stmt, 0), *length);
    result = 0;
out:
    sqlite3_finalize(stmt);
    return result;
}

int store_get(struct store *s, enum core_table table, uint64_t key, uint8_t **value,
              size_t *length, struct err *err) {
    assert(table < CORE_TABLES);
    return get_row(s, table_name[table], key, value, length, err);
}

int store_get_document(struct store *s, enum store_document which, uint8_t **value, size_t *length,
                       struct err *err) {
    assert(which < STORE_DOCUMENTS);
    return get_row(s, "document", which, value, length, err);
}

int store_each(struct store *s, enum core_table table, uint64_t first, uint64_t last,
               store_visit *visit, void *arg, struct err *err) {
    assert(table < CORE_TABLES);
    const uint64_t key_max = INT64_MAX;
    sqlite3_stmt *stmt = prepare(
        s, err, "SELECT key, value FROM %s WHERE key >= ? AND key <= ? ORDER BY key",
        table_name[table]);
    if (!stmt) return -1;
    sqlite3_bind_int64(stmt, 1, (sqlite3_int64)(first < key_max ? first : key_max));
    sqlite3_bind_int64(stmt, 2, (sqlite3_int64)(last < key_max ? last : key_max));
    int rc, result = 0;
    while (result == 0 && (rc = sqlite3_step(stmt)) != SQLITE_DONE) {
        if (sqlite_failed(s, rc, "read", __LINE__, err)) {
            result = -1;
            break;
        }
        size_t length = (size_t)sqlite3_column_bytes(stmt, 1);
        const uint8_t *value = sqlite3_column_blob(stmt, 1);
        result = visit(arg, (uint64_t)sqlite3_column_int64(stmt, 0), value, length, err);
    }
    sqlite3_finalize(stmt);
    return result;
}

/* ---- writing ------------------------------------------------------------------------------- */

int store_term(struct store *s, uint64_t *term, struct err *err) {
    sqlite3_stmt *stmt = prepare(s, err, "SELECT term FROM term");
    if (!stmt) return -1;
    int rc = sqlite3_step(stmt);
    int result = sqlite_failed(s, rc, "read", __LINE__, err) ? -1 : 0;
    if (rc == SQLITE_DONE) result = err_set(err, ERR_CORRUPT, "the store %s has no term", s->path);
    *term = (uint64_t)sqlite3_column_int64(stmt, 0);
    sqlite3_finalize(stmt);
    return result;
}

/* By a random step: a store that was put back to an older day must not use a term a second time, under
 * which members remember plans of the same numbers. */
int store_raise_term(struct store *s, uint64_t *term, struct err *err) {
    if (run(s, "BEGIN IMMEDIATE", err)) return -1;
    int result = run(s, "UPDATE term SET term = term + 1 + (term > 0) * abs(random() % 1000)", err);
    if (result == 0) result = store_term(s, term, err);
    return end_transaction(s, result, err);
}

static int write_row(struct store *s, const char *table, bool replace, uint64_t key,
                     const uint8_t *value, size_t length, struct err *err) {
    sqlite3_stmt *stmt = prepare(s, err, "INSERT %s INTO %s VALUES(?, ?)",
                                 replace ? "OR REPLACE" : "", table);
    if (!stmt) return -1;
    sqlite3_bind_int64(stmt, 1, (sqlite3_int64)key);
    sqlite3_bind_blob64(stmt, 2, value, length, SQLITE_STATIC);
    int rc = sqlite3_step(stmt);
    int result = 0;
    if ((rc & 0xff) == SQLITE_CONSTRAINT)
        result = err_set(err, ERR_CORRUPT, "the store %s already has %s %llu", s->path, table,
                         (unsigned long long)key);
    else if (sqlite_failed(s, rc, "write", __LINE__, err))
        result = -1;
    sqlite3_finalize(stmt);
    return result;
}

static int delete_row(struct store *s, const char *table, uint64_t key, struct err *err) {
    sqlite3_stmt *stmt = prepare(s, err, "DELETE FROM %s WHERE key = ?", table);
    if (stmt) sqlite3_bind_int64(stmt, 1, (sqlite3_int64)key);
    return finish(s, stmt, err);
}

static int write_all(struct store *s, const struct core_write *writes, uint32_t count,
                     struct err *err) {
    for (uint32_t i = 0; i < count; i++) {
        const struct core_write *w = &writes[i];
        assert(w->table < CORE_TABLES && w->key <= INT64_MAX);
        const char *table = table_name[w->table];
        int result = w->value ? write_row(s, table, w->table != CORE_LEDGER, w->key, w->value,
                                          w->value_length, err)
                              : delete_row(s, table, w->key, err);
        if (result) return -1;
    }
    return 0;
}

int store_commit(struct store *s, uint64_t term, const struct core_write *writes, uint32_t count,
                 struct err *err) {
    return store_commit_document(s, term, writes, count, STORE_DOCUMENTS, (struct proto_bytes){0}, err);
}

/* which STORE_DOCUMENTS: none. */
int store_commit_document(struct store *s, uint64_t term, const struct core_write *writes,
                          uint32_t count, enum store_document which, struct proto_bytes document,
                          struct err *err) {
    if (run(s, "BEGIN IMMEDIATE", err)) return -1;
    uint64_t current = 0;
    int result = store_term(s, &current, err);
    if (result == 0 && current != term)
        result = err_set(err, ERR_STALE,
                         "another coordinator took this run over: the store is at term %llu, we "
                         "are %llu",
                         (unsigned long long)current, (unsigned long long)term);
    if (result == 0) result = write_all(s, writes, count, err);
    if (result == 0 && which < STORE_DOCUMENTS)
        result = write_row(s, "document", true, (uint64_t)which, document.data, document.length, err);
    return end_transaction(s, result, err);
}

static int visit_for_enrolments(void *arg, uint64_t key, const uint8_t *value, size_t length,
                                struct err *err) {
    struct msg_signed_entry sealed = {0};
    struct msg_entry entry = {0};
    int result = -1;
    (void)key;
    if (proto_decode(value, length, RECORD_signed_entry, &sealed, err)) goto out;
    if (proto_decode(sealed.bytes.data, sealed.bytes.length, RECORD_entry, &entry, err)) goto out;
    if (entry.kind != LEDGER_GENESIS && entry.kind != LEDGER_DELEGATION) ++*(uint64_t *)arg;
    result = 0;
out:
    proto_decoded_release(RECORD_entry, &entry);
    proto_decoded_release(RECORD_signed_entry, &sealed);
    return result;
}

int store_begun(struct store *s, bool *begun, struct err *err) {
    uint64_t others = 0;
    if (store_each(s, CORE_LEDGER, 0, UINT64_MAX, visit_for_enrolments, &others, err)) return -1;
    *begun = others > 0;
    return 0;
}

static int replace_everything(struct store *s, const struct proto_bytes *documents,
                              const struct core_write *writes, uint32_t count, struct err *err) {
    bool begun = false;
    if (store_begun(s, &begun, err)) return -1;
    if (begun)
        return err_set(err, ERR_REFUSED, "members have enrolled in the run of %s: it can no longer "
                       "be sealed anew", s->path);
    if (run(s,
            "DELETE FROM ledger; DELETE FROM lease; DELETE FROM invite; DELETE FROM meta;"
            "DELETE FROM document; UPDATE term SET term = 0",
            err))
        return -1;
    for (int i = 0; i < STORE_DOCUMENTS; i++)
        if (write_row(s, "document", false, (uint64_t)i, documents[i].data, documents[i].length,
                      err))
            return -1;
    return write_all(s, writes, count, err);
}

int store_seal(struct store *s, const struct proto_bytes *documents,
               const struct core_write *writes, uint32_t count, struct err *err) {
    if (run(s, "BEGIN IMMEDIATE", err)) return -1;
    return end_transaction(s, replace_everything(s, documents, writes, count, err), err);
}

/* ---- invites ------------------------------------------------------------------------------- */

uint64_t store_invite_id(const struct digest *secret_digest) {
    uint64_t id = 0;
    for (int i = 7; i >= 0; i--) id = id << 8 | secret_digest->b[i];
    return id & INT64_MAX;
}

void store_invite_make(uint32_t uses, uint64_t expires_ms, bool aggregate_only,
                       struct digest *secret, struct msg_invite_record *record) {
    randombytes_buf(secret->b, sizeof secret->b);
    *record = (struct msg_invite_record){
        .secret_digest = digest_of(secret->b, sizeof secret->b),
        .uses_left = uses,
        .expires_ms = expires_ms,
        .aggregate_only = aggregate_only,
    };
}

int store_invite_add(struct store *s, const struct msg_invite_record *record, struct err *err) {
    struct proto_buffer b;
    proto_buffer_init(&b, proto_record_bytes_max(RECORD_invite_record));
    int result = proto_encode(&b, RECORD_invite_record, record, err);
    if (result == 0)
        result = write_row(s, "invite", false, store_invite_id(&record->secret_digest), b.data,
                           b.length, err);
    proto_buffer_release(&b);
    return result;
}

int store_invite_find(struct store *s, const struct digest *secret, uint64_t now_ms,
                      struct core_invite *out, struct err *err) {
    struct digest secret_digest = digest_of(secret->b, sizeof secret->b);
    uint8_t *value = NULL;
    size_t length;
    struct err why;
    memset(out, 0, sizeof *out);
    out->id = store_invite_id(&secret_digest);
    if (store_get(s, CORE_INVITE, out->id, &value, &length, &why))
        return why.code == ERR_NOT_FOUND ? 0 : err_set(err, why.code, "%s", why.msg);
    int result = proto_decode(value, length, RECORD_invite_record, &out->record, &why);
    free(value);
    if (result) /* our own store, not a peer's message: so not ERR_PROTOCOL */
        return err_set(err, ERR_CORRUPT, "the store's invite %llu: %s",
                       (unsigned long long)out->id, why.msg);
    out->found = digest_equal(&out->record.secret_digest, &secret_digest);
    out->expired = now_ms >= out->record.expires_ms;
    return 0;
}

/* ---- one coordinator per folder -------------------------------------------------------------- */

int store_lock(const char *dir, int *fd, struct err *err) {
    char path[4096], holder[32] = "";
    if (snprintf(path, sizeof path, "%s/" STORE_LOCK_NAME, dir) >= (int)sizeof path)
        return err_set(err, ERR_CONFIG, "the path of the lock is too long");
    *fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (*fd < 0) return err_set_errno(err, "open %s", path);
    if (flock(*fd, LOCK_EX | LOCK_NB)) {
        int in_use = errno == EWOULDBLOCK;
        if (!in_use) err_set_errno(err, "lock %s", path);
        ssize_t n = pread(*fd, holder, sizeof holder - 1, 0);
        holder[n > 0 ? strspn(holder, "0123456789") : 0] = '\0';
        close(*fd);
        *fd = -1;
        if (!in_use) return -1;
        return err_set(err, ERR_REFUSED,
                       "process %s serves this run already (%s is locked); stop it first, or look "
                       "with `intellect-coordinator status`", *holder ? holder : "?", path);
    }
    int length = snprintf(holder, sizeof holder, "%ld\n", (long)getpid());
    if (ftruncate(*fd, 0) || pwrite(*fd, holder, (size_t)length, 0) != length) {
        err_set_errno(err, "write %s", path);
        close(*fd);
        *fd = -1;
        return -1;
    }
    return 0;
}
