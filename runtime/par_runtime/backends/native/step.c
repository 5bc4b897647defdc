/* One call of the step network on a CPU: q positions of every row go through all layers to logits.

   ONNX Runtime does the same with step.onnx. This code serves one case: few rows, and weights that are larger than any
   cache. Then a step takes as long as reading all weights from memory, and everything here makes that read fast:
   - matrices are packed in the order in which they are read, and are prefetched;
   - fp16 and bf16 weights are read as they are stored, and converted to fp32 in registers;
   - keys are stored in the same packed form, and only the keys that a row attends to are read.
   Each matrix is multiplied in the arithmetic for which it was packed (matrix.h); everything else is fp32, as in
   step.onnx. The tokens are drawn here too.

   The instruction set is chosen when a model is loaded. The Python side is library.py, weights.py and backend.py.

   Letters in the comments:
   R  rows of the batch            L  layers                          S  cache slots of a row
   B  images of the batch
   q  positions of a row per call  H  attention heads                 V  codes (size of the vocabulary)
   M  = R * q, rows of a product   D  numbers of a head (head_dim)    T  keys that a row attends to, T <= S
   K  inner size of a product      N  columns of a product            F  ffn_dim
   [A][B] is an array of A times B numbers in C order. A matrix "in panels" is [N/PANEL][K][PANEL]. */

#define _GNU_SOURCE /* for pool.h; before any header */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "instructions.h"
#include "matrix.h"
#include "pool.h"

#define PREFETCH_CACHE_BYTES 8192  /* how far ahead keys and values are prefetched, */
#define PREFETCH_PANEL_BYTES 32768 /* and how much of its first panel a thread prefetches while it packs, */
#define PREFETCH_FROM_BYTES 1000000 /* if the matrix is this large: smaller ones may still be in a cache */
#define RMS_EPSILON 1e-5f

/* The model. The Python class Model of library.py has the same fields. */
typedef struct {
    int64_t dim, n_layers, n_heads, head_dim, ffn_dim, vocab_size, cache_slots;
    int64_t head_columns;         /* of `output`: V, and columns of zeros up to a whole panel */
    int64_t cache;                /* FP32 or BF16: what keys and values are cached in */
    float attention_scale;        /* of queries */
    const void *embed;            /* [embed_rows][dim] */
    int64_t embed_rows, embed_stored; /* FP32, FP16 or BF16 */
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
    int64_t rows, query, images;
    const int64_t *ids;        /* [R][q] rows of the embedding */
    const int64_t *write;      /* [R] first slot that each row writes, which is also its position; it attends to slots
                                  0 .. write + q - 1 */
    const int64_t *cache_row;  /* [R] row of the cache where each row's keys and values are */
    const int64_t *uncond_row; /* [B] row without class of each image, or its own number where it is not guided */
    const float *guidance;     /* [B] */
    const float *temperature;  /* [B] */
    const int64_t *top_k;      /* [B], 0 keeps all */
    const float *top_p;        /* [B], 1 keeps all */
    const float *uniform;      /* [B][q] in [0,1) */
    void **keys;               /* [L] pointers to [cache rows][H][S/PANEL][D][PANEL] fp32, or in bf16 as in
                                  attention_bf16.h */
    void **values;             /* [L] pointers to [cache rows][H][S][D] fp32, or in bf16 as there */
    int64_t *tokens;           /* [B][q] the result; or NULL, then */
    float *logits;             /* [B][q][V] guided logits are the result */
    float *record;             /* NULL, or where what each product multiplies goes: [M][K] of each, in order */
    char *workspace;           /* parvis_workspace() bytes, 64 bytes aligned */
} Step;

/* Intermediate results of a call, shared by all threads; in its workspace. */
typedef struct {
    float *x;             /* [M][dim] */
    float *qkv;           /* [M][3*H*D] */
    float *attention_out; /* [M][H*D] */
    float *ffn_hidden;    /* [M][F] */
    float *logits;        /* [M][head_columns] */
} Buffers;

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* What a product of attention prefetches: for each of the first `rows` rows of its matrix, what lies `ahead` numbers
   behind that row. */
typedef struct {
    long ahead, rows;
} Ahead;

/* c [m][PANEL] = x w for x [m][2*pairs] and w [pairs][PANEL][2], both bf16; attention_bf16.h describes it. */
typedef void PairsProduct(const uint16_t *x, long ldx, long m, const uint16_t *w, long ldw, long pairs, float *c,
                          long ldc, Ahead fetch);

/* What panel p of `padded` keys prefetches, `bytes` a number: the panels behind it, and behind the last one the values.
   Where there are few keys, that is more values than are needed; otherwise nothing that this call does not read. */
INLINE Ahead ahead_of_keys(const char *panel, const char *values, long p, long padded, long d, long bytes) {
    long panel_bytes = PANEL * d * bytes, step = larger(1, PREFETCH_CACHE_BYTES / panel_bytes);
    long beyond = p / PANEL + step - padded / PANEL;
    const char *to = beyond < 0 ? panel + step * panel_bytes : values + beyond * panel_bytes;
    return (Ahead){(to - panel) / bytes, d};
}

/* What the values' `rows` rows of `row_bytes` bytes prefetch. All columns at once, when the first ones are read. */
INLINE Ahead ahead_of_values(long column, long rows, long row_bytes, long bytes) {
    long step = PREFETCH_CACHE_BYTES / row_bytes;
    return (Ahead){step * row_bytes / bytes, column ? 0 : rows - step};
}

/* Prefetches part t of q of the beginning of `next`. */
INLINE void prefetch_share(const char *next, long t, long q) {
    const long lines = PREFETCH_CACHE_BYTES / 64;
    if (next)
        for (long line = t * lines / q; line < (t + 1) * lines / q; line++) __builtin_prefetch(next + 64 * line);
}

/* -- the kernels, once for each instruction set -------------------------------------------------------------------- */

#include "sorting.h"
#ifdef HAS_VECTORS
#ifdef HAS_AVX
#include <immintrin.h>
#include "dots.h"
#define VECTORS 512
#include "vectors.h"
#include "products_fp32.h"
#include "products_rows.h"
#include "numbers.h"
#include "step_kernels.h"
#include "attention.h"
#include "attention_bf16.h"
#include "draws.h"
#undef VECTORS
#define VECTORS 256
#include "vectors.h"
#include "products_fp32.h"
#include "products_rows.h"
#include "numbers.h"
#include "step_kernels.h"
#include "attention.h"
#include "attention_bf16.h"
#include "draws.h"
#include "products_twin.h"
#ifdef HAS_DOT
#include "attention_dot.h"
#ifdef HAS_TILES
#include "attention_tiles.h"
#endif
#endif
#undef VECTORS
#define SHORT(f) f##_sse
#else
#include <arm_neon.h>
#include "dots.h"
#define SHORT(f) f##_neon
#endif
#define VECTORS 128
#include "vectors.h"
#include "products_fp32.h"
#include "products_rows.h"
#include "numbers.h"
#include "step_kernels.h"
#include "attention.h"
#include "attention_bf16.h"
#include "draws.h"
#ifdef HAS_BFMMLA
#include "attention_bfdot.h"
#endif
#endif
/* The kernels of one instruction set; the files above describe them. */
typedef struct {
    const char *instructions;
    int bits;  /* of its vectors */
    int tiles; /* whether products are made in tiles */
    void (*read_numbers)(const void *from, int64_t stored, long n, float *out);
    void (*round_bf16)(const float *x, long n, uint16_t *out);
    void (*inverse_rms)(const float *x, long dim, long m, float *scale);
    void (*attention_head)(const Step *s, const Buffers *at, long layer, long row, long head, float *scratch,
                           const char *next);
    void (*attention_head_bf16)(const Step *s, const Buffers *at, long layer, long row, long head, float *scratch,
                                const char *next, PairsProduct *product);
    PairsProduct *pairs_product;
    void (*swiglu)(const float *c, long m, float *out, long ldo);
    void (*guide)(const float *cond, const float *uncond, float guidance, long v, float *out);
    int64_t (*draw)(float *y, long v, float uniform, float temperature, int64_t top_k, float top_p, float *scratch);
} Kernels;

/* The kernels for this CPU; NULL where there are none. PARVIS_NATIVE in the environment selects others (instructions.h). */
static const Kernels *select_kernels(void) {
#define KERNELS(SET, BITS, TILES, PAIRS_PRODUCT)                                                                      \
    {                                                                                                                 \
        .instructions = #SET, .bits = BITS, .tiles = TILES, .read_numbers = read_numbers_##SET,                       \
        .round_bf16 = round_bf16_##SET, .inverse_rms = inverse_rms_##SET, .attention_head = attention_head_##SET,     \
        .attention_head_bf16 = attention_head_bf16_##SET, .pairs_product = PAIRS_PRODUCT, .swiglu = swiglu_##SET,     \
        .guide = guide_##SET, .draw = draw_##SET,                                                                     \
    }
#ifdef HAS_AVX
    static const Kernels avx512 = KERNELS(avx512, 512, 0, pairs_product_avx512),
                         avx2 = KERNELS(avx2, 256, 0, pairs_product_avx2),
                         sse = KERNELS(sse, 128, 0, pairs_product_sse);
    Instructions have = instructions_of_cpu();
#ifdef HAS_DOT
    static const Kernels with_dot = KERNELS(avx512, 512, 0, pairs_product_dot);
#ifdef HAS_TILES
    static const Kernels with_tiles = KERNELS(avx512, 512, 1, pairs_product_tiles);
    if (tiles_of_cpu(have)) return &with_tiles;
#endif
    if (have.avx512 && have.bf16_dot) return &with_dot;
#endif
    if (have.avx512) return &avx512;
    if (have.avx2) return &avx2;
    if (have.short_vectors) return &sse;
#elif defined(HAS_VECTORS)
    static const Kernels neon = KERNELS(neon, 128, 0, pairs_product_neon);
#ifdef HAS_BFMMLA
    static const Kernels with_bf16 = KERNELS(neon, 128, 0, pairs_product_bfdot);
    if (instructions_of_cpu().bf16_matrix) return &with_bf16;
#endif
    return &neon;
#endif
    return NULL;
}

#include "products_choose.h"
#include "products_pack.h"

/* To be called in each thread before the heads of a layer, where the cache is in bf16. */
static void begin_attention(const Kernels *kernels, long query) {
#ifdef HAS_TILES
    if (kernels->tiles) shape_tiles_of_attention(query);
#else
    (void)kernels, (void)query;
#endif
}

/* To be called in each thread after its last product. */
static void end_products(const Kernels *kernels) {
#ifdef HAS_TILES
    if (kernels->tiles) give_back_tiles();
#else
    (void)kernels;
#endif
}

#include "network.h"

/* -- what Python calls --------------------------------------------------------------------------------------------- */

/* "avx512", "avx2", "neon", or "" where this CPU has none of them; "sse" where a test asked for it. */
const char *parvis_instructions(void) { return select_kernels() ? select_kernels()->instructions : ""; }

/* Which of these are used: 1 products in bf16, 2 in int8, 4 tiles of AMX for both, 8 ARM's of small matrices for either;
   or their sum. */
int parvis_extra_instructions(void) {
    Instructions have = instructions_of_cpu();
    int int8 = have.int8_dot || have.vnni || have.int8_matrix;
    return (have.bf16_dot || have.bf16_matrix) + 2 * int8 + 4 * tiles_of_cpu(have) + 8 * (have.int8_matrix || have.bf16_matrix);
}

int parvis_panel(void) { return PANEL; }

/* The sizes of the structures and the offsets of their last fields; library.py compares them with its own. */
void parvis_struct_sizes(int64_t *sizes /* [6] */) {
    sizes[0] = sizeof(Matrix);
    sizes[1] = offsetof(Matrix, layout);
    sizes[2] = sizeof(Model);
    sizes[3] = offsetof(Model, output);
    sizes[4] = sizeof(Step);
    sizes[5] = offsetof(Step, workspace);
}

/* Puts a pool of up to n_threads threads, or NULL, into *pool. */
void parvis_pool_open(int n_threads, void **pool) { *pool = pool_open(n_threads, select_kernels()); }

/* Closes *pool, which may be NULL, and is afterwards. */
void parvis_pool_close(void **pool) { pool_take(pool); }

/* To be called before anything is freed that a call was given. */
void parvis_settle(void *pool) { pool_settle(pool); }

/* Places the buffers of a call behind each other from `at` on, and the threads' scratch memory behind them; returns the
   end. */
static char *place(StepCall *call, char *at, int threads) {
    const Step *s = &call->step;
    const Model *model = s->model;
    int64_t m = s->rows * s->query, inner = model->n_heads * model->head_dim;
    struct {
        float **buffer;
        int64_t columns;
    } buffers[] = {{&call->shared.x, model->dim},
                   {&call->shared.qkv, 3 * inner},
                   {&call->shared.attention_out, inner},
                   {&call->shared.ffn_hidden, model->ffn_dim},
                   {&call->shared.logits, model->head_columns}};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) {
        *buffers[i].buffer = (float *)at;
        at += aligned(m * buffers[i].columns * 4);
    }
    call->scratch = at;
    call->scratch_bytes = scratch_bytes_of(model, s->rows, s->query);
    return at + threads * call->scratch_bytes;
}

/* Bytes of the workspace of calls of `rows` rows of `query` positions on up to `threads` threads. */
int64_t parvis_workspace(const Model *model, int64_t rows, int64_t query, int threads) {
    static char origin[1];
    StepCall call = {.step = {.model = model, .rows = rows, .query = query}};
    return place(&call, origin, threads) - origin;
}

/* Makes a call. Returns 0; or, before any work, -1 where memory is exhausted, -2 where an id is no row of the
   embedding. */
int parvis_step(void *opened, const Step *step) {
    Pool *pool = opened;
    const Model *model = step->model;
    StepCall call = {.step = *step, .kernels = pool->kernels};
    if (!step->rows || !step->query) return 0; /* nothing to compute, and no product has so few rows */
    place(&call, step->workspace, pool->most_threads);
    for (int64_t i = 0, m = step->rows * step->query; i < m; i++)
        if (step->ids[i] < 0 || step->ids[i] >= model->embed_rows) return -2;
    for (int64_t i = 0, m = step->rows * step->query, dim = model->dim; i < m; i++) {
        const char *row = (const char *)model->embed + step->ids[i] * dim * (model->embed_stored == FP32 ? 4 : 2);
        call.kernels->read_numbers(row, model->embed_stored, dim, call.shared.x + i * dim);
    }
    return pool_run(pool, run_step, &call, sizeof call, phases_of(model));
}

/* The draw alone, for tests: the token of each of `count` rows of logits [count][v]. `scratch` is [4*columns], where
   columns is v up to a multiple of PANEL. */
void parvis_draw(const float *logits, int64_t count, int64_t v, const float *uniform, const float *temperature,
                 const int64_t *top_k, const float *top_p, int64_t *tokens, float *scratch) {
    int64_t columns = (v + PANEL - 1) / PANEL * PANEL;
    for (int64_t i = 0; i < count; i++) {
        memcpy(scratch, logits + i * v, (size_t)v * sizeof(float));
        end_of_logits(scratch, v, columns);
        tokens[i] = select_kernels()->draw(scratch, v, uniform[i], temperature[i], top_k[i], top_p[i],
                                           scratch + columns);
    }
}

/* The product alone, to measure how fast this CPU reads and multiplies: x w for x [m][k] and each of `n_panels` panels
   of w, `times` times. Every result overwrites the one before it. No pool: the calling thread does all of it. `packed`
   has parvis_packed_bytes(), and is packed here. */
void parvis_products(const Matrix *w, const float *x /* [m][k] */, int64_t m, int64_t k, int64_t n_panels,
                     int64_t times, float *tile /* [product_rows(m)][PANEL] */, char *packed) {
    const Kernels *kernels = select_kernels();
    Product product = product_of(kernels, w, m);
    char *scratch = packed + aligned(packed_rows_bytes(m, k));
    product.pack_rows(w, x, k, m, k, NULL, NULL, packed);
    for (int64_t i = 0; i < times; i++)
        for (int64_t p = 0; p < n_panels; p++) product.panel_product(w, packed, m, k, p, tile, scratch);
    end_products(kernels);
}

int64_t parvis_packed_bytes(int64_t m, int64_t k) { return aligned(packed_rows_bytes(m, k)) + product_scratch_bytes(); }

/* Rows of the tile that parvis_products() writes. */
int64_t parvis_product_rows(int64_t m) { return product_rows(m); }
