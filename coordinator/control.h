/* control.h - how other commands ask the serving process, or tell it something: a Unix socket in the
 * run's folder (mode 0600). A request is one line with a JSON object, the answer is one JSON object;
 * then the connection is closed. {} asks for the status; see operate.h for orders. */
#ifndef INTELLECT_COORDINATOR_CONTROL_H
#define INTELLECT_COORDINATOR_CONTROL_H

#include <jansson.h>

#include "proto/err.h"

#define CONTROL_SOCKET_NAME "control.sock"
#define CONTROL_ANSWER_MS_MAX 3000
#define CONTROL_CLIENTS_MAX 16
#define CONTROL_REQUEST_BYTES_MAX 4096

struct event_base;
struct control;

/* answer: called for each request; the object it returns is taken over. dir: the run's folder, in which the
 * caller holds serve.lock: a socket that is left there is a dead process's. NULL with ERR_IO. */
struct control *control_create(struct event_base *base, const char *dir,
                               json_t *(*answer)(void *arg, const json_t *request), void *arg,
                               struct err *err);
void control_destroy(struct control *c); /* removes the socket; NULL is fine */

/* The serving process' answer; request NULL: {}. ERR_NOT_FOUND: nobody serves; ERR_TIMEOUT: somebody does, and does
 * not answer; ERR_CORRUPT: that is no JSON. */
json_t *control_ask(const char *dir, const json_t *request, struct err *err);

#endif
