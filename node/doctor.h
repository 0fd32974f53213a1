/* doctor.h - the command `doctor`: can this machine be a member, and how fast will it be? Each check ends within
 * DOCTOR_CHECK_S or so, changes nothing, and says a line: what was found, and what to do where it is wrong.
 *
 *   doctor.c         options, the order of checks, the report as lines or JSON, disk
 *   doctor_device.c  GPUs, measured rates, memory, tokens per second
 *   doctor_net.c     coordinator, port, clock, corpus */
#ifndef INTELLECT_NODE_DOCTOR_H
#define INTELLECT_NODE_DOCTOR_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "node/device.h"
#include "node/home.h"
#include "node/nvml.h"
#include "proto/proto.h"

/* doctor [INVITE] [--home DIR] [--device D] [--precision P] [--threads N] [--listen PORT] [--no-listen]
 * [--corpus PATH] [--model NAME] [--json]
 * Exit status 0: it can join; 1: it cannot; 2: wrong use. */
int tool_doctor(int argc, char **argv);

/* ---- between the files -------------------------------------------------------------------------- */

#define DOCTOR_CHECK_S 10

/* FAIL: with that the node cannot be a member; WARN: it can, and something is not as it should be. */
enum doctor_verdict { DOCTOR_OK, DOCTOR_WARN, DOCTOR_FAIL, DOCTOR_SKIP };

struct doctor {
    const char *home, *corpus, *model_name; /* corpus, model_name: NULL where not given */
    struct device device;
    int precision, threads, listen_port; /* listen_port: 0 any, -1 none */
    bool json;
    char home_path[HOME_PATH_BYTES], joined_corpus[PROTO_URL_BYTES_MAX + 1];
    struct invite invite; /* of the run; host "" where no run is known */
    uint8_t *genesis_bytes;
    uint32_t genesis_length;
    struct msg_genesis genesis;
    bool has_genesis;
    char local_address[PROTO_ADDRESS_BYTES_MAX + 1]; /* towards the coordinator; "" where not known */
    json_t *checks;
    bool failed;
};

/* One line of the report; returns its JSON object, for numbers to be added, borrowed. */
json_t *doctor_say(struct doctor *d, const char *name, enum doctor_verdict verdict, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

double doctor_now_s(void);
/* The model's and the optimizer's numbers: of the run, or of --model. False: neither is known. */
bool doctor_shape(const struct doctor *d, struct msg_model *m, struct msg_inner *inner);

void doctor_device(struct doctor *d);
void doctor_coordinator(struct doctor *d); /* fills genesis and local_address */
void doctor_port(struct doctor *d);
void doctor_corpus(struct doctor *d);
void doctor_clock(struct doctor *d);

/* What a GPU reaches by its maker's data sheet (dense, without sparsity), by its name; 0: not known. */
struct doctor_card {
    const char *name;
    double bf16_tflops, fp32_tflops, gb_per_s;
};
const struct doctor_card *doctor_card(const char *name);

/* What a backend reaches, in about three seconds: FLOP a second in large products, bytes read and written a
 * second. -1: no memory, or the device's failure. */
struct doctor_rates {
    double flops, bytes_per_s;
};
struct kernels;
int doctor_measure(const struct kernels *k, struct doctor_rates *out, struct err *err);

#endif
