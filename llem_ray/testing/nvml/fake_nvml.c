/* A fake libnvidia-ml.so.1: GPUs, waveforms, a sensor model and faults from a scenario file.
 *
 * The scenario comes from fake_nvml_load(path) or, at nvmlInit, from the file that LLEM_RAY_FAKE_NVML_SCENARIO names. Its format
 * is written by llem_ray.testing.nvml.scenario: one "key value..." per line. Readings are evaluated in closed form from the
 * cumulative integral of the waveform, so the truth is known exactly.
 *
 * Build: gcc -O2 -shared -fPIC -Wl,-soname,libnvidia-ml.so.1 -o libnvidia-ml.so.1 fake_nvml.c -lm
 */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15, NO_DATA = 21, UNKNOWN = 999
};
enum { TARGET_COUNTER = 1, TARGET_INSTANT = 2, TARGET_AVERAGE = 4, TARGET_LEGACY = 8, TARGET_STATE = 16, TARGET_READINGS = 15 };
enum { FIELD_ENERGY = 83, FIELD_AVERAGE = 185, FIELD_INSTANT = 186 };
enum { SCOPE_GPU = 0, SCOPE_MODULE = 1 };
enum { VALUE_UINT = 1, VALUE_ULONG_LONG = 3 };
enum { LEGACY_INSTANT = 0, LEGACY_AVERAGE = 1 };
#define MAX_GPUS 64
#define MAX_FAULTS 64
#define MAX_PROCESSES 64

typedef enum {
    FAULT_GPU_LOST, FAULT_NOT_SUPPORTED, FAULT_NO_PERMISSION, FAULT_TIMEOUT, FAULT_ZERO_READING, FAULT_COUNTER_RESET,
    FAULT_FREEZE, FAULT_SLOW_CALL, FAULT_TEMPERATURE, FAULT_CLOCK_EVENTS, FAULT_MEMORY_USED, FAULT_POWER_LIMIT, FAULT_KINDS
} fault_kind;

static const char *const FAULT_NAMES[FAULT_KINDS] = {
    "gpu_lost", "not_supported", "no_permission", "timeout", "zero_reading", "counter_reset",
    "freeze", "slow_call", "temperature", "clock_events", "memory_used", "power_limit"};

typedef struct {
    fault_kind kind;
    double begin_s, end_s, value;
    unsigned targets;
} fault_t;

/* A sensor publishes at phase + k period (+- jitter), visible lag later, the mean over the window before it. */
typedef struct {
    double period_s, phase_s, lag_s, window_s, gain, noise_w, jitter_s;
} sensor_t;

typedef struct {
    size_t n;
    double *t_s, *power_w, *energy_j; /* energy_j[i]: from t_s[0] to t_s[i] */
    char *linear;
    double repeat_s; /* 0: never */
    double cycle_j;
} waveform_t;

typedef struct gpu {
    unsigned index;
    char uuid[96], name[96], pci[32];
    unsigned long long memory_total, memory_used;
    unsigned limit_mw, limit_min_mw, limit_max_mw;
    int cc_major, cc_minor, architecture, mig, legacy, processes;
    int rc_energy, rc_instant, rc_average, rc_legacy_energy, rc_legacy_power;
    double module_extra_w; /* negative: module scope is not supported */
    double temperature_c, latency_us, quantum_mj, base_mj;
    unsigned sm_mhz, memory_mhz;
    unsigned long long clock_events, seed;
    sensor_t counter, instant, average;
    waveform_t wave;
    fault_t faults[MAX_FAULTS];
    unsigned n_faults;
} gpu_t;

static gpu_t gpus[MAX_GPUS]; /* static: handles stay valid memory when a scenario is replaced */
static unsigned n_gpus;
static int loaded, init_rc;
static int realtime;
static int64_t origin_ns;
static _Atomic int64_t virtual_ns;
static _Atomic int init_count;
static char driver_version[80], message[256];
static int cuda_version;

/* ---- time ------------------------------------------------------------------------------------------------------- */

EXPORT int64_t fake_nvml_time_ns(void) {
    if (!realtime) return atomic_load(&virtual_ns);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (int64_t)now.tv_sec * 1000000000LL + now.tv_nsec;
}

EXPORT void fake_nvml_set_time_ns(uint64_t t_ns) { atomic_store(&virtual_ns, (int64_t)t_ns); }

static double now_s(void) { return (double)(fake_nvml_time_ns() - origin_ns) * 1e-9; }

static void spend_us(double duration_us) {
    if (duration_us <= 0) return;
    int64_t duration_ns = (int64_t)(duration_us * 1e3);
    if (!realtime) {
        atomic_fetch_add(&virtual_ns, duration_ns);
        return;
    }
    struct timespec left = {duration_ns / 1000000000LL, duration_ns % 1000000000LL};
    while (nanosleep(&left, &left) == -1 && errno == EINTR) {}
}

/* ---- waveform --------------------------------------------------------------------------------------------------- */

static double segment_j(const waveform_t *w, size_t i, double duration_s) {
    double energy_j = w->power_w[i] * duration_s;
    if (w->linear[i]) {
        int last = i + 1 == w->n;
        double next_w = last ? w->power_w[0] : w->power_w[i + 1];
        double next_s = last ? w->t_s[0] + w->repeat_s : w->t_s[i + 1];
        if (!last || w->repeat_s > 0) energy_j += 0.5 * (next_w - w->power_w[i]) / (next_s - w->t_s[i]) * duration_s * duration_s;
    }
    return energy_j;
}

/* Energy from t_s[0] to t, negative before it. */
static double energy_j(const waveform_t *w, double t) {
    double cycles = 0;
    if (w->repeat_s > 0) {
        cycles = floor((t - w->t_s[0]) / w->repeat_s);
        t -= cycles * w->repeat_s;
    }
    if (t < w->t_s[0]) return cycles * w->cycle_j + w->power_w[0] * (t - w->t_s[0]);
    size_t lo = 0, hi = w->n;
    while (hi - lo > 1) {
        size_t middle = (lo + hi) / 2;
        if (w->t_s[middle] <= t) lo = middle; else hi = middle;
    }
    return cycles * w->cycle_j + w->energy_j[lo] + segment_j(w, lo, t - w->t_s[lo]);
}

static int finish_waveform(waveform_t *w) {
    if (w->n == 0) return 0;
    double total_j = 0;
    for (size_t i = 0; i < w->n; i++) {
        w->energy_j[i] = total_j;
        if (i + 1 < w->n) {
            if (w->t_s[i + 1] <= w->t_s[i]) return 0;
            total_j += segment_j(w, i, w->t_s[i + 1] - w->t_s[i]);
        }
    }
    if (w->repeat_s > 0) {
        double left_s = w->t_s[0] + w->repeat_s - w->t_s[w->n - 1];
        if (left_s <= 0) return 0;
        w->cycle_j = total_j + segment_j(w, w->n - 1, left_s);
    }
    return 1;
}

/* ---- sensors ---------------------------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t x) { /* splitmix64 */
    x += 0x9e3779b97f4a7c15ULL;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

static double uniform(uint64_t seed, uint64_t stream, int64_t k) { /* in (0, 1) */
    return ((double)(mix(mix(seed + stream * 0x632be59bd9b4e019ULL) ^ (uint64_t)k) >> 11) + 0.5) * 0x1p-53;
}

static double gaussian(uint64_t seed, uint64_t stream, int64_t k) {
    return sqrt(-2.0 * log(uniform(seed, stream, k))) * cos(2.0 * M_PI * uniform(seed, stream + 1, k));
}

static double tick_s(const sensor_t *s, uint64_t seed, int64_t k) {
    double jitter_s = s->jitter_s > 0 ? s->jitter_s * (2.0 * uniform(seed, 7, k) - 1.0) : 0.0;
    return s->phase_s + (double)k * s->period_s + jitter_s;
}

/* Index of the last tick that is visible at t. */
static int64_t last_tick(const sensor_t *s, uint64_t seed, double t) {
    t -= s->lag_s;
    int64_t k = (int64_t)floor((t - s->phase_s) / s->period_s) + 1;
    while (tick_s(s, seed, k) > t) k--;
    return k;
}

static const fault_t *fault_at(const gpu_t *g, fault_kind kind, double t, unsigned target) {
    for (unsigned i = 0; i < g->n_faults; i++) {
        const fault_t *f = &g->faults[i];
        if (f->kind == kind && (f->targets & target) && f->begin_s <= t && t < f->end_s) return f;
    }
    return NULL;
}

static uint64_t counter_mj(const gpu_t *g, double t) {
    if (fault_at(g, FAULT_ZERO_READING, t, TARGET_COUNTER)) return 0;
    double tau = tick_s(&g->counter, g->seed, last_tick(&g->counter, g->seed, t));
    for (unsigned i = 0; i < g->n_faults; i++) {
        const fault_t *f = &g->faults[i];
        if (f->kind == FAULT_FREEZE && f->begin_s <= tau && tau < f->end_s)
            tau = tick_s(&g->counter, g->seed, last_tick(&g->counter, g->seed, f->begin_s));
    }
    double from_j = 0, base_mj = g->base_mj, reset_s = -INFINITY;
    for (unsigned i = 0; i < g->n_faults; i++) {
        const fault_t *f = &g->faults[i];
        if (f->kind != FAULT_COUNTER_RESET || f->begin_s > tau || f->begin_s < reset_s) continue;
        reset_s = f->begin_s;
        from_j = energy_j(&g->wave, reset_s);
        base_mj = f->value;
    }
    double module_j = g->module_extra_w > 0 ? g->module_extra_w * (isinf(reset_s) ? tau : tau - reset_s) : 0;
    double value_mj = base_mj + g->counter.gain * (energy_j(&g->wave, tau) - from_j + module_j) * 1e3;
    return value_mj <= 0 ? 0 : (uint64_t)(floor(value_mj / g->quantum_mj) * g->quantum_mj);
}

static unsigned power_mw(const gpu_t *g, const sensor_t *s, uint64_t stream, double t, int scope, unsigned target) {
    if (fault_at(g, FAULT_ZERO_READING, t, target)) return 0;
    int64_t k = last_tick(s, g->seed, t);
    double tau = tick_s(s, g->seed, k);
    double mean_w = (energy_j(&g->wave, tau) - energy_j(&g->wave, tau - s->window_s)) / s->window_s;
    if (s->noise_w > 0) mean_w += s->noise_w * gaussian(g->seed, stream, k);
    mean_w *= s->gain;
    if (scope == SCOPE_MODULE) mean_w += g->module_extra_w;
    return mean_w <= 0 ? 0 : (unsigned)llround(mean_w * 1e3);
}

/* ---- scenario file ---------------------------------------------------------------------------------------------- */

static void clear_scenario(void) {
    for (unsigned i = 0; i < MAX_GPUS; i++) {
        free(gpus[i].wave.t_s);
        free(gpus[i].wave.power_w);
        free(gpus[i].wave.energy_j);
        free(gpus[i].wave.linear);
    }
    memset(gpus, 0, sizeof gpus);
    n_gpus = 0;
    loaded = 0;
    init_rc = OK;
    realtime = 0;
    origin_ns = 0;
}

static int parse_sensor(const char *text, sensor_t *s) {
    return sscanf(text, "%lf %lf %lf %lf %lf %lf %lf", &s->period_s, &s->phase_s, &s->lag_s, &s->window_s, &s->gain, &s->noise_w,
                  &s->jitter_s) == 7 && s->period_s > 0 && s->jitter_s < s->period_s / 2;
}

static int parse_fault(gpu_t *g, const char *text) {
    char kind[32];
    fault_t f;
    if (g->n_faults == MAX_FAULTS || sscanf(text, "%31s %lf %lf %lf %u", kind, &f.begin_s, &f.end_s, &f.value, &f.targets) != 5) return 0;
    for (int k = 0; k < FAULT_KINDS; k++) {
        if (strcmp(kind, FAULT_NAMES[k]) == 0) {
            f.kind = (fault_kind)k;
            g->faults[g->n_faults++] = f;
            return 1;
        }
    }
    return 0;
}

static int parse_waveform(waveform_t *w, const char *text, FILE *file, unsigned *line_number) {
    char line[256];
    if (w->n || sscanf(text, "%zu %lf", &w->n, &w->repeat_s) != 2 || w->n == 0) return 0;
    w->t_s = calloc(w->n, sizeof(double));
    w->power_w = calloc(w->n, sizeof(double));
    w->energy_j = calloc(w->n, sizeof(double));
    w->linear = calloc(w->n, 1);
    if (!w->t_s || !w->power_w || !w->energy_j || !w->linear) return 0;
    for (size_t i = 0; i < w->n; i++) {
        char kind;
        ++*line_number;
        if (!fgets(line, sizeof line, file) || sscanf(line, "%c %lf %lf", &kind, &w->t_s[i], &w->power_w[i]) != 3) return 0;
        if (kind != 's' && kind != 'l') return 0;
        w->linear[i] = kind == 'l';
    }
    return finish_waveform(w);
}

static void copy_text(char *to, size_t size, const char *from) {
    snprintf(to, size, "%s", from);
}

static int parse_gpu_line(gpu_t *g, const char *key, const char *rest, FILE *file, unsigned *line_number) {
    if (!strcmp(key, "name")) return copy_text(g->name, sizeof g->name, rest), 1;
    if (!strcmp(key, "pci")) return copy_text(g->pci, sizeof g->pci, rest), 1;
    if (!strcmp(key, "memory")) return sscanf(rest, "%llu %llu", &g->memory_total, &g->memory_used) == 2;
    if (!strcmp(key, "limit")) return sscanf(rest, "%u %u %u", &g->limit_mw, &g->limit_min_mw, &g->limit_max_mw) == 3;
    if (!strcmp(key, "chip")) return sscanf(rest, "%d %d %d", &g->cc_major, &g->cc_minor, &g->architecture) == 3;
    if (!strcmp(key, "mig")) return sscanf(rest, "%d", &g->mig) == 1;
    if (!strcmp(key, "legacy")) return sscanf(rest, "%d", &g->legacy) == 1;
    if (!strcmp(key, "module")) return sscanf(rest, "%lf", &g->module_extra_w) == 1;
    if (!strcmp(key, "state"))
        return sscanf(rest, "%lf %u %u %llu %d", &g->temperature_c, &g->sm_mhz, &g->memory_mhz, &g->clock_events, &g->processes) == 5 &&
               g->processes <= MAX_PROCESSES;
    if (!strcmp(key, "codes"))
        return sscanf(rest, "%d %d %d %d %d", &g->rc_energy, &g->rc_instant, &g->rc_average, &g->rc_legacy_energy, &g->rc_legacy_power) == 5;
    if (!strcmp(key, "energy")) return sscanf(rest, "%lf %lf", &g->base_mj, &g->quantum_mj) == 2 && g->quantum_mj > 0;
    if (!strcmp(key, "seed")) return sscanf(rest, "%llu", &g->seed) == 1;
    if (!strcmp(key, "latency_us")) return sscanf(rest, "%lf", &g->latency_us) == 1;
    if (!strcmp(key, "counter")) return parse_sensor(rest, &g->counter);
    if (!strcmp(key, "instant")) return parse_sensor(rest, &g->instant) && g->instant.window_s > 0;
    if (!strcmp(key, "average")) return parse_sensor(rest, &g->average) && g->average.window_s > 0;
    if (!strcmp(key, "fault")) return parse_fault(g, rest);
    if (!strcmp(key, "waveform")) return parse_waveform(&g->wave, rest, file, line_number);
    return 0;
}

static int parse_line(const char *key, const char *rest, FILE *file, unsigned *line_number) {
    long long ns;
    if (!strcmp(key, "fake-nvml")) return atoi(rest) == 1;
    if (!strcmp(key, "driver")) return sscanf(rest, "%79s %d", driver_version, &cuda_version) == 2;
    if (!strcmp(key, "init")) return sscanf(rest, "%d", &init_rc) == 1;
    if (!strcmp(key, "clock")) {
        char kind[16];
        if (sscanf(rest, "%15s %lld", kind, &ns) != 2) return 0;
        realtime = !strcmp(kind, "realtime");
        origin_ns = ns;
        if (!realtime) atomic_store(&virtual_ns, ns);
        return realtime || !strcmp(kind, "virtual");
    }
    if (!strcmp(key, "gpu")) {
        if (n_gpus == MAX_GPUS) return 0;
        gpus[n_gpus].index = n_gpus;
        copy_text(gpus[n_gpus].uuid, sizeof gpus[n_gpus].uuid, rest);
        n_gpus++;
        return 1;
    }
    return n_gpus > 0 && parse_gpu_line(&gpus[n_gpus - 1], key, rest, file, line_number);
}

EXPORT const char *fake_nvml_message(void) { return message; }

/* Replaces the scenario: 0, or the number of the line that is wrong (fake_nvml_message() has the text). */
EXPORT int fake_nvml_load(const char *path) {
    clear_scenario();
    FILE *file = fopen(path, "r");
    if (!file) {
        snprintf(message, sizeof message, "%s: %s", path, strerror(errno));
        return -1;
    }
    char line[512];
    unsigned line_number = 0;
    int fine = 1;
    while (fine && fgets(line, sizeof line, file)) {
        line_number++;
        line[strcspn(line, "\n")] = 0;
        char *rest = strchr(line, ' ');
        if (rest) *rest++ = 0;
        if (*line) fine = parse_line(line, rest ? rest : "", file, &line_number);
    }
    fclose(file);
    for (unsigned i = 0; fine && i < n_gpus; i++) fine = gpus[i].wave.n > 0 && gpus[i].quantum_mj > 0;
    if (!fine) {
        snprintf(message, sizeof message, "%s:%u: malformed scenario", path, line_number);
        clear_scenario();
        return (int)line_number;
    }
    loaded = 1;
    return 0;
}

/* Forgets the scenario and every nvmlInit: the next one finds no driver. */
EXPORT void fake_nvml_unload(void) {
    clear_scenario();
    atomic_store(&init_count, 0);
}

EXPORT int fake_nvml_init_count(void) { return atomic_load(&init_count); }

/* ---- NVML: library and system ----------------------------------------------------------------------------------- */

EXPORT int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    const char *path = getenv("LLEM_RAY_FAKE_NVML_SCENARIO");
    if (!loaded && path && *path && fake_nvml_load(path) != 0) {
        fprintf(stderr, "fake NVML: %s\n", message);
        return UNKNOWN;
    }
    if (!loaded) return DRIVER_NOT_LOADED;
    if (init_rc == OK) atomic_fetch_add(&init_count, 1);
    return init_rc;
}
EXPORT int nvmlInit(void) { return nvmlInitWithFlags(0); }
EXPORT int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

EXPORT int nvmlShutdown(void) {
    if (atomic_load(&init_count) <= 0) return UNINITIALIZED;
    atomic_fetch_sub(&init_count, 1);
    return OK;
}

EXPORT const char *nvmlErrorString(int rc) {
    switch (rc) {
        case OK: return "Success";
        case UNINITIALIZED: return "Uninitialized";
        case INVALID_ARGUMENT: return "Invalid Argument";
        case NOT_SUPPORTED: return "Not Supported";
        case NO_PERMISSION: return "Insufficient Permissions";
        case NOT_FOUND: return "Not Found";
        case INSUFFICIENT_SIZE: return "Insufficient Size";
        case DRIVER_NOT_LOADED: return "Driver Not Loaded";
        case TIMEOUT: return "Timeout";
        case GPU_IS_LOST: return "GPU is lost";
        case NO_DATA: return "No data";
        default: return "Unknown Error";
    }
}

#define REQUIRE_INIT() do { if (atomic_load(&init_count) <= 0) return UNINITIALIZED; } while (0)

static int put_text(char *to, unsigned size, const char *from) {
    if (!to) return INVALID_ARGUMENT;
    if (strlen(from) >= size) return INSUFFICIENT_SIZE;
    strcpy(to, from);
    return OK;
}

EXPORT int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    REQUIRE_INIT();
    return put_text(version, size, driver_version);
}
EXPORT int nvmlSystemGetNVMLVersion(char *version, unsigned size) {
    char text[128];
    snprintf(text, sizeof text, "%d.%s", cuda_version / 1000, driver_version);
    return put_text(version, size, text);
}
EXPORT int nvmlSystemGetCudaDriverVersion(int *version) {
    if (!loaded) return NOT_FOUND;
    return *version = cuda_version, OK;
}
EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) { return nvmlSystemGetCudaDriverVersion(version); }

/* ---- NVML: devices ---------------------------------------------------------------------------------------------- */

EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
    REQUIRE_INIT();
    return *count = n_gpus, OK;
}
EXPORT int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

static int handle_of(gpu_t *g, gpu_t **device) {
    if (fault_at(g, FAULT_GPU_LOST, now_s(), ~0u)) return GPU_IS_LOST;
    return *device = g, OK;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, gpu_t **device) {
    REQUIRE_INIT();
    return index < n_gpus ? handle_of(&gpus[index], device) : INVALID_ARGUMENT;
}
EXPORT int nvmlDeviceGetHandleByIndex(unsigned index, gpu_t **device) { return nvmlDeviceGetHandleByIndex_v2(index, device); }

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, gpu_t **device) {
    REQUIRE_INIT();
    for (unsigned i = 0; uuid && i < n_gpus; i++)
        if (!strcmp(gpus[i].uuid, uuid)) return handle_of(&gpus[i], device);
    return uuid ? NOT_FOUND : INVALID_ARGUMENT;
}
EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, gpu_t **device) {
    REQUIRE_INIT();
    for (unsigned i = 0; bus_id && i < n_gpus; i++)
        if (!strcasecmp(gpus[i].pci, bus_id)) return handle_of(&gpus[i], device);
    return bus_id ? NOT_FOUND : INVALID_ARGUMENT;
}

/* Every call on a device: is the handle good, is the GPU there, and the time the call takes. The reading is taken in the
 * middle of that time; leave() spends the second half. */
static int enter(gpu_t *g, double *t, double *half_us) {
    REQUIRE_INIT();
    *half_us = 0;
    if (g < gpus || g >= gpus + n_gpus || ((char *)g - (char *)gpus) % sizeof *g) return INVALID_ARGUMENT;
    const fault_t *slow = fault_at(g, FAULT_SLOW_CALL, now_s(), ~0u);
    *half_us = 0.5 * (g->latency_us + (slow ? slow->value : 0));
    spend_us(*half_us);
    *t = now_s();
    return fault_at(g, FAULT_GPU_LOST, *t, ~0u) ? GPU_IS_LOST : OK;
}

static int leave(int rc, double half_us) {
    spend_us(half_us);
    return rc;
}

static int faulty(const gpu_t *g, double t, unsigned target) {
    if (fault_at(g, FAULT_NOT_SUPPORTED, t, target)) return NOT_SUPPORTED;
    if (fault_at(g, FAULT_NO_PERMISSION, t, target)) return NO_PERMISSION;
    if (fault_at(g, FAULT_TIMEOUT, t, target)) return TIMEOUT;
    return OK;
}

/* ENTER: common head of a device call that answers at once; its target says which faults hit it. */
#define ENTER(target)                                             \
    double t, half_us;                                            \
    int rc = enter(device, &t, &half_us);                         \
    if (rc == OK && (target)) rc = faulty(device, t, (target));   \
    if (rc != OK) return leave(rc, half_us)

EXPORT int nvmlDeviceGetIndex(gpu_t *device, unsigned *index) {
    ENTER(0);
    return *index = device->index, leave(OK, half_us);
}
EXPORT int nvmlDeviceGetMinorNumber(gpu_t *device, unsigned *minor) { return nvmlDeviceGetIndex(device, minor); }
EXPORT int nvmlDeviceGetName(gpu_t *device, char *name, unsigned size) {
    ENTER(0);
    return leave(put_text(name, size, device->name), half_us);
}
EXPORT int nvmlDeviceGetUUID(gpu_t *device, char *uuid, unsigned size) {
    ENTER(0);
    return leave(put_text(uuid, size, device->uuid), half_us);
}
EXPORT int nvmlDeviceGetBrand(gpu_t *device, unsigned *brand) {
    ENTER(0);
    return *brand = 14, leave(OK, half_us); /* NVML_BRAND_NVIDIA */
}
EXPORT int nvmlDeviceGetArchitecture(gpu_t *device, unsigned *architecture) {
    ENTER(0);
    return *architecture = (unsigned)device->architecture, leave(OK, half_us);
}
EXPORT int nvmlDeviceGetCudaComputeCapability(gpu_t *device, int *major, int *minor) {
    ENTER(0);
    return *major = device->cc_major, *minor = device->cc_minor, leave(OK, half_us);
}

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} pci_t;

EXPORT int nvmlDeviceGetPciInfo_v3(gpu_t *device, pci_t *pci) {
    ENTER(0);
    memset(pci, 0, sizeof *pci);
    sscanf(device->pci, "%x:%x:%x", &pci->domain, &pci->bus, &pci->device);
    pci->device_id = 0x233510deu;
    copy_text(pci->bus_id, sizeof pci->bus_id, device->pci);
    snprintf(pci->bus_id_legacy, sizeof pci->bus_id_legacy, "%04X:%02X:%02X.0", pci->domain & 0xffff, pci->bus & 0xff, pci->device & 0xff);
    return leave(OK, half_us);
}
EXPORT int nvmlDeviceGetPciInfo_v2(gpu_t *device, pci_t *pci) { return nvmlDeviceGetPciInfo_v3(device, pci); }
EXPORT int nvmlDeviceGetPciInfo(gpu_t *device, pci_t *pci) { return nvmlDeviceGetPciInfo_v3(device, pci); }

EXPORT int nvmlDeviceGetMigMode(gpu_t *device, unsigned *current, unsigned *pending) {
    ENTER(0);
    if (device->mig < 0) return leave(NOT_SUPPORTED, half_us);
    return *current = *pending = (unsigned)device->mig, leave(OK, half_us);
}
EXPORT int nvmlDeviceGetMaxMigDeviceCount(gpu_t *device, unsigned *count) {
    ENTER(0);
    return *count = device->mig > 0 ? 7 : 0, leave(OK, half_us);
}
EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(gpu_t *device, unsigned index, gpu_t **mig) {
    (void)index, (void)mig;
    ENTER(0);
    return leave(device->mig < 0 ? NOT_SUPPORTED : NOT_FOUND, half_us);
}
EXPORT int nvmlDeviceGetPersistenceMode(gpu_t *device, unsigned *mode) {
    ENTER(0);
    return *mode = 1, leave(OK, half_us);
}

/* ---- NVML: power and energy ------------------------------------------------------------------------------------- */

static const sensor_t *legacy_sensor(const gpu_t *g) { return g->legacy == LEGACY_AVERAGE ? &g->average : &g->instant; }

EXPORT int nvmlDeviceGetPowerUsage(gpu_t *device, unsigned *power) {
    ENTER(TARGET_LEGACY);
    if (device->rc_legacy_power) return leave(device->rc_legacy_power, half_us);
    uint64_t stream = device->legacy == LEGACY_AVERAGE ? 3 : 1;
    *power = power_mw(device, legacy_sensor(device), stream, t, SCOPE_GPU, TARGET_LEGACY);
    return leave(OK, half_us);
}

EXPORT int nvmlDeviceGetTotalEnergyConsumption(gpu_t *device, unsigned long long *energy) {
    ENTER(TARGET_COUNTER);
    if (device->rc_legacy_energy) return leave(device->rc_legacy_energy, half_us);
    return *energy = counter_mj(device, t), leave(OK, half_us);
}

typedef struct {
    unsigned field_id, scope_id;
    long long timestamp_us, latency_us;
    unsigned value_type;
    int rc;
    union { double d; unsigned ui; unsigned long long ull; } value;
} field_t;

static int read_field(const gpu_t *g, double t, field_t *field) {
    int energy = field->field_id == FIELD_ENERGY, instant = field->field_id == FIELD_INSTANT;
    if (!energy && !instant && field->field_id != FIELD_AVERAGE) return NOT_SUPPORTED;
    unsigned target = energy ? TARGET_COUNTER : instant ? TARGET_INSTANT : TARGET_AVERAGE;
    int rc = faulty(g, t, target);
    if (rc == OK) rc = energy ? g->rc_energy : instant ? g->rc_instant : g->rc_average;
    if (rc != OK) return rc;
    if (energy) {
        field->value_type = VALUE_ULONG_LONG;
        field->value.ull = counter_mj(g, t);
        return OK;
    }
    if (field->scope_id > SCOPE_MODULE || (field->scope_id == SCOPE_MODULE && g->module_extra_w < 0)) return NOT_SUPPORTED;
    field->value_type = VALUE_UINT;
    field->value.ull = 0;
    field->value.ui = power_mw(g, instant ? &g->instant : &g->average, instant ? 1 : 3, t, (int)field->scope_id, target);
    return OK;
}

/* Succeeds when any field did, as NVML documents it: each field has its own code. */
EXPORT int nvmlDeviceGetFieldValues(gpu_t *device, int count, field_t *values) {
    ENTER(0);
    if (count <= 0 || !values) return leave(INVALID_ARGUMENT, half_us);
    int any = 0;
    for (int i = 0; i < count; i++) {
        values[i].timestamp_us = (fake_nvml_time_ns()) / 1000;
        values[i].latency_us = (long long)half_us;
        values[i].rc = read_field(device, t, &values[i]);
        any |= values[i].rc == OK;
    }
    return leave(any ? OK : values[0].rc, half_us);
}

static unsigned limit_mw(const gpu_t *g, double t) {
    const fault_t *f = fault_at(g, FAULT_POWER_LIMIT, t, ~0u);
    return f ? (unsigned)f->value : g->limit_mw;
}

EXPORT int nvmlDeviceGetEnforcedPowerLimit(gpu_t *device, unsigned *limit) {
    ENTER(TARGET_STATE);
    return *limit = limit_mw(device, t), leave(OK, half_us);
}
EXPORT int nvmlDeviceGetPowerManagementLimit(gpu_t *device, unsigned *limit) { return nvmlDeviceGetEnforcedPowerLimit(device, limit); }
EXPORT int nvmlDeviceGetPowerManagementDefaultLimit(gpu_t *device, unsigned *limit) {
    ENTER(TARGET_STATE);
    return *limit = device->limit_max_mw, leave(OK, half_us);
}
EXPORT int nvmlDeviceGetPowerManagementLimitConstraints(gpu_t *device, unsigned *low, unsigned *high) {
    ENTER(TARGET_STATE);
    return *low = device->limit_min_mw, *high = device->limit_max_mw, leave(OK, half_us);
}

/* ---- NVML: state ------------------------------------------------------------------------------------------------ */

static unsigned temperature_c(const gpu_t *g, double t) {
    const fault_t *f = fault_at(g, FAULT_TEMPERATURE, t, ~0u);
    return (unsigned)llround(f ? f->value : g->temperature_c);
}

EXPORT int nvmlDeviceGetTemperature(gpu_t *device, unsigned sensor, unsigned *temperature) {
    ENTER(TARGET_STATE);
    if (sensor != 0) return leave(INVALID_ARGUMENT, half_us);
    return *temperature = temperature_c(device, t), leave(OK, half_us);
}

typedef struct { unsigned version, sensor; int temperature; } temperature_t;
EXPORT int nvmlDeviceGetTemperatureV(gpu_t *device, temperature_t *temperature) {
    ENTER(TARGET_STATE);
    return temperature->temperature = (int)temperature_c(device, t), leave(OK, half_us);
}

EXPORT int nvmlDeviceGetClockInfo(gpu_t *device, unsigned type, unsigned *mhz) {
    ENTER(TARGET_STATE);
    if (type > 3) return leave(INVALID_ARGUMENT, half_us);
    return *mhz = type == 2 ? device->memory_mhz : device->sm_mhz, leave(OK, half_us);
}
EXPORT int nvmlDeviceGetMaxClockInfo(gpu_t *device, unsigned type, unsigned *mhz) { return nvmlDeviceGetClockInfo(device, type, mhz); }

EXPORT int nvmlDeviceGetCurrentClocksEventReasons(gpu_t *device, unsigned long long *reasons) {
    ENTER(TARGET_STATE);
    const fault_t *f = fault_at(device, FAULT_CLOCK_EVENTS, t, ~0u);
    return *reasons = f ? (unsigned long long)f->value : device->clock_events, leave(OK, half_us);
}
EXPORT int nvmlDeviceGetCurrentClocksThrottleReasons(gpu_t *device, unsigned long long *reasons) {
    return nvmlDeviceGetCurrentClocksEventReasons(device, reasons);
}
EXPORT int nvmlDeviceGetSupportedClocksEventReasons(gpu_t *device, unsigned long long *reasons) {
    ENTER(TARGET_STATE);
    return *reasons = 0x1ff, leave(OK, half_us);
}
EXPORT int nvmlDeviceGetSupportedClocksThrottleReasons(gpu_t *device, unsigned long long *reasons) {
    return nvmlDeviceGetSupportedClocksEventReasons(device, reasons);
}

typedef struct { unsigned gpu, memory; } utilization_t;
EXPORT int nvmlDeviceGetUtilizationRates(gpu_t *device, utilization_t *utilization) {
    ENTER(TARGET_STATE);
    double second_w = energy_j(&device->wave, t) - energy_j(&device->wave, t - 1.0);
    double percent = device->limit_mw ? 1e5 * second_w / device->limit_mw : 0;
    utilization->gpu = (unsigned)fmin(100.0, fmax(0.0, percent));
    utilization->memory = utilization->gpu / 2;
    return leave(OK, half_us);
}

static unsigned long long memory_used(const gpu_t *g, double t) {
    const fault_t *f = fault_at(g, FAULT_MEMORY_USED, t, ~0u);
    return f ? (unsigned long long)f->value : g->memory_used;
}

typedef struct { unsigned long long total, free, used; } memory_t;
EXPORT int nvmlDeviceGetMemoryInfo(gpu_t *device, memory_t *memory) {
    ENTER(TARGET_STATE);
    memory->total = device->memory_total;
    memory->used = memory_used(device, t);
    memory->free = memory->total - memory->used;
    return leave(OK, half_us);
}

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2_t;
EXPORT int nvmlDeviceGetMemoryInfo_v2(gpu_t *device, memory_v2_t *memory) {
    ENTER(TARGET_STATE);
    memory->total = device->memory_total;
    memory->reserved = 0;
    memory->used = memory_used(device, t);
    memory->free = memory->total - memory->used;
    return leave(OK, half_us);
}

typedef struct { unsigned pid; unsigned long long used_memory; unsigned gpu_instance, compute_instance; } process_t;
EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(gpu_t *device, unsigned *count, process_t *processes) {
    ENTER(TARGET_STATE);
    unsigned room = *count, n = (unsigned)device->processes;
    *count = n;
    if (n == 0) return leave(OK, half_us);
    if (room < n || !processes) return leave(INSUFFICIENT_SIZE, half_us);
    for (unsigned i = 0; i < n; i++)
        processes[i] = (process_t){.pid = 1000 + i, .used_memory = memory_used(device, t) / n, .gpu_instance = ~0u, .compute_instance = ~0u};
    return leave(OK, half_us);
}
EXPORT int nvmlDeviceGetComputeRunningProcesses_v2(gpu_t *device, unsigned *count, process_t *processes) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, processes);
}
EXPORT int nvmlDeviceGetGraphicsRunningProcesses_v3(gpu_t *device, unsigned *count, process_t *processes) {
    (void)processes;
    ENTER(TARGET_STATE);
    return *count = 0, leave(OK, half_us);
}
EXPORT int nvmlDeviceGetGraphicsRunningProcesses_v2(gpu_t *device, unsigned *count, process_t *processes) {
    return nvmlDeviceGetGraphicsRunningProcesses_v3(device, count, processes);
}
EXPORT int nvmlDeviceGetMPSComputeRunningProcesses_v3(gpu_t *device, unsigned *count, process_t *processes) {
    return nvmlDeviceGetGraphicsRunningProcesses_v3(device, count, processes);
}
EXPORT int nvmlDeviceGetProcessesUtilizationInfo(gpu_t *device, void *info) {
    (void)info;
    ENTER(TARGET_STATE);
    return leave(NO_DATA, half_us);
}
EXPORT int nvmlDeviceGetProcessUtilization(gpu_t *device, void *samples, unsigned *count, unsigned long long since) {
    (void)samples, (void)since;
    ENTER(TARGET_STATE);
    return *count = 0, leave(NO_DATA, half_us);
}
