/* hf.c - what makes a folder a model that Hugging Face's tools open as it is: config.json, the
 * index of the safetensors files, and the tokenizer. */
#include "ckpt/internal.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- config.json ------------------------------------------------------------------------------- */

/* Fewest digits, for a person's eye, that still read back as the same double. */
static size_t real_digits(double x) {
    char text[40];
    for (size_t digits = 6; digits < 17; digits++) {
        snprintf(text, sizeof text, "%.*g", (int)digits, x);
        if (strtod(text, NULL) == x) return digits;
    }
    return 17;
}

static size_t most(size_t a, size_t b) {
    return a > b ? a : b;
}

/* rope_scaling, as transformers 4 and 5 read it; null where there is none. */
static json_t *rope_json(const struct msg_model *m) {
    const char *type = proto_rope_type_name(m->rope_type);
    if (m->rope_type == ROPE_DEFAULT) return json_null();
    if (m->rope_type == ROPE_LINEAR) return json_pack("{ss sf}", "rope_type", type, "factor", m->rope_factor);
    return json_pack("{ss sf sf sf si}", "rope_type", type, "factor", m->rope_factor, "low_freq_factor",
                     m->rope_low_factor, "high_freq_factor", m->rope_high_factor,
                     "original_max_position_embeddings", (int)m->rope_original);
}

int hf_config_format(const struct msg_model *m, enum safetensors_dtype weights, float init_std,
                     struct ckpt_blob *out, struct err *err) {
    char std[40]; /* the shortest decimal of the float, not the double behind it */
    snprintf(std, sizeof std, "%.6g", (double)init_std);
    double initial = strtod(std, NULL);
    const double reals[] = { m->rope_theta, m->norm_eps, m->rope_factor, m->rope_low_factor,
                             m->rope_high_factor };
    size_t digits = real_digits(initial);
    for (size_t i = 0; i < sizeof reals / sizeof *reals; i++) digits = most(digits, real_digits(reals[i]));
    json_t *json = json_pack(
        "{s[s] ss sb sf sn sn si ss si sf si si sb si si si sf so sf sb ss sb si}",
        "architectures", "LlamaForCausalLM", "model_type", "llama",
        "attention_bias", 0, "attention_dropout", 0.0, "bos_token_id", "eos_token_id",
        "head_dim", (int)(m->width / m->heads), "hidden_act", "silu",
        "hidden_size", (int)m->width, "initializer_range", initial,
        "intermediate_size", (int)m->ffn, "max_position_embeddings", (int)m->sequence,
        "mlp_bias", 0, "num_attention_heads", (int)m->heads, "num_hidden_layers", (int)m->layers,
        "num_key_value_heads", (int)m->kv_heads, "rms_norm_eps", m->norm_eps, "rope_scaling",
        rope_json(m), "rope_theta", m->rope_theta, "tie_word_embeddings", (int)m->tied,
        "torch_dtype", weights == SAFETENSORS_BF16 ? "bfloat16" : "float32", "use_cache", 1,
        "vocab_size", (int)m->vocabulary);
    return json_write(json, JSON_INDENT(2) | JSON_REAL_PRECISION(digits), out, err);
}

static int unsupported(const char *what, const char *key, const char *why, struct err *err) {
    return err_set(err, ERR_UNSUPPORTED, "%s: \"%s\" %s", what, key, why);
}

/* transformers builds what it is asked for, but the weights are those of the class that is named. */
static bool is_for_causal_lm(const json_t *json) {
    const json_t *list = json_object_get(json, "architectures"), *name;
    size_t i;
    if (!list || json_is_null(list)) return true;
    json_array_foreach(list, i, name)
        if (json_is_string(name) && !strcmp(json_string_value(name), "LlamaForCausalLM")) return true;
    return false;
}

/* Keys that would make it another network when they say anything but the value we compute. */
static int check_kind(const json_t *json, const char *what, struct err *err) {
    const char *type = json_string_value(json_object_get(json, "model_type"));
    const char *act = json_string_value(json_object_get(json, "hidden_act"));
    if (!type || strcmp(type, "llama") != 0)
        return unsupported(what, "model_type", "must be \"llama\"", err);
    if (act && strcmp(act, "silu") != 0) return unsupported(what, "hidden_act", "must be \"silu\"", err);
    if (json_is_true(json_object_get(json, "attention_bias")))
        return unsupported(what, "attention_bias", "must be false", err);
    if (json_is_true(json_object_get(json, "mlp_bias")))
        return unsupported(what, "mlp_bias", "must be false", err);
    if (json_number_value(json_object_get(json, "attention_dropout")) != 0)
        return unsupported(what, "attention_dropout", "must be 0", err);
    if (!is_for_causal_lm(json))
        return unsupported(what, "architectures", "must have \"LlamaForCausalLM\" or be absent", err);
    const json_t *quantized = json_object_get(json, "quantization_config");
    if (quantized && !json_is_null(quantized))
        return unsupported(what, "quantization_config", "must be absent: the weights are quantised", err);
    return 0;
}

/* A number that this type of scaling cannot do without. */
static int read_real(const json_t *json, const char *object, const char *key, const char *what, double *out,
                     struct err *err) {
    const json_t *v = json_object_get(json, key);
    if (!json_is_number(v))
        return err_set(err, ERR_CORRUPT, "%s: \"%s\" must have a number \"%s\"", what, object, key);
    *out = json_number_value(v);
    return 0;
}

/* One object of rotary settings, of a type that we compute; hf_config_parse() checks the numbers. */
static int read_scaling(const json_t *rope, const char *key, const char *what, struct msg_model *m,
                        struct err *err) {
    const char *type = json_string_value(json_object_get(rope, "rope_type"));
    const json_t *theta = json_object_get(rope, "rope_theta");
    const json_t *part = json_object_get(rope, "partial_rotary_factor");
    double original = 0;
    if (!type) type = json_string_value(json_object_get(rope, "type"));
    if (json_is_number(theta)) m->rope_theta = json_number_value(theta);
    if (json_is_number(part) && json_number_value(part) != 1)
        return unsupported(what, "partial_rotary_factor", "must be 1", err);
    if (type && !strcmp(type, "default")) return 0;
    m->rope_type = type && !strcmp(type, "linear") ? ROPE_LINEAR : ROPE_LLAMA3;
    if (!type || (m->rope_type == ROPE_LLAMA3 && strcmp(type, "llama3") != 0))
        return unsupported(what, key, "must be null or of type \"default\", \"linear\" or \"llama3\"", err);
    if (read_real(rope, key, "factor", what, &m->rope_factor, err)) return -1;
    if (m->rope_type == ROPE_LINEAR) return 0;
    if (read_real(rope, key, "low_freq_factor", what, &m->rope_low_factor, err) ||
        read_real(rope, key, "high_freq_factor", what, &m->rope_high_factor, err) ||
        read_real(rope, key, "original_max_position_embeddings", what, &original, err))
        return -1;
    if (!(original >= 1 && original <= INT32_MAX) || original != floor(original))
        return err_set(err, ERR_CORRUPT, "%s: \"original_max_position_embeddings\" is %g", what, original);
    m->rope_original = (uint32_t)original;
    return 0;
}

/* Rotary settings: rope_theta at the top and rope_scaling, or both in rope_parameters (transformers 5). */
static int read_rope(const json_t *json, const char *what, struct msg_model *m, struct err *err) {
    static const char *const keys[] = {"rope_scaling", "rope_parameters"};
    const json_t *top = json_object_get(json, "rope_theta");
    m->rope_theta = json_is_number(top) ? json_number_value(top) : 10000.0;
    for (int i = 0; i < 2; i++) {
        const json_t *rope = json_object_get(json, keys[i]);
        if (rope && !json_is_null(rope) && read_scaling(rope, keys[i], what, m, err)) return -1;
    }
    return 0;
}

/* A whole number; fallback where the key is missing or null, 0 = it must be there. */
static int read_u32(const json_t *json, const char *key, const char *what, uint32_t fallback,
                    uint32_t *out, struct err *err) {
    const json_t *v = json_object_get(json, key);
    if (fallback && (!v || json_is_null(v))) {
        *out = fallback;
        return 0;
    }
    if (!json_is_integer(v) || json_integer_value(v) < 1 || json_integer_value(v) > INT32_MAX)
        return err_set(err, ERR_CORRUPT, "%s: \"%s\" must be a whole number from 1", what, key);
    *out = (uint32_t)json_integer_value(v);
    return 0;
}

static int read_sizes(const json_t *json, const char *what, struct msg_model *m, struct err *err) {
    uint32_t head;
    if (read_u32(json, "num_hidden_layers", what, 0, &m->layers, err) ||
        read_u32(json, "hidden_size", what, 0, &m->width, err) ||
        read_u32(json, "num_attention_heads", what, 0, &m->heads, err) ||
        read_u32(json, "num_key_value_heads", what, m->heads, &m->kv_heads, err) ||
        read_u32(json, "intermediate_size", what, 0, &m->ffn, err) ||
        read_u32(json, "vocab_size", what, 0, &m->vocabulary, err) ||
        read_u32(json, "max_position_embeddings", what, 2048, &m->sequence, err) ||
        read_u32(json, "head_dim", what, m->width / m->heads ? m->width / m->heads : 1, &head, err))
        return -1;
    if ((uint64_t)head * m->heads != m->width)
        return err_set(err, ERR_UNSUPPORTED, "%s: \"head_dim\" %u times %u heads is not hidden_size %u",
                       what, head, m->heads, m->width);
    return 0;
}

int hf_config_parse(const struct ckpt_blob *blob, const char *what, struct msg_model *out,
                    struct err *err) {
    json_t *json = json_read(blob, what, err);
    if (!json) return -1;
    struct msg_model m = {0};
    const json_t *eps = json_object_get(json, "rms_norm_eps");
    m.norm_eps = json_is_number(eps) ? json_number_value(eps) : 1e-6;
    m.tied = json_is_true(json_object_get(json, "tie_word_embeddings"));
    int r = check_kind(json, what, err) || read_rope(json, what, &m, err) ||
            read_sizes(json, what, &m, err);
    json_decref(json);
    if (r) return -1;
    if (proto_model_check(&m, err)) {
        if (err) err->code = ERR_UNSUPPORTED;
        err_prefix(err, "%s", what);
        return -1;
    }
    *out = m;
    return 0;
}

int hf_generation_config_format(struct ckpt_blob *out, struct err *err) {
    json_t *json = json_pack("{sb sb}", "_from_model_config", 1, "do_sample", 1);
    return json_write(json, JSON_INDENT(2), out, err);
}

/* ---- tokenizer --------------------------------------------------------------------------------- */

/* The character that stands for a byte in Hugging Face's byte-level vocabularies (GPT-2): itself
 * where it prints, else the next free one from U+0100. */
static uint32_t byte_character(uint32_t byte) {
    uint32_t next = 256;
    for (uint32_t b = 0;; b++) {
        bool prints = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        if (b == byte) return prints ? b : next;
        if (!prints) next++;
    }
}

static json_t *byte_vocabulary(void) {
    json_t *vocabulary = json_object();
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t c = byte_character(b);
        char utf8[3] = {(char)c};
        if (c >= 128) utf8[0] = (char)(0xc0 | c >> 6), utf8[1] = (char)(0x80 | (c & 63));
        if (json_object_set_new(vocabulary, utf8, json_integer(b))) {
            json_decref(vocabulary);
            return NULL;
        }
    }
    return vocabulary;
}

/* A BPE without merges over bytes: what our tokenizer computes, in the words of `tokenizers`. */
int hf_tokenizer_format(struct ckpt_blob *out, struct err *err) {
    json_t *level = json_pack("{ss sb sb sb}", "type", "ByteLevel", "add_prefix_space", 0,
                              "trim_offsets", 1, "use_regex", 0);
    json_t *model = json_pack("{ss sn sn sn sn sb sb sb so s[]}", "type", "BPE", "dropout",
                              "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                              "fuse_unk", 0, "byte_fallback", 0, "ignore_merges", 0, "vocab",
                              byte_vocabulary(), "merges");
    json_t *json = json_pack("{ss sn sn s[] sn sO sn so so}", "version", "1.0", "truncation",
                             "padding", "added_tokens", "normalizer", "pre_tokenizer", level,
                             "post_processor", "decoder", level, "model", model);
    return json_write(json, JSON_INDENT(1), out, err);
}

int hf_tokenizer_config_format(const struct msg_model *m, const char *name, struct ckpt_blob *out,
                               struct err *err) {
    json_t *json = json_pack("{ss ss si sb sb sn sn}", "tokenizer_class", "PreTrainedTokenizerFast",
                             "intellect_tokenizer", name, "model_max_length",
                             (int)m->sequence, "add_prefix_space", 0,
                             "clean_up_tokenization_spaces", 0, "bos_token", "eos_token");
    return json_write(json, JSON_INDENT(2), out, err);
}

void hf_tokenizer_name(const struct ckpt_blob *blob, char out[65]) {
    json_t *json = json_read(blob, "tokenizer_config.json", NULL);
    const char *name = json_string_value(json_object_get(json, "intellect_tokenizer"));
    snprintf(out, 65, "%.64s", name ? name : "");
    json_decref(json);
}

/* ---- files and their index --------------------------------------------------------------------- */

int hf_shards(const struct msg_model *m, uint64_t bytes, struct hf_shard **out, uint32_t *count,
              struct err *err) {
    uint32_t n = 0, tensors = proto_model_tensor_count(m);
    struct hf_shard *s = calloc(tensors, sizeof *s);
    struct proto_tensor t;
    if (!s) return err_set(err, ERR_MEMORY, "out of memory for %u tensors", tensors);
    for (uint32_t i = 0; i < tensors; i++) {
        proto_model_tensor(m, i, &t);
        if (n == 0 || (s[n - 1].count + t.count) * 4 > bytes)
            s[n++] = (struct hf_shard){.first_tensor = i, .first = t.offset};
        s[n - 1].end_tensor = i + 1;
        s[n - 1].count += t.count;
    }
    *out = s;
    *count = n;
    return 0;
}

void hf_shard_name(const char *stem, uint32_t i, uint32_t count, char out[64]) {
    snprintf(out, 64, "%s-%05u-of-%05u.safetensors", stem, i + 1, count);
}

int hf_index_format(const struct msg_model *m, const char *stem, enum safetensors_dtype dtype,
                    const struct hf_shard *shards, uint32_t count, struct ckpt_blob *out, struct err *err) {
    json_t *map = json_object();
    struct proto_tensor t;
    char name[64];
    for (uint32_t s = 0; map && s < count; s++) {
        hf_shard_name(stem, s, count, name);
        for (uint32_t i = shards[s].first_tensor; i < shards[s].end_tensor; i++) {
            proto_model_tensor(m, i, &t);
            if (!json_object_set_new(map, t.name, json_string(name))) continue;
            json_decref(map);
            return err_set(err, ERR_MEMORY, "out of memory for an index");
        }
    }
    json_int_t bytes = (json_int_t)(proto_model_elements(m) * safetensors_width(dtype));
    json_t *json = json_pack("{s{sI} so}", "metadata", "total_size", bytes, "weight_map", map);
    return json_write(json, JSON_INDENT(2), out, err);
}
