/* fault.c - where a step went wrong; see fault.h. */
#include "node/fault.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "node/model.h"
#include "node/shard.h"
#include "proto/model.h"

struct search {
    const struct shard *s;
    const struct model *m;
};

static bool output_is_bad(const struct search *f, uint32_t unit) {
    return !model_output_is_finite(f->m, unit);
}

/* Counted from the head back. */
static uint32_t from_the_end(const struct search *f, uint32_t i) {
    return proto_model_tensor_count(&f->s->layout.model) - 1 - i;
}

static bool gradient_is_bad(const struct search *f, uint32_t i) {
    const struct shard *s = f->s;
    struct layout_run r = shard_piece(s, from_the_end(f, i));
    return shard_answers_for(s, &r) &&
           !isfinite(s->k->sum_squares(s->k, s->grads + shard_grad_at(s, &r), r.count));
}

/* The first of n that is bad on any rank; n where none is. */
static uint32_t first_bad(const struct search *f, uint32_t n,
                          bool (*is_bad)(const struct search *, uint32_t)) {
    const struct comm *world = f->s->mesh.world;
    for (uint32_t first = 0; first < n; first += COMM_SUM_MAX) {
        double bad[COMM_SUM_MAX] = { 0 };
        uint32_t some = n - first < COMM_SUM_MAX ? n - first : COMM_SUM_MAX;
        for (uint32_t i = 0; i < some; i++) bad[i] = is_bad(f, first + i);
        if (world) world->sum(world, bad, some);
        for (uint32_t i = 0; i < some; i++)
            if (bad[i] > 0) return first + i;
    }
    return n;
}

void fault_find(const struct shard *s, const struct model *m, char out[FAULT_BYTES]) {
    const struct msg_model *net = &s->layout.model;
    const struct search f = { s, m };
    uint32_t outputs = net->layers + 1, tensors = proto_model_tensor_count(net);
    uint32_t unit = first_bad(&f, outputs, output_is_bad);
    if (unit < outputs) {
        if (unit == 0) snprintf(out, FAULT_BYTES, "the embedding is not finite");
        else snprintf(out, FAULT_BYTES, "the output of layer %u is not finite", unit - 1);
        return;
    }
    uint32_t i = first_bad(&f, tensors, gradient_is_bad);
    snprintf(out, FAULT_BYTES, "all gradients are finite");
    if (i == tensors) return;
    struct proto_tensor t;
    proto_model_tensor(net, from_the_end(&f, i), &t);
    snprintf(out, FAULT_BYTES, "the gradient of %s is not finite", t.name);
}
