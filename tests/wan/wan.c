/* wan.c - long, slow, lossy links between network namespaces, for tests of a world-wide run on one machine whose
 * kernel need not have netem. Root, /dev/net/tun and iproute2's `ip` are needed.
 *
 *   wan PREFIX FILE [RATE_FACTOR]
 *
 * Each site of FILE is the namespace PREFIX-SITE with a TUN device of address 10.88.N.1, N from 1 in the order in
 * which the sites come. A line of FILE is two sites and their link: round trip in ms, jitter in +- ms, Mbit/s, loss
 * in percent of packets; `A > B` says it for that direction alone, after the line for both. RATE_FACTOR scales all rates.
 *
 * Prints "ready" when the sites are there, then obeys stdin: `cut A B`, `heal A B`, `bytes` (prints a line
 * `FROM TO BYTES LOST` for each direction). Ends with stdin, and removes the namespaces.
 *
 * A direction is a virtual clock: a packet leaves when the bits of those before it have left, and arrives half a round
 * trip later, in order. What would wait over QUEUE_MS at the bottleneck is dropped, as a router does. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define SITES_MAX 16
#define NAME_BYTES 24
#define PACKET_BYTES 1500
#define QUEUE_MS 200.0
#define HELD_BYTES_MAX (512u << 20) /* in all queues together */
#define SLACK_NS 50000              /* packets that are due so close together are handed over at once */

struct packet {
    struct packet *next;
    int64_t due_ns;
    uint32_t length;
    uint8_t data[PACKET_BYTES];
};

struct direction {
    double latency_ms, jitter_ms, mbit, loss;
    bool there, cut;
    int64_t clear_ns, last_ns; /* when the bottleneck is free; when the newest packet arrives */
    struct packet *head, **tail;
    uint64_t bytes, lost;
};

static struct {
    char prefix[NAME_BYTES], site[SITES_MAX][NAME_BYTES];
    uint32_t sites;
    int tun[SITES_MAX];
    bool made[SITES_MAX];
    struct direction way[SITES_MAX][SITES_MAX];
    uint64_t held_bytes, random;
} wan = { .random = 88172645463325252u };

static void end(int status) {
    char command[128];
    for (uint32_t i = 0; i < wan.sites; i++) {
        if (!wan.made[i]) continue;
        snprintf(command, sizeof command, "ip netns del %s-%s", wan.prefix, wan.site[i]);
        if (system(command)) fprintf(stderr, "wan: namespace %s-%s stays\n", wan.prefix, wan.site[i]);
    }
    exit(status);
}

__attribute__((noreturn)) static void fail(const char *what, const char *which) {
    fprintf(stderr, "wan: %s %s: %s\n", what, which, errno ? strerror(errno) : "see above");
    end(1);
    abort();
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* In [0, 1): xorshift, the same packets lost in every run that sends the same. */
static double uniform(void) {
    wan.random ^= wan.random << 13;
    wan.random ^= wan.random >> 7;
    wan.random ^= wan.random << 17;
    return (double)(wan.random >> 11) * 0x1p-53;
}

/* ---- packets ---------------------------------------------------------------------------------- */

static void carry(uint32_t from, const struct packet *p, int64_t now) {
    uint32_t address;
    if (p->length < 20 || p->data[0] >> 4 != 4) return;
    memcpy(&address, p->data + 16, sizeof address); /* IPv4's destination */
    uint32_t to = (ntohl(address) >> 8 & 255) - 1;
    if (ntohl(address) >> 16 != (10 << 8 | 88) || to >= wan.sites || to == from) return;
    struct direction *w = &wan.way[from][to];
    int64_t start = w->clear_ns > now ? w->clear_ns : now;
    bool full = (double)(start - now) > QUEUE_MS * 1e6 || wan.held_bytes > HELD_BYTES_MAX;
    struct packet *copy = NULL;
    if (w->there && !w->cut && !full && uniform() * 100 >= w->loss) copy = malloc(sizeof *copy);
    if (!copy) {
        w->lost++;
        return;
    }
    *copy = *p;
    w->clear_ns = start + (int64_t)(p->length * 8e3 / w->mbit);
    copy->due_ns = w->clear_ns + (int64_t)(1e6 * (w->latency_ms + (2 * uniform() - 1) * w->jitter_ms));
    if (copy->due_ns < w->last_ns) copy->due_ns = w->last_ns;
    w->last_ns = copy->due_ns;
    copy->next = NULL;
    *w->tail = copy;
    w->tail = &copy->next;
    wan.held_bytes += copy->length;
}

static void read_site(uint32_t site, int64_t now) {
    struct packet p;
    for (int i = 0; i < 64; i++) {
        ssize_t n = read(wan.tun[site], p.data, sizeof p.data);
        if (n <= 0) return;
        p.length = (uint32_t)n;
        carry(site, &p, now);
    }
}

/* What is due arrives. Returns when the next packet is. */
static int64_t deliver(struct direction *w, int tun, int64_t now) {
    struct packet *p;
    while ((p = w->head) && p->due_ns <= now) {
        w->head = p->next;
        if (!w->head) w->tail = &w->head;
        wan.held_bytes -= p->length;
        if (!w->cut && write(tun, p->data, p->length) == (ssize_t)p->length) w->bytes += p->length;
        else w->lost++;
        free(p);
    }
    return p ? p->due_ns : INT64_MAX;
}

static int64_t deliver_all(int64_t now) {
    int64_t next = now + 1000000000;
    for (uint32_t a = 0; a < wan.sites; a++)
        for (uint32_t b = 0; b < wan.sites; b++) {
            int64_t due = deliver(&wan.way[a][b], wan.tun[b], now);
            if (due < next) next = due;
        }
    return next;
}

/* ---- what is said on stdin ---------------------------------------------------------------------- */

static int find_site(const char *name) {
    for (uint32_t i = 0; i < wan.sites; i++)
        if (!strcmp(wan.site[i], name)) return (int)i;
    return -1;
}

static void obey(const char *line) {
    char what[8], a[NAME_BYTES], b[NAME_BYTES];
    int words = sscanf(line, "%7s %23s %23s", what, a, b);
    if (words == 1 && !strcmp(what, "bytes")) {
        for (uint32_t i = 0; i < wan.sites * wan.sites; i++) {
            const struct direction *w = &wan.way[i / wan.sites][i % wan.sites];
            if (w->there)
                printf("%s %s %llu %llu\n", wan.site[i / wan.sites], wan.site[i % wan.sites],
                       (unsigned long long)w->bytes, (unsigned long long)w->lost);
        }
        puts("end");
    } else if (words == 3 && (!strcmp(what, "cut") || !strcmp(what, "heal")) && find_site(a) >= 0 && find_site(b) >= 0) {
        wan.way[find_site(a)][find_site(b)].cut = wan.way[find_site(b)][find_site(a)].cut = *what == 'c';
        puts("end");
    } else {
        printf("wan: not understood: %s", line);
    }
    fflush(stdout);
}

/* False at the end of stdin. */
static bool listen_to_stdin(void) {
    static char line[256];
    static size_t n;
    ssize_t got = read(0, line + n, sizeof line - 1 - n);
    if (got <= 0) return false;
    n += (size_t)got;
    line[n] = '\0';
    for (char *newline; (newline = strchr(line, '\n'));) {
        char one[256];
        size_t length = (size_t)(newline - line) + 1;
        memcpy(one, line, length);
        one[length] = '\0';
        memmove(line, line + length, n - length + 1);
        n -= length;
        obey(one);
    }
    return n < sizeof line - 1;
}

/* ---- the sites ------------------------------------------------------------------------------------ */

static uint32_t site_named(const char *name) {
    int i = find_site(name);
    if (i >= 0) return (uint32_t)i;
    errno = EINVAL;
    if (wan.sites == SITES_MAX || name[strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789-")]) fail("site", name);
    strcpy(wan.site[wan.sites], name);
    return wan.sites++;
}

static void read_links(const char *path, double factor) {
    char line[256], a[NAME_BYTES], b[NAME_BYTES];
    FILE *f = fopen(path, "r");
    if (!f) fail("open", path);
    while (fgets(line, sizeof line, f)) {
        struct direction w = { .there = true };
        double rtt;
        bool one_way = strchr(line, '>') != NULL;
        if (*line == '#' || *line == '\n') continue;
        errno = EINVAL;
        if (sscanf(line, one_way ? "%23s > %23s %lf %lf %lf %lf" : "%23s %23s %lf %lf %lf %lf", a, b, &rtt, &w.jitter_ms,
                   &w.mbit, &w.loss) != 6 || !(rtt >= 0 && w.mbit > 0))
            fail("not understood:", line);
        w.latency_ms = rtt / 2;
        w.mbit *= factor;
        uint32_t i = site_named(a), j = site_named(b);
        wan.way[i][j] = w;
        wan.way[i][j].tail = &wan.way[i][j].head;
        if (one_way) continue;
        wan.way[j][i] = w;
        wan.way[j][i].tail = &wan.way[j][i].head;
    }
    fclose(f);
}

static void run_ip(const char *format, const char *site, uint32_t number) {
    char command[256];
    snprintf(command, sizeof command, format, wan.prefix, site, number);
    errno = 0;
    if (system(command)) fail("failed:", command);
}

static void make_site(uint32_t i) {
    char path[128];
    struct ifreq request = { .ifr_flags = IFF_TUN | IFF_NO_PI, .ifr_name = "wan0" };
    run_ip("ip netns add %s-%s", wan.site[i], 0);
    wan.made[i] = true;
    snprintf(path, sizeof path, "/run/netns/%s-%s", wan.prefix, wan.site[i]);
    int ns = open(path, O_RDONLY | O_CLOEXEC);
    if (ns < 0 || setns(ns, CLONE_NEWNET)) fail("enter", path);
    close(ns);
    wan.tun[i] = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (wan.tun[i] < 0 || ioctl(wan.tun[i], TUNSETIFF, &request)) fail("make a TUN device in", path);
    run_ip("ip -n %s-%s addr add 10.88.%u.1/16 dev wan0", wan.site[i], i + 1);
    run_ip("ip -n %s-%s link set wan0 mtu 1500 txqueuelen 10000 up", wan.site[i], 0);
    run_ip("ip -n %s-%s link set lo up", wan.site[i], 0);
}

static void make_sites(void) {
    int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    for (uint32_t i = 0; i < wan.sites; i++) make_site(i);
    if (home < 0 || setns(home, CLONE_NEWNET)) fail("come back to", "the first namespace");
    close(home);
}

int main(int argc, char **argv) {
    if (argc < 3 || strlen(argv[1]) >= sizeof wan.prefix) {
        fprintf(stderr, "wan PREFIX FILE [RATE_FACTOR]\n");
        return 2;
    }
    strcpy(wan.prefix, argv[1]);
    double factor = argc > 3 ? atof(argv[3]) : 1;
    read_links(argv[2], factor > 0 ? factor : 1);
    make_sites();
    puts("ready");
    fflush(stdout);
    for (int64_t next = 0;;) {
        struct pollfd fds[SITES_MAX + 1] = { { .fd = 0, .events = POLLIN } };
        int64_t wait = next + SLACK_NS - now_ns();
        struct timespec t = { .tv_sec = wait > 0 ? wait / 1000000000 : 0, .tv_nsec = wait > 0 ? wait % 1000000000 : 0 };
        for (uint32_t i = 0; i < wan.sites; i++) fds[i + 1] = (struct pollfd){ .fd = wan.tun[i], .events = POLLIN };
        ppoll(fds, wan.sites + 1, &t, NULL);
        int64_t now = now_ns();
        for (uint32_t i = 0; i < wan.sites; i++)
            if (fds[i + 1].revents) read_site(i, now);
        if (fds[0].revents && !listen_to_stdin()) end(0);
        next = deliver_all(now_ns());
    }
}
