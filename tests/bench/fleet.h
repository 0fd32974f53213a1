/* fleet.h - a run on this machine, to be measured: the real coordinator (its `init` and `serve`) and
 * light members, each a process of its own and all of them this program again. A light member is an
 * agent of the real modules - uplink, peers, disk, sync - without console and home; in place of its
 * trainer stand some lines in the same process that train on everything at once: what is frozen is
 * the anchor and a little fixed noise. So a round is the outer step and nothing else.
 *
 * What members see and when, they write into memory shared with the measuring process. Times are
 * now_s(), the same clock in all of them. */
#ifndef INTELLECT_BENCH_FLEET_H
#define INTELLECT_BENCH_FLEET_H

#include <stdatomic.h>
#include <sys/types.h>

#include "proto/proto.h"

#define FLEET_MEMBERS_MAX 8
#define FLEET_ROUNDS_MAX 32
#define FLEET_NAMES_MAX 200 /* functions that samples were taken in */
#define FLEET_PHASES 2      /* PLAN to commit, commit to applied */
#define FLEET_PATH_BYTES 256
#define FLEET_INNER_STEPS_MAX 8192

/* ---- what members write ---------------------------------------------------------------------- */

enum fleet_step {
    FLEET_FROZEN,    /* the trainer's parameters are there */
    FLEET_READY,     /* first READY: encoded, hashed, on disk */
    FLEET_PLAN,      /* first PLAN */
    FLEET_REPLAN,    /* a later PLAN of the same round; absent as a rule */
    FLEET_REPORTED,  /* last SHARD_REPORT of ours */
    FLEET_COMMITTED, /* the LEDGER with the commit */
    FLEET_FETCHED,   /* last RESULT; absent where all came before the commit */
    FLEET_APPLIED,   /* first ROOT of the state after it */
    FLEET_STEPS
};

/* at_s 0: it did not happen. cpu_s, disk_s: of this process since its begin; disk_s by the clock on
 * the wall, waiting for flushes and writes. */
struct fleet_moment {
    double at_s, cpu_s, disk_s;
    uint64_t sent_bytes; /* to peers, as sync counts */
};

struct fleet_round {
    struct fleet_moment step[FLEET_STEPS];
    uint32_t shards, contributors; /* of the newest PLAN */
};

/* Where the processor's time went, by samples. */
enum fleet_place { FLEET_HASHING, FLEET_TLS, FLEET_CODEC, FLEET_KERNEL, FLEET_COPYING, FLEET_OTHER,
                   FLEET_PLACES };
struct fleet_function {
    char name[48];
    uint32_t samples;
};
struct fleet_profile {
    uint32_t samples, place[FLEET_PLACES], functions;
    struct fleet_function function[FLEET_NAMES_MAX];
};

struct fleet_memory {
    uint64_t peak_bytes, anonymous_bytes; /* peak: with mapped files; anonymous: in the end */
};

struct fleet_member {
    /* the measuring process' */
    pid_t pid; /* 0: not running */
    char home[FLEET_PATH_BYTES];
    struct digest secret; /* of its invite */
    bool trains, profile;
    int threads;                   /* over 0: a real trainer process with so many threads */
    char corpus[FLEET_PATH_BYTES]; /* for it */
    /* the member's */
    _Atomic uint32_t applied; /* rounds */
    double killed_s;          /* by itself, see fleet.die_in_round */
    uint32_t member, chunks;
    uint64_t elements;
    struct fleet_round round[FLEET_ROUNDS_MAX];
    /* with a real trainer */
    _Atomic uint32_t inner_steps;
    double inner_step_s[FLEET_INNER_STEPS_MAX];    /* when each had ended */
    _Atomic uint32_t checkpoints_wanted, checkpoints; /* wanted: by the measuring process; written */
    double checkpoint_begin_s, checkpoint_end_s;   /* of the newest */
    double late_s;                                 /* the longest the loop was held up, since ... */
    double checkpoint_cpu_s;                       /* of the newest: the agent's threads, not the trainer's */
    double worked_s;                               /* processor time of a checkpoint in one turn, since ... */
    _Atomic bool forget_late;                      /* ... this was last true */
    struct fleet_profile profile_of[FLEET_PHASES];
    struct fleet_memory memory;
    char trouble[256];        /* why it ended */
};

struct fleet {
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    uint16_t port;
    struct digest run;
    _Atomic uint32_t rounds;       /* nobody freezes for a later one */
    _Atomic uint32_t die_in_round; /* who aggregates shard 0 of it kills itself at the PLAN; 0: nobody */
    struct fleet_member member[FLEET_MEMBERS_MAX];
    int members;
    /* the measuring process' */
    pid_t coordinator;
    int fd;
    char folder[FLEET_PATH_BYTES]; /* of the coordinator: corpus, run, log */
    char dir[FLEET_PATH_BYTES];    /* the run's */
};

/* ---- the measuring process ------------------------------------------------------------------- */

/* What the run trains on is described, not there. settings: SECTION.KEY=VALUE, ending with NULL. */
struct fleet_config {
    const char *folder; /* made; for the coordinator */
    const char *corpus; /* manifest or folder; NULL: of bytes, samples of 64 tokens, made here */
    const char *const *settings;
};

/* Seal the run and serve it. NULL: err says why, with the last line of the coordinator's log. */
struct fleet *fleet_create(const struct fleet_config *config, struct err *err);
/* Ends all processes. NULL is fine. Folders stay. */
void fleet_destroy(struct fleet *f);

/* The coordinator ends in order and begins again; it listens elsewhere then. */
int fleet_restart(struct fleet *f, struct err *err);

/* One more member, with its state in `home` (made). It joins with an invite and trains for as long
 * as fleet.rounds allow. Returns its place in f->member, or -1. */
int fleet_add(struct fleet *f, const char *home, bool trains, struct err *err);
/* In order: it writes its profile and memory. */
int fleet_end(struct fleet *f, int place, struct err *err);

/* Wait until each member that runs has applied so many rounds. ERR_TIMEOUT, or somebody died. */
int fleet_wait(struct fleet *f, uint32_t rounds, double seconds, struct err *err);

/* A new invite's secret; the line for `intellect-node join` where it is not NULL. */
int fleet_invite(const struct fleet *f, uint32_t uses, struct digest *secret, char line[INVITE_BYTES_MAX],
                 struct err *err);

/* A small one of text, in `folder` (made). */
int fleet_make_corpus(const char *folder, char corpus[FLEET_PATH_BYTES], struct err *err);

/* Start `program`, which lies beside this one, or this one where it is NULL, with its words in the file
 * `log`. It dies with us. arguments: without the program's name, ending with NULL. */
pid_t fleet_spawn(const char *program, const char *const *arguments, const char *log, int inherited_fd, struct err *err);
/* "VmHWM" and the like of /proc/PID/status, in bytes; 0 where there is none. */
uint64_t fleet_status_bytes(pid_t pid, const char *key);

/* ---- roles of this program ------------------------------------------------------------------- */

/* `bench member FD PLACE`: the fleet is in the memory behind FD. (`bench trainer --fd FD` is what its
 * keeper starts.) */
int fleet_member_main(int argc, char **argv);

/* ---- profile.c ------------------------------------------------------------------------------- */

/* Of this process, a sample every millisecond or few of processor time while it is on. begin: what
 * comes from now on is of this phase, in [0, FLEET_PHASES). */
void profile_begin(int phase);
void profile_stop(void);
void profile_write(struct fleet_profile out[FLEET_PHASES]);

#endif
