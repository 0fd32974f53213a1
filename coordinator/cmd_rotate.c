/* cmd_rotate.c - `intellect-coordinator rotate`: a new online key in place of the old one. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/commands.h"
#include "coordinator/run.h"

static const char help[] =
    "intellect-coordinator rotate DIR [--root-key FILE]\n"
    "\n"
    "Give the coordinator a new online key and retire the old one: from the ledger entry that says so on,\n"
    "nothing the old key signs counts. Do this when online.key may have been seen by others, or as a\n"
    "habit. It takes the run's root key for a moment, and nobody may serve meanwhile; members accept the\n"
    "new key by themselves, as the root key vouches for it.\n"
    "\n"
    "  --root-key FILE  where the root key is kept (default: DIR/root.key)\n"
    "\n"
    "example: intellect-coordinator rotate myrun --root-key /media/safe/root.key\n";

enum { ROOT_KEY = 256 };
static const struct option options[] = { { "root-key", required_argument, NULL, ROOT_KEY }, { 0 } };

static int take(void *arg, int option, const char *value) {
    (void)option;
    *(const char **)arg = value;
    return 0;
}

/* What WELCOME shows: the delegation, signed by the root key for itself. */
static int encode_document(const struct run *run, const struct identity *root,
                           const struct msg_delegation *d, struct proto_buffer *out,
                           struct err *err) {
    struct proto_buffer bytes;
    proto_buffer_init(&bytes, PROTO_BLOB_BYTES_MAX);
    int result = proto_encode(&bytes, RECORD_delegation, d, err);
    if (!result) {
        struct msg_signed_entry e = { .bytes = { bytes.data, (uint32_t)bytes.length } };
        proto_sign(root, "delegation", &run->id, 0, bytes.data, bytes.length, &e.signature);
        result = proto_encode(out, RECORD_signed_entry, &e, err);
    }
    proto_buffer_release(&bytes);
    return result;
}

static int load_root(struct identity *root, const struct run *run, const char *given,
                     struct err *err) {
    char path[RUN_PATH_BYTES];
    if (!given && run_path(run->dir, RUN_ROOT_KEY, path, err)) return -1;
    if (identity_load(root, given ? given : path, err)) {
        err_prefix(err, "the run's root key (--root-key FILE says where it is kept)");
        return -1;
    }
    if (!memcmp(&root->key, &run->genesis.root_key, sizeof root->key)) return 0;
    identity_release(root);
    return err_set(err, ERR_REFUSED, "%s is not the root key of this run", given ? given : path);
}

/* The key in force now, so that the entry can retire it. */
static int current_number(const struct run *run, uint32_t *number, uint32_t *highest,
                          struct err *err) {
    struct run_keys keys;
    struct ledger_chain chain;
    if (run_keys_load(&keys, run, err)) return -1;
    int result = run_chain(run, &chain, err);
    *number = 0;
    *highest = chain.number_max;
    for (uint32_t i = 0; !result && i < chain.online_count; i++)
        if (!memcmp(&chain.online[i], &keys.online.key, sizeof keys.online.key))
            *number = chain.number[i];
    run_keys_release(&keys);
    return result;
}

static int write_key(struct identity *id, const char *path, struct err *err) {
    if (unlink(path) && access(path, F_OK) == 0) return err_set_errno(err, "remove %s", path);
    identity_create(id);
    return identity_save(id, path, err);
}

static int rotate_with(const struct run *run, const struct identity *root, uint64_t *index,
                       struct err *err) {
    struct msg_delegation d = { .run = run->id };
    struct proto_buffer document;
    struct identity next;
    struct run_keys keys;
    char path[RUN_PATH_BYTES];
    if (current_number(run, &d.retires, &d.number, err)) return -1;
    d.number++;
    if (run_path(run->dir, RUN_NEXT_KEY, path, err) || write_key(&next, path, err)) return -1;
    d.key = next.key;
    identity_release(&next);
    proto_buffer_init(&document, PROTO_BLOB_BYTES_MAX);
    int result = encode_document(run, root, &d, &document, err);
    if (!result) {
        struct proto_bytes shown = { document.data, (uint32_t)document.length };
        struct run_entry entry = { LEDGER_DELEGATION, RECORD_delegation, &d };
        result = run_append(run, root, &entry, NULL, 0, &shown, index, err);
    }
    proto_buffer_release(&document);
    if (!result) result = run_keys_load(&keys, run, err); /* puts the new key in its place */
    if (!result) run_keys_release(&keys);
    return result;
}

int coordinator_rotate(int argc, char **argv) {
    const char *root_key = NULL, *dir;
    struct command_line line = { help, options, take, &root_key };
    struct identity root;
    struct run run;
    struct err err;
    uint64_t index = 0;
    int code, lock;
    if (!command_line_parse(&line, argc, argv, &dir, &code)) return code;
    if (run_open(&run, dir, &err)) return coordinator_failed(&err);
    int failed = store_lock(run.dir, &lock, &err);
    if (!failed) {
        failed = load_root(&root, &run, root_key, &err);
        if (!failed) {
            failed = rotate_with(&run, &root, &index, &err);
            identity_release(&root);
        }
        close(lock);
    }
    run_release(&run);
    if (failed) return coordinator_failed(&err);
    printf("the old online key is retired by ledger entry %llu; serve the run to go on\n",
           (unsigned long long)index);
    return 0;
}
