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
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x4e564d4cu
#define MAX_GPUS 16
#define MAX_LINKS 18
#define MAX_EVENTS 64

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3,
    DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15, VERSION_MISMATCH = 25
};

/* What a scripted failure applies to; the order is FIELDS in driver.py. */
enum field {
    F_IDENTITY, F_MEMORY, F_UTILISATION, F_TEMPERATURE, F_THRESHOLD, F_POWER, F_CLOCKS, F_THROTTLE, F_ECC,
    F_REMAPPED, F_RETIRED, F_NVLINK, F_AFFINITY, F_MIG, F_EVENTS, F_RECOVERY, FIELDS
};

struct link { uint32_t active; int32_t remote_gpu; };
struct event { uint64_t seq, type, data; uint32_t gpu, reserved; };

struct gpu {
    char uuid[96], name[96], bus_id[32];
    uint64_t memory_total, memory_used, memory_reserved, throttle;
    uint64_t ecc[2]; /* corrected, uncorrected; since the driver was loaded */
    uint32_t utilisation, temperature, slowdown, shutdown, power_mw, sm_mhz;
    uint32_t remapped[4]; /* corrected, uncorrected, pending, failed */
    uint32_t retired_pending, numa_node, capability_major, capability_minor, recovery_action;
    uint32_t lost, hidden, hang_ms, link_count, mig_mode;
    uint32_t errors[FIELDS];
    struct link links[MAX_LINKS];
};

struct state {
    uint32_t magic, size, init_result, call_result, gpu_count, reserved;
    uint64_t event_head; /* seq of the next event; the ring holds the last MAX_EVENTS */
    char driver_version[80];
    struct event events[MAX_EVENTS];
    struct gpu gpus[MAX_GPUS];
};

struct event_set { uint64_t next; uint64_t mask[MAX_GPUS]; };

typedef struct { char legacy[16]; uint32_t domain, bus, device, id, subsystem; char bus_id[32]; } pci_info;
typedef struct { uint32_t version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { uint32_t gpu, memory; } utilisation;
typedef struct { uint32_t version, sensor; int32_t temperature; } temperature_v1;
typedef struct { void *device; unsigned long long type, data; uint32_t gpu_instance, compute_instance; } event_data;
typedef struct {
    uint32_t field, scope; int64_t timestamp, latency; uint32_t value_type, result;
    union { double d; uint32_t u; unsigned long long ull; } value;
} field_value;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct state state;
static struct stat seen;
static int loaded, users;
static char gpu_tokens[MAX_GPUS];

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

static int find(const void *device, int *gpu) {
    const char *token = device;
    if (token < gpu_tokens || token >= gpu_tokens + MAX_GPUS) return INVALID_ARGUMENT;
    return *gpu = (int)(token - gpu_tokens), SUCCESS;
}

/* Begins a call on a device: on success the mutex is held and `at` is the device. */
static int enter(const void *device, enum field field, struct gpu **at) {
    int gpu = 0;
    pthread_mutex_lock(&mutex);
    int result = ready();
    if (result == SUCCESS) result = find(device, &gpu);
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
    struct gpu *g;                                         \
    int entered = enter(device, field, &g);                \
    if (entered != SUCCESS) return entered

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
int nvmlDeviceGetUUID(void *device, char *out, unsigned size) {
    ON_DEVICE(F_IDENTITY);
    snprintf(out, size, "%s", g->uuid);
    return leave(SUCCESS);
}
int nvmlDeviceGetName(void *device, char *out, unsigned size) {
    ON_DEVICE(F_IDENTITY);
    snprintf(out, size, "%s", g->name);
    return leave(SUCCESS);
}
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
    out->total = g->memory_total;
    out->used = g->memory_used;
    out->reserved = g->memory_reserved;
    out->free = out->total - out->used - out->reserved;
    return leave(SUCCESS);
}
int nvmlDeviceGetMemoryInfo(void *device, memory_v1 *out) {
    ON_DEVICE(F_MEMORY);
    out->total = g->memory_total;
    out->used = g->memory_used + g->memory_reserved;
    out->free = out->total - out->used;
    return leave(SUCCESS);
}
int nvmlDeviceGetUtilizationRates(void *device, utilisation *out) {
    ON_DEVICE(F_UTILISATION);
    if (g->mig_mode) return leave(NOT_SUPPORTED);
    out->gpu = out->memory = g->utilisation;
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
int nvmlDeviceGetClockInfo(void *device, unsigned type, unsigned *out) {
    ON_DEVICE(F_CLOCKS);
    if (type != 1) return leave(NOT_SUPPORTED);
    *out = g->sm_mhz;
    return leave(SUCCESS);
}
GETTER(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, F_THROTTLE, g->throttle)
GETTER(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, F_THROTTLE, g->throttle)
int nvmlDeviceGetTotalEccErrors(void *device, unsigned type, unsigned counter, unsigned long long *out) {
    ON_DEVICE(F_ECC);
    if (type > 1 || counter != 0) return leave(INVALID_ARGUMENT);
    *out = g->ecc[type];
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
