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

#include "matrix.h"
#include "threads.h"

#define PREFETCH_SLOTS 12 /* how far ahead cached values are prefetched */
#define RMS_EPSILON 1e-5f

/* The model. The Python class Model of library.py has the same fields. */
typedef struct {
    int64_t dim, n_layers, n_heads, head_dim, ffn_dim, vocab_size, cache_slots;
    float attention_scale;        /* of queries */
    const float *cosine, *sine;   /* [positions][D/2] rotary tables */
    const Matrix *wqkv;           /* [L] matrices [dim][3*H*D] */
    const Matrix *wo;             /* [L] matrices [H*D][dim] */
    const Matrix *w13;            /* [L] matrices [dim][2*F]: panels of PANEL/2 columns of w1, then of w3 */
    const Matrix *w2;             /* [L] matrices [F][dim] */
    const float **attention_norm; /* [L] pointers to [dim] */
    const float **ffn_norm;       /* [L] pointers to [dim] */
    const float *norm;            /* [dim] */
    Matrix output;                /* [dim][V] */
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
    float *attention_out; /* [M][H*D] */
    float *ffn_hidden;    /* [M][F] */
    float *record;        /* NULL, or where what each product multiplies goes: [M][K] of each, in the order of a call */
    /* Each thread's own: */
    char *scratch;         /* [threads][scratch_bytes], 64 bytes aligned */
    int64_t scratch_bytes; /* from parvis_scratch() */
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
#define vec_load_int8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define vec_load_int4(p, shift)                                                                                        \
    _mm512_cvtepi32_ps(_mm512_sub_epi32(                                                                               \
        _mm512_and_si512(_mm512_srli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p))), shift),        \
                         _mm512_set1_epi32(15)),                                                                       \
        _mm512_set1_epi32(8)))
#define vec_mul _mm512_mul_ps
#define vec_store _mm512_storeu_ps
#define vec_set1 _mm512_set1_ps
#define vec_fma _mm512_fmadd_ps
#include "products.h"
#include "products_fp32.h"
#include "products_rows.h"
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
#undef vec_load_int8
#undef vec_load_int4
#undef vec_mul
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
#define vec_load_int8(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define vec_load_int4(p, shift)                                                                                        \
    _mm256_cvtepi32_ps(_mm256_sub_epi32(                                                                               \
        _mm256_and_si256(_mm256_srli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p))), shift),        \
                         _mm256_set1_epi32(15)),                                                                       \
        _mm256_set1_epi32(8)))
#define vec_mul _mm256_mul_ps
#define vec_store _mm256_storeu_ps
#define vec_set1 _mm256_set1_ps
#define vec_fma _mm256_fmadd_ps
#include "products.h"
#include "products_fp32.h"
#include "products_rows.h"
#include "step_kernels.h"
#include "products_twin.h"
#if __GNUC__ >= 10 || (defined(__clang_major__) && __clang_major__ >= 9)
#define HAS_DOT /* the compiler knows dot products */
#include "products_bf16.h"
#include "products_int8.h"
#endif
#endif
#include "products_choose.h"
#include "products_pack.h"

/* The kernels of one instruction set; products.h and step_kernels.h describe them. */
typedef struct {
    const char *instructions;
    int avx512; /* which vectors its products use, of product_of() */
    void (*inverse_rms)(const float *x, long dim, long m, float *scale);
    void (*attention_head)(const Step *s, long layer, long row, long head, float *scratch);
    void (*swiglu)(const float *c, long m, float *out, long ldo);
} Kernels;

/* The kernels for this CPU; NULL where it has neither AVX-512 nor AVX2. PARVIS_NATIVE=avx2 in the environment selects
   AVX2 on a CPU that has both. */
static const Kernels *select_kernels(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    static const Kernels avx512 = {
        .instructions = "avx512",
        .avx512 = 1,
        .inverse_rms = inverse_rms_avx512,
        .attention_head = attention_head_avx512,
        .swiglu = swiglu_avx512,
    };
    static const Kernels avx2 = {
        .instructions = "avx2",
        .avx512 = 0,
        .inverse_rms = inverse_rms_avx2,
        .attention_head = attention_head_avx2,
        .swiglu = swiglu_avx2,
    };
    if (instructions_of_cpu().avx512) return &avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return &avx2;
#endif
    return NULL;
}

/* -- the network: every function here is called by all threads, and ends with a barrier ---------------------------- */

/* What a thread needs during a phase; parvis_scratch() reserves it. */
typedef struct {
    float *scale;         /* [M] */
    float *tile;          /* [M][PANEL] one panel of a product */
    void *packed;         /* the packed activations of a product */
    void *product_scratch;
    float *attention;     /* of attention_head(); the memory of `packed` and `tile` */
    float *record;        /* where the next product's rows go, of one thread; NULL for the others */
} Scratch;

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Bytes of the packed activations of any product of a model. */
static int64_t largest_packed(const Model *model, int64_t m) {
    return packed_rows_bytes(m, larger(model->ffn_dim, larger(model->dim, model->n_heads * model->head_dim)));
}

/* Keeps x [M][k], or with `gain` [k] its RMSNorm, where a step is recorded: `parvis calibrate` needs it. */
static void record(const float *x, const float *gain, long m, long k, Scratch *own) {
    if (!own->record) return;
    for (long i = 0; i < m; i++)
        for (long j = 0; j < k; j++) *own->record++ = gain ? x[i * k + j] * own->scale[i] * gain[j] : x[i * k + j];
}

/* Packs x [M][k] for a product with w; with `gain` [k], its RMSNorm. Every thread packs for itself: that takes less time
   than waiting at a barrier for what another thread packs. */
static void pack(const Kernels *kernels, const Step *s, const float *x, const float *gain, const Matrix *w, long k,
                 Scratch *own) {
    long m = s->rows * s->query;
    if (gain) kernels->inverse_rms(x, k, m, own->scale);
    product_of(w, kernels->avx512).pack_rows(w, x, k, m, k, gain ? own->scale : NULL, gain, own->packed);
    record(x, gain, m, k, own);
}

/* c [M][n] = x w, or c += x w with `accumulate`, for x [M][k] or, with `gain` [k], its RMSNorm. Each panel's result is
   first summed in a tile of its own: the rows of c are a multiple of 4 KB apart, and would evict each other from L1. */
static void matmul(Pool *pool, const Kernels *kernels, const Step *s, const float *x, const float *gain,
                   const Matrix *w, long k, long n, float *c, int accumulate, Scratch *own) {
    long m = s->rows * s->query;
    PanelProduct *panel_product = product_of(w, kernels->avx512).panel_product;
    pack(kernels, s, x, gain, w, k, own);
    for (long p = -1; (p = next_panel(pool, n / PANEL, p)) >= 0;) {
        panel_product(w, own->packed, m, k, p, own->tile, own->product_scratch);
        for (long i = 0; i < m; i++) {
            float *to = c + i * n + p * PANEL;         /* [PANEL] */
            const float *from = own->tile + i * PANEL; /* [PANEL] */
            if (accumulate)
                for (long j = 0; j < PANEL; j++) to[j] += from[j];
            else memcpy(to, from, PANEL * sizeof(float));
        }
    }
    barrier(pool);
}

/* qkv [M][3*H*D] -> attention_out [M][H*D]; the new keys and values enter the cache. A piece is one head of one row. */
static void attention(Pool *pool, const Kernels *kernels, const Step *s, long layer, float *scratch) {
    long n_heads = s->model->n_heads;
    for (long i; (i = next_piece(pool)) < s->rows * n_heads;)
        kernels->attention_head(s, layer, i / n_heads, i % n_heads, scratch);
    barrier(pool);
}

/* ffn_hidden [M][F] = silu(x w1) * (x w3) for the RMSNorm of x [M][dim]. */
static void ffn_hidden(Pool *pool, const Kernels *kernels, const Step *s, const float *gain, const Matrix *w13,
                       Scratch *own) {
    const Model *model = s->model;
    long m = s->rows * s->query;
    PanelProduct *panel_product = product_of(w13, kernels->avx512).panel_product;
    pack(kernels, s, s->x, gain, w13, model->dim, own);
    for (long p = -1; (p = next_panel(pool, 2 * model->ffn_dim / PANEL, p)) >= 0;) {
        panel_product(w13, own->packed, m, model->dim, p, own->tile, own->product_scratch);
        kernels->swiglu(own->tile, m, s->ffn_hidden + p * (PANEL / 2), model->ffn_dim);
    }
    barrier(pool);
}

/* The task of the pool: one call of the network. */
static void run_step(Pool *pool, const void *argument, int thread) {
    const Step *s = argument;
    const Model *model = s->model;
    const Kernels *kernels = select_kernels();
    long dim = model->dim, inner = model->n_heads * model->head_dim, m = s->rows * s->query;
    char *at = s->scratch + thread * s->scratch_bytes;
    int64_t packed = largest_packed(model, m);
    Scratch own = {.scale = (float *)at, .tile = (float *)(at + aligned(m * 4))};
    own.packed = (char *)own.tile + m * PANEL * 4;
    own.product_scratch = (char *)own.packed + aligned(packed);
    own.attention = own.tile;
    own.record = thread ? NULL : s->record;
    for (long l = 0; l < model->n_layers; l++) {
        matmul(pool, kernels, s, s->x, model->attention_norm[l], model->wqkv + l, dim, 3 * inner, s->qkv, 0, &own);
        attention(pool, kernels, s, l, own.attention);
        matmul(pool, kernels, s, s->attention_out, NULL, model->wo + l, inner, dim, s->x, 1, &own);
        ffn_hidden(pool, kernels, s, model->ffn_norm[l], model->w13 + l, &own);
        matmul(pool, kernels, s, s->ffn_hidden, NULL, model->w2 + l, model->ffn_dim, dim, s->x, 1, &own);
    }
    matmul(pool, kernels, s, s->x, model->norm, &model->output, dim, model->vocab_size, s->logits, 0, &own);
}

/* -- what Python calls --------------------------------------------------------------------------------------------- */

/* "avx512", "avx2", or "" where this CPU has neither. */
const char *parvis_instructions(void) { return select_kernels() ? select_kernels()->instructions : ""; }

int parvis_panel(void) { return PANEL; }

/* The sizes of the structures and the offsets of their last fields; library.py compares them with its own. */
void parvis_struct_sizes(int64_t *sizes /* [6] */) {
    sizes[0] = sizeof(Matrix);
    sizes[1] = offsetof(Matrix, layout);
    sizes[2] = sizeof(Model);
    sizes[3] = offsetof(Model, output);
    sizes[4] = sizeof(Step);
    sizes[5] = offsetof(Step, scratch_bytes);
}

/* Bytes of scratch memory that each thread needs for a step of `rows` rows of `query` positions; a multiple of 64. */
int64_t parvis_scratch(const Model *model, int64_t rows, int64_t query) {
    int64_t m = rows * query, padded_slots = (model->cache_slots + PANEL - 1) / PANEL * PANEL;
    int64_t attention = query * (2 * model->head_dim + 2 * padded_slots) * 4;
    int64_t products = m * PANEL * 4 + aligned(largest_packed(model, m)) + product_scratch_bytes();
    return aligned(m * 4) + aligned(larger(attention, products)) + 64;
}

void *parvis_open(int n_threads) { return pool_open(n_threads, run_step); }

void parvis_close(void *pool) { pool_close(pool); }

void parvis_step(void *pool, const Step *step) { pool_run(pool, step); }

/* The product alone, to measure how fast this CPU reads and multiplies: x w for x [m][k] and each of `n_panels` panels
   of w, `times` times. Every result overwrites the one before it. No pool: the calling thread does all of it. `packed`
   has parvis_packed_bytes(), and is packed here. */
void parvis_products(const Matrix *w, const float *x /* [m][k] */, int64_t m, int64_t k, int64_t n_panels,
                     int64_t times, float *tile /* [m][PANEL] */, char *packed) {
    Product product = product_of(w, select_kernels()->avx512);
    char *scratch = packed + aligned(packed_rows_bytes(m, k));
    product.pack_rows(w, x, k, m, k, NULL, NULL, packed);
    for (int64_t i = 0; i < times; i++)
        for (int64_t p = 0; p < n_panels; p++) product.panel_product(w, packed, m, k, p, tile, scratch);
}

int64_t parvis_packed_bytes(int64_t m, int64_t k) { return aligned(packed_rows_bytes(m, k)) + product_scratch_bytes(); }
