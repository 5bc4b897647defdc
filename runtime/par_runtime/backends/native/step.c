/* One call of the step network on a CPU: q positions of every row through all layers, to logits.

   What ONNX Runtime does with step.onnx, for the one case that matters: few rows, weights that no cache holds. Then a step is
   a read of all weights, and everything here serves that read: matrices are packed in the order in which they are read and
   fetched ahead of their use; half-precision weights are read as they are stored and widened in registers; keys are kept in the
   same panels, and only those that a row sees are read. Arithmetic is fp32 throughout, as in step.onnx.

   Threads share each product panel by panel, through a counter, so that a core that a neighbour slows does less.
   Plain C and the system's threads; the instruction set is chosen when the library is loaded. Python's side: native.py. */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PANEL 32 /* columns of a panel */
#define PIECE 64 /* of a panel's rows that stay in the first cache */
#define AHEAD 3072 /* bytes that a panel is fetched from memory before its use, where the rows pass over it once, */
#define NEAR 1024 /* and into the first cache */
#define VALUES_AHEAD 12 /* keys whose values are fetched before their use */
#define SHARES 4 /* of a product that each thread takes, if none is slowed */
#define NORM_COLUMNS 128 /* that a thread takes at a time */
#define EPSILON 1e-5f
#define SPINS 4000 /* looks at a counter before a thread lets others run */
enum { SINGLE, HALF, BRAIN };

typedef struct {
    int64_t dim, layers, heads, head, ffn, vocab, slots, type;
    float scale;
    const void **wqkv, **wo, **w13, **w2; /* a pointer per layer to packed panels */
    const float **attention_gain, **ffn_gain;
    const float *gain;
    const void *output;
} Model;

typedef struct {
    const Model *model;
    int64_t rows, query;
    const int64_t *write; /* [R] first slot of each row */
    float *x; /* [M,d] activations, overwritten */
    const float *cosine, *sine; /* [M,head/2] */
    float **all_keys, **all_values; /* per layer, [R,H,slots,head] */
    float *logits; /* [M,V] */
    float *keys, *values, *qkv, *mixed, *normed, *gates, *scratch;
    int64_t scratch_floats; /* of each thread */
} Step;

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SUFFIX avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,fma,f16c,avx2")))
#define ROWS 12
#define SOME 8
#define VEC 16
#define vec __m512
#define load _mm512_loadu_ps
#define store _mm512_storeu_ps
#define set1 _mm512_set1_ps
#define fma _mm512_fmadd_ps
#define load_half(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define load_brain(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#include "step_kernels.h"
#undef SUFFIX
#undef TARGET
#undef ROWS
#undef SOME
#undef VEC
#undef vec
#undef load
#undef store
#undef set1
#undef fma
#undef load_half
#undef load_brain
#define SUFFIX avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define ROWS 3
#define SOME 3
#define VEC 8
#define vec __m256
#define load _mm256_loadu_ps
#define store _mm256_storeu_ps
#define set1 _mm256_set1_ps
#define fma _mm256_fmadd_ps
#define load_half(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define load_brain(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#include "step_kernels.h"
#endif

typedef struct {
    void (*panel)(int, const float *, long, const void *, long, float *, long, int);
    void (*scales)(const float *, long, long, float *);
    void (*norm)(const float *, const float *, const float *, long, long, long, long, float *);
    void (*head)(const Step *, long, long, float *);
    void (*gated)(const float *, long, float *);
    const char *name;
} Kernels;

static const Kernels *chosen(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    static const Kernels wide = {panel_avx512, scales_avx512, norm_avx512, head_avx512, gated_avx512, "avx512"};
    static const Kernels narrow = {panel_avx2, scales_avx2, norm_avx2, head_avx2, gated_avx2, "avx2"};
    const char *asked = getenv("PARVIS_NATIVE");
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        !(asked && !strcmp(asked, "avx2")))
        return &wide;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return &narrow;
#endif
    return NULL;
}

/* -- threads: the caller is one of them; the others wait between calls, and look at a counter within one ------------------ */

typedef struct {
    int count;
    pthread_t *threads;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    const Step *step;
    int64_t turn; /* of calls, guarded by lock */
    int ending, started;
    atomic_long next; /* piece of the phase that is shared out */
    atomic_int arrived;
    atomic_long phase;
} Pool;

static void rest(int *spins) {
    if (++*spins < SPINS) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    } else {
        sched_yield();
    }
}

/* All threads have done the phase; the last to come opens the next. */
static void together(Pool *pool) {
    long phase = atomic_load(&pool->phase);
    if (atomic_fetch_add(&pool->arrived, 1) == pool->count - 1) {
        atomic_store(&pool->arrived, 0);
        atomic_store(&pool->next, 0);
        atomic_store(&pool->phase, phase + 1);
    } else {
        int spins = 0;
        while (atomic_load_explicit(&pool->phase, memory_order_acquire) == phase) rest(&spins);
    }
}

static long take(Pool *pool) { return atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed); }

/* The next of so many panels for this thread, `at` being its last one (-1 at first); -1 where there is none. Panels are taken some
   at a time, side by side, so that what is fetched ahead at the end of one is the beginning of the thread's next. */
static long next_panel(Pool *pool, long panels, long at) {
    long each = panels / (pool->count * SHARES);
    if (each < 1) each = 1;
    if (at >= 0 && (at + 1) % each && at + 1 < panels) return at + 1;
    long first = take(pool) * each;
    return first < panels ? first : -1;
}

/* c [M,N] (+)= x^T w, panel by panel. A panel is summed in `tile` [M][PANEL]: rows of c lie a multiple of 4 KB apart, and would
   push each other out of the first cache. */
static void product(Pool *pool, const Kernels *f, const Step *s, const float *x, const void *w, long k, long n, float *c, int add,
                    float *tile) {
    long m = s->rows * s->query, wide = s->model->type == SINGLE ? 4 : 2;
    for (long p = -1; (p = next_panel(pool, n / PANEL, p)) >= 0;) {
        f->panel((int)s->model->type, x, m, (const char *)w + p * PANEL * k * wide, k, tile, PANEL, 0);
        for (long i = 0; i < m; i++) {
            float *row = c + i * n + p * PANEL;
            const float *sum = tile + i * PANEL;
            if (add)
                for (long j = 0; j < PANEL; j++) row[j] += sum[j];
            else
                memcpy(row, sum, PANEL * sizeof(float));
        }
    }
    together(pool);
}

/* RMSNorm of all rows, transposed. Each thread finds every row's factor itself: that is shorter than waiting for another's. */
static void normed(Pool *pool, const Kernels *f, const Step *s, const float *gain, float *scale) {
    long m = s->rows * s->query, d = s->model->dim;
    f->scales(s->x, d, m, scale);
    for (long j; (j = take(pool) * NORM_COLUMNS) < d;)
        f->norm(s->x, gain, scale, d, m, j, j + NORM_COLUMNS < d ? j + NORM_COLUMNS : d, s->normed);
    together(pool);
}

static void work(Pool *pool, const Step *shared, int thread) {
    Step s = *shared;
    const Model *w = s.model;
    const Kernels *f = chosen();
    long m = s.rows * s.query, inner = w->heads * w->head, wide = w->type == SINGLE ? 4 : 2;
    float *scratch = s.scratch + thread * s.scratch_floats;
    for (long l = 0; l < w->layers; l++) {
        s.keys = s.all_keys[l], s.values = s.all_values[l];
        normed(pool, f, &s, w->attention_gain[l], scratch);
        product(pool, f, &s, s.normed, w->wqkv[l], w->dim, 3 * inner, s.qkv, 0, scratch);
        for (long i; (i = take(pool)) < s.rows * w->heads;) f->head(&s, i / w->heads, i % w->heads, scratch);
        together(pool);
        product(pool, f, &s, s.mixed, w->wo[l], inner, w->dim, s.x, 1, scratch);
        normed(pool, f, &s, w->ffn_gain[l], scratch);
        for (long p = -1; (p = next_panel(pool, 2 * w->ffn / PANEL, p)) >= 0;) {
            f->panel((int)w->type, s.normed, m, (const char *)w->w13[l] + p * PANEL * w->dim * wide, w->dim, scratch, PANEL, 0);
            f->gated(scratch, m, s.gates + p * (PANEL / 2) * m);
        }
        together(pool);
        product(pool, f, &s, s.gates, w->w2[l], w->ffn, w->dim, s.x, 1, scratch);
    }
    normed(pool, f, &s, w->gain, scratch);
    product(pool, f, &s, s.normed, w->output, w->dim, w->vocab, s.logits, 0, scratch);
}

typedef struct {
    Pool *pool;
    int thread;
} Worker;

static void *worker(void *given) {
    Worker me = *(Worker *)given;
    free(given);
    int64_t seen = 0;
    for (;;) {
        pthread_mutex_lock(&me.pool->lock);
        while (me.pool->turn == seen && !me.pool->ending) pthread_cond_wait(&me.pool->wake, &me.pool->lock);
        int ending = me.pool->ending;
        const Step *step = me.pool->step;
        seen = me.pool->turn;
        pthread_mutex_unlock(&me.pool->lock);
        if (ending) return NULL;
        work(me.pool, step, me.thread);
    }
}

/* -- what Python calls ----------------------------------------------------------------------------------------------------- */

const char *parvis_instructions(void) { return chosen() ? chosen()->name : ""; }

int parvis_panel(void) { return PANEL; }

/* Floats that a thread needs for a step of `rows` rows of `query` positions. */
int64_t parvis_scratch(const Model *w, int64_t rows, int64_t query) {
    int64_t padded = (w->slots + PANEL - 1) / PANEL * PANEL;
    int64_t attention = query * (2 * w->head + 2 * padded), gates = rows * query * PANEL;
    return (attention > gates ? attention : gates) + 64;
}

void *parvis_open(int threads) {
    Pool *pool = calloc(1, sizeof(Pool));
    if (!pool) return NULL;
    pool->threads = calloc((size_t)threads, sizeof(pthread_t));
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->count = 1;
    for (int i = 1; pool->threads && i < threads; i++) {
        Worker *it = malloc(sizeof(Worker));
        if (!it) break;
        it->pool = pool, it->thread = i;
        if (pthread_create(&pool->threads[i], NULL, worker, it)) {
            free(it);
            break;
        }
        pool->count++;
    }
    return pool;
}

void parvis_close(void *opened) {
    Pool *pool = opened;
    pthread_mutex_lock(&pool->lock);
    pool->ending = 1;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 1; i < pool->count; i++) pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->wake);
    free(pool->threads);
    free(pool);
}

void parvis_step(void *opened, const Step *step) {
    Pool *pool = opened;
    atomic_store(&pool->next, 0);
    pthread_mutex_lock(&pool->lock);
    pool->step = step;
    pool->turn++;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    work(pool, step, 0);
}

/* w [K,N] in `bytes` per number into panels [N/PANEL][K][PANEL]; with `paired`, a panel holds half of its columns from the first
   half of w and half from the second. N is a multiple of PANEL. */
void parvis_pack(const char *w, int64_t k, int64_t n, int64_t bytes, int paired, char *out) {
    int64_t wide = (paired ? PANEL / 2 : PANEL) * bytes;
    for (int64_t row = 0; row < k; row++) /* read in order: the file is mapped in small pages, what is written lies in large ones */
        for (int64_t p = 0; p < n / PANEL; p++) {
            const char *from = w + row * n * bytes + p * wide;
            char *to = out + (p * k + row) * PANEL * bytes;
            memcpy(to, from, (size_t)wide);
            if (paired) memcpy(to + wide, from + n / 2 * bytes, (size_t)wide);
        }
}
