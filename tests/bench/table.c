/* table.c - the rows of the table, printed as they come. */
#include <assert.h>
#include <stdarg.h>
#include <stdio.h>

#include "tests/bench/bench.h"

/* Few digits where they mean little. */
static const char *number(double x, char out[32]) {
    snprintf(out, 32, "%.*f", x >= 1000 ? 0 : x >= 100 ? 1 : x >= 1 ? 2 : 4, x);
    return out;
}

void print_head(void) {
    printf("%-48s %10s %10s  %-10s %6s   %s\n", "what", "best", "median", "unit", "share",
           "of, in the same run");
}

static void print_row(const struct row *r) {
    char best[32], median[32], reference[32], share[16] = "";
    if (r->reference_rate > 0) snprintf(share, sizeof share, "%.0f %%", 100 * r->share);
    printf("%-48s %10s %10s  %-10s %6s   ", r->what, number(r->best, best),
           number(r->median, median), r->unit, share);
    if (r->reference_rate > 0)
        printf("%s: %s", r->reference, number(r->reference_rate, reference));
    printf("\n");
    fflush(stdout);
}

static struct row *row_new(struct bench *b, const char *what, const char *unit,
                           const struct series *s) {
    assert(b->rows < ROWS_MAX);
    struct row *r = &b->row[b->rows++];
    *r = (struct row){.unit = unit, .samples = s->count};
    snprintf(r->what, sizeof r->what, "%s", what);
    return r;
}

void row_rate(struct bench *b, const char *what, const char *unit, double work,
              const struct series *s, const char *name, double reference_work,
              const struct series *reference) {
    struct row *r = row_new(b, what, unit, s);
    r->best = work / smallest(s);
    r->median = work / middle(s);
    if (reference) {
        snprintf(r->reference, sizeof r->reference, "%s", name);
        r->reference_rate = reference_work / smallest(reference);
        r->share = r->best / r->reference_rate;
    }
    print_row(r);
}

void row_time(struct bench *b, const char *what, const char *unit, double units_per_s,
              const struct series *s, const char *name, const struct series *reference) {
    struct row *r = row_new(b, what, unit, s);
    r->best = units_per_s * smallest(s);
    r->median = units_per_s * middle(s);
    if (reference) {
        snprintf(r->reference, sizeof r->reference, "%s", name);
        r->reference_rate = units_per_s * smallest(reference);
        r->share = r->best > 0 ? r->reference_rate / r->best : 1;
    }
    print_row(r);
}

void row_value(struct bench *b, const char *what, const char *unit, const struct series *s,
               double limit) {
    struct row *r = row_new(b, what, unit, s);
    r->best = smallest(s);
    r->median = middle(s);
    if (limit > 0) {
        snprintf(r->reference, sizeof r->reference, "asked is at most");
        r->reference_rate = limit;
        r->share = r->best > 0 ? limit / r->best : 1;
    }
    print_row(r);
}

void row_note(struct bench *b, const char *format, ...) {
    va_list args;
    assert(b->rows);
    struct row *r = &b->row[b->rows - 1];
    va_start(args, format);
    vsnprintf(r->note, sizeof r->note, format, args);
    va_end(args);
    printf("      %s\n", r->note);
    fflush(stdout);
}

json_t *row_json(const struct row *r) {
    json_t *j = json_pack("{ss sf sf ss si}", "what", r->what, "rate", r->best, "median",
                          r->median, "unit", r->unit, "samples", r->samples);
    bool has = r->reference_rate > 0;
    json_object_set_new(j, "reference", has ? json_string(r->reference) : json_null());
    json_object_set_new(j, "reference_rate", has ? json_real(r->reference_rate) : json_null());
    json_object_set_new(j, "share", has ? json_real(r->share) : json_null());
    if (r->note[0]) json_object_set_new(j, "note", json_string(r->note));
    return j;
}
