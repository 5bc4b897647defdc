/* The matrix products of step.c for one instruction set. step.c includes this file once per set, before step_kernels.h
   and with the same macros.

   A product has two parts: pack_rows() brings activations into the order in which the product reads them, once for all
   panels of a matrix; panel_product() multiplies them by one panel. Both depend on the arithmetic.

   A matrix is stored in panels, [N/PANEL][K][PANEL], so a product reads it from the first byte to the last.
   MULTIPLY_FP32: packed activations are transposed, [K][M], so the numbers that are multiplied at the same time are
   neighbours; every weight is converted to fp32 in registers. */

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define NAME(f) CAT(f, SUFFIX)
#define PANEL_VECS (PANEL / VEC_FLOATS)

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
