/* core_intervals.c - sets of samples as disjoint ranges in ascending order. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

/* The first range that ends after `start`, or count. */
static uint32_t find(const struct interval_set *s, uint64_t start) {
    uint32_t low = 0, high = s->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (s->list[middle].start + s->list[middle].count <= start)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void insert(struct interval_set *s, uint32_t i, uint64_t start, uint64_t count) {
    s->list = core_grow32(s->list, s->count, &s->capacity, sizeof *s->list);
    memmove(&s->list[i + 1], &s->list[i], (s->count - i) * sizeof *s->list);
    s->list[i] = (struct msg_range){start, count};
    s->count++;
}

static void erase(struct interval_set *s, uint32_t i) {
    memmove(&s->list[i], &s->list[i + 1], (s->count - i - 1) * sizeof *s->list);
    s->count--;
}

bool interval_overlaps(const struct interval_set *s, uint64_t start, uint64_t count) {
    uint32_t i = find(s, start);
    return i < s->count && s->list[i].start < start + count;
}

void interval_add(struct interval_set *s, uint64_t start, uint64_t count) {
    assert(count && !interval_overlaps(s, start, count));
    uint32_t i = find(s, start);
    bool joins_left = i > 0 && s->list[i - 1].start + s->list[i - 1].count == start;
    bool joins_right = i < s->count && s->list[i].start == start + count;
    s->total += count;
    if (joins_left && joins_right) {
        s->list[i - 1].count += count + s->list[i].count;
        erase(s, i);
    } else if (joins_left) {
        s->list[i - 1].count += count;
    } else if (joins_right) {
        s->list[i].start = start;
        s->list[i].count += count;
    } else {
        insert(s, i, start, count);
    }
}

void interval_remove(struct interval_set *s, uint64_t start, uint64_t count) {
    uint32_t i = find(s, start);
    assert(count && i < s->count && s->list[i].start <= start);
    uint64_t end = s->list[i].start + s->list[i].count;
    assert(end >= start + count);
    s->total -= count;
    if (end > start + count) insert(s, i + 1, start + count, end - start - count);
    if (s->list[i].start < start)
        s->list[i].count = start - s->list[i].start;
    else
        erase(s, i);
}

bool interval_gap(const struct interval_set *s, uint64_t end, uint64_t *start, uint64_t *count) {
    uint32_t i = find(s, *start);
    if (i < s->count && s->list[i].start <= *start) {
        *start = s->list[i].start + s->list[i].count;
        i++;
    }
    if (*start >= end) return false;
    uint64_t stop = i < s->count && s->list[i].start < end ? s->list[i].start : end;
    *count = stop - *start;
    return true;
}

void interval_release(struct interval_set *s) {
    free(s->list);
    *s = (struct interval_set){0};
}
