/* control.h - how `status` and `invite` ask the serving process what it knows: a Unix socket in the
 * run's folder (mode 0600) that answers every connection with one JSON object and closes it. */
#ifndef INTELLECT_COORDINATOR_CONTROL_H
#define INTELLECT_COORDINATOR_CONTROL_H

#include <jansson.h>

#include "proto/err.h"

#define CONTROL_SOCKET_NAME "control.sock"
#define CONTROL_ANSWER_MS_MAX 3000
#define CONTROL_CLIENTS_MAX 16

struct event_base;
struct control;

/* answer: called for each connection; the object is taken over. dir: the run's folder, in which the
 * caller holds serve.lock: a socket that is left there is a dead process's. NULL with ERR_IO. */
struct control *control_create(struct event_base *base, const char *dir,
                               json_t *(*answer)(void *arg), void *arg, struct err *err);
void control_destroy(struct control *c); /* removes the socket; NULL is fine */

/* The serving process' answer. ERR_NOT_FOUND: nobody serves; ERR_TIMEOUT: somebody does, and does
 * not answer; ERR_CORRUPT: that is no JSON. */
json_t *control_ask(const char *dir, struct err *err);

#endif
