/* nvml.c - a management library as the driver's looks from outside, of a machine with two GPUs: for tests of
 * node/nvml.c. FAKE_NVML=broken: it does not start. FAKE_NVML_PID: a process on the first GPU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct memory {
    unsigned long long total, free, used;
};
struct process {
    unsigned pid;
    unsigned long long bytes;
    unsigned instance, compute;
};
static int devices[2];

int nvmlInit_v2(void);
int nvmlShutdown(void);
const char *nvmlErrorString(int code);
int nvmlSystemGetDriverVersion(char *out, unsigned size);
int nvmlSystemGetCudaDriverVersion_v2(int *out);
int nvmlDeviceGetCount_v2(unsigned *out);
int nvmlDeviceGetHandleByIndex_v2(unsigned i, int **out);
int nvmlDeviceGetName(int *d, char *out, unsigned size);
int nvmlDeviceGetMemoryInfo(int *d, struct memory *out);
int nvmlDeviceGetCurrPcieLinkGeneration(int *d, unsigned *out);
int nvmlDeviceGetCurrPcieLinkWidth(int *d, unsigned *out);
int nvmlDeviceGetMaxPcieLinkGeneration(int *d, unsigned *out);
int nvmlDeviceGetMaxPcieLinkWidth(int *d, unsigned *out);
int nvmlDeviceGetNvLinkState(int *d, unsigned link, unsigned *out);
int nvmlDeviceGetComputeRunningProcesses_v3(int *d, unsigned *count, struct process *out);
int nvmlDeviceGetTopologyCommonAncestor(int *a, int *b, int *out);

int nvmlInit_v2(void) {
    const char *how = getenv("FAKE_NVML");
    return how && !strcmp(how, "broken") ? 9 : 0;
}
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "Unknown Error"; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { return snprintf(out, size, "580.65.06") < 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { return *out = 13000, 0; }
int nvmlDeviceGetCount_v2(unsigned *out) { return *out = 2, 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, int **out) { return i < 2 ? (*out = &devices[i], 0) : 6; }
int nvmlDeviceGetName(int *d, char *out, unsigned size) {
    return snprintf(out, size, d == devices ? "NVIDIA H100 80GB HBM3" : "NVIDIA Unheard Of") < 0;
}
int nvmlDeviceGetMemoryInfo(int *d, struct memory *out) {
    *out = (struct memory){ 80ull << 30, 70ull << 30, 10ull << 30 };
    (void)d;
    return 0;
}
int nvmlDeviceGetCurrPcieLinkGeneration(int *d, unsigned *out) { return *out = d == devices ? 5 : 3, 0; }
int nvmlDeviceGetCurrPcieLinkWidth(int *d, unsigned *out) { return *out = d == devices ? 16 : 4, 0; }
int nvmlDeviceGetMaxPcieLinkGeneration(int *d, unsigned *out) { return *out = 5, (void)d, 0; }
int nvmlDeviceGetMaxPcieLinkWidth(int *d, unsigned *out) { return *out = 16, (void)d, 0; }
int nvmlDeviceGetNvLinkState(int *d, unsigned link, unsigned *out) {
    return (void)d, link < 4 ? (*out = link < 3, 0) : 3;
}
int nvmlDeviceGetComputeRunningProcesses_v3(int *d, unsigned *count, struct process *out) {
    const char *pid = getenv("FAKE_NVML_PID");
    unsigned n = d == devices && pid ? 2 : 0;
    if (n > *count) return 7;
    if (n) {
        out[0] = (struct process){ 4194305, 1ull << 30, 0, 0 }; /* more than any process has */
        out[1] = (struct process){ (unsigned)atoi(pid), 9ull << 30, 0, 0 };
    }
    *count = n;
    return 0;
}
int nvmlDeviceGetTopologyCommonAncestor(int *a, int *b, int *out) { return *out = a == b ? 0 : 20, 0; }
