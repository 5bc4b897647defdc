/* Products in fp32, and in bf16 where the CPU has no instructions for it. step.c includes this file once for each
   instruction set, with the macros that it explains there.

   Activations are stored transposed, [K][M], so the numbers that are multiplied at the same time are neighbours. The
   sums of some rows stay in registers during a pass over a block of K: those of few rows for all columns of a panel,
   those of more rows for COLUMN_VECS vectors of columns at a time. Each sum is made in the order of K, so it does not
   depend on the number of rows. */

/* Columns [0, vecs * VEC_FLOATS) of c [rows][PANEL] = x w, or c += x w with `accumulate`, for x [k][m] from the first of
   the rows on. `scales` [PANEL] are those of codes. With `fetch`, the whole rows of w are prefetched. */
TARGET INLINE void NAME(fp32_rows)(const int rows, const int vecs, const int fetch, const int stored, const char *w,
                                   const float *scales, const float *x, long m, long k, float *c, int accumulate,
                                   Prefetch prefetch) {
    const long row_bytes = PANEL * unit_bytes(stored);
    const int together = stored == INT4 ? 2 : 1; /* rows whose codes lie in the same bytes */
    vec sum[ROWS_MAX][PANEL_VECS];
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < vecs; j++)
            sum[i][j] = accumulate ? vec_load_fp32(c + i * PANEL + j * VEC_FLOATS) : vec_set1(0.0f);
    for (long p = 0; p < k; p += together, w += row_bytes) {
        if (fetch) prefetch_step(&prefetch, w, row_bytes, p);
        UNROLL
        for (int t = 0; t < together; t++, x += m) {
            vec w_row[PANEL_VECS];
            UNROLL
            for (int j = 0; j < vecs; j++) {
                const char *at = w + j * VEC_FLOATS * unit_bytes(stored);
                if (stored == FP32) w_row[j] = vec_load_fp32((const float *)at);
                else if (stored == FP16) w_row[j] = vec_load_fp16((const uint16_t *)at);
                else if (stored == BF16) w_row[j] = vec_load_bf16((const uint16_t *)at);
                else if (stored == INT8) w_row[j] = vec_mul(vec_load_int8(at), vec_load_fp32(scales + j * VEC_FLOATS));
                else w_row[j] = vec_mul(vec_load_int4(at, t * 4), vec_load_fp32(scales + j * VEC_FLOATS));
            }
            UNROLL
            for (int i = 0; i < rows; i++) {
                vec value = vec_set1(x[i]);
                UNROLL
                for (int j = 0; j < vecs; j++) sum[i][j] = vec_fma(value, w_row[j], sum[i][j]);
            }
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < vecs; j++) vec_store(c + i * PANEL + j * VEC_FLOATS, sum[i][j]);
}

/* fp32_rows for any number of rows up to ROWS_MAX: each number is code of its own. */
TARGET static void NAME(fp32_pass)(long rows, int stored, const char *w, const float *scales, const float *x, long m,
                                   long k, float *c, int accumulate, Prefetch prefetch) {
#define AT(FIRST, VECS, ROWS, STORED)                                                                             \
    NAME(fp32_rows)(ROWS, VECS, (FIRST) == 0, STORED, w + (FIRST) * VEC_FLOATS * unit_bytes(STORED),                \
                    scales + (FIRST) * VEC_FLOATS, x, m, k, c + (FIRST) * VEC_FLOATS, accumulate, prefetch)
#define CASE(ROWS, STORED)                                                                                     \
    case ROWS * 8 + STORED:                                                                                    \
        if (ROWS <= ROWS_WHOLE) AT(0, PANEL_VECS, ROWS, STORED);                                               \
        else if (ROWS <= ROWS_MAX)                                                                             \
            AT(0, COLUMN_VECS, ROWS, STORED), AT(PANEL_VECS - COLUMN_VECS, COLUMN_VECS, ROWS, STORED);          \
        break;
#if CODES_DIRECT
#define CASES(ROWS) CASE(ROWS, FP32) CASE(ROWS, FP16) CASE(ROWS, BF16) CASE(ROWS, INT8) CASE(ROWS, INT4)
#else
#define CASES(ROWS) CASE(ROWS, FP32) CASE(ROWS, FP16) CASE(ROWS, BF16)
#endif
    switch (rows * 8 + stored) {
        CASES(1) CASES(2) CASES(3) CASES(4) CASES(5) CASES(6)
#if ROWS_MAX > 6
        CASES(7) CASES(8) CASES(9) CASES(10) CASES(11) CASES(12)
#endif
    }
#undef CASES
#undef CASE
#undef AT
}

/* out [k][PANEL] fp32 = `k` rows of a panel, which are stored at w as `stored` says; `scales` [PANEL] of the group. */
TARGET static void NAME(widen)(int stored, const char *w, const float *scales, long k, float *out) {
    for (long p = 0; p < k; p++)
        for (int j = 0; j < PANEL; j += VEC_FLOATS) {
            float *to = out + p * PANEL + j;
            const char *row = w + (stored == INT4 ? p / 2 * PANEL + j : stored == INT8 ? p * PANEL + j : 0);
            if (stored == FP16) vec_store(to, vec_load_fp16((const uint16_t *)w + p * PANEL + j));
            else if (stored == BF16) vec_store(to, vec_load_bf16((const uint16_t *)w + p * PANEL + j));
            else if (stored == INT8) vec_store(to, vec_mul(vec_load_int8(row), vec_load_fp32(scales + j)));
            else vec_store(to, vec_mul(vec_load_int4(row, p % 2 * 4), vec_load_fp32(scales + j)));
        }
}

/* scales [PANEL] fp32 of a group. */
TARGET INLINE void NAME(load_scales)(int64_t stored, const char *from, float *scales) {
    for (int j = 0; j < PANEL; j += VEC_FLOATS) {
        if (stored == FP32) vec_store(scales + j, vec_load_fp32((const float *)from + j));
        else if (stored == FP16) vec_store(scales + j, vec_load_fp16((const uint16_t *)from + j));
        else vec_store(scales + j, vec_load_bf16((const uint16_t *)from + j));
    }
}

/* The product of a panel whose layout is ROWS_*; `stored` is that layout's. A block of weights that is not fp32 is
   widened once where more than PASSES_NARROW passes need it, and one of codes, unless CODES_DIRECT, or where two do. */
TARGET INLINE void NAME(fp32_product)(int stored, const Matrix *matrix, const char *w, const float *x, long m, long k,
                                      float *c, float *wide) {
    long passes = (m + ROWS_MAX - 1) / ROWS_MAX, quantised = stored >= INT8;
    long step = quantised && matrix->group < K_BLOCK ? matrix->group : K_BLOCK;
    int widened = quantised ? !CODES_DIRECT || passes > 1 : stored != FP32 && passes > PASSES_NARROW;
    float scales[PANEL] = {0};
    for (long first = 0; first < k; first += step) {
        long block = k - first < step ? k - first : step, bytes = block * PANEL;
        if (quantised && first % matrix->group == 0) {
            NAME(load_scales)(matrix->scales, w, scales);
            w += PANEL * number_bytes(matrix->scales);
        }
        bytes = stored == INT4 ? bytes / 2 : stored == INT8 ? bytes : bytes * number_bytes(stored);
        if (widened) NAME(widen)(stored, w, scales, block, wide);
        for (long i = 0, pass = 0, rows; i < m; i += rows, pass++) {
            rows = rows_of_pass(m - i, ROWS_MAX);
            NAME(fp32_pass)(rows, widened ? FP32 : stored, widened ? (const char *)wide : w, scales, x + first * m + i,
                            m, block, c + i * PANEL, first > 0, prefetch_of(w, bytes, block, pass, passes));
        }
        w += bytes;
    }
}

#if VECTORS == 128
/* What products_int8.h computes, for vectors that have no products of bytes. Packed activations are, for each group of K:
   their codes as floats [group][M], then scales [M]. The sums of a group are whole numbers below 2^24 (128 times 127
   times 127), so exact in fp32; `scratch` has them. */
TARGET static void NAME(panel_product_int8)(const Matrix *matrix, const void *packed, long m, long k, long panel,
                                            float *c, void *scratch) {
    int source = (int)matrix->stored;
    const char *w = (const char *)matrix->data + panel * panel_bytes(matrix, k);
    long group = matrix->group, bytes = panel_bytes(matrix, group), scale_bytes = PANEL * number_bytes(matrix->scales);
    float scales[PANEL], ones[PANEL], *sums = scratch; /* [ROWS_MAX][PANEL] */
    for (int j = 0; j < PANEL; j++) ones[j] = 1;
    const float *x = packed;
    for (long first = 0; first < k; first += group, w += bytes, x += (group + 1) * m) {
        const float *x_scale = x + group * m;
        long passes = (m + ROWS_MAX - 1) / ROWS_MAX;
        NAME(load_scales)(matrix->scales, w, scales);
        for (long i = 0, pass = 0, rows; i < m; i += rows, pass++) {
            rows = rows_of_pass(m - i, ROWS_MAX);
            NAME(fp32_pass)(rows, source, w + scale_bytes, ones, x + i, m, group, sums, 0,
                            prefetch_of(w, bytes, group, pass, passes));
            for (long row = 0; row < rows; row++)
                for (int j = 0; j < PANEL; j += VEC_FLOATS) {
                    float *to = c + (i + row) * PANEL + j;
                    vec part = vec_mul(vec_load_fp32(sums + row * PANEL + j), vec_set1(x_scale[i + row]));
                    vec before = first ? vec_load_fp32(to) : vec_set1(0.0f);
                    vec_store(to, vec_fma(part, vec_load_fp32(scales + j), before));
                }
        }
    }
}
#endif

TARGET static void NAME(panel_product_fp32)(const Matrix *w, const void *packed, long m, long k, long panel, float *c,
                                            void *scratch) {
    const char *at = (const char *)w->data + panel * panel_bytes(w, k);
    switch (w->layout) {
    case ROWS_FP32: NAME(fp32_product)(FP32, w, at, packed, m, k, c, scratch); break;
    case ROWS_FP16: NAME(fp32_product)(FP16, w, at, packed, m, k, c, scratch); break;
    case ROWS_BF16: NAME(fp32_product)(BF16, w, at, packed, m, k, c, scratch); break;
    case ROWS_INT8: NAME(fp32_product)(INT8, w, at, packed, m, k, c, scratch); break;
    default: NAME(fp32_product)(INT4, w, at, packed, m, k, c, scratch);
    }
}
