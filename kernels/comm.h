/* comm.h - the communicator: what the rank processes of one node say to each other about tensors. As with
 * `struct kernels` it is one table of functions: over shared memory between processes, and where kernels
 * compute on a GPU over device memory that they open in each other (comm_area_use). It knows no model, no
 * segment and no network.
 *
 * A node's ranks form a mesh of dp x tp: rank = dp_rank * tp + tp_rank. Each rank is in three groups: the
 * world, the tp ranks that hold one replica's pieces between them, and the dp ranks that hold the same
 * piece of all replicas. All members of a group call the same entries in the same order with the same
 * sizes; a call returns when its result may be used (on a GPU: by what is asked for after it).
 *
 * Sums add in the order of ranks, element by element, in fp32 for both types (bf16 is rounded once, at the
 * end): a result has the same bits on every rank and in every run, on a GPU too, but for NCCL's,
 * comm_area_use().
 *
 * Entries return nothing: the first failure is kept, later calls do nothing and their outputs are not to be
 * used, and check() reports it, so a training step asks once at its end. A failure is final and the whole
 * mesh's, whichever rank had it:
 *  - a member that calls another entry, or with other numbers: every one of them names both;
 *  - a rank that died, or left while another waits for it: noticed within COMM_LOOK_MS, wherever the
 *    others stand, once they call something;
 *  - a rank that gave up and said why, comm_area_fail().
 * A rank that is alive and does not come is waited for without end, where whoever started the ranks watches their
 * progress; else comm_area_watch(). */
#ifndef INTELLECT_COMM_H
#define INTELLECT_COMM_H

#include "kernels/kernels.h"
#include "proto/err.h"

#include <stddef.h>
#include <stdint.h>

enum comm_type { COMM_FP32 = 0, COMM_BF16 = 1, COMM_BYTES = 2 }; /* bytes are moved, never added */

/* A group as one of its ranks has it. Buffers are memory that the rank's kernels compute on, of the world's
 * broadcast (commands, and no tensors) the host's. n counts elements of the type and may be 0. A group of one
 * copies where out is not in, and else does nothing. */
struct comm {
    const char *name; /* "tensor-parallel", "data-parallel", "world": for messages */
    int rank, size;   /* the caller's place in the group, and how many there are */

    /* x[n] = sum over ranks of x[n] */
    void (*all_reduce)(const struct comm *c, void *x, size_t n, enum comm_type type);
    /* out[size,n] = every rank's in[n], in rank order. in may be the rank's own place in out. */
    void (*all_gather)(const struct comm *c, void *out, const void *in, size_t n, enum comm_type type);
    /* out[n] = sum over ranks of row `rank` of their in[size,n]. out may be that row of in. */
    void (*reduce_scatter)(const struct comm *c, void *out, const void *in, size_t n, enum comm_type type);
    /* x[n] of rank `root` to all */
    void (*broadcast)(const struct comm *c, void *x, size_t n, enum comm_type type, int root);
    /* Nobody goes on before all are here. */
    void (*barrier)(const struct comm *c);
    /* x[n] in host memory = sum over ranks, in double; waits. For losses and norms: n <= COMM_SUM_MAX. */
    void (*sum)(const struct comm *c, double *x, size_t n);
    /* Calls between begin() and end() see what the rank's kernels were asked for before begin(), and go on beside
     * what they are asked for after end(); their results may be used, and what they read or write be changed, after
     * finish() with the number that end() gave. The calls of one group come one after the other all the same, in
     * the order in which they are made. Where a call is done when it returns, as on the CPU, these do nothing. */
    void (*begin)(const struct comm *c);
    uint32_t (*end)(const struct comm *c);
    void (*finish)(const struct comm *c, uint32_t number);
    /* 0, or -1 with the failure that ended the mesh. */
    int (*check)(const struct comm *c, struct err *err);
};
#define COMM_SUM_MAX 64u

/* ---- shared memory between processes ------------------------------------------------------------- */

/* What the ranks' processes share: a memfd, so it has no name and dies with its last process. One rank
 * makes it and hands the descriptor down; each then joins. */
struct comm_shape {
    int tp, dp;          /* >= 1, tp * dp <= COMM_RANKS_MAX */
    size_t window_bytes; /* of a rank in a group; larger tensors go in pieces of that. 0: COMM_WINDOW_BYTES */
    int poison;          /* fill every window with NaN once its piece was read, so that whoever reads
                          * it later is found; COMM_POISON for what this build's default is */
};
#define COMM_RANKS_MAX 64
#define COMM_WINDOW_BYTES ((size_t)1 << 20)
#define COMM_DEVICE_WINDOWS 2 /* on the device, of a rank in each group of more than one but the world */
#define COMM_WINDOWS(size) (2 * ((size_t)(size) + 1)) /* of a group of that many ranks */
#define COMM_LOOK_MS 50    /* how often a rank that waits looks whether the others live */
#define COMM_JOIN_MS 60000 /* ranks that have not joined so long after the first will not */
#if defined(COMM_DEBUG) || defined(__SANITIZE_ADDRESS__)
#define COMM_POISON 1
#else
#define COMM_POISON 0
#endif

enum comm_group { COMM_WORLD = 0, COMM_TP = 1, COMM_DP = 2, COMM_GROUPS = 3 };

struct comm_area;

/* Memory is taken when it is first touched. NULL with ERR_CONFIG (shape), ERR_MEMORY or ERR_IO. */
struct comm_area *comm_area_create(const struct comm_shape *shape, struct err *err);
/* In another process: map the area behind `fd`, which is kept. ERR_CORRUPT when it is none. */
struct comm_area *comm_area_open(int fd, struct err *err);
int comm_area_fd(const struct comm_area *a);
const struct comm_shape *comm_area_shape(const struct comm_area *a);

/* The calling process is `rank` from here on; returns when all are. -1 with ERR_CONFIG (no such rank, or it
 * is taken), ERR_TIMEOUT (names who is missing), or why another rank gave up. */
int comm_area_join(struct comm_area *a, int rank, struct err *err);

/* Process `pid` will join as `rank`: one that dies before it does is not waited for. */
void comm_area_expect(struct comm_area *a, int rank, int pid);

/* After joining; lives as long as the area. */
const struct comm *comm_area_group(const struct comm_area *a, enum comm_group group);

/* Collective, after joining: this rank computes with `k`, and so do the others with such a backend. Where its
 * memory is not the host's, the tensor- and data-parallel groups go through windows of window_bytes on the
 * device from here on, two a rank and group; or, where each rank has a device of its own and all have NCCL,
 * through that (struct kernels_library says what its sums are; calls that differ are not compared then, and
 * hang until whoever watches ends the ranks). `k` is borrowed until comm_area_unuse(). -1 with
 * ERR_UNSUPPORTED (the device's memory cannot be opened by other processes), ERR_MEMORY, or why another rank
 * gave up. */
int comm_area_use(struct comm_area *a, const struct kernels *k, struct err *err);
/* Before `k` is destroyed. Waits until nobody reads the own windows, or the mesh has failed. */
void comm_area_unuse(struct comm_area *a);

/* Nobody else watches: a rank that says nothing for silence_ms while this one waits ends the mesh, with ERR_TIMEOUT,
 * its number, process and step, and whether it is stopped; where all ranks wait for their devices so long, that.
 * What says something: a call, to begin one or to wait in it; goes_on(), which names the step. What is excused may
 * take any time, such as a disk, while it is not stopped. Time in which the waiting rank was stopped itself is not counted. */
void comm_area_watch(struct comm_area *a, int silence_ms);
void comm_area_goes_on(struct comm_area *a, uint64_t step);
void comm_area_excuse(struct comm_area *a, int excused);

/* Give up: every other rank's next or current call fails with "rank N: " and this message. */
void comm_area_fail(struct comm_area *a, const struct err *why);

/* Leave and unmap. NULL is fine. */
void comm_area_destroy(struct comm_area *a);

#endif
