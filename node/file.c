/* file.c - whole reads and writes; see file.h. */
#include "node/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int file_write(int fd, const void *bytes, size_t n, const char *path, struct err *err) {
    for (const char *p = bytes; n;) {
        ssize_t done = write(fd, p, n);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return err_set_errno(err, "write %.150s", path);
        p += done;
        n -= (size_t)done;
    }
    return 0;
}

int file_read(int fd, void *bytes, size_t n, const char *path, struct err *err) {
    for (char *p = bytes; n;) {
        ssize_t done = read(fd, p, n);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return err_set_errno(err, "read %.150s", path);
        if (done == 0) return err_set(err, ERR_TRUNCATED, "%.150s: %zu bytes are missing", path, n);
        p += done;
        n -= (size_t)done;
    }
    return 0;
}

int file_sync_folder_of(const char *path, struct err *err) {
    char folder[4096];
    snprintf(folder, sizeof folder, "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash)
        slash[slash == folder] = '\0';
    else
        strcpy(folder, ".");
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return err_set_errno(err, "open %.150s", folder);
    int rc = fsync(fd) ? err_set_errno(err, "fsync %.150s", folder) : 0;
    close(fd);
    return rc;
}
