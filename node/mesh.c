/* mesh.c - rank processes; see mesh.h. */
#include "node/mesh.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

/* In the new process. A parent that died before the signal was asked for is seen by its absence. */
static void become(struct mesh *m, int rank, pid_t parent) {
    memset(m->child, 0, sizeof m->child);
    m->rank = rank;
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent) _exit(2);
    signal(SIGINT, SIG_IGN); /* rank 0 says when it is over, also after a Ctrl-C to all of them */
    signal(SIGTERM, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
}

static int fork_ranks(struct mesh *m, struct err *err) {
    pid_t parent = getpid();
    fflush(NULL); /* or each rank would print what is waiting */
    for (int r = 1; r < m->ranks; r++) {
        pid_t pid = fork();
        if (pid < 0) return err_set_errno(err, "start rank %d of %d", r, m->ranks);
        if (pid == 0) {
            become(m, r, parent);
            return 0;
        }
        m->child[r] = pid;
        comm_area_expect(m->area, r, (int)pid);
    }
    return 0;
}

static int take_state(struct mesh *m, size_t bytes, struct err *err) {
    if (bytes == 0) return 0;
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return err_set(err, ERR_MEMORY, "no memory of %zu bytes for the state of %d ranks", bytes, m->ranks);
    m->state = p;
    m->state_bytes = bytes;
    return 0;
}

int mesh_start(struct mesh *m, int tp, int dp, size_t state_bytes, struct err *err) {
    *m = (struct mesh){ .tp = tp, .dp = dp };
    if (!(m->area = comm_area_create(&(struct comm_shape){ .tp = tp, .dp = dp, .poison = COMM_POISON }, err)))
        return -1;
    m->ranks = tp * dp;
    if (take_state(m, state_bytes, err) || fork_ranks(m, err) || comm_area_join(m->area, m->rank, err))
        return -1;
    m->world = comm_area_group(m->area, COMM_WORLD);
    m->tensor = comm_area_group(m->area, COMM_TP);
    m->data = comm_area_group(m->area, COMM_DP);
    return 0;
}

int mesh_use(struct mesh *m, const struct kernels *k, struct err *err) {
    return comm_area_use(m->area, k, err);
}

void mesh_unuse(struct mesh *m) {
    if (m->world) comm_area_unuse(m->area);
}

void mesh_watch(struct mesh *m, int silence_ms) { comm_area_watch(m->area, silence_ms); }
void mesh_goes_on(struct mesh *m, uint64_t step) { comm_area_goes_on(m->area, step); }
void mesh_excuse(struct mesh *m, bool excused) { comm_area_excuse(m->area, excused); }

void mesh_fail(struct mesh *m, const struct err *why) {
    if (m->area) comm_area_fail(m->area, why);
}

/* True once all children were waited for. */
static bool reap(struct mesh *m) {
    bool all = true;
    for (int r = 1; r < m->ranks; r++) {
        if (!m->child[r]) continue;
        if (waitpid(m->child[r], NULL, WNOHANG) == 0) all = false;
        else m->child[r] = 0;
    }
    return all;
}

void mesh_end(struct mesh *m, int status) {
    bool is_child = m->rank > 0;
    comm_area_destroy(m->area);
    if (m->state) munmap(m->state, m->state_bytes);
    if (is_child) _exit(status);
    for (int ms = 0; !reap(m) && ms < MESH_END_MS; ms += 10) usleep(10000);
    for (int r = 1; r < m->ranks; r++)
        if (m->child[r]) {
            kill(m->child[r], SIGKILL);
            waitpid(m->child[r], NULL, 0);
        }
    *m = (struct mesh){ 0 };
}

int mesh_threads(const struct mesh *m, int threads) {
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    int all = threads > 0 ? threads : cores > 0 ? (int)cores : 1;
    if (m->ranks <= 1) return threads;
    return all / m->ranks > 0 ? all / m->ranks : 1;
}
