/* The kernels of step.c for one instruction set. step.c includes this file once per set, with these macros defined:

   SUFFIX          name of the set; NAME(f) is f_SUFFIX
   TARGET          attribute that allows the set's instructions
   ROWS_MAX        rows of activations that are multiplied at once: as many as have their sums in registers
   ROWS_MID        a smaller number of rows
   VEC_FLOATS      floats of a vector
   vec             the type of a vector; vec_set1, vec_store, vec_fma, vec_load_fp32, vec_load_fp16, vec_load_bf16

   A matrix is stored in panels, [N/PANEL][K][PANEL], so a product reads it from the first byte to the last. Activations
   are stored transposed, [K][M], so the numbers that are multiplied at the same time are neighbours.
   step.c explains the letters R, q, M, K, N, H, D, S, T. */

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define NAME(f) CAT(f, SUFFIX)
#define PANEL_VECS (PANEL / VEC_FLOATS)

/* -- matrix products ----------------------------------------------------------------------------------------------- */

/* Defines FUNCTION(x, m, w, ldw, k, c, ldc, accumulate, prefetch, prefetch_stride, l1_offset):
   c [N_ROWS][PANEL] = x^T w, or c += x^T w with `accumulate`, for x [k][N_ROWS] and w [k][PANEL].
   m, ldw and ldc are the distances between rows of x, w and c, in numbers. A step waits for weights, and the hardware
   does not prefetch them early enough. So this code prefetches `prefetch_stride` bytes for each row of w: into L2 from
   the address `prefetch` on, and into L1 from `l1_offset` bytes before it. */
#define DEFINE_PRODUCT_OF_ROWS(FUNCTION, N_ROWS, TYPE, VEC_LOAD)                                                    \
    TARGET static void NAME(FUNCTION)(const float *x, long m, const TYPE *w, long ldw, long k, float *c, long ldc,  \
                                      int accumulate, const char *prefetch, long prefetch_stride, long l1_offset) { \
        vec sum[N_ROWS][PANEL_VECS];                                                                                \
        for (int i = 0; i < N_ROWS; i++)                                                                            \
            for (int j = 0; j < PANEL_VECS; j++)                                                                    \
                sum[i][j] = accumulate ? vec_load_fp32(c + i * ldc + j * VEC_FLOATS) : vec_set1(0.0f);              \
        for (long p = 0; p < k; p++) {                                                                              \
            for (long line = 0; line <= (prefetch_stride > 64 ? 64 : 0); line += 64) {                              \
                __builtin_prefetch(prefetch + p * prefetch_stride + line, 0, 2);                                    \
                __builtin_prefetch(prefetch + p * prefetch_stride + line - l1_offset, 0, 3);                        \
            }                                                                                                       \
            vec w_row[PANEL_VECS];                                                                                  \
            for (int j = 0; j < PANEL_VECS; j++) w_row[j] = VEC_LOAD(w + p * ldw + j * VEC_FLOATS);                 \
            for (int i = 0; i < N_ROWS; i++) {                                                                      \
                vec x_value = vec_set1(x[p * m + i]);                                                               \
                for (int j = 0; j < PANEL_VECS; j++) sum[i][j] = vec_fma(x_value, w_row[j], sum[i][j]);             \
            }                                                                                                       \
        }                                                                                                           \
        for (int i = 0; i < N_ROWS; i++)                                                                            \
            for (int j = 0; j < PANEL_VECS; j++) vec_store(c + i * ldc + j * VEC_FLOATS, sum[i][j]);                \
    }

/* Defines the products for one dtype of weights:

   product_DTYPE_rows  the function above, chosen by its number of rows (one that rows_of_pass() returns).
   product_DTYPE       c [M][PANEL] = x^T w for x [K][M] and one panel w [K][PANEL]; ldc is the distance between rows
                       of c. K is cut into blocks, which stay in the L1 cache while all rows of x are multiplied, some
                       rows in each pass. Each pass prefetches its share of the next block, so memory is always busy. */
#define DEFINE_PRODUCT(DTYPE, TYPE, VEC_LOAD)                                                                     \
    DEFINE_PRODUCT_OF_ROWS(CAT(DTYPE, 1), 1, TYPE, VEC_LOAD)                                                      \
    DEFINE_PRODUCT_OF_ROWS(CAT(DTYPE, 2), 2, TYPE, VEC_LOAD)                                                      \
    DEFINE_PRODUCT_OF_ROWS(CAT(DTYPE, 4), 4, TYPE, VEC_LOAD)                                                      \
    DEFINE_PRODUCT_OF_ROWS(CAT(DTYPE, mid), ROWS_MID, TYPE, VEC_LOAD)                                             \
    DEFINE_PRODUCT_OF_ROWS(CAT(DTYPE, max), ROWS_MAX, TYPE, VEC_LOAD)                                             \
    TARGET static void NAME(CAT(DTYPE, rows))(long rows, const float *x, long m, const TYPE *w, long ldw, long k, \
                                              float *c, long ldc, int accumulate, const char *prefetch,           \
                                              long prefetch_stride, long l1_offset) {                             \
        if (rows == ROWS_MAX)                                                                                     \
            NAME(CAT(DTYPE, max))(x, m, w, ldw, k, c, ldc, accumulate, prefetch, prefetch_stride, l1_offset);     \
        else if (rows == ROWS_MID)                                                                                \
            NAME(CAT(DTYPE, mid))(x, m, w, ldw, k, c, ldc, accumulate, prefetch, prefetch_stride, l1_offset);     \
        else if (rows == 4)                                                                                       \
            NAME(CAT(DTYPE, 4))(x, m, w, ldw, k, c, ldc, accumulate, prefetch, prefetch_stride, l1_offset);       \
        else if (rows == 2)                                                                                       \
            NAME(CAT(DTYPE, 2))(x, m, w, ldw, k, c, ldc, accumulate, prefetch, prefetch_stride, l1_offset);       \
        else NAME(CAT(DTYPE, 1))(x, m, w, ldw, k, c, ldc, accumulate, prefetch, prefetch_stride, l1_offset);      \
    }                                                                                                             \
    TARGET static void NAME(DTYPE)(const float *x, long m, const TYPE *w, long k, float *c, long ldc) {           \
        long passes = NAME(count_passes)(m), row_bytes = PANEL * (long)sizeof(TYPE);                              \
        long distance = passes == 1 ? PREFETCH_L2_BYTES : K_BLOCK * row_bytes;                                    \
        long l1_offset = passes == 1 ? PREFETCH_L2_BYTES - PREFETCH_L1_BYTES : 0;                                 \
        long stride = row_bytes / passes;                                                                         \
        for (long first = 0; first < k; first += K_BLOCK) {                                                       \
            long block = k - first < K_BLOCK ? k - first : K_BLOCK;                                               \
            const TYPE *w_block = w + first * PANEL;                                                              \
            const float *x_block = x + first * m;                                                                 \
            for (long i = 0, pass = 0, rows; i < m; i += rows, pass++) {                                          \
                const char *prefetch = (const char *)w_block + distance + pass * block * stride;                  \
                rows = NAME(rows_of_pass)(m - i);                                                                 \
                NAME(CAT(DTYPE, rows))(rows, x_block + i, m, w_block, PANEL, block, c + i * ldc, ldc, first > 0,  \
                                       prefetch, stride, l1_offset);                                              \
            }                                                                                                     \
        }                                                                                                         \
    }

/* How many rows the next pass multiplies, where `left` rows are left. */
static inline long NAME(rows_of_pass)(long left) {
    if (left >= ROWS_MAX) return ROWS_MAX;
    if (left >= ROWS_MID) return ROWS_MID;
    if (left >= 4 && ROWS_MAX > 4) return 4;
    return left >= 2 ? 2 : 1;
}

static inline long NAME(count_passes)(long m) {
    long count = 0;
    for (; m > 0; count++) m -= NAME(rows_of_pass)(m);
    return count;
}

DEFINE_PRODUCT(product_fp32, float, vec_load_fp32)
DEFINE_PRODUCT(product_fp16, uint16_t, vec_load_fp16)
DEFINE_PRODUCT(product_bf16, uint16_t, vec_load_bf16)

/* c [M][PANEL] = x^T w for x [K][M] and one panel w [K][PANEL] of the given dtype. */
TARGET static void NAME(panel_product)(int weight_dtype, const float *x, long m, const void *w, long k, float *c) {
    if (weight_dtype == FP32) NAME(product_fp32)(x, m, w, k, c, PANEL);
    else if (weight_dtype == FP16) NAME(product_fp16)(x, m, w, k, c, PANEL);
    else NAME(product_bf16)(x, m, w, k, c, PANEL);
}

/* -- SwiGLU and RMSNorm -------------------------------------------------------------------------------------------- */

/* e^x with a relative error of about 1e-7: 2^n times a polynomial in the remainder. The coefficients are those of expf
   in the Cephes library. */
TARGET static inline float NAME(exp_approx)(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = __builtin_floorf(x * 1.44269504088896341f + 0.5f);
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    union {
        int32_t bits;
        float value;
    } two_to_n = {((int32_t)n + 127) << 23};
    return y * two_to_n.value;
}

/* out [PANEL/2][M] = silu(a) * b, transposed, for c [M][PANEL]: each row holds PANEL/2 columns of a, then of b. */
TARGET static void NAME(swiglu)(const float *c, long m, float *out) {
    for (long i = 0; i < m; i++) {
        float y[PANEL / 2];
        const float *row = c + i * PANEL; /* [PANEL] */
        for (long j = 0; j < PANEL / 2; j++) y[j] = row[j] / (1.0f + NAME(exp_approx)(-row[j])) * row[j + PANEL / 2];
        for (long j = 0; j < PANEL / 2; j++) out[j * m + i] = y[j];
    }
}

/* scale [M] = 1 / sqrt(mean of squares + epsilon) of each row of x [M][dim]. */
TARGET static void NAME(inverse_rms)(const float *x, long dim, long m, float *scale) {
    for (long i = 0; i < m; i++) {
        const float *row = x + i * dim; /* [dim] */
        float part[16] = {0}, sum = 0;
        long j = 0;
        for (; j + 16 <= dim; j += 16)
            for (int l = 0; l < 16; l++) part[l] += row[j + l] * row[j + l];
        for (; j < dim; j++) sum += row[j] * row[j];
        for (int l = 0; l < 16; l++) sum += part[l];
        scale[i] = 1.0f / sqrtf(sum / (float)dim + RMS_EPSILON);
    }
}

/* Columns [first, end) of RMSNorm: out [dim][M] = x [M][dim] * scale [M] * gain [dim], transposed. Each thread does
   some columns of all rows, not some rows, so that no two threads write into one cache line. */
TARGET static void NAME(rms_norm)(const float *x, const float *gain, const float *scale, long dim, long m, long first,
                                  long end, float *out) {
    for (long j = first; j < end; j++)
        for (long i = 0; i < m; i++) out[j * m + i] = x[i * dim + j] * scale[i] * gain[j];
}

/* -- attention ----------------------------------------------------------------------------------------------------- */

/* Maximum and sum of row [n]. They reduce 16 parts separately, which the compiler turns into vectors. In a single
   chain, each operation would wait for the one before. */
TARGET static inline float NAME(reduce_max)(const float *row, long n) {
    float part[16], largest;
    long j = 0;
    for (int l = 0; l < 16; l++) part[l] = row[0];
    for (; j + 16 <= n; j += 16)
        for (int l = 0; l < 16; l++) part[l] = row[j + l] > part[l] ? row[j + l] : part[l];
    for (largest = part[0]; j < n; j++) largest = row[j] > largest ? row[j] : largest;
    for (int l = 1; l < 16; l++) largest = part[l] > largest ? part[l] : largest;
    return largest;
}

TARGET static inline float NAME(reduce_sum)(const float *row, long n) {
    float part[16] = {0}, sum = 0;
    long j = 0;
    for (; j + 16 <= n; j += 16)
        for (int l = 0; l < 16; l++) part[l] += row[j + l];
    for (; j < n; j++) sum += row[j];
    for (int l = 0; l < 16; l++) sum += part[l];
    return sum;
}

/* Attention of head h of row r: rotates its q queries and keys (RoPE), writes keys and values into the cache, and
   writes its part of attention_out [H*D][M]. `scratch` is [scratch_floats]. */
TARGET static void NAME(attention_head)(const Step *s, long layer, long r, long h, float *scratch) {
    const Model *model = s->model;
    long n_heads = model->n_heads, head_dim = model->head_dim, slots = model->cache_slots;
    long q = s->query, m = s->rows * q, inner = n_heads * head_dim;
    long cache_head = (s->cache_row[r] * n_heads + h) * slots * head_dim;
    float *k_cache = s->keys[layer] + cache_head;   /* [S/PANEL][D][PANEL] */
    float *v_cache = s->values[layer] + cache_head; /* [S][D] */
    long visible = s->write[r] + q;                 /* T, the keys that this row attends to */
    long panels = (visible + PANEL - 1) / PANEL, padded = panels * PANEL;
    float *queries = scratch;               /* [D][q] */
    float *scores = queries + head_dim * q; /* [q][padded] */
    for (long t = 0; t < q; t++) {
        /* [D] of the query; those of the key are `inner` numbers further on, those of the value 2 * inner */
        const float *row = s->qkv + (r * q + t) * 3 * inner + h * head_dim;
        long slot = s->write[r] + t;
        const float *cosine = model->cosine + slot * head_dim / 2;             /* [D/2] */
        const float *sine = model->sine + slot * head_dim / 2;                 /* [D/2] */
        float *key = k_cache + slot / PANEL * PANEL * head_dim + slot % PANEL; /* [D], PANEL apart */
        for (long j = 0; j < head_dim / 2; j++) {
            float a = row[2 * j], b = row[2 * j + 1];
            queries[2 * j * q + t] = (a * cosine[j] - b * sine[j]) * model->attention_scale;
            queries[(2 * j + 1) * q + t] = (b * cosine[j] + a * sine[j]) * model->attention_scale;
            a = row[inner + 2 * j], b = row[inner + 2 * j + 1];
            key[2 * j * PANEL] = a * cosine[j] - b * sine[j];
            key[(2 * j + 1) * PANEL] = b * cosine[j] + a * sine[j];
        }
        memcpy(v_cache + slot * head_dim, row + 2 * inner, head_dim * sizeof(float));
    }
    for (long p = 0; p < panels; p++)
        NAME(product_fp32)(queries, q, k_cache + p * PANEL * head_dim, head_dim, scores + p * PANEL, padded);
    float *probabilities_t = scores + q * padded; /* [T][q] */
    for (long t = 0; t < q; t++) {
        float *row = scores + t * padded; /* [T] */
        float largest = NAME(reduce_max)(row, visible);
        for (long j = 0; j < visible; j++) row[j] = NAME(exp_approx)(row[j] - largest);
        float inverse_sum = 1.0f / NAME(reduce_sum)(row, visible);
        for (long j = 0; j < visible; j++) probabilities_t[j * q + t] = row[j] * inverse_sum;
    }
    float *out = probabilities_t + q * padded; /* [q][D]; PANEL columns at a time, then the remaining columns */
    long first = 0;
    for (; first + PANEL <= head_dim; first += PANEL)
        for (long t = 0, rows; t < q; t += rows) {
            const char *prefetch = (const char *)(v_cache + first + PREFETCH_SLOTS * head_dim);
            rows = NAME(rows_of_pass)(q - t);
            NAME(product_fp32_rows)(rows, probabilities_t + t, q, v_cache + first, head_dim, visible,
                                    out + t * head_dim + first, head_dim, 0, prefetch, head_dim * 4, 0);
        }
    for (long t = 0; t < q; t++) {
        for (long j = first; j < head_dim; j++) out[t * head_dim + j] = 0;
        if (first < head_dim)
            for (long l = 0; l < visible; l++)
                for (long j = first; j < head_dim; j++)
                    out[t * head_dim + j] += probabilities_t[l * q + t] * v_cache[l * head_dim + j];
        for (long j = 0; j < head_dim; j++)
            s->attention_out[(h * head_dim + j) * m + r * q + t] = out[t * head_dim + j];
    }
}

#undef DEFINE_PRODUCT_OF_ROWS
#undef DEFINE_PRODUCT
#undef PANEL_VECS
#undef NAME
#undef CAT
#undef CAT_
