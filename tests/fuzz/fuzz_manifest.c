/* fuzz_manifest.c - the small JSON objects of a checkpoint, which anybody may have put into a store.
 * What is taken must be written again as something that means the same.
 *
 * Input: a byte that picks the object, the object. */
#include <stdlib.h>

#include "ckpt/internal.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/records.h"

static void init(void) {
    struct err err;
    int failed = proto_init(&err);
    assert(!failed);
}

static bool manifest_taken(const struct ckpt_blob *in) {
    struct manifest m, again;
    struct ckpt_blob out;
    struct err err = {0};
    if (manifest_parse(in, &m, &err)) return false;
    assert(m.count >= 1 && m.count <= CKPT_OBJECTS_MAX);
    int failed = manifest_format(&m, &out, &err) || manifest_parse(&out, &again, &err);
    assert(!failed && again.count == m.count && !strcmp(again.tokenizer, m.tokenizer));
    assert(again.facts.index == m.facts.index && again.facts.round == m.facts.round);
    for (uint32_t i = 0; i < m.count; i++) {
        const struct manifest_object *o = &m.object[i], *a = manifest_find(&again, o->name);
        assert(ckpt_name_valid(o->name) && a && a->bytes == o->bytes);
        assert(digest_equal(&a->digest, &o->digest));
    }
    free(out.data);
    manifest_release(&m);
    manifest_release(&again);
    return true;
}

static bool signature_taken(const struct ckpt_blob *in) {
    struct manifest_sig s, again;
    struct msg_genesis genesis = {0};
    struct digest run = {0};
    struct ckpt_blob out;
    struct err err = {0};
    if (manifest_sig_parse(in, &s, &err)) return false;
    assert(manifest_sig_check(&s, &genesis, &run, in, &err) && err.code == ERR_REFUSED);
    int failed = manifest_sig_format(&s, &out, &err) || manifest_sig_parse(&out, &again, &err);
    assert(!failed && again.term == s.term && again.delegation.length == s.delegation.length);
    assert(!memcmp(again.delegation.data, s.delegation.data, s.delegation.length));
    free(out.data);
    manifest_sig_release(&s);
    manifest_sig_release(&again);
    return true;
}

static bool cursor_taken(const struct ckpt_blob *in) {
    struct ckpt_facts facts = {.index = 4, .round = 1, .tokens_committed = 80};
    struct msg_range *spent, *again;
    struct ckpt_blob out;
    struct err err = {0};
    uint32_t count, again_count;
    if (cursor_parse(in, &facts, &spent, &count, &err)) return false;
    for (uint32_t i = 1; i < count; i++)
        assert(spent[i].start > spent[i - 1].start + spent[i - 1].count);
    int failed = cursor_format(&facts, spent, count, &out, &err) ||
                 cursor_parse(&out, &facts, &again, &again_count, &err);
    assert(!failed && again_count == count && !memcmp(again, spent, count * sizeof *spent));
    free(out.data);
    free(spent);
    free(again);
    return true;
}

static bool latest_taken(const struct ckpt_blob *in) {
    struct latest l, again;
    struct ckpt_blob out;
    struct err err = {0};
    if (latest_parse(in, &l, &err)) return false;
    assert(ckpt_name_valid(l.prefix));
    int failed = latest_format(&l, &out, &err) || latest_parse(&out, &again, &err);
    assert(!failed && !strcmp(again.prefix, l.prefix) && again.index == l.index);
    free(out.data);
    return true;
}

static bool config_taken(const struct ckpt_blob *in) {
    struct msg_model m, again;
    struct ckpt_blob out;
    struct err err = {0};
    if (hf_config_parse(in, "config.json", &m, &err)) return false;
    assert(proto_model_elements(&m) > 0);
    int failed = hf_config_format(&m, SAFETENSORS_F32, 0.02f, &out, &err) ||
                 hf_config_parse(&out, "config.json", &again, &err);
    assert(!failed);
    struct proto_buffer a = record_encoded(RECORD_model, &m), b = record_encoded(RECORD_model, &again);
    assert(a.length == b.length && !memcmp(a.data, b.data, a.length));
    proto_buffer_release(&a);
    proto_buffer_release(&b);
    free(out.data);
    return true;
}

static bool tokenizer_taken(const struct ckpt_blob *in) {
    char name[65];
    memset(name, 'x', sizeof name);
    hf_tokenizer_name(in, name);
    assert(memchr(name, '\0', sizeof name));
    return *name != '\0';
}

static bool (*const objects[])(const struct ckpt_blob *in) = {
    manifest_taken, signature_taken, cursor_taken, latest_taken, config_taken, tokenizer_taken};
#define OBJECTS (sizeof objects / sizeof *objects)

static bool take(const uint8_t *bytes, size_t length) {
    if (length == 0) return false;
    struct ckpt_blob in = {malloc(length), length - 1}; /* a copy of its own: blobs are not const */
    assert(in.data);
    memcpy(in.data, bytes + 1, length - 1);
    bool taken = objects[bytes[0] % OBJECTS](&in);
    free(in.data);
    return taken;
}

/* ---- samples ----------------------------------------------------------------------------------- */

static void put(const struct fuzz_sink *out, uint8_t which, const char *name, int failed,
                struct ckpt_blob blob) {
    struct proto_buffer b;
    assert(!failed);
    proto_buffer_init(&b, 1u << 20);
    proto_buffer_append(&b, &which, 1);
    proto_buffer_append(&b, blob.data, blob.length);
    out->sample(out->arg, name, b.data, b.length);
    proto_buffer_release(&b);
    free(blob.data);
}

static const struct msg_model model = {.layers = 2, .width = 64, .heads = 4, .kv_heads = 2, .ffn = 128,
                                       .vocabulary = 256, .sequence = 32, .rope_theta = 1e4,
                                       .norm_eps = 1e-5, .tied = 1};

static void put_ours(const struct fuzz_sink *out) {
    struct manifest_object object[2] = {{"config.json", 100, {{1}}}, {"genesis.bin", 200, {{2}}}};
    struct manifest m = {.facts = {.index = 4, .round = 1, .tokens_committed = 80}, .tokenizer = "bytes",
                         .object = object, .count = 2};
    struct msg_range spent[2] = {{0, 4}, {10, 6}};
    struct latest latest = {.prefix = "step-000000000004", .index = 4};
    struct proto_buffer delegation = record_sample(RECORD_delegation, 1);
    struct manifest_sig sig = {.term = 3, .delegation = {delegation.data, delegation.length}};
    struct ckpt_blob blob = {0};
    struct err err;
    put(out, 0, "manifest", manifest_format(&m, &blob, &err), blob);
    put(out, 1, "signature", manifest_sig_format(&sig, &blob, &err), blob);
    put(out, 2, "cursor", cursor_format(&m.facts, spent, 2, &blob, &err), blob);
    put(out, 3, "latest", latest_format(&latest, &blob, &err), blob);
    proto_buffer_release(&delegation);
}

static void put_theirs(const struct fuzz_sink *out) {
    struct ckpt_blob blob = {0};
    struct err err;
    put(out, 4, "config", hf_config_format(&model, SAFETENSORS_F32, 0.02f, &blob, &err), blob);
    put(out, 5, "tokenizer", hf_tokenizer_config_format(&model, "bytes", &blob, &err), blob);
}

/* The names and values of the objects, from the samples themselves. */
static void put_words(const struct fuzz_sink *out) {
    static const char *const words[] = {
        "\"format\"", "\"version\"", "\"intellect-checkpoint\"", "\"intellect-signature\"", "\"intellect-cursor\"",
        "\"intellect-latest\"", "\"run\"", "\"ledger_index\"", "\"round\"", "\"tokens_committed\"", "\"ledger_head\"",
        "\"state_root\"", "\"tokenizer\"", "\"objects\"", "\"name\"", "\"bytes\"", "\"blake2b\"", "\"key\"", "\"term\"",
        "\"signature\"", "\"delegation\"", "\"delegation_signature\"", "\"spent\"", "\"checkpoint\"", "\"manifest\"",
        "\"rope_scaling\"", "\"head_dim\"", "\"rope_parameters\"", "\"hidden_act\"", "9223372036854775807", "-1", "1e400",
        "null", "true", "\\u0000", "\\ud800", "[[", "{\"", "1.0"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) out->word(out->arg, words[i]);
}

static void samples(const struct fuzz_sink *out) {
    put_ours(out);
    put_theirs(out);
    put_words(out);
}

const struct fuzz_target fuzz_manifest = {"manifest", init, take, samples};
