/* One call of the step network on a CPU: q positions of every row go through all layers to logits.

   ONNX Runtime does the same with step.onnx. This code serves one case: few rows, and weights that are larger than any
   cache. Then a step takes as long as reading all weights from memory, and everything here makes that read fast:
   - matrices are packed in the order in which they are read, and are prefetched;
   - fp16 and bf16 weights are read as they are stored, and converted to fp32 in registers;
   - keys are stored in the same packed form, and only the keys that a row attends to are read.
   All arithmetic is fp32, as in step.onnx.

   The instruction set is chosen when the library is loaded. The Python side is library.py, weights.py and backend.py.

   Letters in the comments:
   R  rows of the batch            L  layers                          S  cache slots of a row
   q  positions of a row per call  H  attention heads                 V  codes (size of the vocabulary)
   M  = R * q, rows of a product   D  numbers of a head (head_dim)    T  keys that a row attends to, T <= S
   K  inner size of a product      N  columns of a product            F  ffn_dim
   [A][B] is an array of A times B numbers in C order. A matrix "in panels" is [N/PANEL][K][PANEL]. */

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "threads.h"

#define PANEL 32   /* columns of a panel */
#define K_BLOCK 64 /* rows of a panel that stay in the L1 cache while all rows of activations are multiplied */
#define PREFETCH_L2_BYTES 3072 /* in products of one pass: how far ahead weights are prefetched into L2, */
#define PREFETCH_L1_BYTES 1024 /* and how far ahead into L1 */
#define PREFETCH_SLOTS 12      /* how far ahead cached values are prefetched */
#define NORM_COLUMNS 128       /* columns of one piece of an RMSNorm */
#define RMS_EPSILON 1e-5f

/* As in library.py */
enum { FP32, FP16, BF16 };

/* The model. The Python class Model of library.py has the same fields. */
typedef struct {
    int64_t dim, n_layers, n_heads, head_dim, ffn_dim, vocab_size, cache_slots;
    int64_t weight_dtype;         /* FP32, FP16 or BF16: of all matrices */
    float attention_scale;        /* of queries */
    const float *cosine, *sine;   /* [positions][D/2] rotary tables */
    const void **wqkv;            /* [L] pointers to [dim][3*H*D] in panels */
    const void **wo;              /* [L] pointers to [H*D][dim] in panels */
    const void **w13;             /* [L] pointers to [dim][2*F] in panels of PANEL/2 columns of w1, then of w3 */
    const void **w2;              /* [L] pointers to [F][dim] in panels */
    const float **attention_norm; /* [L] pointers to [dim] */
    const float **ffn_norm;       /* [L] pointers to [dim] */
    const float *norm;            /* [dim] */
    const void *output;           /* [dim][V] in panels */
} Model;

/* One call. The Python class Step of library.py has the same fields. */
typedef struct {
    const Model *model;
    int64_t rows, query;
    const int64_t *write;     /* [R] first slot that each row writes, which is also its position; it attends to slots
                                 0 .. write + q - 1 */
    const int64_t *cache_row; /* [R] row of the cache where each row's keys and values are */
    float *x;                 /* [M][dim] embeddings of the inputs; overwritten */
    float **keys;             /* [L] pointers to [cache rows][H][S/PANEL][D][PANEL] */
    float **values;           /* [L] pointers to [cache rows][H][S][D] */
    float *logits;            /* [M][V] the result */
    /* Intermediate results, shared by all threads: */
    float *qkv;           /* [M][3*H*D] */
    float *attention_out; /* [H*D][M] */
    float *norm_out;      /* [dim][M] */
    float *ffn_hidden;    /* [F][M] */
    /* Each thread's own: */
    float *scratch;         /* [threads][scratch_floats] */
    int64_t scratch_floats; /* from parvis_scratch() */
} Step;

/* -- the kernels, once for each instruction set -------------------------------------------------------------------- */

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SUFFIX avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,fma,f16c,avx2")))
#define ROWS_MAX 12
#define ROWS_MID 8
#define VEC_FLOATS 16
#define vec __m512
#define vec_load_fp32 _mm512_loadu_ps
#define vec_load_fp16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define vec_load_bf16(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define vec_store _mm512_storeu_ps
#define vec_set1 _mm512_set1_ps
#define vec_fma _mm512_fmadd_ps
#include "step_kernels.h"
#undef SUFFIX
#undef TARGET
#undef ROWS_MAX
#undef ROWS_MID
#undef VEC_FLOATS
#undef vec
#undef vec_load_fp32
#undef vec_load_fp16
#undef vec_load_bf16
#undef vec_store
#undef vec_set1
#undef vec_fma
#define SUFFIX avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define ROWS_MAX 3
#define ROWS_MID 3
#define VEC_FLOATS 8
#define vec __m256
#define vec_load_fp32 _mm256_loadu_ps
#define vec_load_fp16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define vec_load_bf16(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define vec_store _mm256_storeu_ps
#define vec_set1 _mm256_set1_ps
#define vec_fma _mm256_fmadd_ps
#include "step_kernels.h"
#endif

/* The kernels of one instruction set; step_kernels.h describes them. */
typedef struct {
    const char *instructions;
    void (*panel_product)(int weight_dtype, const float *x, long m, const void *w, long k, float *c);
    void (*inverse_rms)(const float *x, long dim, long m, float *scale);
    void (*rms_norm)(const float *x, const float *gain, const float *scale, long dim, long m, long first, long end,
                     float *out);
    void (*attention_head)(const Step *s, long layer, long row, long head, float *scratch);
    void (*swiglu)(const float *c, long m, float *out);
} Kernels;

/* The kernels for this CPU; NULL where it has neither AVX-512 nor AVX2. PARVIS_NATIVE=avx2 in the environment selects
   AVX2 on a CPU that has both. */
static const Kernels *select_kernels(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    static const Kernels avx512 = {
        .instructions = "avx512",
        .panel_product = panel_product_avx512,
        .inverse_rms = inverse_rms_avx512,
        .rms_norm = rms_norm_avx512,
        .attention_head = attention_head_avx512,
        .swiglu = swiglu_avx512,
    };
    static const Kernels avx2 = {
        .instructions = "avx2",
        .panel_product = panel_product_avx2,
        .inverse_rms = inverse_rms_avx2,
        .rms_norm = rms_norm_avx2,
        .attention_head = attention_head_avx2,
        .swiglu = swiglu_avx2,
    };
    const char *requested = getenv("PARVIS_NATIVE");
    int avx2_requested = requested && !strcmp(requested, "avx2");
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        !avx2_requested)
        return &avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return &avx2;
#endif
    return NULL;
}

/* -- the network: every function here is called by all threads, and ends with a barrier ---------------------------- */

static long bytes_per_weight(const Model *model) { return model->weight_dtype == FP32 ? 4 : 2; }

/* c [M][n] = x^T w, or c += x^T w with `accumulate`, for x [k][M] and w [k][n] in panels. Each panel's result is first
   summed in `tile` [M][PANEL]: the rows of c are a multiple of 4 KB apart, and would evict each other from L1. */
static void matmul(Pool *pool, const Kernels *kernels, const Step *s, const float *x, const void *w, long k, long n,
                   float *c, int accumulate, float *tile) {
    long m = s->rows * s->query, panel_bytes = PANEL * k * bytes_per_weight(s->model);
    for (long p = -1; (p = next_panel(pool, n / PANEL, p)) >= 0;) {
        kernels->panel_product((int)s->model->weight_dtype, x, m, (const char *)w + p * panel_bytes, k, tile);
        for (long i = 0; i < m; i++) {
            float *to = c + i * n + p * PANEL;    /* [PANEL] */
            const float *from = tile + i * PANEL; /* [PANEL] */
            if (accumulate)
                for (long j = 0; j < PANEL; j++) to[j] += from[j];
            else memcpy(to, from, PANEL * sizeof(float));
        }
    }
    barrier(pool);
}

/* norm_out [dim][M] = RMSNorm of x [M][dim] with `gain` [dim], transposed. Every thread computes the factors `scale`
   [M] itself: that takes less time than waiting at a barrier for the factors of another thread. */
static void norm(Pool *pool, const Kernels *kernels, const Step *s, const float *gain, float *scale) {
    long m = s->rows * s->query, dim = s->model->dim;
    kernels->inverse_rms(s->x, dim, m, scale);
    for (long first; (first = next_piece(pool) * NORM_COLUMNS) < dim;) {
        long end = first + NORM_COLUMNS < dim ? first + NORM_COLUMNS : dim;
        kernels->rms_norm(s->x, gain, scale, dim, m, first, end, s->norm_out);
    }
    barrier(pool);
}

/* qkv [M][3*H*D] -> attention_out [H*D][M]; the new keys and values enter the cache. A piece is one head of one row. */
static void attention(Pool *pool, const Kernels *kernels, const Step *s, long layer, float *scratch) {
    long n_heads = s->model->n_heads;
    for (long i; (i = next_piece(pool)) < s->rows * n_heads;)
        kernels->attention_head(s, layer, i / n_heads, i % n_heads, scratch);
    barrier(pool);
}

/* norm_out [dim][M] -> ffn_hidden [F][M] = silu(w1^T norm_out) * (w3^T norm_out), with `w13` [dim][2*F] in panels. */
static void ffn_hidden(Pool *pool, const Kernels *kernels, const Step *s, const void *w13, float *tile) {
    const Model *model = s->model;
    long m = s->rows * s->query, panel_bytes = PANEL * model->dim * bytes_per_weight(model);
    for (long p = -1; (p = next_panel(pool, 2 * model->ffn_dim / PANEL, p)) >= 0;) {
        const char *panel = (const char *)w13 + p * panel_bytes; /* [dim][PANEL] */
        kernels->panel_product((int)model->weight_dtype, s->norm_out, m, panel, model->dim, tile);
        kernels->swiglu(tile, m, s->ffn_hidden + p * (PANEL / 2) * m);
    }
    barrier(pool);
}

/* The task of the pool: one call of the network. */
static void run_step(Pool *pool, const void *argument, int thread) {
    const Step *s = argument;
    const Model *model = s->model;
    const Kernels *kernels = select_kernels();
    long dim = model->dim, inner = model->n_heads * model->head_dim;
    float *scratch = s->scratch + thread * s->scratch_floats; /* [scratch_floats] */
    for (long l = 0; l < model->n_layers; l++) {
        norm(pool, kernels, s, model->attention_norm[l], scratch);
        matmul(pool, kernels, s, s->norm_out, model->wqkv[l], dim, 3 * inner, s->qkv, 0, scratch);
        attention(pool, kernels, s, l, scratch);
        matmul(pool, kernels, s, s->attention_out, model->wo[l], inner, dim, s->x, 1, scratch);
        norm(pool, kernels, s, model->ffn_norm[l], scratch);
        ffn_hidden(pool, kernels, s, model->w13[l], scratch);
        matmul(pool, kernels, s, s->ffn_hidden, model->w2[l], model->ffn_dim, dim, s->x, 1, scratch);
    }
    norm(pool, kernels, s, model->norm, scratch);
    matmul(pool, kernels, s, s->norm_out, model->output, dim, model->vocab_size, s->logits, 0, scratch);
}

/* -- what Python calls --------------------------------------------------------------------------------------------- */

/* "avx512", "avx2", or "" where this CPU has neither. */
const char *parvis_instructions(void) { return select_kernels() ? select_kernels()->instructions : ""; }

int parvis_panel(void) { return PANEL; }

/* The sizes of both structures and the offsets of their last fields; library.py compares them with its own. */
void parvis_struct_sizes(int64_t *sizes /* [4] */) {
    sizes[0] = sizeof(Model);
    sizes[1] = offsetof(Model, output);
    sizes[2] = sizeof(Step);
    sizes[3] = offsetof(Step, scratch_floats);
}

/* Floats of scratch memory that each thread needs for a step of `rows` rows of `query` positions. */
int64_t parvis_scratch(const Model *model, int64_t rows, int64_t query) {
    int64_t padded_slots = (model->cache_slots + PANEL - 1) / PANEL * PANEL;
    int64_t attention = query * (2 * model->head_dim + 2 * padded_slots), tile = rows * query * PANEL;
    return (attention > tile ? attention : tile) + 64;
}

void *parvis_open(int n_threads) { return pool_open(n_threads, run_step); }

void parvis_close(void *pool) { pool_close(pool); }

void parvis_step(void *pool, const Step *step) { pool_run(pool, step); }

/* The product alone, to measure how fast this CPU reads and multiplies: x^T w for x [k][m] and each of `n_panels` panels
   of w, `times` times. Every result overwrites the one before it. No pool: the calling thread does all of it. */
void parvis_products(int weight_dtype, const float *x /* [k][m] */, int64_t m, const char *w /* [n_panels][k][PANEL] */,
                     int64_t k, int64_t n_panels, int64_t times, float *tile /* [m][PANEL] */) {
    const Kernels *kernels = select_kernels();
    int64_t panel_bytes = PANEL * k * (weight_dtype == FP32 ? 4 : 2);
    for (int64_t i = 0; i < times; i++)
        for (int64_t p = 0; p < n_panels; p++)
            kernels->panel_product(weight_dtype, x, m, w + p * panel_bytes, k, tile);
}

/* Packs w [k][n], of `bytes` per number, into panels: out [n/PANEL][k][PANEL]; n is a multiple of PANEL. With
   `interleave_halves`, a panel holds PANEL/2 columns of the first half of w, then PANEL/2 of the second half. */
void parvis_pack(const char *w /* [k][n] */, int64_t k, int64_t n, int64_t bytes, int interleave_halves,
                 char *out /* [n/PANEL][k][PANEL] */) {
    int64_t run = (interleave_halves ? PANEL / 2 : PANEL) * bytes;
    /* w is read in order: it is a mapped file with small pages. `out` has huge pages. */
    for (int64_t row = 0; row < k; row++)
        for (int64_t p = 0; p < n / PANEL; p++) {
            const char *from = w + row * n * bytes + p * run;
            char *to = out + (p * k + row) * PANEL * bytes;
            memcpy(to, from, (size_t)run);
            if (interleave_halves) memcpy(to + run, from + n / 2 * bytes, (size_t)run);
        }
}
