/* tokenizer_file.c - a Hugging Face tokenizer.json, read and checked; see tokenizer.h for what is taken. */
#include "node/tokenizer_file.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

/* What a file is while it is read. */
struct reading {
    struct tokenizer_file *f;
    json_t *vocab;
    uint8_t *used; /* a bit per id */
    int32_t byte_of[512]; /* the byte that a code point stands for; -1: none */
};

/* ---- the alphabet ------------------------------------------------------------------------------ */

/* A byte is written as the character of its own code where that can be seen, else as the next one of those
 * from U+0100 on (GPT-2's bytes_to_unicode). */
static void fill_alphabet(int32_t byte_of[512]) {
    int next = 256;
    for (int i = 0; i < 512; i++) byte_of[i] = -1;
    for (int b = 0; b < 256; b++) {
        int seen = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        byte_of[seen ? b : next++] = b;
    }
}

/* The bytes that a token stands for into out; 0: it has characters that stand for none. */
static size_t bytes_of(const struct reading *r, const char *text, size_t n,
                       char out[TOKENIZER_TOKEN_BYTES_MAX]) {
    size_t count = 0;
    for (size_t i = 0; i < n; count++) {
        unsigned code = (unsigned char)text[i];
        if (code < 0x80)
            i++;
        else if (code < 0xc2 || code > 0xc7 ||
                 i + 1 == n) /* below U+0200 has two bytes, 0xc2 to 0xc7 the first */
            return 0;
        else {
            code = (code & 0x1f) << 6 | ((unsigned char)text[i + 1] & 0x3f);
            i += 2;
        }
        if (r->byte_of[code] < 0) return 0;
        out[count] = (char)r->byte_of[code];
    }
    return count;
}

/* ---- fields ------------------------------------------------------------------------------------ */

static int refuse(struct err *err, const char *field, const char *why) {
    return err_set(err, ERR_UNSUPPORTED, "%s %s", field, why);
}

/* A setting that would change ids where it has any value. */
static int must_be_off(json_t *object, const char *key, const char *path, struct err *err) {
    json_t *v = json_object_get(object, key);
    char field[96];
    if (!v || json_is_null(v) || json_is_false(v) || (json_is_string(v) && !json_string_length(v)) ||
        (json_is_number(v) && json_number_value(v) == 0))
        return 0;
    snprintf(field, sizeof field, "%.60s.%.30s", path, key);
    return refuse(err, field, "is set, which this build cannot do: it must be null, false or empty");
}

static int must_be_type(json_t *object, const char *path, const char *type, struct err *err) {
    const char *is = json_string_value(json_object_get(object, "type"));
    if (is && !strcmp(is, type)) return 0;
    return err_set(err, ERR_UNSUPPORTED, "%s.type is \"%.40s\"; this build reads \"%s\"", path, is ? is : "",
                   type);
}

static int is_type(json_t *object, const char *type) {
    const char *is = json_string_value(json_object_get(object, "type"));
    return is && !strcmp(is, type);
}

/* ---- model ------------------------------------------------------------------------------------- */

static int mark_used(struct reading *r, uint32_t id) {
    int was = r->used[id >> 3] >> (id & 7) & 1;
    r->used[id >> 3] |= (uint8_t)(1 << (id & 7));
    return was;
}

static int count_vocab(struct reading *r, size_t *bytes, struct err *err) {
    const char *key;
    json_t *value;
    *bytes = 0;
    json_object_foreach(r->vocab, key, value) {
        json_int_t id = json_is_integer(value) ? json_integer_value(value) : -1;
        size_t n = strlen(key);
        if (id < 0 || id >= TOKENIZER_VOCABULARY_MAX || n > TOKENIZER_TOKEN_BYTES_MAX)
            return err_set(err, ERR_UNSUPPORTED,
                           "model.vocab: token \"%.40s\" of %zu bytes has id %lld; allowed "
                           "are %d bytes and ids below %u",
                           key, n, (long long)id, TOKENIZER_TOKEN_BYTES_MAX, TOKENIZER_VOCABULARY_MAX);
        if (mark_used(r, (uint32_t)id))
            return err_set(err, ERR_CORRUPT, "model.vocab: id %lld is of two tokens, one of them \"%.40s\"",
                           (long long)id, key);
        *bytes += n;
        if ((uint32_t)id >= r->f->vocabulary) r->f->vocabulary = (uint32_t)id + 1;
    }
    return 0;
}

static int keep_text(struct reading *r, uint32_t id, const char *text, struct err *err) {
    char *copy = strdup(text);
    if (!copy) return err_set(err, ERR_MEMORY, "no memory for tokens");
    free(r->f->other[id]);
    r->f->other[id] = copy;
    return 0;
}

static int take_vocab(struct reading *r, struct err *err) {
    char bytes[TOKENIZER_TOKEN_BYTES_MAX];
    const char *key;
    json_t *value;
    json_object_foreach(r->vocab, key, value) {
        uint32_t id = (uint32_t)json_integer_value(value);
        size_t n = bytes_of(r, key, strlen(key), bytes);
        if (n)
            bpe_add_token(r->f->bpe, id, bytes, n);
        else if (keep_text(r, id, key, err))
            return -1;
    }
    for (int b = 0; b < 256; b++)
        if (bpe_find(r->f->bpe, (char[]){ (char)b }, 1) < 0)
            return err_set(err, ERR_UNSUPPORTED, "model.vocab has no token for byte %d: it is not byte-level",
                           b);
    return 0;
}

/* The two parts of merge i: ["a", "b"] or "a b". */
static int parts_of(json_t *merge, size_t i, char left[TOKENIZER_TOKEN_BYTES_MAX + 1],
                    char right[TOKENIZER_TOKEN_BYTES_MAX + 1], struct err *err) {
    const char *a, *b, *text = json_string_value(merge);
    size_t a_n;
    if (text) {
        const char *space = strchr(text, ' ');
        a = text;
        b = space && !strchr(space + 1, ' ') ? space + 1 : NULL;
        a_n = space ? (size_t)(space - text) : 0;
    } else {
        a = json_string_value(json_array_get(merge, 0));
        b = json_array_size(merge) == 2 ? json_string_value(json_array_get(merge, 1)) : NULL;
        a_n = a ? strlen(a) : 0;
    }
    if (!a || !b || a_n > TOKENIZER_TOKEN_BYTES_MAX || strlen(b) > TOKENIZER_TOKEN_BYTES_MAX)
        return err_set(err, ERR_CORRUPT, "model.merges[%zu] is neither \"a b\" nor [\"a\", \"b\"]", i);
    memcpy(left, a, a_n);
    left[a_n] = '\0';
    strcpy(right, b);
    return 0;
}

static int take_merge(struct reading *r, json_t *merge, size_t i, struct err *err) {
    char left[2 * TOKENIZER_TOKEN_BYTES_MAX + 1], right[TOKENIZER_TOKEN_BYTES_MAX + 1];
    size_t n;
    if (parts_of(merge, i, left, right, err)) return -1;
    json_t *a = json_object_get(r->vocab, left), *b = json_object_get(r->vocab, right);
    strcat(left, right);
    json_t *both = json_object_get(r->vocab, left);
    if (!a || !b || !both)
        return err_set(err, ERR_CORRUPT,
                       "model.merges[%zu] gives \"%.60s\": it or a part of it is not in model.vocab", i,
                       left);
    uint32_t a_id = (uint32_t)json_integer_value(a), b_id = (uint32_t)json_integer_value(b);
    if (!bpe_token(r->f->bpe, a_id, &n) || !bpe_token(r->f->bpe, b_id, &n)) return 0; /* can't come up */
    bpe_add_merge(r->f->bpe, (uint32_t)i, a_id, b_id, (uint32_t)json_integer_value(both));
    return 0;
}

static int take_model(struct reading *r, json_t *model, uint32_t added, struct err *err) {
    static const char *const off[] = { "dropout", "continuing_subword_prefix", "end_of_word_suffix",
                                       "byte_fallback" };
    json_t *merges = json_object_get(model, "merges");
    size_t bytes, count = json_array_size(merges);
    /* Files of 2019 have no type. */
    if (json_object_get(model, "type") && must_be_type(model, "model", "BPE", err)) return -1;
    for (size_t i = 0; i < sizeof off / sizeof *off; i++)
        if (must_be_off(model, off[i], "model", err)) return -1;
    if (!json_is_object(r->vocab = json_object_get(model, "vocab")))
        return refuse(err, "model.vocab", "is no object");
    if (!json_is_array(merges)) return refuse(err, "model.merges", "is no array");
    if (count_vocab(r, &bytes, err)) return -1;
    if (added > r->f->vocabulary) r->f->vocabulary = added;
    r->f->other = calloc((size_t)r->f->vocabulary + 1, sizeof *r->f->other);
    if (!r->f->other) return err_set(err, ERR_MEMORY, "no memory for a vocabulary of %u", r->f->vocabulary);
    r->f->bpe = bpe_create(r->f->vocabulary, (uint32_t)count, bytes,
                           json_is_true(json_object_get(model, "ignore_merges")), err);
    if (!r->f->bpe || take_vocab(r, err)) return -1;
    for (size_t i = 0; i < count; i++)
        if (take_merge(r, json_array_get(merges, i), i, err)) return -1;
    return 0;
}

/* ---- added tokens ------------------------------------------------------------------------------ */

static int parse_added(json_t *o, size_t i, const char **content, uint32_t *id, struct err *err) {
    json_int_t wide = -1;
    char field[64];
    snprintf(field, sizeof field, "added_tokens[%zu]", i);
    if (json_unpack(o, "{s:s, s:I}", "content", content, "id", &wide) || !**content ||
        strlen(*content) > TOKENIZER_TOKEN_BYTES_MAX || wide < 0 || wide >= TOKENIZER_VOCABULARY_MAX)
        return err_set(err, ERR_UNSUPPORTED, "%s: content of 1 to %d bytes and an id below %u are needed",
                       field, TOKENIZER_TOKEN_BYTES_MAX, TOKENIZER_VOCABULARY_MAX);
    *id = (uint32_t)wide;
    return must_be_off(o, "single_word", field, err) || must_be_off(o, "lstrip", field, err) ||
                   must_be_off(o, "rstrip", field, err) ? -1 : 0;
}

/* The vocabulary that these ids need. */
static int count_added(json_t *list, uint32_t *vocabulary, struct err *err) {
    const char *content;
    uint32_t id;
    *vocabulary = 0;
    if (json_array_size(list) > TOKENIZER_ADDED_MAX)
        return err_set(err, ERR_UNSUPPORTED, "added_tokens: %zu are too many, allowed are %d",
                       json_array_size(list), TOKENIZER_ADDED_MAX);
    for (size_t i = 0; i < json_array_size(list); i++) {
        if (parse_added(json_array_get(list, i), i, &content, &id, err)) return -1;
        if (id >= *vocabulary) *vocabulary = id + 1;
    }
    return 0;
}

static int take_added(struct reading *r, json_t *list, struct err *err) {
    size_t n = json_array_size(list);
    if (!(r->f->added = calloc(n + 1, sizeof *r->f->added)))
        return err_set(err, ERR_MEMORY, "no memory for added tokens");
    for (size_t i = 0; i < n; i++) {
        json_t *o = json_array_get(list, i), *normalized = json_object_get(o, "normalized");
        struct added_token *a = &r->f->added[i];
        const char *content;
        if (parse_added(o, i, &content, &a->id, err)) return -1;
        json_t *known = json_object_get(r->vocab, content);
        if (known ? json_integer_value(known) != a->id : mark_used(r, a->id))
            return err_set(err, ERR_CORRUPT,
                           "added_tokens[%zu]: id %u of \"%.40s\" is not what model.vocab says, or is "
                           "of another token",
                           i, a->id, content);
        if (keep_text(r, a->id, content, err)) return -1;
        a->content = r->f->other[a->id];
        a->n = strlen(content);
        a->special = json_is_true(json_object_get(o, "special"));
        a->normalized = normalized ? json_is_true(normalized) : !a->special;
        r->f->added_count++;
    }
    return 0;
}

/* ---- the rest ---------------------------------------------------------------------------------- */

static int take_byte_level(json_t *o, const char *path, bool use_regex, struct err *err) {
    char field[96];
    json_t *v = json_object_get(o, "use_regex");
    if (must_be_type(o, path, "ByteLevel", err) || must_be_off(o, "add_prefix_space", path, err)) return -1;
    if ((!v || json_is_true(v)) == use_regex) return 0;
    snprintf(field, sizeof field, "%s.use_regex", path);
    return refuse(err, field,
                  use_regex ? "is false: words would be whole texts" : "is true: words would be cut twice");
}

static int take_split(struct reading *r, json_t *o, struct err *err) {
    const char *path = "pre_tokenizer.pretokenizers[0]";
    const char *regex = json_string_value(json_object_get(json_object_get(o, "pattern"), "Regex"));
    const char *behavior = json_string_value(json_object_get(o, "behavior"));
    if (must_be_type(o, path, "Split", err) || must_be_off(o, "invert", path, err)) return -1;
    if (!behavior || strcmp(behavior, "Isolated") != 0)
        return refuse(err, "pre_tokenizer.pretokenizers[0].behavior", "is not \"Isolated\"");
    int pattern = regex ? split_find(regex) : -1;
    if (pattern < 0)
        return refuse(err, "pre_tokenizer.pretokenizers[0].pattern",
                      "is none of those of GPT-2, Llama 3 and Qwen2");
    r->f->pattern = (enum split_pattern)pattern;
    return 0;
}

static int take_pre_tokenizer(struct reading *r, json_t *o, struct err *err) {
    r->f->pattern = SPLIT_GPT2;
    if (is_type(o, "ByteLevel")) return take_byte_level(o, "pre_tokenizer", true, err);
    if (must_be_type(o, "pre_tokenizer", "Sequence", err)) return -1;
    json_t *list = json_object_get(o, "pretokenizers");
    if (json_array_size(list) != 2)
        return refuse(err, "pre_tokenizer.pretokenizers", "is not a Split and a ByteLevel");
    return take_split(r, json_array_get(list, 0), err) ||
                   take_byte_level(json_array_get(list, 1), "pre_tokenizer.pretokenizers[1]", false, err)
               ? -1
               : 0;
}

static int take_normalizer(struct reading *r, json_t *o, struct err *err) {
    if (!o || json_is_null(o)) return 0;
    r->f->nfc = true;
    return must_be_type(o, "normalizer", "NFC", err);
}

static int take_all(struct reading *r, json_t *root, struct err *err) {
    json_t *added = json_object_get(root, "added_tokens"), *decoder = json_object_get(root, "decoder");
    uint32_t added_vocabulary;
    if (added && !json_is_null(added) && !json_is_array(added))
        return refuse(err, "added_tokens", "is no array");
    if (take_normalizer(r, json_object_get(root, "normalizer"), err)) return -1;
    if (take_pre_tokenizer(r, json_object_get(root, "pre_tokenizer"), err)) return -1;
    if (decoder && !json_is_null(decoder) && must_be_type(decoder, "decoder", "ByteLevel", err)) return -1;
    if (count_added(added, &added_vocabulary, err)) return -1;
    return take_model(r, json_object_get(root, "model"), added_vocabulary, err) || take_added(r, added, err)
               ? -1
               : 0;
}

int tokenizer_file_parse(struct tokenizer_file *f, const void *json, size_t n, struct err *err) {
    json_error_t why;
    if (n > TOKENIZER_FILE_BYTES_MAX)
        return err_set(err, ERR_UNSUPPORTED, "%zu bytes; a tokenizer has at most %zu", n,
                       TOKENIZER_FILE_BYTES_MAX);
    json_t *root = json_loadb(json, n, JSON_REJECT_DUPLICATES, &why);
    if (!root) return err_set(err, ERR_CORRUPT, "line %d: %.150s", why.line, why.text);
    struct reading r = { .f = f, .used = calloc(TOKENIZER_VOCABULARY_MAX / 8, 1) };
    fill_alphabet(r.byte_of);
    int rc = r.used ? take_all(&r, root, err) : err_set(err, ERR_MEMORY, "no memory for a table of ids");
    free(r.used);
    json_decref(root);
    return rc;
}

void tokenizer_file_release(struct tokenizer_file *f) {
    for (uint32_t i = 0; f->other && i < f->vocabulary; i++) free(f->other[i]);
    free(f->other);
    free(f->added);
    bpe_destroy(f->bpe);
    *f = (struct tokenizer_file){ 0 };
}
