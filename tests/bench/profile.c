/* profile.c - where a process' time goes, without tools or privileges: SIGPROF on its own processor
 * time, the interrupted instruction kept; names are looked up in the end. What a system call takes
 * shows at the call: the signal comes when it returns. */
#define _GNU_SOURCE /* dladdr, REG_RIP */
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

#include "tests/bench/bench.h"
#include "tests/bench/fleet.h"

#define PROFILE_SAMPLES_MAX 65536

static uintptr_t sample[PROFILE_SAMPLES_MAX];
static uint8_t sample_phase[PROFILE_SAMPLES_MAX];
static atomic_int phase_now;
static atomic_uint sample_count;
static atomic_bool on;

static uintptr_t interrupted(const ucontext_t *u) {
#if defined(__x86_64__)
    return (uintptr_t)u->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
    return (uintptr_t)u->uc_mcontext.pc;
#else
    return 0;
#endif
}

static void on_signal(int number, siginfo_t *info, void *context) {
    (void)number, (void)info;
    if (!atomic_load_explicit(&on, memory_order_relaxed)) return;
    unsigned i = atomic_fetch_add(&sample_count, 1);
    if (i >= PROFILE_SAMPLES_MAX) return;
    sample[i] = interrupted(context);
    sample_phase[i] = (uint8_t)atomic_load_explicit(&phase_now, memory_order_relaxed);
}

void profile_begin(int phase) {
    struct sigaction a = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    struct itimerval each = {{.tv_usec = 1000}, {.tv_usec = 1000}};
    atomic_store(&phase_now, phase);
    if (!atomic_exchange(&on, true)) {
        sigaction(SIGPROF, &a, NULL);
        setitimer(ITIMER_PROF, &each, NULL);
    }
}

void profile_stop(void) {
    struct itimerval none = {0};
    setitimer(ITIMER_PROF, &none, NULL);
    atomic_store(&on, false);
}

/* ---- names of this program's own functions, which dladdr() does not know --------------------- */

struct symbols {
    const uint8_t *file; /* mapped */
    size_t bytes;
    const Elf64_Sym *list;
    size_t count;
    const char *text;
    uintptr_t base; /* where the program was loaded */
};

static int take_base(struct dl_phdr_info *info, size_t size, void *arg) {
    (void)size;
    *(uintptr_t *)arg = info->dlpi_addr;
    return 1; /* the program comes first */
}

static void take_sections(struct symbols *s) {
    const Elf64_Ehdr *head = (const Elf64_Ehdr *)(const void *)s->file;
    const Elf64_Shdr *section = (const Elf64_Shdr *)(const void *)(s->file + head->e_shoff);
    if (memcmp(head->e_ident, ELFMAG, SELFMAG) || head->e_ident[EI_CLASS] != ELFCLASS64) return;
    for (int i = 0; i < head->e_shnum; i++) {
        if (section[i].sh_type != SHT_SYMTAB) continue;
        s->list = (const Elf64_Sym *)(const void *)(s->file + section[i].sh_offset);
        s->count = section[i].sh_size / sizeof *s->list;
        s->text = (const char *)(s->file + section[section[i].sh_link].sh_offset);
    }
}

static void symbols_open(struct symbols *s) {
    struct stat st;
    int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    *s = (struct symbols){0};
    dl_iterate_phdr(take_base, &s->base);
    if (fd < 0 || fstat(fd, &st)) return;
    void *file = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (file == MAP_FAILED) return;
    s->file = file;
    s->bytes = (size_t)st.st_size;
    take_sections(s);
}

/* *of: the file it was compiled from; "" for what is no `static`. NULL: no such function. */
static const char *symbols_find(const struct symbols *s, uintptr_t at, const char **of) {
    const char *source = "";
    for (size_t i = 0; i < s->count; i++) {
        const Elf64_Sym *y = &s->list[i];
        if (ELF64_ST_TYPE(y->st_info) == STT_FILE) source = s->text + y->st_name;
        if (ELF64_ST_TYPE(y->st_info) != STT_FUNC || at - s->base < y->st_value ||
            at - s->base - y->st_value >= y->st_size)
            continue;
        *of = ELF64_ST_BIND(y->st_info) == STB_LOCAL ? source : "";
        return s->text + y->st_name;
    }
    return NULL;
}

/* ---- what a sample means --------------------------------------------------------------------- */

static bool begins(const char *text, const char *with) {
    return !strncmp(text, with, strlen(with));
}

static bool is_system_call(uintptr_t at) {
#if defined(__x86_64__)
    return !memcmp((const void *)(at - 2), "\x0f\x05", 2);
#elif defined(__aarch64__)
    return !memcmp((const void *)(at - 4), "\x01\x00\x00\xd4", 4);
#else
    return false;
#endif
}

static enum fleet_place place_of_own(const char *name, const char *source) {
    if (begins(name, "outer_") || begins(source, "outer")) return FLEET_CODEC;
    if (begins(name, "digest_") || begins(source, "digest")) return FLEET_HASHING;
    return FLEET_OTHER;
}

static enum fleet_place place_of(const struct symbols *s, uintptr_t at, const char **name) {
    Dl_info info = {0};
    const char *source;
    if ((*name = symbols_find(s, at, &source))) return place_of_own(*name, source);
    if (!dladdr((const void *)at, &info) || !info.dli_fname) {
        *name = "?";
        return FLEET_OTHER;
    }
    const char *slash = strrchr(info.dli_fname, '/'), *file = slash ? slash + 1 : info.dli_fname;
    *name = info.dli_sname ? info.dli_sname : file;
    if (begins(file, "libsodium")) return FLEET_HASHING;
    if (begins(file, "libcrypto") || begins(file, "libssl")) return FLEET_TLS;
    if (!begins(file, "libc.")) return FLEET_OTHER;
    return is_system_call(at) ? FLEET_KERNEL : FLEET_COPYING;
}

static void count(struct fleet_profile *out, const char *name) {
    uint32_t i = 0;
    while (i < out->functions && strncmp(out->function[i].name, name, sizeof out->function->name - 1))
        i++;
    if (i == FLEET_NAMES_MAX) return;
    if (i == out->functions) {
        strncpy(out->function[i].name, name, sizeof out->function->name - 1);
        out->functions++;
    }
    out->function[i].samples++;
}

static int more_samples_first(const void *a, const void *b) {
    uint32_t x = ((const struct fleet_function *)a)->samples,
             y = ((const struct fleet_function *)b)->samples;
    return (x < y) - (x > y);
}

void profile_write(struct fleet_profile out[FLEET_PHASES]) {
    struct symbols s;
    const char *name;
    unsigned n = atomic_load(&sample_count);
    if (n > PROFILE_SAMPLES_MAX) n = PROFILE_SAMPLES_MAX;
    symbols_open(&s);
    memset(out, 0, FLEET_PHASES * sizeof *out);
    for (uint32_t i = 0; i < n; i++) {
        struct fleet_profile *p = &out[sample_phase[i]];
        p->samples++;
        p->place[place_of(&s, sample[i], &name)]++;
        count(p, name);
    }
    for (int i = 0; i < FLEET_PHASES; i++)
        qsort(out[i].function, out[i].functions, sizeof *out->function, more_samples_first);
    if (s.file) munmap((void *)(uintptr_t)s.file, s.bytes);
}
