/* test_fuzz_corpus.c - every parser of outside bytes meets again what fuzzing has found: the inputs in
 * tests/fuzz/corpus, and the valid samples from which fuzzing starts. A crash, a failed assert or a
 * sanitizer's report is the failure. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/fuzz/fuzz.h"

static void take_file(const struct fuzz_target *t, const char *path) {
    FILE *f = fopen(path, "rbe");
    assert_non_null(f);
    fseek(f, 0, SEEK_END);
    size_t length = (size_t)ftell(f);
    uint8_t *bytes = malloc(length ? length : 1);
    rewind(f);
    assert_int_equal(fread(bytes, 1, length, f), length);
    fclose(f);
    print_message("%s\n", path); /* the last one in the log is the one that failed */
    t->take(bytes, length);
    free(bytes);
}

static void take_corpus(const struct fuzz_target *t) {
    char folder[64], path[512];
    snprintf(folder, sizeof folder, "tests/fuzz/corpus/%s", t->name);
    DIR *dir = opendir(folder);
    struct dirent *entry;
    unsigned count = 0;
    assert_non_null(dir);
    while ((entry = readdir(dir))) {
        if (entry->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        take_file(t, path);
        count++;
    }
    closedir(dir);
    assert_true(count > 0);
}

/* A target that refuses a valid sample no longer tests what is behind the refusal. */
static void take_sample(void *arg, const char *name, const void *bytes, size_t length) {
    const struct fuzz_target *t = arg;
    uint8_t *copy = malloc(length ? length : 1);
    assert_non_null(copy);
    if (length) memcpy(copy, bytes, length);
    print_message("sample %s of %s\n", name, t->name);
    if (!t->take(copy, length)) fail_msg("%s: sample %s is refused", t->name, name);
    free(copy);
}

static void skip_word(void *arg, const char *text) { (void)arg, (void)text; }

static void take_all(void **state) {
    const struct fuzz_target *t = *state;
    t->init();
    t->samples(&(struct fuzz_sink){(void *)(uintptr_t)t, take_sample, skip_word});
    take_corpus(t);
}

#define TEST(name) {#name "_meets_its_corpus", take_all, NULL, NULL, (void *)(uintptr_t)&fuzz_##name},

int main(void) {
    const struct CMUnitTest tests[] = {FUZZ_TARGETS(TEST)};
    return cmocka_run_group_tests_name("fuzz corpus", tests, NULL, NULL);
}
