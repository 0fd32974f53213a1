/* curve.h - the loss curve of a training run as a CSV file, one row a step, and as a picture. */
#ifndef INTELLECT_NODE_CURVE_H
#define INTELLECT_NODE_CURVE_H

#include <stdint.h>

#include "proto/err.h"

struct curve;

struct curve_row {
    uint64_t step, tokens;     /* both counted from the run's beginning, this step included */
    double loss, grad_norm, lr;
    double seconds;            /* that the step took; the one column that no rerun repeats */
};

/* Open PATH to append to. Rows of steps after `upto` are dropped: a run that was killed goes on from its last
 * saved state, and takes them again. NULL with ERR_IO, ERR_FULL, ERR_CORRUPT (it is no loss curve). */
struct curve *curve_open(const char *path, uint64_t upto, struct err *err);
/* -1 with ERR_IO or ERR_FULL. A row is in the file when it returns. */
int curve_add(struct curve *c, const struct curve_row *row, struct err *err);
void curve_close(struct curve *c); /* NULL is fine */

/* Draw the losses of a CSV file as an SVG: every step, thin, and their running mean. Errors as curve_open's,
 * ERR_NOT_FOUND where there is nothing to draw. */
int curve_plot(const char *csv, const char *svg, struct err *err);

#endif
