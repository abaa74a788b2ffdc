/* An NVML that a test scripts: the soname and symbols of the driver's libnvidia-ml.so.1, its answers read
 * from a state file that the test replaces (atomically) while a process runs.
 *
 * The layout of `struct state` is mirrored by ctypes in driver.py; `size` guards against drift. A symbol is
 * left out of a build with -DnvmlSomething=absent_nvmlSomething. Return codes and structures follow nvml.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x4e564d4cu
#define MAX_GPUS 16
#define MAX_LINKS 18
#define MAX_PROCESSES 32
#define MAX_MIG 8
#define MAX_EVENTS 64

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15, VERSION_MISMATCH = 25
};

/* What a scripted failure applies to; the order is FIELDS in driver.py. */
enum field {
    F_IDENTITY, F_MEMORY, F_UTILISATION, F_TEMPERATURE, F_THRESHOLD, F_POWER, F_POWER_LIMIT, F_CLOCKS,
    F_THROTTLE, F_ECC, F_REMAPPED, F_RETIRED, F_NVLINK, F_TOPOLOGY, F_AFFINITY, F_MIG, F_PROCESSES,
    F_EVENTS, F_RECOVERY, FIELDS
};

struct process { uint32_t pid, reserved; uint64_t bytes; };
struct mig { char uuid[96]; uint64_t total, used; uint32_t gpu_instance, compute_instance; };
struct link { uint32_t active; int32_t remote_gpu; };
struct event { uint64_t seq, type, data; uint32_t gpu, reserved; };

struct gpu {
    char uuid[96], name[96], bus_id[32];
    uint64_t memory_total, memory_used, memory_reserved, throttle;
    uint64_t ecc[2][2]; /* corrected, uncorrected by volatile, aggregate */
    uint64_t cpu_mask[4];
    uint32_t utilisation, memory_utilisation, temperature, slowdown, shutdown;
    uint32_t power_mw, power_limit_mw, sm_mhz, memory_mhz, max_sm_mhz, max_memory_mhz;
    uint32_t remapped[4]; /* corrected, uncorrected, pending, failed */
    uint32_t retired_corrected, retired_uncorrected, retired_pending;
    uint32_t numa_node, capability_major, capability_minor, recovery_action;
    uint32_t lost, hidden, hang_ms;
    uint32_t link_count, process_count, mig_mode, mig_count;
    uint32_t errors[FIELDS];
    struct link links[MAX_LINKS];
    struct process processes[MAX_PROCESSES];
    struct mig migs[MAX_MIG];
};

struct state {
    uint32_t magic, size, init_result, call_result, gpu_count, reserved;
    uint64_t event_head; /* seq of the next event; the ring holds the last MAX_EVENTS */
    char driver_version[80];
    struct event events[MAX_EVENTS];
    uint32_t topology[MAX_GPUS][MAX_GPUS];
    struct gpu gpus[MAX_GPUS];
};

struct event_set { uint64_t next; uint64_t mask[MAX_GPUS]; };

typedef struct { char legacy[16]; uint32_t domain, bus, device, id, subsystem; char bus_id[32]; } pci_info;
typedef struct { uint32_t version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { uint32_t gpu, memory; } utilisation;
typedef struct { uint32_t version, sensor; int32_t temperature; } temperature_v1;
typedef struct { uint32_t pid; unsigned long long bytes; uint32_t gpu_instance, compute_instance; } process_info;
typedef struct { void *device; unsigned long long type, data; uint32_t gpu_instance, compute_instance; } event_data;
typedef struct {
    uint32_t field, scope; int64_t timestamp, latency; uint32_t value_type, result;
    union { double d; uint32_t u; unsigned long long ull; } value;
} field_value;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct state state;
static struct stat seen;
static int loaded, users;
static char gpu_tokens[MAX_GPUS], mig_tokens[MAX_GPUS][MAX_MIG];

/* Takes the newest state; the mutex is held. A file that is gone means that the driver is not loaded. */
static int reload(void) {
    const char *path = getenv("TIERPLANE_TEST_NVML_STATE");
    struct stat now;
    if (path == NULL || stat(path, &now) != 0) return loaded = 0, DRIVER_NOT_LOADED;
    if (loaded && now.st_ino == seen.st_ino && now.st_mtim.tv_sec == seen.st_mtim.tv_sec &&
        now.st_mtim.tv_nsec == seen.st_mtim.tv_nsec)
        return SUCCESS;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return loaded = 0, DRIVER_NOT_LOADED;
    static struct state fresh;
    ssize_t got = read(fd, &fresh, sizeof fresh);
    close(fd);
    if (got != (ssize_t)sizeof fresh || fresh.magic != MAGIC || fresh.size != sizeof fresh) {
        fprintf(stderr, "test NVML: %s is %zd bytes, not the %zu of this build\n", path, got, sizeof fresh);
        return loaded = 0, DRIVER_NOT_LOADED;
    }
    state = fresh;
    seen = now;
    loaded = 1;
    return SUCCESS;
}

static int ready(void) {
    if (users == 0) return UNINITIALIZED;
    int result = reload();
    return result != SUCCESS ? result : (int)state.call_result;
}

static int find(const void *device, int *gpu, int *mig) {
    const char *token = device;
    *mig = -1;
    if (token >= gpu_tokens && token < gpu_tokens + MAX_GPUS) return *gpu = (int)(token - gpu_tokens), SUCCESS;
    const char *first = &mig_tokens[0][0];
    if (token < first || token >= first + sizeof mig_tokens) return INVALID_ARGUMENT;
    *gpu = (int)(token - first) / MAX_MIG;
    *mig = (int)(token - first) % MAX_MIG;
    return SUCCESS;
}

/* Begins a call on a device: on success the mutex is held and `at` and `mig` say which device. */
static int enter(const void *device, enum field field, struct gpu **at, int *mig) {
    int gpu = 0;
    pthread_mutex_lock(&mutex);
    int result = ready();
    if (result == SUCCESS) result = find(device, &gpu, mig);
    if (result == SUCCESS && state.gpus[gpu].hang_ms > 0) {
        struct timespec pause = {state.gpus[gpu].hang_ms / 1000, (state.gpus[gpu].hang_ms % 1000) * 1000000L};
        pthread_mutex_unlock(&mutex);
        nanosleep(&pause, NULL);
        pthread_mutex_lock(&mutex);
        result = ready();
    }
    if (result == SUCCESS && state.gpus[gpu].lost) result = GPU_IS_LOST;
    if (result == SUCCESS) result = (int)state.gpus[gpu].errors[field];
    if (result != SUCCESS) return pthread_mutex_unlock(&mutex), result;
    *at = &state.gpus[gpu];
    return SUCCESS;
}

static int leave(int result) { return pthread_mutex_unlock(&mutex), result; }

#define ON_DEVICE(field)                                   \
    struct gpu *g; int mig;                                \
    int entered = enter(device, field, &g, &mig);          \
    if (entered != SUCCESS) return entered;                \
    (void)mig

#define GETTER(name, type, field, value)                   \
    int name(void *device, type *out) {                    \
        ON_DEVICE(field);                                  \
        *out = (value);                                    \
        return leave(SUCCESS);                             \
    }

/* --- the library ------------------------------------------------------------------------------------- */

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&mutex);
    int result = reload();
    if (result == SUCCESS) result = (int)state.init_result;
    if (result == SUCCESS) users++;
    return leave(result);
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    pthread_mutex_lock(&mutex);
    if (users == 0) return leave(UNINITIALIZED);
    users--;
    return leave(SUCCESS);
}

const char *nvmlErrorString(int code) { return code == SUCCESS ? "Success" : "scripted error"; }

int nvmlSystemGetDriverVersion(char *out, unsigned size) {
    pthread_mutex_lock(&mutex);
    int result = ready();
    if (result == SUCCESS) snprintf(out, size, "%s", state.driver_version);
    return leave(result);
}
int nvmlSystemGetNVMLVersion(char *out, unsigned size) {
    snprintf(out, size, "13.580.00");
    return SUCCESS;
}
int nvmlSystemGetCudaDriverVersion(int *out) { return *out = 13000, SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { return *out = 13000, SUCCESS; }

/* --- finding devices ----------------------------------------------------------------------------------- */

int nvmlDeviceGetCount_v2(unsigned *out) {
    pthread_mutex_lock(&mutex);
    int result = ready();
    *out = 0;
    for (unsigned i = 0; result == SUCCESS && i < state.gpu_count; i++) *out += !state.gpus[i].hidden;
    return leave(result);
}

static int handle_of(unsigned slot, void **out) {
    if (state.gpus[slot].lost) return GPU_IS_LOST;
    return *out = &gpu_tokens[slot], SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    pthread_mutex_lock(&mutex);
    int result = ready();
    if (result != SUCCESS) return leave(result);
    for (unsigned i = 0; i < state.gpu_count; i++)
        if (!state.gpus[i].hidden && index-- == 0) return leave(handle_of(i, out));
    return leave(INVALID_ARGUMENT);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
    pthread_mutex_lock(&mutex);
    int result = ready();
    if (result != SUCCESS) return leave(result);
    for (unsigned i = 0; i < state.gpu_count; i++)
        if (!state.gpus[i].hidden && strcmp(uuid, state.gpus[i].uuid) == 0) return leave(handle_of(i, out));
    return leave(NOT_FOUND);
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, void **out) {
    pthread_mutex_lock(&mutex);
    int result = ready();
    if (result != SUCCESS) return leave(result);
    for (unsigned i = 0; i < state.gpu_count; i++)
        if (!state.gpus[i].hidden && strcasecmp(bus_id, state.gpus[i].bus_id) == 0) return leave(handle_of(i, out));
    return leave(NOT_FOUND);
}

int nvmlDeviceGetUUID(void *device, char *out, unsigned size) {
    ON_DEVICE(F_IDENTITY);
    snprintf(out, size, "%s", mig < 0 ? g->uuid : g->migs[mig].uuid);
    return leave(SUCCESS);
}
int nvmlDeviceGetName(void *device, char *out, unsigned size) {
    ON_DEVICE(F_IDENTITY);
    snprintf(out, size, "%s", g->name);
    return leave(SUCCESS);
}
GETTER(nvmlDeviceGetIndex, unsigned, F_IDENTITY, (unsigned)(g - state.gpus))
GETTER(nvmlDeviceGetMinorNumber, unsigned, F_IDENTITY, (unsigned)(g - state.gpus))
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    ON_DEVICE(F_IDENTITY);
    *major = (int)g->capability_major;
    *minor = (int)g->capability_minor;
    return leave(SUCCESS);
}

static void fill_pci(pci_info *out, const char *bus_id) {
    memset(out, 0, sizeof *out);
    snprintf(out->bus_id, sizeof out->bus_id, "%s", bus_id);
    snprintf(out->legacy, sizeof out->legacy, "%.15s", bus_id + 4);
    sscanf(bus_id, "%x:%x:%x", &out->domain, &out->bus, &out->device);
}
int nvmlDeviceGetPciInfo_v3(void *device, pci_info *out) {
    ON_DEVICE(F_IDENTITY);
    fill_pci(out, g->bus_id);
    return leave(SUCCESS);
}

/* --- what a device measures ---------------------------------------------------------------------------- */

int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2 *out) {
    ON_DEVICE(F_MEMORY);
    if (out->version != 0x02000028u) return leave(VERSION_MISMATCH);
    out->total = mig < 0 ? g->memory_total : g->migs[mig].total;
    out->used = mig < 0 ? g->memory_used : g->migs[mig].used;
    out->reserved = mig < 0 ? g->memory_reserved : 0;
    out->free = out->total - out->used - out->reserved;
    return leave(SUCCESS);
}
int nvmlDeviceGetMemoryInfo(void *device, memory_v1 *out) {
    ON_DEVICE(F_MEMORY);
    out->total = mig < 0 ? g->memory_total : g->migs[mig].total;
    out->used = mig < 0 ? g->memory_used + g->memory_reserved : g->migs[mig].used;
    out->free = out->total - out->used;
    return leave(SUCCESS);
}
int nvmlDeviceGetUtilizationRates(void *device, utilisation *out) {
    ON_DEVICE(F_UTILISATION);
    if (mig >= 0 || g->mig_mode) return leave(NOT_SUPPORTED);
    out->gpu = g->utilisation;
    out->memory = g->memory_utilisation;
    return leave(SUCCESS);
}
int nvmlDeviceGetTemperature(void *device, unsigned sensor, unsigned *out) {
    ON_DEVICE(F_TEMPERATURE);
    if (sensor != 0) return leave(INVALID_ARGUMENT);
    *out = g->temperature;
    return leave(SUCCESS);
}
int nvmlDeviceGetTemperatureV(void *device, temperature_v1 *out) {
    ON_DEVICE(F_TEMPERATURE);
    if (out->version != 0x100000Cu) return leave(VERSION_MISMATCH);
    out->temperature = (int32_t)g->temperature;
    return leave(SUCCESS);
}
int nvmlDeviceGetTemperatureThreshold(void *device, unsigned threshold, unsigned *out) {
    ON_DEVICE(F_THRESHOLD);
    if (threshold > 1) return leave(NOT_SUPPORTED);
    *out = threshold == 0 ? g->shutdown : g->slowdown;
    return leave(SUCCESS);
}
GETTER(nvmlDeviceGetPowerUsage, unsigned, F_POWER, g->power_mw)
GETTER(nvmlDeviceGetEnforcedPowerLimit, unsigned, F_POWER_LIMIT, g->power_limit_mw)
GETTER(nvmlDeviceGetPowerManagementLimit, unsigned, F_POWER_LIMIT, g->power_limit_mw)
int nvmlDeviceGetClockInfo(void *device, unsigned type, unsigned *out) {
    ON_DEVICE(F_CLOCKS);
    *out = type == 2 ? g->memory_mhz : g->sm_mhz;
    return leave(SUCCESS);
}
int nvmlDeviceGetMaxClockInfo(void *device, unsigned type, unsigned *out) {
    ON_DEVICE(F_CLOCKS);
    *out = type == 2 ? g->max_memory_mhz : g->max_sm_mhz;
    return leave(SUCCESS);
}
GETTER(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, F_THROTTLE, g->throttle)
GETTER(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, F_THROTTLE, g->throttle)
int nvmlDeviceGetTotalEccErrors(void *device, unsigned type, unsigned counter, unsigned long long *out) {
    ON_DEVICE(F_ECC);
    if (type > 1 || counter > 1) return leave(INVALID_ARGUMENT);
    *out = g->ecc[type][counter];
    return leave(SUCCESS);
}
int nvmlDeviceGetRemappedRows(void *device, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    ON_DEVICE(F_REMAPPED);
    *corrected = g->remapped[0];
    *uncorrected = g->remapped[1];
    *pending = g->remapped[2];
    *failed = g->remapped[3];
    return leave(SUCCESS);
}
int nvmlDeviceGetRetiredPages(void *device, unsigned cause, unsigned *count, unsigned long long *addresses) {
    ON_DEVICE(F_RETIRED);
    unsigned have = cause == 0 ? g->retired_corrected : g->retired_uncorrected;
    unsigned room = *count;
    *count = have;
    if (addresses == NULL || room < have) return leave(have == 0 ? SUCCESS : INSUFFICIENT_SIZE);
    for (unsigned i = 0; i < have; i++) addresses[i] = 0x1000ull * (i + 1);
    return leave(SUCCESS);
}
GETTER(nvmlDeviceGetRetiredPagesPendingStatus, unsigned, F_RETIRED, g->retired_pending)
int nvmlDeviceGetFieldValues(void *device, int count, field_value *values) {
    ON_DEVICE(F_RECOVERY);
    for (int i = 0; i < count; i++) {
        values[i].result = values[i].field == 230 ? SUCCESS : NOT_SUPPORTED;
        values[i].value_type = 1;
        values[i].value.ull = 0;
        values[i].value.u = g->recovery_action;
    }
    return leave(SUCCESS);
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process_info *out) {
    ON_DEVICE(F_PROCESSES);
    unsigned room = *count, have = mig < 0 ? g->process_count : 0;
    *count = have;
    if (have > 0 && (out == NULL || room < have)) return leave(INSUFFICIENT_SIZE);
    for (unsigned i = 0; i < have; i++)
        out[i] = (process_info){g->processes[i].pid, g->processes[i].bytes, 0xffffffffu, 0xffffffffu};
    return leave(SUCCESS);
}
int nvmlDeviceGetComputeRunningProcesses_v2(void *device, unsigned *count, process_info *out) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, out);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *count, process_info *out) {
    ON_DEVICE(F_PROCESSES);
    (void)out;
    *count = 0;
    return leave(SUCCESS);
}

/* --- how devices hang together ---------------------------------------------------------------------------- */

static int at_link(struct gpu *g, unsigned link) {
    if (g->link_count == 0) return NOT_SUPPORTED;
    return link < g->link_count ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetNvLinkState(void *device, unsigned link, unsigned *out) {
    ON_DEVICE(F_NVLINK);
    int result = at_link(g, link);
    if (result == SUCCESS) *out = g->links[link].active;
    return leave(result);
}
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, pci_info *out) {
    ON_DEVICE(F_NVLINK);
    int result = at_link(g, link);
    if (result != SUCCESS) return leave(result);
    int remote = g->links[link].remote_gpu;
    fill_pci(out, remote < 0 ? "00000000:C0:00.0" : state.gpus[remote].bus_id);
    return leave(SUCCESS);
}
int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, unsigned *out) {
    ON_DEVICE(F_NVLINK);
    int result = at_link(g, link);
    if (result == SUCCESS) *out = g->links[link].remote_gpu < 0 ? 2 : 0;
    return leave(result);
}
int nvmlDeviceGetTopologyCommonAncestor(void *device, void *other, unsigned *out) {
    int second, second_mig;
    ON_DEVICE(F_TOPOLOGY);
    int result = find(other, &second, &second_mig);
    if (result == SUCCESS && state.gpus[second].lost) result = GPU_IS_LOST;
    if (result == SUCCESS) *out = state.topology[g - state.gpus][second];
    return leave(result);
}
int nvmlDeviceGetCpuAffinity(void *device, unsigned size, unsigned long *out) {
    ON_DEVICE(F_AFFINITY);
    for (unsigned i = 0; i < size; i++) out[i] = i < 4 ? g->cpu_mask[i] : 0;
    return leave(SUCCESS);
}
int nvmlDeviceGetMemoryAffinity(void *device, unsigned size, unsigned long *out, unsigned scope) {
    ON_DEVICE(F_AFFINITY);
    (void)scope;
    for (unsigned i = 0; i < size; i++) out[i] = g->numa_node / 64 == i ? 1ul << (g->numa_node % 64) : 0;
    return leave(SUCCESS);
}

/* --- MIG --------------------------------------------------------------------------------------------------- */

int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    ON_DEVICE(F_MIG);
    *current = *pending = g->mig_mode;
    return leave(SUCCESS);
}
GETTER(nvmlDeviceGetMaxMigDeviceCount, unsigned, F_MIG, MAX_MIG)
int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **out) {
    ON_DEVICE(F_MIG);
    if (!g->mig_mode || index >= g->mig_count) return leave(NOT_FOUND);
    *out = &mig_tokens[g - state.gpus][index];
    return leave(SUCCESS);
}
GETTER(nvmlDeviceIsMigDeviceHandle, unsigned, F_MIG, mig >= 0)
GETTER(nvmlDeviceGetGpuInstanceId, unsigned, F_MIG, mig < 0 ? 0 : g->migs[mig].gpu_instance)
GETTER(nvmlDeviceGetComputeInstanceId, unsigned, F_MIG, mig < 0 ? 0 : g->migs[mig].compute_instance)

/* --- events ------------------------------------------------------------------------------------------------- */

int nvmlEventSetCreate(void **out) {
    pthread_mutex_lock(&mutex);
    int result = ready();
    if (result != SUCCESS) return leave(result);
    struct event_set *set = calloc(1, sizeof *set);
    set->next = state.event_head;
    *out = set;
    return leave(SUCCESS);
}
int nvmlEventSetFree(void *set) { return free(set), SUCCESS; }
GETTER(nvmlDeviceGetSupportedEventTypes, unsigned long long, F_EVENTS, 0xfull)
int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) {
    ON_DEVICE(F_EVENTS);
    ((struct event_set *)set)->mask[g - state.gpus] |= types;
    return leave(SUCCESS);
}

static int next_event(struct event_set *set, event_data *out) {
    if (state.event_head > set->next + MAX_EVENTS) set->next = state.event_head - MAX_EVENTS;
    while (set->next < state.event_head) {
        struct event *e = &state.events[set->next++ % MAX_EVENTS];
        if ((set->mask[e->gpu] & e->type) == 0) continue;
        *out = (event_data){&gpu_tokens[e->gpu], e->type, e->data, 0xffffffffu, 0xffffffffu};
        return SUCCESS;
    }
    for (unsigned i = 0; i < state.gpu_count; i++)
        if (set->mask[i] && state.gpus[i].lost) return GPU_IS_LOST;
    return TIMEOUT;
}

/* The driver sleeps until an interrupt; here the state file is looked at every 2 ms. */
int nvmlEventSetWait_v2(void *set, event_data *out, unsigned timeout_ms) {
    struct timespec pause = {0, 2000000};
    for (unsigned waited = 0;; waited += 2) {
        pthread_mutex_lock(&mutex);
        int result = ready();
        if (result == SUCCESS) result = next_event(set, out);
        pthread_mutex_unlock(&mutex);
        if (result != TIMEOUT || waited >= timeout_ms) return result;
        nanosleep(&pause, NULL);
    }
}
