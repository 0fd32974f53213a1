/* mesh.h - the rank processes of one node: starts them, hands each its communicators and memory that all
 * of them share. What they compute is the engine's business, what they are told their caller's.
 *
 * mesh_start() forks: it returns in every rank, as MPI_Init does. Call it before anything that a fork does
 * not survive: threads, OpenMP, a device. Rank 0 is the process that called; the others are its children,
 * die with it, and end in mesh_end(). */
#ifndef INTELLECT_NODE_MESH_H
#define INTELLECT_NODE_MESH_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "kernels/comm.h"
#include "proto/err.h"

struct mesh {
    int rank, ranks, tp, dp;
    const struct comm *world, *tensor, *data; /* groups of one where the mesh has one rank */
    float *state;                             /* what state_bytes asked for, the same memory in all ranks */
    /* private */
    struct comm_area *area;
    size_t state_bytes;
    pid_t child[COMM_RANKS_MAX]; /* rank 0: of rank i; 0 = none */
};

/* Become tp * dp ranks.
 *
 * state_bytes  memory for what ranks write together and one of them reads, such as a saved state; it
 *              is taken when it is touched. Not for the device.
 * Returns 0 in every rank, with *m filled, or -1: ERR_CONFIG (shape), ERR_MEMORY, or why another did not
 * come up. A child that fails so must go to mesh_end() too. */
int mesh_start(struct mesh *m, int tp, int dp, size_t state_bytes, struct err *err);

/* Collective: this rank computes with `k`, and tensors go between ranks as comm_area_use() says; its errors.
 * mesh_unuse() before k->destroy(), also after a failure. */
int mesh_use(struct mesh *m, const struct kernels *k, struct err *err);
void mesh_unuse(struct mesh *m);

/* After mesh_start(), as comm_area_watch() and the two behind it say. */
void mesh_watch(struct mesh *m, int silence_ms);
void mesh_goes_on(struct mesh *m, uint64_t step);
void mesh_excuse(struct mesh *m, bool excused);

/* Tell the other ranks that this one gives up, and why; their calls fail from now on. */
void mesh_fail(struct mesh *m, const struct err *why);

/* In a child: end the process with this status. In rank 0: wait for the children to end, for at most
 * MESH_END_MS, then kill them; returns. A mesh that never started is fine. */
void mesh_end(struct mesh *m, int status);
#define MESH_END_MS 10000

/* Threads of a rank where the machine's `threads` (0 = as many as cores) are shared among all. */
int mesh_threads(const struct mesh *m, int threads);

#endif
