/* test_ckpt_keep.c - what becomes of checkpoints: which stay, how they are fetched and exported. */
#include "tests/ckpt_rig.h"

/* ---- which stay ---------------------------------------------------------------------------------- */

static void count_removed(void *arg, const struct ckpt_entry *e) {
    assert_false(e->kept || e->latest || e->pinned);
    ++*(uint32_t *)arg;
}

/* `latest` is where a new member begins: it must not go back because an old writer was late. */
static void latest_never_goes_back_and_old_checkpoints_can_be_pruned(void **state) {
    (void)state;
    struct err err = {0};
    struct latest l;
    char version[CKPT_VERSION_BYTES_MAX + 1];
    uint32_t removed = 0;
    const struct ckpt_retention two = {.last = 2};
    struct ckpt_store *s = open_store("history");
    const uint64_t order[] = {3, 9, 4, 8};
    for (int i = 0; i < 4; i++) must_write(s, &run, order[i]);
    assert_int_equal(latest_read(s, &l, version, &err), 0);
    assert_int_equal(l.index, 9);
    assert_int_equal(ckpt_prune(s, &two, count_removed, &removed, &err), 0);
    assert_int_equal(removed, 2);
    assert_int_equal(access(folder("history/step-000000000008/manifest.json"), F_OK), 0);
    assert_int_equal(access(folder("history/step-000000000004"), F_OK), -1);
    if (check_all(folder("history"), &err)) fail_msg("%s", err.msg);
    s->ops->close(s);
}

static bool is_kept(const struct ckpt_entry *e, uint32_t count, uint64_t index) {
    for (uint32_t i = 0; i < count; i++)
        if (e[i].index == index) return e[i].kept;
    return false;
}

/* Forget what was not kept, as a prune does. */
static uint32_t drop_unkept(struct ckpt_entry *e, uint32_t count) {
    uint32_t left = 0;
    for (uint32_t i = 0; i < count; i++)
        if (e[i].kept) e[left++] = e[i];
    return left;
}

/* A history thinned out again and again keeps the same checkpoints as one thinned out once. */
static void what_stays_once_stays(void **state) {
    (void)state;
    const struct ckpt_retention how = {.last = 3, .every = 100, .stale_s = 50};
    uint64_t random = 11;
    for (int round = 0; round < 200; round++) {
        struct ckpt_entry often[64] = {0}, once[64] = {0};
        uint32_t count = 0, all = 0;
        uint64_t index = 0, pinned = 0;
        for (int i = 0; i < 40; i++) {
            index += 1 + next_random(&random) % 60;
            struct ckpt_entry e = {.index = index, .complete = next_random(&random) % 5 != 0, .modified_s = 1000 + i};
            if (e.complete && next_random(&random) % 11 == 0) e.pinned = true, pinned = index;
            memmove(&often[1], often, count++ * sizeof e);
            memmove(&once[1], once, all++ * sizeof e);
            often[0] = once[0] = e;
            ckpt_retain(&how, 1000 + i, often, count);
            count = drop_unkept(often, count);
        }
        ckpt_retain(&how, 1039, once, all);
        assert_true(!pinned || is_kept(once, all, pinned));
        uint32_t newest = 0;
        for (uint32_t i = 0; i < all; i++) {
            if (once[i].complete && newest++ < 3) assert_true(once[i].kept);
            if (once[i].kept) assert_true(is_kept(often, count, once[i].index));
        }
        assert_int_equal(drop_unkept(once, all), count);
    }
    struct ckpt_entry left = {.index = 4, .modified_s = 100};
    ckpt_retain(&how, 149, &left, 1);
    assert_true(left.kept); /* its writer may be at it */
    ckpt_retain(&how, 150, &left, 1);
    assert_false(left.kept);
}

/* What was published with a paper stays, and everything that stays is whole. */
static void a_pinned_checkpoint_survives_every_prune(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_entry *e;
    uint32_t count, removed = 0;
    char path[256];
    const struct ckpt_retention how = {.last = 1, .every = 4};
    struct ckpt_store *s = open_store("pinned");
    for (uint64_t i = 1; i <= 10; i++) must_write(s, &run, i);
    assert_int_equal(ckpt_pin(s, 6, true, &err), 0);
    assert_int_equal(ckpt_pin(s, 6, true, &err), 0);
    assert_int_equal(ckpt_pin(s, 77, true, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    if (ckpt_prune(s, &how, count_removed, &removed, &err)) fail_msg("%s", err.msg);
    assert_int_equal(removed, 5);
    if (ckpt_list(s, &e, &count, &err)) fail_msg("%s", err.msg);
    static const uint64_t stay[] = {10, 8, 6, 4, 1}; /* newest; of 8..11, pinned; of 4..7; of 0..3 */
    assert_int_equal(count, 5);
    for (uint32_t i = 0; i < count; i++) {
        assert_int_equal(e[i].index, stay[i]);
        assert_true(e[i].complete && e[i].bytes > run.elements * 8);
        assert_int_equal(e[i].pinned, e[i].index == 6);
        assert_int_equal(e[i].latest, e[i].index == 10);
        snprintf(path, sizeof path, "%s/%s", folder("pinned"), e[i].prefix);
        if (check_all(path, &err)) fail_msg("%s", err.msg);
    }
    free(e);
    assert_int_equal(ckpt_pin(s, 6, false, &err), 0);
    if (ckpt_prune(s, &how, count_removed, &removed, &err)) fail_msg("%s", err.msg);
    assert_int_equal(removed, 6);
    s->ops->close(s);
}

/* ---- Hugging Face folders ---------------------------------------------------------------------- */

/* A published checkpoint becomes a model for everybody, without what belongs to the run. */
static void an_export_is_a_plain_folder_with_the_same_bits(void **state) {
    (void)state;
    struct err err = {0};
    char path[160];
    fresh("exported", path);
    struct ckpt *c = must_open(path);
    if (ckpt_export(c, folder("export"), &err)) fail_msg("%s", err.msg);
    assert_int_equal(ckpt_export(c, folder("export"), &err), -1); /* not over something else */
    assert_int_equal(err.code, ERR_REFUSED);
    ckpt_close(c);
    assert_int_equal(count_in(folder("export")), 8); /* config 2, tokenizer 2, index, 3 files */

    c = must_open(folder("export"));
    assert_true(ckpt_is_plain(c));
    assert_string_equal(ckpt_tokenizer(c), "bytes");
    float *got = malloc(run.elements * 4);
    assert_int_equal(ckpt_read(c, CKPT_ANCHOR, 0, run.elements, got, &err), 0);
    assert_memory_equal(got, run.anchor, run.elements * 4);
    assert_int_equal(ckpt_read(c, CKPT_MOMENTUM, 0, 1, got, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    assert_int_equal(ckpt_verify(c, NULL, NULL, &err), -1);
    if (ckpt_export(c, folder("export-2"), &err)) fail_msg("%s", err.msg); /* a copy of a copy */
    assert_int_equal(count_in(folder("export-2")), 8);
    assert_null(ckpt_open(folder("export"), &run.id, &err));
    assert_int_equal(err.code, ERR_REFUSED);
    free(got);
    ckpt_close(c);
}

/* ---- fetch ------------------------------------------------------------------------------------- */

static bool note_progress(void *arg, const struct ckpt_progress *now) {
    struct ckpt_progress *last = arg;
    assert_true(now->done >= last->done && now->done <= now->total && now->read <= now->total);
    *last = *now;
    return true;
}

/* Fetch `path` into folder(name); *last receives the last progress. */
static int fetch(const char *path, const char *name, struct ckpt_progress *last, struct err *err) {
    struct ckpt *c = must_open(path);
    *last = (struct ckpt_progress){0};
    int r = ckpt_fetch(c, folder(name), note_progress, last, err);
    ckpt_close(c);
    return r;
}

/* Cut off anywhere, even by a crash that left nonsense, and called again: what is there is used, and
 * what comes out is the checkpoint. */
static void a_fetch_goes_on_where_it_ended(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_progress last;
    char path[160];
    fresh("fetched-from", path);
    if (fetch(path, "fetched", &last, &err)) fail_msg("%s", err.msg);
    if (check_all(folder("fetched"), &err)) fail_msg("%s", err.msg);
    assert_int_equal(count_in(folder("fetched")), 17); /* nothing half beside them */
    assert_int_equal(last.done, last.total);
    uint64_t all = last.read;

    if (fetch(path, "fetched", &last, &err)) fail_msg("%s", err.msg); /* nothing left to do */
    assert_int_equal(last.read, 0);
    assert_int_equal(last.done, last.total);

    static const char name[] = "model-00002-of-00003.safetensors";
    char part[192], whole[192], manifest[192];
    snprintf(whole, sizeof whole, "%s/%s", folder("fetched"), name);
    snprintf(part, sizeof part, "%s/.%s.part", folder("fetched"), name);
    snprintf(manifest, sizeof manifest, "%s/manifest.json", folder("fetched"));
    struct ckpt_blob b = slurp(whole);
    for (int nonsense = 0; nonsense < 3; nonsense++) {
        assert_int_equal(unlink(whole), 0);
        assert_int_equal(unlink(manifest), 0);
        uint8_t *half = calloc(1, 2 * b.length);
        if (nonsense == 0) memcpy(half, b.data, b.length / 2);
        spill(part, half, nonsense == 2 ? 2 * b.length : b.length / 2); /* longer than it can be */
        free(half);
        if (fetch(path, "fetched", &last, &err)) fail_msg("%s", err.msg);
        if (check_all(folder("fetched"), &err)) fail_msg("%s", err.msg);
        if (nonsense == 0) assert_in_range(last.read, b.length / 2, b.length);
        assert_true(last.read < all);
        assert_int_equal(access(part, F_OK), -1);
    }
    free(b.data);
}

/* What is not ours is neither replaced nor followed, and what is wrong in the store gets no manifest. */
static void a_fetch_replaces_nothing_and_believes_nothing(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_progress last;
    char path[160], file[256], other[160];
    fresh("fetch-source", path);
    mkdir(folder("fetch-foreign"), 0700);
    snprintf(file, sizeof file, "%s/config.json", folder("fetch-foreign"));
    spill(file, (const uint8_t *)"{}", 2);
    assert_int_equal(fetch(path, "fetch-foreign", &last, &err), -1);
    assert_int_equal(err.code, ERR_REFUSED);
    assert_non_null(strstr(err.msg, "config.json: is there"));
    assert_int_equal(file_bytes(file), 2);

    mkdir(folder("fetch-link"), 0700);
    snprintf(file, sizeof file, "%s/.genesis.bin.part", folder("fetch-link"));
    snprintf(other, sizeof other, "%s/precious", root);
    spill(other, (const uint8_t *)"precious", 8);
    assert_int_equal(symlink(other, file), 0);
    assert_int_equal(fetch(path, "fetch-link", &last, &err), -1);
    assert_int_equal(file_bytes(other), 8);

    struct ckpt_store *s = open_store("fetch-source");
    must_write(s, &run, 6);
    s->ops->close(s);
    if (fetch(path, "fetch-two", &last, &err)) fail_msg("%s", err.msg);
    snprintf(other, sizeof other, "%s/step-000000000006", folder("fetch-source"));
    assert_int_equal(fetch(other, "fetch-two", &last, &err), -1); /* two checkpoints in one folder */
    assert_int_equal(err.code, ERR_REFUSED);
    if (check_all(folder("fetch-two"), &err)) fail_msg("%s", err.msg);

    snprintf(file, sizeof file, "%s/momentum-00001-of-00003.safetensors", path);
    struct ckpt_blob b = slurp(file);
    b.data[b.length - 9] ^= 1;
    spill(file, b.data, b.length);
    free(b.data);
    assert_int_equal(fetch(path, "fetch-rotten", &last, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "momentum-00001-of-00003"));
    snprintf(file, sizeof file, "%s/manifest.json", folder("fetch-rotten"));
    assert_int_equal(access(file, F_OK), -1);
    assert_null(ckpt_open(folder("fetch-rotten"), NULL, &err)); /* nor is it taken for a plain folder */
    assert_int_equal(err.code, ERR_NOT_FOUND);
}

/* Weights from elsewhere have no manifest; they come all the same. */
static void a_plain_folder_can_be_fetched(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_progress last;
    char path[160];
    fresh("fetch-plain", path);
    struct ckpt *c = must_open(path);
    if (ckpt_export(c, folder("fetch-plain-hf"), &err)) fail_msg("%s", err.msg);
    ckpt_close(c);
    snprintf(path, sizeof path, "%s", folder("fetch-plain-hf"));
    if (fetch(path, "fetch-plain-copy", &last, &err)) fail_msg("%s", err.msg);
    assert_int_equal(count_in(folder("fetch-plain-copy")), 8);
    c = must_open(folder("fetch-plain-copy"));
    float *got = malloc(run.elements * 4);
    assert_int_equal(ckpt_read(c, CKPT_ANCHOR, 0, run.elements, got, &err), 0);
    assert_memory_equal(got, run.anchor, run.elements * 4);
    free(got);
    ckpt_close(c);
}

/* A corrupt checkpoint is not exported in silence, and nothing is left that looks exported. */
static void an_export_of_a_corrupt_checkpoint_fails_and_leaves_nothing(void **state) {
    (void)state;
    struct err err = {0};
    char path[160], file[256];
    fresh("rotten", path);
    snprintf(file, sizeof file, "%s/model-00003-of-00003.safetensors", path);
    struct ckpt_blob b = slurp(file);
    b.data[b.length - 5] ^= 1;
    spill(file, b.data, b.length);
    free(b.data);
    struct ckpt *c = must_open(path);
    assert_int_equal(ckpt_export(c, folder("rotten-export"), &err), -1);
    assert_non_null(strstr(err.msg, "model-00003-of-00003"));
    assert_int_equal(count_in(folder("rotten-export")), 0);
    ckpt_close(c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(latest_never_goes_back_and_old_checkpoints_can_be_pruned),
        cmocka_unit_test(what_stays_once_stays),
        cmocka_unit_test(a_pinned_checkpoint_survives_every_prune),
        cmocka_unit_test(an_export_is_a_plain_folder_with_the_same_bits),
        cmocka_unit_test(a_fetch_goes_on_where_it_ended),
        cmocka_unit_test(a_fetch_replaces_nothing_and_believes_nothing),
        cmocka_unit_test(a_plain_folder_can_be_fetched),
        cmocka_unit_test(an_export_of_a_corrupt_checkpoint_fails_and_leaves_nothing),
    };
    return cmocka_run_group_tests(tests, before_all, after_all);
}
