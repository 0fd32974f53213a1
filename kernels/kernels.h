/* kernels.h - numerics on tensors. Two halves:
 *
 * 1. `struct kernels`, a backend: one table of functions with everything a Llama network needs
 *    forward and backward, its optimizer, and the memory its tensors live in. kernels_reference()
 *    is plain loops with double accumulators, the specification; kernels_cpu_create() and
 *    kernels_cpu_bf16_create() are the fast CPU ones, tested against it. A GPU backend is one more
 *    table of the same type.
 * 2. `outer_*`, the arithmetic of the outer step: codec, exact sum, Nesterov, mixing, initial
 *    values. Same bytes in, same bits out, on every compiler and machine. CPU only, host memory.
 *
 * No model, no network, no file. Tensors are dense and row-major, their shape is written [B,T,C]:
 * batch, tokens, channels; `rows` is B*T where a kernel does not care. H are query heads, KV
 * key/value heads (H a multiple of KV), D the head size (even), F the hidden width of the
 * feed-forward part, V the vocabulary. Pointers may not overlap unless an entry says so. */
#ifndef INTELLECT_KERNELS_H
#define INTELLECT_KERNELS_H

#include "proto/err.h"

#include <stddef.h>
#include <stdint.h>

/* Whether a gradient kernel replaces its output or adds to it. The first micro-batch of a step
 * writes, the others add, so nobody has to clear a gradient first. */
enum kernels_write { KERNELS_SET = 0, KERNELS_ADD = 1 };

/* One AdamW step, arXiv:1711.05101. The bias corrections are handed in, because a joiner that took
 * over another member's second moments counts the steps of m and v separately. */
struct kernels_adamw {
    float lr;           /* this step's learning rate; it scales the weight decay too */
    float beta1, beta2; /* decay of m and v, in [0,1) */
    float eps;          /* added to sqrt(v / v_correction), so it must be > 0 */
    float weight_decay; /* decoupled; 0 for norms and embeddings if the caller wants that */
    float m_correction; /* 1 - beta1^(steps that went into m), > 0 */
    float v_correction; /* 1 - beta2^(steps that went into v), > 0 */
    float grad_scale;   /* gradients are multiplied by it first: the clip factor, or 1 */
    /* Where weights are rounded stochastically: the random bits of param[i] are those of this seed,
     * another one for each step, and of the element `first` + i of the model. */
    uint64_t seed, first;
};

/* How the moments of an optimizer are kept: in fp32, in bf16, or in 8 bits, in blocks of
 * KERNELS_STATE_BLOCK, the last of which may be shorter, with a unit each; states.h has the bits. SIGNED
 * for first moments, ROOT for second ones, which are not negative. Rounding is stochastic, from a seed and
 * the element's number: unbiased, so updates far below a last digit are not all lost. */
enum kernels_state {
    KERNELS_STATE_FP32 = 0, KERNELS_STATE_BF16 = 1, KERNELS_STATE_SIGNED8 = 2, KERNELS_STATE_ROOT8 = 3
};
#define KERNELS_STATE_BLOCK 256
/* Bytes of n elements; those of whole blocks are also where what follows them begins. */
size_t kernels_state_bytes(enum kernels_state how, size_t n);

/* A step along a direction that somebody else found; seed, first as in struct kernels_adamw. */
struct kernels_descent {
    float step, keep; /* param = keep * param - step * direction */
    uint64_t seed, first;
};

/* What a row's logits come to over a part of the vocabulary: enough for the loss once all parts are known. */
struct kernels_part {
    float max, sum; /* the largest logit; the sum of exp(logit - max) */
    float target;   /* the target's logit, -INFINITY where it is in another part */
    float largest;  /* where in the part the largest logit stands first; exact below 2^24 */
};
#define KERNELS_ELSEWHERE (-2) /* a target, or a token, in another part */

/* What cross-entropy is multiplied by and what is added to it, against logits that drift away. */
struct kernels_loss {
    float grad_scale; /* of the whole gradient; usually 1 / (targets that count) */
    float z;          /* z-loss of PaLM, arXiv:2204.02311; there 1e-4. 0: none */
    float max_z;      /* max-z loss of Baichuan 2, arXiv:2309.10305; there 2e-4. 0: none */
};

/* Angles of the rotary embedding: pair i of a head of size D turns by theta^(-2i/D) a position,
 * slowed down in a model whose context was stretched. The numbers are the model's, proto/model.h. */
enum kernels_rope_type { KERNELS_ROPE_DEFAULT = 0, KERNELS_ROPE_LINEAR = 1, KERNELS_ROPE_LLAMA3 = 2 };
struct kernels_rope {
    enum kernels_rope_type type;
    double theta;
    double factor;                  /* linear, llama3: divides the angles ... */
    double low_factor, high_factor; /* llama3: ... of pairs that turn less than low_factor times in
                                     * `original` positions; not of those that turn more than
                                     * high_factor times; blended between */
    int original;
};

/* What a network asks of a backend, for scratch_bytes(). */
struct kernels_shape {
    int rows, T;                     /* tokens of a micro-batch, of a sequence */
    int width, heads, kv_heads, ffn; /* of a layer */
    int head_rows, vocabulary;       /* the head goes by so many rows */
};

/* A backend. Call an entry as k->matmul_forward(k, ...). All pointers to tensors are memory from
 * k->alloc(); `host` pointers are ordinary memory. Entries run in order; on a GPU they return
 * before they are done. They return nothing: a backend keeps its first failure, later calls may
 * then do nothing, and check() reports it, so a training step asks once at its end. A table is used
 * by one thread at a time; two tables are independent. Scratch belongs to the backend and grows at
 * the first use of a shape; after that no entry but alloc() takes memory. */
struct kernels {
    const char *name;         /* "reference", "cpu", "cuda" */
    const char *description;  /* one line for people: library version, instruction set, threads */

    /* How a weight is kept; gradients of weights and moments are fp32 always.
     * 4, 0: fp32. 2, 2: bf16, and in a plane apart, `rest`, the lower half of the fp32 value that it
     * stands for: 4 bytes in all, no bit is lost. 2, 0: bf16 alone, rounded stochastically when it
     * is updated. Entries take weights as `const void *w`; they see bf16 where it is that;
     * an entry that is handed a rest keeps it also where rest_bytes is 0. */
    size_t weight_bytes, rest_bytes;

    /* How an activation and its gradient are kept: 4: fp32, 2: bf16, of which entries compute in fp32
     * and round once. Entries take activations as `void *`. What is `float *` is fp32 in every
     * backend: the residual stream and its gradient, statistics, logits, losses. */
    size_t act_bytes;

    /* Memory. alloc: `bytes` of zeroes aligned to 64, or NULL with ERR_MEMORY. free takes NULL. */
    void *(*alloc)(const struct kernels *k, size_t bytes, struct err *err);
    void (*free)(const struct kernels *k, void *p);
    /* The same of the host's memory, which entries read and write where it lies: from a device through its
     * link, some tens of GB/s instead of thousands. Where alloc()'s memory is the host's, it is that. */
    void *(*alloc_host)(const struct kernels *k, size_t bytes, struct err *err);
    void (*free_host)(const struct kernels *k, void *p);
    void (*copy_in)(const struct kernels *k, void *to, const void *host, size_t bytes);
    void (*copy_out)(const struct kernels *k, void *host, const void *from, size_t bytes);
    void (*zero)(const struct kernels *k, void *p, size_t bytes);
    /* n weights from and to fp32 in host memory. rest: NULL where rest_bytes is 0; bf16 alone is
     * rounded to nearest. What comes out is what went in where there is a rest, bit for bit. */
    void (*weights_in)(const struct kernels *k, void *w, uint16_t *rest, const float *host, size_t n);
    void (*weights_out)(const struct kernels *k, float *host, const void *w, const uint16_t *rest,
                        size_t n);
    /* The same to memory of the backend. rest may be NULL: what entries see of the weights. */
    void (*weights_widen)(const struct kernels *k, float *out, const void *w, const uint16_t *rest, size_t n);
    /* Wait for everything asked for so far: 0, or -1 with the first failure since last time. */
    int (*check)(const struct kernels *k, struct err *err);
    /* Scratch that the backend will hold once these entries ran: the largest of the products, and
     * attention. About: what a library takes for itself is estimated. */
    size_t (*scratch_bytes)(const struct kernels *k, const struct kernels_shape *s);
    void (*destroy)(struct kernels *k); /* frees k; does nothing for the reference */

    /* Matrix products: every weight is [OC,C], "out x in", as in a checkpoint. Sums are fp32. */
    /* out[rows,OC] = x[rows,C] * w[OC,C]^T. Adjacent weights (q,k,v or gate,up) are one w with a
     * larger OC, their outputs then lie side by side in each row. */
    void (*matmul_forward)(const struct kernels *k, void *out, const void *x, const void *w,
                           int rows, int C, int OC);
    /* The same, not rounded: logits. */
    void (*matmul_logits)(const struct kernels *k, float *out, const void *x, const void *w,
                          int rows, int C, int OC);
    /* dx[rows,C] = dout[rows,OC] * w[OC,C] */
    void (*matmul_backward_input)(const struct kernels *k, void *dx, const void *dout,
                                  const void *w, int rows, int C, int OC);
    /* dw[OC,C] = or += dout[rows,OC]^T * x[rows,C] */
    void (*matmul_backward_weight)(const struct kernels *k, float *dw, const void *dout,
                                   const void *x, int rows, int C, int OC,
                                   enum kernels_write write);

    /* Embedding: out[rows,C] = w[V,C] at tokens[rows]; a token outside [0,V) is a caller bug, but for
     * KERNELS_ELSEWHERE, whose row of `out` is zero and which has no gradient here. */
    void (*embedding_forward)(const struct kernels *k, float *out, const int32_t *tokens,
                              const void *w, int rows, int C, int V);
    /* dw[V,C] += dout[rows,C] at tokens; rows are added in order, so repeats give the same bits. */
    void (*embedding_backward)(const struct kernels *k, float *dw, const float *dout,
                               const int32_t *tokens, int rows, int C, int V);

    /* RMSNorm, arXiv:1910.07467: out = x * rstd * w; rstd[rows] = 1/sqrt(mean(x^2) + eps), kept. w is fp32
     * in every backend, from weights_widen(): bf16 near 1 moves in steps of 1/256 and 1/128, which are
     * several updates each, and a network learns later for it (docs/results.md). */
    void (*rmsnorm_forward)(const struct kernels *k, void *out, float *rstd, const float *x,
                            const float *w, float eps, int rows, int C);
    /* dx[rows,C] += (dx holds the residual stream's gradient), dw[C] +=. */
    void (*rmsnorm_backward)(const struct kernels *k, float *dx, float *dw, const void *dout,
                             const float *x, const float *w, const float *rstd, int rows, int C);

    /* Rotary embedding, arXiv:2104.09864, Hugging Face convention: element d of a head is
     * paired with d + D/2. In place on the query and key heads of qkv[B,T,H+2KV,D]; value heads
     * untouched. cos, sin: [T,D/2] from kernels_rope_tables(), copied in.
     * start  [B,T], here and in attention: where in the sequence the document of token t begins,
     *        in [0,t] and never less than that of t - 1. Positions count from there. NULL: the
     *        sequence is one document. */
    void (*rope_forward)(const struct kernels *k, void *qkv, const float *cos, const float *sin,
                         const int32_t *start, int B, int T, int H, int KV, int D);
    /* The transposed (inverse) rotation, in place on the gradient of qkv. */
    void (*rope_backward)(const struct kernels *k, void *dqkv, const float *cos, const float *sin,
                          const int32_t *start, int B, int T, int H, int KV, int D);

    /* Causal grouped-query attention, scale 1/sqrt(D): query t sees the keys [start, t]. qkv:
     * [B,T,H+2KV,D], a row holds the query heads, then key heads, then value heads; query head h
     * reads key/value head h / (H/KV). out: [B,T,H,D]. lse: [B,H,T], natural log of the sum of
     * exponentials, kept. */
    void (*attention_forward)(const struct kernels *k, void *out, float *lse, const void *qkv,
                              const int32_t *start, int B, int T, int H, int KV, int D);
    /* dqkv is overwritten in full. Scores come again from qkv and lse (arXiv:2205.14135). With bf16,
     * probabilities and the gradients of scores may be rounded before they are multiplied. */
    void (*attention_backward)(const struct kernels *k, void *dqkv, const void *dout,
                               const void *qkv, const void *out, const float *lse,
                               const int32_t *start, int B, int T, int H, int KV, int D);

    /* SwiGLU, arXiv:2002.05202. gate_up: [rows,2F], a row holds F gates, then F ups.
     * out[rows,F] = silu(gate) * up. Backward overwrites dgate_up; dgate_up may be gate_up. */
    void (*swiglu_forward)(const struct kernels *k, void *out, const void *gate_up, int rows,
                           int F);
    void (*swiglu_backward)(const struct kernels *k, void *dgate_up, const void *dout,
                            const void *gate_up, int rows, int F);

    /* out = a + b, of the residual stream and a branch; out may be a */
    void (*add)(const struct kernels *k, float *out, const float *a, const void *b, size_t n);
    /* x += more */
    void (*accumulate)(const struct kernels *k, float *x, const float *more, size_t n);
    /* out = x as an activation; out may be x where that is fp32, and nothing is done then */
    void (*round)(const struct kernels *k, void *out, const float *x, size_t n);

    /* Softmax and cross-entropy in one. loss[rows] = -log softmax(logits)[target], in nats;
     * penalty[rows] = z * (log of the sum of exponentials)^2 + max_z * (largest logit)^2;
     * dlogits [rows,V], activations: the gradient of (loss + penalty) * grad_scale, or NULL for none;
     * it may be `logits` where activations are fp32. Logits [rows,V] are destroyed. Of equal largest
     * logits the first has max_z's gradient. A target of -1 is ignored: loss, penalty, gradient 0. */
    void (*cross_entropy)(const struct kernels *k, float *loss, float *penalty, void *dlogits,
                          float *logits, const int32_t *targets, const struct kernels_loss *how,
                          int rows, int V);

    /* The same where each rank has the logits [rows,V] of a part of the vocabulary. Targets count from the
     * part's first word; -1 is ignored, KERNELS_ELSEWHERE is in another part. First part[rows] of the own
     * logits; then, from part[parts,rows] of all of them in the vocabulary's order (own: which is the
     * caller's), the loss, the same on all, and the gradient of the own logits, as in cross_entropy. */
    void (*vocabulary_part)(const struct kernels *k, struct kernels_part *part, const float *logits,
                            const int32_t *targets, int rows, int V);
    void (*vocabulary_loss)(const struct kernels *k, float *loss, float *penalty, void *dlogits,
                            float *logits, const int32_t *targets, const struct kernels_part *part,
                            int own, int parts, const struct kernels_loss *how, int rows, int V);

    /* Optimizer: param -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * param) */
    void (*adamw)(const struct kernels *k, void *param, uint16_t *rest, const float *grad, float *m,
                  float *v, size_t n, const struct kernels_adamw *a);
    /* The same without moments. */
    void (*descend)(const struct kernels *k, void *param, uint16_t *rest, const float *direction, size_t n,
                    const struct kernels_descent *d);
    /* out = a * x + b * y; out may be x or y. */
    void (*combine)(const struct kernels *k, float *out, float a, const float *x, float b, const float *y,
                    size_t n);
    /* n elements, from a block's first on, to and from what is kept of them in less than fp32. seed 0
     * rounds to nearest: what came out goes in unchanged then, bit for bit, if it is not below 10^-37.
     * first: the number of x[0] for the random bits. */
    void (*state_in)(const struct kernels *k, void *state, enum kernels_state how, const float *x, size_t n,
                     uint64_t seed, uint64_t first);
    void (*state_out)(const struct kernels *k, float *x, const void *state, enum kernels_state how, size_t n);
    /* Sum of x[i]^2 in double, in an order that does not depend on the number of threads. Waits. An
     * element that is not finite makes the result not finite, so it also finds a lost gradient. */
    double (*sum_squares)(const struct kernels *k, const float *x, size_t n);

    /* NULL where alloc()'s memory is the host's: the outer_* functions below are for that. */
    const struct kernels_outer *outer;
    /* NULL likewise: comm.h then moves and adds what ranks say to each other itself. */
    const struct kernels_shared *shared;
    const struct kernels_library *library; /* NULL where there is none */
    const struct kernels_aside *aside;     /* NULL where entries are done when they return */
};

/* Work beside the rest. What is asked for between begin() and end() comes after all that was asked for before, in
 * an order of its own with what was asked for so earlier, and goes on beside what is asked for after end(); after
 * finish() what is asked for comes after it. Only for entries that neither wait nor take scratch: copies, sums, and
 * what ranks say to each other. check() waits for both. */
struct kernels_aside {
    void (*begin)(const struct kernels *k);
    uint32_t (*end)(const struct kernels *k); /* numbers what was begun: one more each time */
    void (*finish)(const struct kernels *k, uint32_t number); /* and what has a lower number */
};

/* Memory that the ranks of a node, each a process with a table of its own, have of one device or of devices that
 * read each other's: what comm.h makes a communicator of. */
#define KERNELS_HANDLE_BYTES 64
struct kernels_shared {
    /* Like alloc(), ended by free(); `handle` opens it in another process. ERR_UNSUPPORTED where the system does not
     * allow that. */
    void *(*share)(const struct kernels *k, size_t bytes, uint8_t handle[KERNELS_HANDLE_BYTES], struct err *err);
    /* Until close(), and no longer than its owner keeps it. NULL with ERR_UNSUPPORTED. */
    void *(*open)(const struct kernels *k, const uint8_t handle[KERNELS_HANDLE_BYTES], struct err *err);
    void (*close)(const struct kernels *k, void *p);
    void (*copy)(const struct kernels *k, void *to, const void *from, size_t bytes);
    /* out[n] = from[0][n] + from[1][n] + ..., in this order, in fp32; bf16: of bf16, rounded once. count <=
     * KERNELS_SUM_MAX. out may be one of them. */
    void (*sum)(const struct kernels *k, void *out, const void *const *from, int count, size_t n, int bf16);
};
#define KERNELS_SUM_MAX 64

/* The same by a library of the device's maker (NCCL), for ranks that have a device each. It asks the device for
 * everything, in the stream's order, so nobody waits on the host; sums are its own: the same bits on every rank,
 * and in every run of the same ranks on the same machine, but in an order that it chooses, and bf16 is rounded at each
 * addition. What fails is check()'s. */
#define KERNELS_UNIQUE_BYTES 128
struct kernels_library {
    int (*found)(const struct kernels *k);
    /* Which device, by a number that all processes of the machine have for it. */
    uint64_t (*device)(const struct kernels *k);
    int (*unique)(const struct kernels *k, uint8_t id[KERNELS_UNIQUE_BYTES], struct err *err);
    /* Member `rank` of a group of `size` that have this id; returns when all have joined. At most KERNELS_GROUPS_MAX.
     * lost(arg) is asked then and while the backend waits for its device, whether the others are still there: once it is
     * true, what hangs is ended, and check() fails. */
    void *(*join)(const struct kernels *k, const uint8_t id[KERNELS_UNIQUE_BYTES], int rank, int size,
                  int (*lost)(void *arg), void *arg, struct err *err);
    void (*leave)(const struct kernels *k, void *group);
    void (*all_reduce)(const struct kernels *k, void *group, void *x, size_t n, int bf16);
    void (*all_gather)(const struct kernels *k, void *group, void *out, const void *in, size_t bytes);
    void (*reduce_scatter)(const struct kernels *k, void *group, void *out, const void *in, size_t n, int bf16);
    void (*broadcast)(const struct kernels *k, void *group, void *x, size_t bytes, int root);
};
#define KERNELS_GROUPS_MAX 2

/* The specification: one thread, double accumulators, no tricks, slow. Never fails, never freed. In
 * fp32, and with weights of two planes and activations in bf16. */
const struct kernels *kernels_reference(void);
const struct kernels *kernels_reference_bf16(void);

/* The fast CPU backend: oneDNN matrix products, OpenMP for the rest, fp32.
 * threads  OpenMP threads it uses, >= 1; 0 takes what OpenMP would (cores, or OMP_NUM_THREADS).
 * End with k->destroy(k). The program should set OMP_WAIT_POLICY=passive before its first OpenMP
 * call where it shares its cores, else waiting threads spin. Returns NULL with ERR_MEMORY. */
struct kernels *kernels_cpu_create(int threads, struct err *err);

/* The same with weights and activations in bf16: products, attention's too, on AMX or AVX512-BF16 where
 * the processor has one of them (twice the rate of fp32), else in fp32, as `description` says.
 * stochastic  0 keeps the rest of each weight, 1 has none.
 * Returns NULL with ERR_MEMORY, or ERR_UNSUPPORTED from oneDNN. */
struct kernels *kernels_cpu_bf16_create(int threads, int stochastic, struct err *err);

/* The CUDA backend on a device, from libintellect-cuda.so beside the program (INTELLECT_CUDA_PLUGIN names another
 * file). weight_bytes, rest_bytes: how weights are kept, as in the table. Returns NULL with ERR_UNSUPPORTED (no
 * plugin, one of another release, driver or device too old; msg has the versions), ERR_NOT_FOUND (no device),
 * ERR_CONFIG (no such device) or ERR_MEMORY. */
struct kernels *kernels_cuda_create(int device, size_t weight_bytes, size_t rest_bytes, struct err *err);

/* Fill cos and sin [T,D/2], host memory, computed in double. (transformers computes angles in fp32:
 * at position 8192 its first pairs are off by up to 5e-4.) */
void kernels_rope_tables(float *cos, float *sin, int T, int D, const struct kernels_rope *rope);

/* ================================================================================================
 * The outer step. fp32 and double IEEE operations in a fixed order, round to nearest even, no fused
 * multiply-add, no libm: every function below gives the same bits on every machine, whatever
 * rounding mode, flushing of subnormals or trapping of exceptions the calling thread has; it finds
 * that unchanged. A computed NaN is 0x7fc00000 (a double: 0x7ff8000000000000) everywhere. Arrays of n
 * elements; n may be 0. Nothing allocates. `make bitexact` compares builds. */

/* Set the calling thread's floating-point environment to round-to-nearest with subnormals kept, and
 * put back what was there. The outer_* functions do it themselves; a caller needs the pair only
 * around arithmetic of its own that must give the same bits everywhere. */
struct outer_fp {
    uint64_t saved;
};
void outer_fp_begin(struct outer_fp *fp);
void outer_fp_end(const struct outer_fp *fp);

/* How n values travel. A number here is on the wire: docs/protocol.md.
 * OUTER_FP32: n little-endian fp32 values.
 * OUTER_INT8: blocks of OUTER_BLOCK elements, the last may be shorter. A block is its scale (fp32,
 *   little-endian, >= +0, largest |x| / 127) and then one int8 per element in [-127,127]; the value
 *   is scale * int8 in fp32. A scale of 0 is a block of zeroes.
 * OUTER_FP4: likewise, with largest |x| / 12, and half a byte per element, E2M1 as in OCP's MX formats (twice its
 *   values, so that they are integers): codes 0 to 7 are 0, 1, 2, 3, 4, 6, 8, 12, bit 3 is the sign, 8 (-0) is no
 *   code. Of a block of n elements byte i has element i in its low half and element (n + 1) / 2 + i, if there is
 *   one, in its high half (else 0). */
enum outer_codec { OUTER_FP32 = 0, OUTER_INT8 = 1, OUTER_FP4 = 2 };
#define OUTER_BLOCK 256

/* The bounds that keep an exact sum exact: one element on the grid is below 2^38 in magnitude and
 * the weights of one round add up to less than 2^24 (the caller chooses their unit), so a sum stays
 * below 2^62. A grid exponent e = 37 - ceil(log2(largest clipped |x| of the round)) uses the room
 * well. */
#define OUTER_GRID_LIMIT ((int64_t)1 << 38)
#define OUTER_WEIGHT_LIMIT ((uint32_t)1 << 24)
#define OUTER_GRID_EXPONENT_MAX 200 /* in either direction */

/* Bytes of n encoded elements; 0 for a codec that does not exist. */
size_t outer_encoded_bytes(enum outer_codec codec, size_t n);

/* out = (anchor - local) + residual; residual may be NULL. out may be any of the inputs. */
void outer_pseudo_gradient(float *out, const float *anchor, const float *local,
                           const float *residual, size_t n);

/* Encode x into bytes[outer_encoded_bytes(codec, n)]. -1 with ERR_CORRUPT if an element, or a value
 * it would decode to, is not finite (err->msg has the index); bytes are then undefined. */
int outer_encode(uint8_t *bytes, const float *x, size_t n, enum outer_codec codec, struct err *err);

/* Check bytes from a stranger: known codec, length = outer_encoded_bytes(codec, n), every scale and
 * value finite, no negative scale (-0 is one), no code that stands for nothing (-128; 8). 0, or -1 with ERR_CORRUPT. */
int outer_check(const uint8_t *bytes, size_t length, size_t n, enum outer_codec codec,
                struct err *err);

/* Sum of squares and largest magnitude of the values that bytes decode to, without decoding them: what
 * a contribution is announced with, and held to. Of blocks: the sum over them, in their order, of
 * (scale * scale) * (sum of the integers' squares) in double. Refuses what outer_check() refuses. */
int outer_measure(const uint8_t *bytes, size_t length, size_t n, enum outer_codec codec,
                  float *absmax, double *norm2, struct err *err);

/* Decode into x[n]. Refuses what outer_check() refuses; x is then undefined. */
int outer_decode(float *x, const uint8_t *bytes, size_t length, size_t n, enum outer_codec codec,
                 struct err *err);

/* What the encoding lost: residual = x - decode(bytes). residual may be x. Errors as
 * outer_decode(). */
int outer_residual(float *residual, const float *x, const uint8_t *bytes, size_t length, size_t n,
                   enum outer_codec codec, struct err *err);

/* Add one contribution exactly: sum[i] += rint(value[i] * clip * 2^grid_exponent) * weight.
 * Integers, so neither order nor grouping of contributions changes the result.
 * clip           factor in [0,1] that limits the contribution's norm.
 * grid_exponent  the plan's, |.| <= OUTER_GRID_EXPONENT_MAX.
 * weight         < OUTER_WEIGHT_LIMIT; the caller keeps the round's total below it too.
 * Refuses what outer_check() refuses, an element at or over OUTER_GRID_LIMIT on the grid, and clip,
 * exponent or weight out of range: -1 with ERR_CORRUPT, and sum is as before. */
int outer_accumulate(int64_t *sum, const uint8_t *bytes, size_t length, size_t n,
                     enum outer_codec codec, uint32_t weight, float clip, int grid_exponent,
                     struct err *err);

/* Add a partial sum of total weight `weight`: sum[i] += partial[i]. -1 with ERR_CORRUPT if an
 * element is larger than that weight allows (weight * OUTER_GRID_LIMIT); sum is then as before. */
int outer_accumulate_partial(int64_t *sum, const int64_t *partial, size_t n, uint32_t weight,
                             struct err *err);

/* out = sum / weight * 2^-grid_exponent, through double. weight: what really arrived, 0 is a caller
 * bug: a round without weight never commits. */
void outer_mean(float *out, const int64_t *sum, size_t n, uint64_t weight, int grid_exponent);

/* Nesterov SGD as PyTorch writes it: momentum = mu * momentum + mean, then
 * anchor = anchor - lr * (mean + mu * momentum); each operation rounds to fp32, in this order. */
void outer_nesterov(float *anchor, float *momentum, const float *mean, size_t n, float lr,
                    float mu);

/* local = alpha * local + (1 - alpha) * anchor_new (arXiv:2501.18512). alpha 0 is a copy. */
void outer_mix(float *local, const float *anchor_new, size_t n, float alpha);

/* local = local + (anchor_new - anchor_old): a member that was not summed keeps its work. */
void outer_add_delta(float *local, const float *anchor_new, const float *anchor_old, size_t n);

/* Sum of squares in double, and largest magnitude. Not finite if an element is not. The norm of
 * several chunks is the square root of their sums added in chunk order. */
double outer_norm2(const float *x, size_t n);
float outer_absmax(const float *x, size_t n);

/* Initial parameters: out[i] is element first_element + i of the stream `seed`, so chunks of any
 * size give the same values. About normal with mean 0: twelve 16-bit uniforms, so within 6 std. */
void outer_init_normal(float *out, uint64_t seed, uint64_t first_element, size_t n, float std);

/* The same on the memory of a backend that is not the host's, to the bit: arguments are those of the outer_* function of
 * the name, pointers to arrays are memory from alloc(), `bytes` a multiple of 4. What is decoded was checked before, with
 * outer_check(). encode waits; the failure of a device is check()'s, as with any entry.
 *
 * The agent owns the anchor and never opens a device (docs/architecture.md), so a round calls none of this yet: pseudo-
 * gradients are taken, encoded, summed and applied on the host, by outer_*. */
struct kernels_outer {
    void (*pseudo_gradient)(const struct kernels *k, float *out, const float *anchor, const float *local,
                            const float *residual, size_t n);
    int (*encode)(const struct kernels *k, uint8_t *bytes, const float *x, size_t n, enum outer_codec codec,
                  struct err *err);
    void (*decode)(const struct kernels *k, float *x, const uint8_t *bytes, size_t n, enum outer_codec codec);
    void (*residual)(const struct kernels *k, float *out, const float *x, const uint8_t *bytes, size_t n,
                     enum outer_codec codec);
    void (*nesterov)(const struct kernels *k, float *anchor, float *momentum, const float *mean, size_t n, float lr,
                     float mu);
    void (*mix)(const struct kernels *k, float *local, const float *anchor_new, size_t n, float alpha);
    void (*add_delta)(const struct kernels *k, float *local, const float *anchor_new, const float *anchor_old, size_t n);
};

#endif
