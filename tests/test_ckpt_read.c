/* test_ckpt_read.c - reading a checkpoint or a Hugging Face folder: nothing that was changed on the way, or
 * that somebody made up, is believed. */
#include "tests/ckpt_rig.h"

/* ---- changed on the way -------------------------------------------------------------------------- */

/* Whoever signed vouches for digests alone: what others load must be the run's. */
static void weights_that_are_not_the_anchors_are_refused(void **state) {
    (void)state;
    struct err err = {0};
    char path[160], file[256], hex[DIGEST_HEX_BYTES];
    struct ckpt_store *s = open_store("bf16-other");
    struct ckpt_writer *w = create_bf16(s, &run);
    if (finish(w, &run, &err)) fail_msg("%s", err.msg);
    ckpt_writer_destroy(w);
    s->ops->close(s);
    snprintf(path, sizeof path, "%s/step-000000000005", folder("bf16-other"));
    struct ckpt *c = must_open(path);
    uint64_t bytes;
    struct digest ignored;
    const char *first = ckpt_object(c, 0, &bytes, &ignored);
    snprintf(file, sizeof file, "%s/%s", path, first);
    struct ckpt_blob b = slurp(file);
    b.data[b.length - 1] ^= 1;
    spill(file, b.data, b.length);
    struct digest now = digest_of(b.data, b.length);
    digest_hex(&now, hex);
    sign_again(path, first, hex);
    ckpt_close(c);
    free(b.data);
    assert_int_equal(check_all(path, &err), -1);
    if (!strstr(err.msg, "the weights are not the anchor rounded to bf16")) fail_msg("%s", err.msg);
}

/* Disks and couriers flip bits. Each object is hit at its beginning, middle and end. */
static void a_changed_byte_anywhere_is_found_and_named(void **state) {
    (void)state;
    char path[160], file[512];
    fresh("flip", path);
    struct object_list l = files_in(path);
    assert_int_equal(l.count, 17);
    for (size_t i = 0; i < l.count; i++) {
        snprintf(file, sizeof file, "%s/%s", path, l.object[i].name);
        struct ckpt_blob b = slurp(file);
        const size_t where[] = {0, b.length / 2, b.length - 1};
        for (int k = 0; k < 3; k++) {
            struct err err = {0};
            b.data[where[k]] ^= 4;
            spill(file, b.data, b.length);
            b.data[where[k]] ^= 4;
            if (!check_all(path, &err)) fail_msg("%s: byte %zu changed unseen", file, where[k]);
            bool run_named = !strcmp(l.object[i].name, "genesis.bin") && err.code == ERR_REFUSED;
            if (!strstr(err.msg, l.object[i].name) && !run_named)
                fail_msg("%s changed, and the message is: %s", l.object[i].name, err.msg);
        }
        spill(file, b.data, b.length);
        free(b.data);
    }
    struct err err = {0};
    if (check_all(path, &err)) fail_msg("%s", err.msg);
    object_list_release(&l);
}

/* A copy that stopped early, and one that never began. */
static void a_short_or_missing_object_is_found_and_named(void **state) {
    (void)state;
    char path[160], file[512];
    fresh("short", path);
    struct object_list l = files_in(path);
    for (size_t i = 0; i < l.count; i++) {
        snprintf(file, sizeof file, "%s/%s", path, l.object[i].name);
        struct ckpt_blob b = slurp(file);
        for (int k = 0; k < 3; k++) { /* one byte, nearly all bytes, the file itself */
            struct err err = {0};
            if (k < 2) assert_int_equal(truncate(file, k ? 3 : (off_t)b.length - 1), 0);
            else assert_int_equal(unlink(file), 0);
            if (!check_all(path, &err)) fail_msg("%s: shortened unseen", file);
            bool run_named = !strcmp(l.object[i].name, "genesis.bin") && err.code == ERR_REFUSED;
            if (!strstr(err.msg, l.object[i].name) && !run_named)
                fail_msg("%s shortened, and the message is: %s", l.object[i].name, err.msg);
        }
        spill(file, b.data, b.length);
        free(b.data);
    }
    object_list_release(&l);
}

/* The manifest is what makes a folder a checkpoint; without it the config.json and tensors that
 * lie there must not pass for a plain model either. */
static void without_a_manifest_there_is_no_checkpoint(void **state) {
    (void)state;
    char path[160], file[256];
    fresh("headless", path);
    snprintf(file, sizeof file, "%s/manifest.json", path);
    assert_int_equal(unlink(file), 0);
    assert_refused(path, ERR_NOT_FOUND, "not finished");
    assert_refused(folder("headless"), ERR_NOT_FOUND, "no manifest.json");
    assert_refused(folder("no-such-folder"), ERR_NOT_FOUND, "no-such-folder");
    struct ckpt_store *s = open_store("empty");
    s->ops->close(s);
    assert_refused(folder("empty"), ERR_NOT_FOUND, "no checkpoint here");
    assert_refused("gopher://x", ERR_CONFIG, "gopher");
}

static void another_run_is_refused(void **state) {
    (void)state;
    struct err err = {0};
    char path[160];
    struct digest other = digest_of("another", 7);
    fresh("other-run", path);
    assert_null(ckpt_open(path, &other, &err));
    assert_int_equal(err.code, ERR_REFUSED);
    assert_non_null(strstr(err.msg, "expected run"));
}

/* A store is not trusted: whoever can write there may put files that fit together, but not sign. */
static void a_manifest_that_the_run_did_not_sign_is_refused(void **state) {
    (void)state;
    struct err err = {0};
    struct run thief = {0};
    struct ckpt_blob b;
    char path[160], file[256], stolen[256];
    make_run(&thief, 9, 0);
    struct ckpt_store *s = open_store("thief");
    must_write(s, &thief, 5);
    s->ops->close(s);
    fresh("victim", path);
    const char *const swapped[] = {"manifest.sig", "manifest.json"};
    for (int i = 0; i < 2; i++) {
        snprintf(file, sizeof file, "%s/%s", path, swapped[i]);
        snprintf(stolen, sizeof stolen, "%s/step-000000000005/%s", folder("thief"), swapped[i]);
        b = slurp(stolen);
        spill(file, b.data, b.length);
        free(b.data);
        assert_refused(path, ERR_REFUSED, "manifest.sig");
    }
    assert_non_null(strstr((assert_null(ckpt_open(path, &thief.id, &err)), err.msg), "expected run"));
    release_run(&thief);
}

/* Headers for a file with 16 bytes of data; each must be refused, with a word that says why. */
static const struct {
    const char *header, *word;
} hostile[] = {
    {"", "not a safetensors file"},
    {"[]", "not a safetensors file"},
    {"{", "not JSON"},
    {"{}", "tensors end at byte"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}} x", "not JSON"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
     "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}", "duplicate"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
     "\"b\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[4,16]}}", "overlaps"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
     "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}", "gap"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[8],\"data_offsets\":[0,32]}}", "bytes 0 to 32 of data of 16"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16,0]}}", "bytes 16 to 0"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[-16,0]}}", "data_offsets"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,9223372036854775807]}}", "of data of 16"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,99999999999999999999]}}", "not JSON"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,16]}}", "shape and dtype make 20"},
    {"{\"a\":{\"dtype\":\"F16\",\"shape\":[4],\"data_offsets\":[0,16]}}", "shape and dtype make 8"},
    {"{\"a\":{\"dtype\":\"F99\",\"shape\":[4],\"data_offsets\":[0,16]}}", "F99"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,16]}}", "too large"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,4],\"data_offsets\":[0,16]}}", "shape"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4.0],\"data_offsets\":[0,16]}}", "shape"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":4,\"data_offsets\":[0,16]}}", "shape"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0]}}", "data_offsets"},
    {"{\"a\":{\"dtype\":4,\"shape\":[4],\"data_offsets\":[0,16]}}", "dtype"},
    {"{\"a\":[],\"b\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}", "no dtype"},
};

/* ---- hostile safetensors ----------------------------------------------------------------------- */

static void hostile_headers_are_refused_with_a_reason(void **state) {
    (void)state;
    struct safetensors s;
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        struct err err = {0};
        size_t n = strlen(hostile[i].header);
        int r = safetensors_parse((const uint8_t *)hostile[i].header, n, 8 + n + 16, "file.st", &s, &err);
        if (!r) fail_msg("accepted: %s", hostile[i].header);
        if (!strstr(err.msg, hostile[i].word) || !strstr(err.msg, "file.st"))
            fail_msg("%s\n  gave \"%s\", which does not say \"%s\"", hostile[i].header, err.msg, hostile[i].word);
    }
    struct err err = {0};
    size_t n;
    assert_int_equal(safetensors_header_length((const uint8_t *)"\0\0\0\0\0\0\0\1", 1 << 20, "f", &n, &err), -1);
    assert_int_equal(safetensors_header_length((const uint8_t *)"\377\0\0\0\0\0\0\0", 100, "f", &n, &err), -1);
    assert_int_equal(err.code, ERR_TRUNCATED);
}

/* Whatever becomes of a header, reading it stays inside it, and what passes is consistent: every
 * tensor lies in the file. The address sanitizer watches. */
static void mutated_headers_never_lead_out_of_the_file(void **state) {
    (void)state;
    static const char tokens[] = "0123456789\"{}[],:-.eF32BF16datshp_";
    struct err err = {0};
    struct ckpt_blob good;
    struct safetensors s;
    struct proto_tensor beyond;
    uint64_t random = 42;
    int accepted = 0;
    assert_int_equal(safetensors_format(&run.model, 0, 5, SAFETENSORS_F32, &good, &err), 0);
    proto_model_tensor(&run.model, 5, &beyond);
    uint64_t file_bytes = good.length + beyond.offset * 4;
    assert_int_equal(safetensors_parse(good.data + 8, good.length - 8, file_bytes, "f", &s, &err), 0);
    assert_int_equal(s.count, 5);
    safetensors_release(&s);
    for (int i = 0; i < 20000; i++) {
        size_t n = good.length - 8;
        uint8_t *h = malloc(n); /* its own, exactly as long: reading on is caught */
        memcpy(h, good.data + 8, n);
        for (uint64_t k = next_random(&random) % 3 + 1; k > 0; k--) {
            uint64_t x = next_random(&random);
            h[(x >> 8) % n] = x & 1 ? (uint8_t)tokens[(x >> 1) % (sizeof tokens - 1)] : (uint8_t)(x >> 40);
        }
        if (!safetensors_parse(h, n, file_bytes, "f", &s, &err)) {
            accepted++;
            for (uint32_t t = 0; t < s.count; t++)
                assert_true(s.tensor[t].offset + s.tensor[t].bytes <= file_bytes);
            safetensors_release(&s);
        }
        free(h);
    }
    assert_true(accepted > 0 && accepted < 20000); /* names and padding may change, the rest not */
    free(good.data);
}

/* The other parsers of a store's bytes, the same way. */
static void mutated_objects_are_errors_and_not_crashes(void **state) {
    (void)state;
    static const char *const names[] = {"config.json", "cursor.json", "ledger.bin", "manifest.json",
                                        "manifest.sig"};
    char path[160], file[256];
    uint64_t random = 7;
    fresh("mutated", path);
    for (int i = 0; i < 5; i++) {
        snprintf(file, sizeof file, "%s/%s", path, names[i]);
        struct ckpt_blob good = slurp(file);
        for (int k = 0; k < 2000; k++) {
            struct err err = {0};
            struct ckpt_blob b = {malloc(good.length), good.length};
            memcpy(b.data, good.data, b.length);
            b.length -= k % 3 ? 0 : next_random(&random) % b.length;
            for (int hits = k % 4; hits > 0 && b.length; hits--)
                b.data[next_random(&random) % b.length] = (uint8_t)next_random(&random);
            struct msg_model model;
            struct manifest m;
            struct manifest_sig sig;
            struct msg_range *spent = NULL;
            struct msg_signed_entry *entries = NULL;
            struct ckpt_facts facts = {.index = 5, .round = 5, .tokens_committed = 5000};
            uint32_t n;
            struct digest head;
            if (i == 0) hf_config_parse(&b, "f", &model, &err);
            if (i == 1 && !cursor_parse(&b, &facts, &spent, &n, &err)) free(spent);
            if (i == 2 && !ledger_parse(&b, &entries, &n, &err)) {
                ledger_check(entries, n, 5, &head, &err);
                free(entries);
            }
            if (i == 3 && !manifest_parse(&b, &m, &err)) manifest_release(&m);
            if (i == 4 && !manifest_sig_parse(&b, &sig, &err)) manifest_sig_release(&sig);
            free(b.data);
        }
        free(good.data);
    }
}

/* ---- Hugging Face folders ------------------------------------------------------------------------ */

static void replace_text(const char *path, const char *old, const char *new) {
    struct ckpt_blob b = slurp(path);
    char *at = strstr((char *)b.data, old), out[4096];
    assert_non_null(at);
    int n = snprintf(out, sizeof out, "%.*s%s%s", (int)(at - (char *)b.data), (char *)b.data, new, at + strlen(old));
    spill(path, out, (size_t)n);
    free(b.data);
}

/* A model that computes something else must not be read as if it were ours: the loss would be
 * wrong in silence. */
static void another_network_is_refused_by_the_key_that_makes_it_one(void **state) {
    (void)state;
    static const struct {
        const char *old, *new, *word;
        enum err_code code;
    } cases[] = {
        {"\"llama\"", "\"mistral\"", "model_type", ERR_UNSUPPORTED},
        {"\"silu\"", "\"gelu\"", "hidden_act", ERR_UNSUPPORTED},
        {"\"attention_bias\": false", "\"attention_bias\": true", "attention_bias", ERR_UNSUPPORTED},
        {"\"mlp_bias\": false", "\"mlp_bias\": true", "mlp_bias", ERR_UNSUPPORTED},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"yarn\"}", "rope_scaling", ERR_UNSUPPORTED},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"llama3\"}", "factor", ERR_CORRUPT},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 0.5}", "rope_factor",
         ERR_UNSUPPORTED},
        {"\"rope_scaling\": null", "\"rope_parameters\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, "
         "\"high_freq_factor\": 4, \"original_max_position_embeddings\": 64}", "rope_high_factor", ERR_UNSUPPORTED},
        {"\"rope_scaling\": null", "\"rope_parameters\": {\"rope_type\": \"default\", \"partial_rotary_factor\": 0.5}",
         "partial_rotary_factor", ERR_UNSUPPORTED},
        {"\"attention_dropout\": 0.0", "\"attention_dropout\": 0.1", "attention_dropout", ERR_UNSUPPORTED},
        {"\"LlamaForCausalLM\"", "\"LlamaForSequenceClassification\"", "architectures", ERR_UNSUPPORTED},
        {"\"head_dim\": 8", "\"head_dim\": 16", "head_dim", ERR_UNSUPPORTED},
        {"\"hidden_size\": 32", "\"hidden_size\": \"32\"", "hidden_size", ERR_CORRUPT},
        {"\"hidden_size\": 32", "\"hidden_size\": 0", "hidden_size", ERR_CORRUPT},
        {"\"num_attention_heads\": 4", "\"num_attention_heads\": 5", "head_dim", ERR_UNSUPPORTED},
        {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", "layers.2", ERR_CORRUPT},
        {"\"intermediate_size\": 48", "\"intermediate_size\": 64", "gate_proj", ERR_CORRUPT},
        {"\"vocab_size\": 256", "\"vocab_size\": 99999999", "config.json", ERR_UNSUPPORTED},
        {"{", "", "not JSON", ERR_CORRUPT},
    };
    struct err err = {0};
    char path[160], file[256];
    fresh("config", path);
    struct ckpt *c = must_open(path);
    assert_int_equal(ckpt_export(c, folder("config-export"), &err), 0);
    ckpt_close(c);
    snprintf(file, sizeof file, "%s/config.json", folder("config-export"));
    struct ckpt_blob good = slurp(file);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        replace_text(file, cases[i].old, cases[i].new);
        assert_refused(folder("config-export"), cases[i].code, cases[i].word);
        spill(file, good.data, good.length);
    }
    free(good.data);
    ckpt_close(must_open(folder("config-export")));
}

static struct msg_model model_of(const char *config) {
    struct err err = {0};
    struct msg_model m;
    struct ckpt_blob b = {(uint8_t *)(uintptr_t)config, strlen(config)};
    if (hf_config_parse(&b, "config.json", &m, &err)) fail_msg("%s", err.msg);
    return m;
}

/* Llama 3.1 and 3.2 stretch their context; both spellings of Hugging Face, and what we write ourselves. */
static void scaled_rotary_embeddings_are_read_and_written(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_blob b;
#define SIZES "\"model_type\": \"llama\", \"hidden_size\": 32, \"num_attention_heads\": 4, \"num_hidden_layers\": 2, " \
              "\"intermediate_size\": 48, \"vocab_size\": 256, "
#define LLAMA3 "\"factor\": 32.5, \"high_freq_factor\": 4.0, \"low_freq_factor\": 1, " \
               "\"original_max_position_embeddings\": 8192, \"rope_type\": \"llama3\""
    struct msg_model four = model_of("{" SIZES "\"rope_theta\": 500000.0, \"rope_scaling\": {" LLAMA3 "}}");
    struct msg_model five = model_of("{" SIZES "\"rope_parameters\": {\"rope_theta\": 500000.0, " LLAMA3 "}}");
    struct msg_model linear = model_of("{" SIZES "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2}}");
    assert_true(proto_model_equal(&four, &five));
    assert_int_equal(four.rope_type, ROPE_LLAMA3);
    assert_true(four.rope_factor == 32.5 && four.rope_high_factor == 4 && four.rope_original == 8192);
    assert_int_equal(linear.rope_type, ROPE_LINEAR);
    assert_true(linear.rope_factor == 2 && linear.rope_theta == 10000);
    const struct msg_model *all[] = {&four, &linear};
    for (int i = 0; i < 2; i++) {
        assert_int_equal(hf_config_format(all[i], SAFETENSORS_F32, 0.02f, &b, &err), 0);
        struct msg_model again;
        assert_int_equal(hf_config_parse(&b, "config.json", &again, &err), 0);
        assert_true(proto_model_equal(all[i], &again));
        free(b.data);
    }
}

/* Write one file with every tensor in `dtype`, in reverse order, as other tools do. */
static void write_single_file(const char *path, const struct msg_model *m, const char *dtype, size_t width,
                              const uint8_t *data) {
    json_t *json = json_object();
    uint64_t at = 0;
    FILE *f = fopen(path, "wb");
    for (uint32_t i = proto_model_tensor_count(m); i-- > 0;) {
        struct proto_tensor t;
        proto_model_tensor(m, i, &t);
        json_t *shape = t.dims == 1 ? json_pack("[I]", (json_int_t)t.shape[0])
                                    : json_pack("[II]", (json_int_t)t.shape[0], (json_int_t)t.shape[1]);
        json_object_set_new(json, t.name, json_pack("{ss so s[II]}", "dtype", dtype, "shape", shape, "data_offsets",
                                                    (json_int_t)at, (json_int_t)(at + t.count * width)));
        at += t.count * width;
    }
    json_object_set_new(json, "model.layers.0.self_attn.rotary_emb.inv_freq", /* old exports have it */
                        json_pack("{ss s[i] s[II]}", "dtype", "F32", "shape", 1, "data_offsets",
                                  (json_int_t)at, (json_int_t)(at + 4)));
    char *text = json_dumps(json, JSON_COMPACT);
    uint64_t n = strlen(text);
    fwrite(&n, 8, 1, f);
    fwrite(text, 1, n, f);
    for (uint32_t i = proto_model_tensor_count(m); i-- > 0;) {
        struct proto_tensor t;
        proto_model_tensor(m, i, &t);
        fwrite(data + t.offset * width, width, (size_t)t.count, f);
    }
    fwrite("abcd", 4, 1, f);
    fclose(f);
    free(text);
    json_decref(json);
}

/* Most published models are bf16 or fp16, in one file without an index, in an order of their own. */
static void narrow_floats_are_widened_exactly(void **state) {
    (void)state;
    struct err err = {0};
    struct run tied = {0};
    struct ckpt_blob config;
    make_run(&tied, 3, 1);
    mkdir(folder("narrow"), 0700);
    assert_int_equal(hf_config_format(&tied.model, SAFETENSORS_F32, 0.02f, &config, &err), 0);
    spill(folder("narrow/config.json"), config.data, config.length);
    free(config.data);
    uint16_t *narrow = malloc(tied.elements * 2);
    float *got = malloc(tied.elements * 4);
    for (size_t i = 0; i < tied.elements; i++) narrow[i] = (uint16_t)(i * 40503u);
    for (int half = 0; half < 2; half++) {
        write_single_file(folder("narrow/model.safetensors"), &tied.model, half ? "F16" : "BF16", 2, (uint8_t *)narrow);
        struct ckpt *c = must_open(folder("narrow"));
        assert_true(ckpt_model(c)->tied == 1 && ckpt_model(c)->rope_theta == 500000);
        assert_string_equal(ckpt_tokenizer(c), "");
        assert_int_equal(ckpt_read(c, CKPT_ANCHOR, 0, tied.elements, got, &err), 0);
        for (size_t i = 0; i < tied.elements; i++) {
            int exponent = narrow[i] >> 10 & 31, fraction = narrow[i] & 1023;
            double magnitude = exponent ? ldexp(fraction + 1024, exponent - 25) : ldexp(fraction, -24);
            uint32_t wide;
            memcpy(&wide, &got[i], 4);
            if (!half) assert_int_equal(wide, (uint32_t)narrow[i] << 16);
            else if (exponent < 31) assert_true(got[i] == (narrow[i] & 0x8000 ? -magnitude : magnitude));
            else assert_true(fraction ? isnan(got[i]) : isinf(got[i]));
        }
        ckpt_close(c);
    }
    write_single_file(folder("narrow/model.safetensors"), &tied.model, "I16", 2, (uint8_t *)narrow);
    assert_refused(folder("narrow"), ERR_UNSUPPORTED, "only F32, F16 and BF16");
    free(narrow);
    free(got);
    release_run(&tied);
}

/* An index is hostile too: it may name files outside the folder, or tensors that are not there. */
static void a_hostile_index_is_refused(void **state) {
    (void)state;
    struct err err = {0};
    char path[160], file[256];
    fresh("index", path);
    struct ckpt *c = must_open(path);
    assert_int_equal(ckpt_export(c, folder("index-export"), &err), 0);
    ckpt_close(c);
    snprintf(file, sizeof file, "%s/model.safetensors.index.json", folder("index-export"));
    struct ckpt_blob good = slurp(file);
    static const char *const cases[][3] = {
        {"\"model-00001-of-00003.safetensors\"", "\"../../../etc/passwd\"", "cannot be a file's name"},
        {"\"model-00001-of-00003.safetensors\"", "\"model-00009-of-00003.safetensors\"", "00009"},
        {"\"model-00001-of-00003.safetensors\"", "\"model-00002-of-00003.safetensors\"", "is missing"},
        {"\"model-00001-of-00003.safetensors\"", "7", "in no file"},
        {"\"weight_map\"", "\"weights\"", "no weight_map"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        replace_text(file, cases[i][0], cases[i][1]);
        assert_null(ckpt_open(folder("index-export"), NULL, &err));
        if (!strstr(err.msg, cases[i][2])) fail_msg("\"%s\" does not say \"%s\"", err.msg, cases[i][2]);
        spill(file, good.data, good.length);
    }
    free(good.data);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(weights_that_are_not_the_anchors_are_refused),
        cmocka_unit_test(a_changed_byte_anywhere_is_found_and_named),
        cmocka_unit_test(a_short_or_missing_object_is_found_and_named),
        cmocka_unit_test(without_a_manifest_there_is_no_checkpoint),
        cmocka_unit_test(another_run_is_refused),
        cmocka_unit_test(a_manifest_that_the_run_did_not_sign_is_refused),
        cmocka_unit_test(hostile_headers_are_refused_with_a_reason),
        cmocka_unit_test(mutated_headers_never_lead_out_of_the_file),
        cmocka_unit_test(mutated_objects_are_errors_and_not_crashes),
        cmocka_unit_test(another_network_is_refused_by_the_key_that_makes_it_one),
        cmocka_unit_test(scaled_rotary_embeddings_are_read_and_written),
        cmocka_unit_test(narrow_floats_are_widened_exactly),
        cmocka_unit_test(a_hostile_index_is_refused),
    };
    return cmocka_run_group_tests(tests, before_all, after_all);
}
