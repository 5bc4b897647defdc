/* A stand-in for libcuda.so.1, so that cuda.py runs through the real cuda-python on a machine without a GPU.
 *
 * "Device" memory is host memory. Work runs when it is submitted, or is recorded while its stream is captured. The
 * stub is as strict as the driver may be: every address must lie in one live allocation of the right kind, every
 * handle must be live, every call needs a live context in its thread. What breaks while a graph is replayed is
 * reported by the next cuStreamSynchronize, as on a GPU. Only one thread may be in the stub at a time.
 *
 * cuda-bindings looks up cuGetProcAddress_v2 by dlsym, and everything else through that, under plain names (cuMemAlloc,
 * not cuMemAlloc_v2) with the CUDA version whose form of the call it means. The forms here are the newest.
 *
 * Environment, read at each call: STUB_CUDA_DEVICES (1), STUB_CUDA_MEMORY_BYTES per device (2^30),
 * STUB_CUDA_FAIL=name:code[,name:code] makes calls fail, STUB_CUDA_HIDE=name is what the driver is too old to know
 * (read once, at the first call of all). */

#include "stub_modules.h"
#include "stub_state.h"

/* -- for tests ----------------------------------------------------------------------------------------------------- */

int stub_live(int kind) {
    int count = 0;
    for (struct object *o = objects; o; o = o->next) count += o->kind == (enum kind)kind;
    return count;
}

int stub_context_refs(int device) { return contexts[device].refs; }

/* -- device -------------------------------------------------------------------------------------------------------- */

static int cuInit(unsigned flags) {
    int code = forced(__func__);
    if (code) return code;
    if (flags) return INVALID_VALUE;
    if (setting("STUB_CUDA_DEVICES", 1) < 1) return NO_DEVICE;
    initialised = 1;
    return OK;
}

static int cuDriverGetVersion(int *version) {
    *version = 13010;
    return forced(__func__);
}

static int cuDeviceGetCount(int *count) {
    ENTER();
    *count = (int)setting("STUB_CUDA_DEVICES", 1);
    return OK;
}

static int cuDeviceGet(int *device, int ordinal) {
    ENTER();
    if (ordinal < 0 || ordinal >= setting("STUB_CUDA_DEVICES", 1) || ordinal >= MAX_DEVICES) return INVALID_DEVICE;
    *device = ordinal;
    return OK;
}

static int cuDeviceGetName(char *name, int length, int device) {
    ENTER();
    snprintf(name, (size_t)length, "Stub GPU %d", device);
    return OK;
}

static int cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER();
    if (attribute != CAPABILITY_MAJOR && attribute != CAPABILITY_MINOR) return INVALID_VALUE;
    *value = attribute == CAPABILITY_MAJOR ? 8 : device;
    return OK;
}

static int cuDeviceTotalMem(size_t *bytes, int device) {
    (void)device;
    ENTER();
    *bytes = (size_t)setting("STUB_CUDA_MEMORY_BYTES", 1 << 30);
    return OK;
}

static int cuDevicePrimaryCtxRetain(void **context, int device) {
    ENTER();
    contexts[device].refs++;
    contexts[device].device = device;
    *context = &contexts[device];
    return OK;
}

static int cuDevicePrimaryCtxRelease(int device) {
    ENTER();
    if (!contexts[device].refs) return INVALID_CONTEXT;
    if (--contexts[device].refs) return OK;
    for (struct object *o = objects, *next; o; o = next) { /* what the context owns goes with it */
        next = o->next;
        if (o->owner == &contexts[device]) drop(o);
    }
    return OK;
}

static int cuCtxSetCurrent(void *context) {
    ENTER();
    current = context;
    return OK;
}

/* -- memory -------------------------------------------------------------------------------------------------------- */

static int cuMemGetInfo(size_t *free_bytes, size_t *total) {
    ENTER_CONTEXT();
    size_t used = 0;
    for (struct object *o = objects; o; o = o->next)
        if (o->kind == DEVICE && o->owner == current) used += o->size;
    *total = (size_t)setting("STUB_CUDA_MEMORY_BYTES", 1 << 30);
    *free_bytes = used < *total ? *total - used : 0;
    return OK;
}

static int allocate(enum kind kind, void **memory, size_t size) {
    int code = unsafe();
    if (code || !size) return code ? code : INVALID_VALUE;
    char *got = aligned_alloc(256, (size + 255) / 256 * 256);
    if (!got) return OUT_OF_MEMORY;
    struct object *o = make(kind);
    o->memory = got;
    o->size = size;
    memset(got, 0xAB, size); /* so that what was never written is seen */
    *memory = got;
    return OK;
}

static int release(enum kind kind, address pointer) {
    int code = unsafe();
    struct object *o = span(kind, pointer, 0);
    if (code || !o || (address)(uintptr_t)o->memory != pointer) return code ? code : INVALID_VALUE;
    drop(o);
    return OK;
}

static int cuMemAlloc(address *pointer, size_t size) {
    ENTER_CONTEXT();
    size_t free_bytes, total;
    void *memory = NULL;
    cuMemGetInfo(&free_bytes, &total);
    int code = size > free_bytes ? OUT_OF_MEMORY : allocate(DEVICE, &memory, size);
    *pointer = (address)(uintptr_t)memory;
    return code;
}

static int cuMemFree(address pointer) {
    ENTER_CONTEXT();
    return release(DEVICE, pointer);
}
static int cuMemHostAlloc(void **memory, size_t size, unsigned flags) {
    ENTER_CONTEXT();
    return flags ? INVALID_VALUE : allocate(PINNED, memory, size);
}
static int cuMemFreeHost(void *memory) {
    ENTER_CONTEXT();
    return release(PINNED, (address)(uintptr_t)memory);
}

static int cuMemsetD8Async(address dst, unsigned char value, size_t size, void *stream) {
    ENTER_CONTEXT();
    return submit(stream,
                  (struct node){.op = FILL, .to = DEVICE, .dst = dst, .width = size, .height = 1, .value = value});
}

static int copy(enum kind to, address dst, enum kind from, address src, size_t size, void *stream) {
    return submit(
        stream, (struct node){.op = COPY, .to = to, .from = from, .dst = dst, .src = src, .width = size, .height = 1});
}

static int cuMemcpyHtoDAsync(address dst, const void *src, size_t size, void *stream) {
    ENTER_CONTEXT();
    return copy(DEVICE, dst, PINNED, (address)(uintptr_t)src, size, stream);
}
static int cuMemcpyDtoHAsync(void *dst, address src, size_t size, void *stream) {
    ENTER_CONTEXT();
    return copy(PINNED, (address)(uintptr_t)dst, DEVICE, src, size, stream);
}
static int cuMemcpyDtoDAsync(address dst, address src, size_t size, void *stream) {
    ENTER_CONTEXT();
    return copy(DEVICE, dst, DEVICE, src, size, stream);
}

static int cuMemcpy2DAsync(const struct memcpy_2d *c, void *stream) {
    ENTER_CONTEXT();
    if (c->src_type != MEMORY_DEVICE || c->dst_type != MEMORY_DEVICE || c->src_x || c->src_y || c->dst_x || c->dst_y)
        return INVALID_VALUE;
    if (c->src_pitch < c->width || c->dst_pitch < c->width) return INVALID_VALUE;
    return submit(stream, (struct node){.op = COPY,
                                        .to = DEVICE,
                                        .from = DEVICE,
                                        .dst = c->dst_device,
                                        .src = c->src_device,
                                        .dst_pitch = c->dst_pitch,
                                        .src_pitch = c->src_pitch,
                                        .width = c->width,
                                        .height = c->height});
}

/* -- streams ------------------------------------------------------------------------------------------------------- */

static int cuStreamCreate(void **stream, unsigned flags) {
    ENTER_CONTEXT();
    if (flags > 1) return INVALID_VALUE;
    *stream = make(STREAM);
    return OK;
}
static int cuStreamDestroy(void *stream) {
    ENTER_CONTEXT();
    return destroy(STREAM, stream);
}

static int cuStreamSynchronize(void *handle) {
    ENTER_CONTEXT();
    /* NULL is the default stream: always there, so a stream used after it was freed must not become NULL. */
    struct object *stream = find(STREAM, handle);
    if (!stream) return handle ? INVALID_HANDLE : OK;
    if (stream->capturing) {
        stream->broken = 1;
        return CAPTURE_UNSUPPORTED;
    }
    int code = stream->error;
    stream->error = OK;
    return code;
}

static int cuStreamIsCapturing(void *handle, int *status) {
    ENTER_CONTEXT();
    struct object *stream = find(STREAM, handle);
    if (!stream) return INVALID_HANDLE;
    *status = stream->broken ? 2 : stream->capturing;
    return OK;
}

static int cuStreamBeginCapture(void *handle, int mode) {
    ENTER_CONTEXT();
    struct object *stream = find(STREAM, handle);
    if (!stream) return handle ? INVALID_HANDLE : CAPTURE_UNSUPPORTED;
    if (stream->capturing) return ILLEGAL_STATE;
    if (mode != 1) return INVALID_VALUE; /* THREAD_LOCAL is what cuda.py promises */
    stream->capturing = 1;
    stream->thread = pthread_self();
    return OK;
}

static int cuStreamEndCapture(void *handle, void **graph) {
    *graph = NULL;
    ENTER_CONTEXT();
    struct object *stream = find(STREAM, handle);
    if (!stream) return INVALID_HANDLE;
    if (!stream->capturing) return ILLEGAL_STATE;
    if (!pthread_equal(stream->thread, pthread_self())) return CAPTURE_WRONG_THREAD;
    int broken = stream->broken;
    stream->capturing = stream->broken = 0;
    if (!broken) {
        struct object *made = *graph = make(GRAPH);
        made->nodes = stream->nodes;
        made->n_nodes = stream->n_nodes;
    } else free(stream->nodes);
    stream->nodes = NULL;
    stream->n_nodes = 0;
    return broken ? CAPTURE_INVALIDATED : OK;
}

/* -- graphs -------------------------------------------------------------------------------------------------------- */

static int cuGraphGetNodes(void *handle, void **nodes, size_t *count) {
    ENTER_CONTEXT();
    struct object *graph = find(GRAPH, handle);
    if (!graph) return INVALID_VALUE;
    for (size_t i = 0; nodes && i < *count; i++) nodes[i] = i < graph->n_nodes ? &graph->nodes[i] : NULL;
    if (!nodes || *count > graph->n_nodes) *count = graph->n_nodes;
    return OK;
}

static int cuGraphInstantiateWithFlags(void **exec, void *handle, unsigned long long flags) {
    *exec = NULL;
    ENTER_CONTEXT();
    struct object *graph = find(GRAPH, handle);
    if (!graph || flags) return INVALID_VALUE;
    struct object *made = *exec = make(EXEC);
    made->n_nodes = graph->n_nodes;
    made->nodes = malloc(graph->n_nodes * sizeof(struct node) + 1);
    if (graph->n_nodes) memcpy(made->nodes, graph->nodes, graph->n_nodes * sizeof(struct node));
    return OK;
}

static int cuGraphLaunch(void *handle, void *on) {
    ENTER_CONTEXT();
    struct object *exec = find(EXEC, handle), *stream = find(STREAM, on);
    if (!exec || !stream) return INVALID_HANDLE;
    if (stream->capturing) return NOT_SUPPORTED; /* a child graph; the runtime makes none */
    for (size_t i = 0; i < exec->n_nodes && !stream->error; i++) {
        if (reachable(&exec->nodes[i])) run(&exec->nodes[i]);
        else stream->error = ILLEGAL_ADDRESS;
    }
    return OK;
}

static int cuGraphDestroy(void *graph) {
    ENTER_CONTEXT();
    return destroy(GRAPH, graph);
}
static int cuGraphExecDestroy(void *exec) {
    ENTER_CONTEXT();
    return destroy(EXEC, exec);
}

/* -- events -------------------------------------------------------------------------------------------------------- */

static int cuEventCreate(void **event, unsigned flags) {
    ENTER_CONTEXT();
    if (flags) return INVALID_VALUE;
    *event = make(EVENT);
    return OK;
}
static int cuEventDestroy(void *event) {
    ENTER_CONTEXT();
    return destroy(EVENT, event);
}

/* In a capture the event is recorded as a node that does nothing, and cannot be waited for or timed, as on a GPU. */
static int cuEventRecord(void *handle, void *on) {
    ENTER_CONTEXT();
    struct object *event = find(EVENT, handle), *stream = find(STREAM, on);
    struct timespec now;
    if (!event || !stream) return INVALID_HANDLE;
    int code = submit(on, (struct node){.op = MARK});
    if (code) return code;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->ms = (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
    event->recorded = 1;
    event->captured = stream->capturing;
    return OK;
}

static int cuEventSynchronize(void *handle) {
    ENTER_CONTEXT();
    struct object *event = find(EVENT, handle);
    if (!event) return INVALID_HANDLE;
    if (!event->captured) return OK;
    int code = unsafe();
    return code ? code : CAPTURED_EVENT;
}

static int cuEventElapsedTime(float *ms, void *start, void *end) {
    ENTER_CONTEXT();
    struct object *a = find(EVENT, start), *b = find(EVENT, end);
    if (!a || !b || !a->recorded || !b->recorded) return INVALID_HANDLE;
    if (a->captured || b->captured) return CAPTURED_EVENT;
    *ms = (float)(b->ms - a->ms);
    return OK;
}

/* -- errors and symbols -------------------------------------------------------------------------------------------- */

static int cuGetErrorString(int code, const char **text) {
    static const struct {
        int code;
        const char *text;
    } known[] = {{OK, "no error"},
                 {INVALID_VALUE, "invalid argument"},
                 {OUT_OF_MEMORY, "out of memory"},
                 {NO_DEVICE, "no CUDA-capable device is detected"},
                 {INVALID_DEVICE, "invalid device ordinal"},
                 {INVALID_CONTEXT, "invalid device context"},
                 {CONTEXT_IS_DESTROYED, "context is destroyed"},
                 {ILLEGAL_ADDRESS, "an illegal memory access was encountered"},
                 {CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"},
                 {CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"}};
    int forced_code = forced(__func__);
    *text = NULL;
    for (size_t i = 0; !forced_code && i < sizeof known / sizeof *known; i++)
        if (known[i].code == code) *text = known[i].text;
    return forced_code ? forced_code : *text ? OK : INVALID_VALUE;
}

int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
#define F(f)          \
    {                 \
        #f, (void *)f \
    }
    static const struct {
        const char *name;
        void *function;
    } table[] = {F(cuInit),
                 F(cuDriverGetVersion),
                 F(cuDeviceGetCount),
                 F(cuDeviceGet),
                 F(cuDeviceGetName),
                 F(cuDeviceGetAttribute),
                 F(cuDeviceTotalMem),
                 F(cuDevicePrimaryCtxRetain),
                 F(cuDevicePrimaryCtxRelease),
                 F(cuCtxSetCurrent),
                 F(cuMemGetInfo),
                 F(cuMemAlloc),
                 F(cuMemFree),
                 F(cuMemHostAlloc),
                 F(cuMemFreeHost),
                 F(cuMemsetD8Async),
                 F(cuMemcpyHtoDAsync),
                 F(cuMemcpyDtoHAsync),
                 F(cuMemcpyDtoDAsync),
                 F(cuMemcpy2DAsync),
                 F(cuStreamCreate),
                 F(cuStreamDestroy),
                 F(cuStreamSynchronize),
                 F(cuStreamIsCapturing),
                 F(cuStreamBeginCapture),
                 F(cuStreamEndCapture),
                 F(cuGraphGetNodes),
                 F(cuGraphInstantiateWithFlags),
                 F(cuGraphLaunch),
                 F(cuGraphDestroy),
                 F(cuGraphExecDestroy),
                 F(cuModuleLoadData),
                 F(cuModuleUnload),
                 F(cuModuleGetFunction),
                 F(cuFuncSetAttribute),
                 F(cuLaunchKernelEx),
                 F(cuEventCreate),
                 F(cuEventDestroy),
                 F(cuEventRecord),
                 F(cuEventSynchronize),
                 F(cuEventElapsedTime),
                 F(cuGetErrorString)};
    const char *hidden = getenv("STUB_CUDA_HIDE");
    (void)version;
    (void)flags;
    *function = NULL;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(name, table[i].name) && !(hidden && !strcmp(name, hidden))) *function = table[i].function;
    if (status) *status = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}
