/* nccl.c - see nccl.h. */
#define _GNU_SOURCE
#include "kernels/cuda/nccl.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- NCCL's interface ---------------------------------------------------------------------------------- */

enum { SUCCESS = 0, IN_PROGRESS = 7 };           /* ncclResult_t */
enum { BYTES = 1, FLOAT = 7, BFLOAT16 = 9 };     /* ncclDataType_t */
enum { SUM = 0 };                                /* ncclRedOp_t */
#define VERSION_LEAST 21400 /* 2.14, the first with non-blocking communicators */

struct unique { /* ncclUniqueId, passed by value */
    char internal[KERNELS_UNIQUE_BYTES];
};

/* ncclConfig_t of 2.14: what came later takes its defaults. */
struct config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

static struct {
    void *dl;
    int version;
    int (*get_version)(int *);
    int (*get_unique)(struct unique *);
    int (*init)(void **, int, struct unique, int, struct config *);
    int (*async_error)(void *, int *);
    int (*abort)(void *);
    int (*destroy)(void *);
    const char *(*words)(int);
    const char *(*last_error)(void *);
    int (*all_reduce)(const void *, void *, size_t, int, int, void *, void *);
    int (*all_gather)(const void *, void *, size_t, int, void *, void *);
    int (*reduce_scatter)(const void *, void *, size_t, int, int, void *, void *);
    int (*broadcast)(const void *, void *, size_t, int, int, void *, void *);
} lib; /* loaded once, for good */

static int find(const char *name, void *to) {
    *(void **)to = dlsym(lib.dl, name);
    return *(void **)to ? 0 : -1;
}

static int load(void) {
    if (lib.dl) return lib.version >= VERSION_LEAST ? 0 : -1;
    if (!(lib.dl = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL))) return -1;
    if (find("ncclGetVersion", &lib.get_version) || find("ncclGetUniqueId", &lib.get_unique) ||
        find("ncclCommInitRankConfig", &lib.init) || find("ncclCommGetAsyncError", &lib.async_error) ||
        find("ncclCommAbort", &lib.abort) || find("ncclCommDestroy", &lib.destroy) ||
        find("ncclGetErrorString", &lib.words) || find("ncclGetLastError", &lib.last_error) ||
        find("ncclAllReduce", &lib.all_reduce) || find("ncclAllGather", &lib.all_gather) ||
        find("ncclReduceScatter", &lib.reduce_scatter) || find("ncclBroadcast", &lib.broadcast) ||
        lib.get_version(&lib.version))
        lib.version = 0;
    return lib.version >= VERSION_LEAST ? 0 : -1;
}

int nccl_found(void) {
    const char *wish = getenv("INTELLECT_NCCL");
    return !(wish && *wish == '0') && !load();
}

/* ---- a group ------------------------------------------------------------------------------------------- */

struct nccl {
    void *comm;
    int (*lost)(void *arg);
    void *arg;
};

void nccl_abort(struct nccl *g) {
    if (g->comm) lib.abort(g->comm);
    g->comm = NULL;
}

/* The result of `what`, waited for where NCCL has not finished asking its own threads. */
static int settle(struct nccl *g, int result, const char *what, struct err *err) {
    while (result == IN_PROGRESS) {
        if (g->lost(g->arg)) {
            nccl_abort(g);
            return err_set(err, ERR_IO, "NCCL %s: another rank is gone", what);
        }
        usleep(100);
        int rc = lib.async_error(g->comm, &result);
        if (rc) result = rc;
    }
    if (result == SUCCESS) return 0;
    err_set(err, ERR_UNSUPPORTED, "NCCL %s: %s: %.150s", what, lib.words(result), lib.last_error(g->comm));
    nccl_abort(g);
    return -1;
}

int nccl_watch(struct nccl *g, struct err *err) {
    int result = SUCCESS, rc = g->comm ? lib.async_error(g->comm, &result) : SUCCESS;
    if (rc) result = rc;
    return result == IN_PROGRESS ? 0 : settle(g, result, "between ranks", err);
}

int nccl_unique(uint8_t id[KERNELS_UNIQUE_BYTES], struct err *err) {
    struct unique u;
    int result = load() ? -1 : lib.get_unique(&u);
    if (result) return err_set(err, ERR_UNSUPPORTED, "NCCL %d names no group: error %d", lib.version, result);
    memcpy(id, &u, sizeof u);
    return 0;
}

struct nccl *nccl_join(const uint8_t id[KERNELS_UNIQUE_BYTES], int rank, int size,
                       int (*lost)(void *arg), void *arg, struct err *err) {
    struct config config = { sizeof config, 0xcafebeef, VERSION_LEAST, 0 };
    struct unique u;
    struct nccl *g = calloc(1, sizeof *g);
    if (!g || load()) {
        err_set(err, ERR_UNSUPPORTED, g ? "NCCL is gone" : "no memory for a group");
        free(g);
        return NULL;
    }
    *g = (struct nccl){ .lost = lost, .arg = arg };
    memcpy(&u, id, sizeof u);
    int result = lib.init(&g->comm, size, u, rank, &config);
    if (!settle(g, result, "begins a group", err)) return g;
    free(g);
    return NULL;
}

void nccl_leave(struct nccl *g) {
    if (!g) return;
    if (g->comm && g->lost(g->arg)) nccl_abort(g); /* to destroy would wait for who is gone */
    if (g->comm) lib.destroy(g->comm);
    free(g);
}

/* ---- calls --------------------------------------------------------------------------------------------- */

static int type_of(int bf16) { return bf16 ? BFLOAT16 : FLOAT; }

int nccl_all_reduce(struct nccl *g, void *stream, void *x, size_t n, int bf16, struct err *err) {
    if (!g->comm || !n) return 0;
    return settle(g, lib.all_reduce(x, x, n, type_of(bf16), SUM, g->comm, stream), "all_reduce", err);
}

int nccl_all_gather(struct nccl *g, void *stream, void *out, const void *in, size_t bytes, struct err *err) {
    if (!g->comm || !bytes) return 0;
    return settle(g, lib.all_gather(in, out, bytes, BYTES, g->comm, stream), "all_gather", err);
}

int nccl_reduce_scatter(struct nccl *g, void *stream, void *out, const void *in, size_t n, int bf16,
                        struct err *err) {
    if (!g->comm || !n) return 0;
    return settle(g, lib.reduce_scatter(in, out, n, type_of(bf16), SUM, g->comm, stream), "reduce_scatter",
                  err);
}

int nccl_broadcast(struct nccl *g, void *stream, void *x, size_t bytes, int root, struct err *err) {
    if (!g->comm || !bytes) return 0;
    return settle(g, lib.broadcast(x, x, bytes, BYTES, root, g->comm, stream), "broadcast", err);
}
