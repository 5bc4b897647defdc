/* What the stub of libcuda keeps: live allocations, captures, and the rules by which calls fail. */

#ifndef STUB_STATE_H
#define STUB_STATE_H
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    CONTEXT_IS_DESTROYED = 709,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908
};
enum { MEMORY_DEVICE = 2, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, MAX_DEVICES = 8 };
/* The numbers stub_live() takes; test_cuda.py has the same order. */
enum kind { DEVICE, PINNED, STREAM, GRAPH, EXEC, EVENT, MODULE };

typedef unsigned long long address;
struct node {
    enum { COPY, FILL, MARK, LAUNCH } op;
    enum kind to, from;
    address dst, src;
    size_t dst_pitch, src_pitch, width, height;
    int value;
    address words[24]; /* LAUNCH: what it writes */
};
struct context {
    int refs, device;
};
struct object {
    enum kind kind;
    struct object *next;
    struct context *owner;
    char *memory;
    size_t size; /* DEVICE, PINNED */
    struct node *nodes;
    size_t n_nodes; /* GRAPH, EXEC, and STREAM while it is captured */
    int capturing, broken, error;
    pthread_t thread; /* STREAM */
    int recorded, captured;
    double ms; /* EVENT */
};
struct memcpy_2d { /* CUDA_MEMCPY2D */
    size_t src_x, src_y;
    unsigned src_type;
    const void *src_host;
    address src_device;
    void *src_array;
    size_t src_pitch;
    size_t dst_x, dst_y;
    unsigned dst_type;
    void *dst_host;
    address dst_device;
    void *dst_array;
    size_t dst_pitch;
    size_t width, height;
};

static struct object *objects;
static struct context contexts[MAX_DEVICES];
static __thread struct context *current;
static int initialised;

static long long setting(const char *name, long long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atoll(text) : otherwise;
}

static int forced(const char *name) {
    size_t length = strlen(name);
    for (const char *at = getenv("STUB_CUDA_FAIL"); at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, name, length) && at[length] == ':') return atoi(at + length + 1);
    return OK;
}

#define ENTER()                                   \
    do {                                          \
        int code_ = forced(__func__);             \
        if (code_) return code_;                  \
        if (!initialised) return NOT_INITIALIZED; \
    } while (0)
#define ENTER_CONTEXT()                                  \
    do {                                                 \
        ENTER();                                         \
        if (!current) return INVALID_CONTEXT;            \
        if (!current->refs) return CONTEXT_IS_DESTROYED; \
    } while (0)

static struct object *find(enum kind kind, const void *handle) {
    struct object *o = objects;
    while (o && (o != handle || o->kind != kind)) o = o->next;
    return o;
}

static struct object *make(enum kind kind) {
    struct object *o = calloc(1, sizeof *o);
    o->kind = kind;
    o->owner = current;
    o->next = objects;
    return objects = o;
}

static void drop(struct object *o) {
    struct object **at = &objects;
    while (*at != o) at = &(*at)->next;
    *at = o->next;
    free(o->memory);
    free(o->nodes);
    free(o);
}

static int destroy(enum kind kind, void *handle) {
    struct object *o = find(kind, handle);
    if (!o) return INVALID_HANDLE;
    drop(o);
    return OK;
}

/* The live allocation that holds all of the span, or NULL. */
static struct object *span(enum kind kind, address pointer, size_t size) {
    for (struct object *o = objects; o; o = o->next) {
        address start = (address)(uintptr_t)o->memory;
        if (o->kind == kind && pointer >= start && size <= o->size && pointer - start <= o->size - size) return o;
    }
    return NULL;
}

static int reachable(const struct node *n) {
    size_t rows = n->height ? n->height - 1 : 0;
    if (n->op == MARK) return 1;
    return span(n->to, n->dst, rows * n->dst_pitch + n->width) &&
           (n->op == FILL || n->op == LAUNCH || span(n->from, n->src, rows * n->src_pitch + n->width));
}

static void run(const struct node *n) {
    for (size_t y = 0; n->op != MARK && y < n->height; y++) {
        char *dst = (char *)(uintptr_t)n->dst + y * n->dst_pitch;
        if (n->op == FILL) memset(dst, n->value, n->width);
        else if (n->op == LAUNCH) memcpy(dst, n->words, n->width);
        else memcpy(dst, (char *)(uintptr_t)n->src + y * n->src_pitch, n->width);
    }
}

static int submit(void *handle, struct node n) {
    struct object *stream = find(STREAM, handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->broken) return CAPTURE_INVALIDATED;
    if (!reachable(&n)) return INVALID_VALUE;
    if (!stream->capturing) {
        run(&n);
        return OK;
    }
    stream->nodes = realloc(stream->nodes, (stream->n_nodes + 1) * sizeof n);
    stream->nodes[stream->n_nodes++] = n;
    return OK;
}

/* What may not happen in a thread while it captures breaks its captures. */
static int unsafe(void) {
    int found = 0;
    for (struct object *o = objects; o; o = o->next)
        if (o->kind == STREAM && o->capturing && pthread_equal(o->thread, pthread_self())) found = o->broken = 1;
    return found ? CAPTURE_UNSUPPORTED : OK;
}

#endif
