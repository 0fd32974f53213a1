/* curve.c - loss curves; see curve.h. */
#include "node/curve.h"

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEADER "step,tokens,loss,grad_norm,lr,seconds\n"
#define LINE_BYTES 256
#define PATH_BYTES 4096

struct curve {
    FILE *file;
    char path[PATH_BYTES];
};

static bool parse_row(const char *line, struct curve_row *r) {
    return sscanf(line, "%" SCNu64 ",%" SCNu64 ",%lf,%lf,%lf,%lf", &r->step, &r->tokens, &r->loss,
                  &r->grad_norm, &r->lr, &r->seconds) == 6;
}

/* The next whole row: 1; 0 at the end, where a last line without its end counts as none. */
static int next_row(FILE *f, const char *path, char line[LINE_BYTES], struct curve_row *r, struct err *err) {
    if (!fgets(line, LINE_BYTES, f) || !strchr(line, '\n')) return 0;
    if (parse_row(line, r)) return 1;
    return err_set(err, ERR_CORRUPT, "%.150s is no loss curve: \"%.40s\"", path, line);
}

static int check_header(FILE *f, const char *path, struct err *err) {
    char line[LINE_BYTES];
    if (fgets(line, sizeof line, f) && !strcmp(line, HEADER)) return 0;
    return err_set(err, ERR_CORRUPT, "%.150s is no loss curve: its first line is not \"%.36s\"", path, HEADER);
}

static int copy_rows(FILE *from, FILE *to, const char *path, uint64_t upto, struct err *err) {
    char line[LINE_BYTES];
    struct curve_row r;
    int rc = from ? check_header(from, path, err) : 0;
    fputs(HEADER, to);
    while (rc == 0 && from) {
        int got = next_row(from, path, line, &r, err);
        if (got < 0) return -1;
        if (got == 0) break;
        if (r.step <= upto) fputs(line, to);
    }
    return rc;
}

struct curve *curve_open(const char *path, uint64_t upto, struct err *err) {
    char temporary[PATH_BYTES + 8];
    struct curve *c = calloc(1, sizeof *c);
    if (!c) {
        err_set(err, ERR_MEMORY, "no memory for a loss curve");
        return NULL;
    }
    snprintf(c->path, sizeof c->path, "%s", path);
    snprintf(temporary, sizeof temporary, "%s.new", c->path);
    FILE *before = fopen(path, "re");
    c->file = fopen(temporary, "we");
    int rc = c->file ? copy_rows(before, c->file, path, upto, err) : err_set_errno(err, "%.150s", temporary);
    if (before) fclose(before);
    if (rc == 0 && (fflush(c->file) || rename(temporary, path))) rc = err_set_errno(err, "%.150s", path);
    if (rc == 0) return c;
    if (c->file) remove(temporary);
    curve_close(c);
    return NULL;
}

int curve_add(struct curve *c, const struct curve_row *r, struct err *err) {
    fprintf(c->file, "%" PRIu64 ",%" PRIu64 ",%.9g,%.9g,%.9g,%.4f\n", r->step, r->tokens, r->loss,
            r->grad_norm, r->lr, r->seconds);
    return fflush(c->file) ? err_set_errno(err, "%.150s", c->path) : 0;
}

void curve_close(struct curve *c) {
    if (!c) return;
    if (c->file) fclose(c->file);
    free(c);
}

/* ---- the picture ------------------------------------------------------------------------------- */

#define WIDTH 900
#define HEIGHT 500
#define LEFT 70
#define RIGHT 20
#define TOP 20
#define BOTTOM 50
#define POINTS_MAX 4000 /* more than pixels is only a larger file */
#define TICKS 6

struct points {
    double *step, *loss;
    size_t n, room;
    double low, high; /* of the losses */
};

static int add_point(struct points *p, const struct curve_row *r, struct err *err) {
    if (p->n == p->room) {
        size_t room = p->room ? 2 * p->room : 1024;
        double *step = realloc(p->step, room * sizeof *step);
        if (step) p->step = step;
        double *loss = step ? realloc(p->loss, room * sizeof *loss) : NULL;
        if (!loss) return err_set(err, ERR_MEMORY, "no memory for %zu points of a curve", room);
        p->loss = loss;
        p->room = room;
    }
    p->step[p->n] = (double)r->step;
    p->loss[p->n++] = r->loss;
    if (r->loss < p->low) p->low = r->loss;
    if (r->loss > p->high) p->high = r->loss;
    return 0;
}

static int read_points(const char *csv, struct points *p, struct err *err) {
    char line[LINE_BYTES];
    struct curve_row r;
    FILE *f = fopen(csv, "re");
    if (!f) return err_set_errno(err, "%.150s", csv);
    int rc = check_header(f, csv, err), got = 0;
    while (rc == 0 && (got = next_row(f, csv, line, &r, err)) == 1)
        if (isfinite(r.loss)) rc = add_point(p, &r, err);
    fclose(f);
    if (rc == 0 && got == 0 && p->n < 2)
        return err_set(err, ERR_NOT_FOUND, "%.150s has %zu steps, a curve needs two", csv, p->n);
    return rc || got < 0 ? -1 : 0;
}

static double x_of(const struct points *p, double step) {
    double first = p->step[0], last = p->step[p->n - 1];
    return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last > first ? last - first : 1);
}

static double y_of(const struct points *p, double loss) {
    double span = p->high > p->low ? p->high - p->low : 1;
    return TOP + (HEIGHT - TOP - BOTTOM) * (p->high - loss) / span;
}

static void draw_axes(FILE *f, const struct points *p) {
    fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" "
               "font-size=\"13\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n", WIDTH, HEIGHT);
    for (int i = 0; i <= TICKS; i++) {
        double loss = p->low + (p->high - p->low) * i / TICKS, y = y_of(p, loss);
        double step = p->step[0] + (p->step[p->n - 1] - p->step[0]) * i / TICKS, x = x_of(p, step);
        fprintf(f, "<path d=\"M%d %.1fH%d\" stroke=\"#ddd\"/>", LEFT, y, WIDTH - RIGHT);
        fprintf(f, "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%.3g</text>", LEFT - 8, y + 4, loss);
        fprintf(f, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%.0f</text>\n", x,
                HEIGHT - BOTTOM + 20, step);
    }
    fprintf(f, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">step</text>", (LEFT + WIDTH - RIGHT) / 2,
            HEIGHT - 10);
    fprintf(f, "<text transform=\"translate(18 %d) rotate(-90)\" text-anchor=\"middle\">loss, nats per "
               "token</text>\n", (TOP + HEIGHT - BOTTOM) / 2);
}

/* mean_of 1: as they are; larger: the mean of so many steps up to each. */
static void draw_line(FILE *f, const struct points *p, size_t mean_of, const char *look) {
    size_t stride = p->n / POINTS_MAX + 1;
    double sum = 0;
    fprintf(f, "<polyline fill=\"none\" %s points=\"", look);
    for (size_t i = 0; i < p->n; i++) {
        sum += p->loss[i] - (i >= mean_of ? p->loss[i - mean_of] : 0);
        size_t count = i + 1 < mean_of ? i + 1 : mean_of;
        if (i % stride == 0 || i + 1 == p->n)
            fprintf(f, "%.1f,%.1f ", x_of(p, p->step[i]), y_of(p, sum / (double)count));
    }
    fprintf(f, "\"/>\n");
}

int curve_plot(const char *csv, const char *svg, struct err *err) {
    struct points p = { .low = INFINITY, .high = -INFINITY };
    int rc = read_points(csv, &p, err);
    FILE *f = rc ? NULL : fopen(svg, "we");
    if (rc == 0 && !f) rc = err_set_errno(err, "%.150s", svg);
    if (rc == 0) {
        draw_axes(f, &p);
        draw_line(f, &p, 1, "stroke=\"#9bc\"");
        draw_line(f, &p, p.n / 50 + 1, "stroke=\"#036\" stroke-width=\"2\"");
        fputs("</svg>\n", f);
    }
    if (f && fclose(f) && rc == 0) rc = err_set_errno(err, "%.150s", svg);
    free(p.step);
    free(p.loss);
    return rc;
}
