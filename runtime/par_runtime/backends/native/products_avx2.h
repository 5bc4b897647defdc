/* What the products of int8 and int4 codes in AVX2 share, products_twin.h and products_vnni.h: scales, and the way
   through the rows and the groups of a panel. The sums of one to three rows are in registers for all columns of a panel,
   those of four to six rows for a half. */

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define ROWS_AVX2 6       /* of activations that a pass multiplies, at most */
#define ROWS_WHOLE_AVX2 3 /* of which the sums of all columns are in registers */

/* The scales of columns 8*j and after of a panel, as fp32; `stored`: FP32, FP16 or BF16. */
AVX2 INLINE __m256 scales_avx2(int64_t stored, const char *scales, int j) {
    if (stored == FP32) return _mm256_loadu_ps((const float *)scales + 8 * j);
    __m128i halves = _mm_loadu_si128((const __m128i *)scales + j);
    if (stored == FP16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* c = total * x_scale * scales, or c += that, for 8 columns. */
AVX2 INLINE void scaled_avx2(__m256i total, float x_scale, __m256 scales, float *c, int accumulate) {
    __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps(x_scale));
    _mm256_storeu_ps(c, _mm256_fmadd_ps(part, scales, accumulate ? _mm256_loadu_ps(c) : _mm256_setzero_ps()));
}

/* One pass over a group: c [rows][PANEL] = x w, or c += x w with `accumulate`, for up to ROWS_AVX2 rows. */
typedef void GroupPass(long rows, int source, int64_t scales_stored, const char *w, const char *x, long m, long group,
                       float *c, int accumulate, Prefetch prefetch);

/* The body of a GroupPass, by two functions of some columns of a group, for int8 and int4. */
#define GROUP_PASS(INT8_GROUP, INT4_GROUP)                                                                    \
    if (!prefetch.from) prefetch_step(&prefetch, w, PANEL * number_bytes(scales_stored), 0);                  \
    switch (rows * 8 + source) {                                                                              \
        GROUP_ROWS(1, INT8_GROUP, INT4_GROUP)                                                                 \
        GROUP_ROWS(2, INT8_GROUP, INT4_GROUP)                                                                 \
        GROUP_ROWS(3, INT8_GROUP, INT4_GROUP)                                                                 \
        GROUP_ROWS(4, INT8_GROUP, INT4_GROUP)                                                                 \
        GROUP_ROWS(5, INT8_GROUP, INT4_GROUP)                                                                 \
        GROUP_ROWS(6, INT8_GROUP, INT4_GROUP)                                                                 \
    }
#define GROUP_ROWS(ROWS, INT8_GROUP, INT4_GROUP) GROUP_CASE(ROWS, INT8, INT8_GROUP) GROUP_CASE(ROWS, INT4, INT4_GROUP)
#define GROUP_CASE(ROWS, SOURCE, GROUP)                                                \
    case ROWS * 8 + SOURCE:                                                            \
        if (ROWS <= ROWS_WHOLE_AVX2) GROUP_COLUMNS(GROUP, ROWS, 0, 4);                 \
        else GROUP_COLUMNS(GROUP, ROWS, 0, 2), GROUP_COLUMNS(GROUP, ROWS, 2, 2);       \
        break;
#define GROUP_COLUMNS(GROUP, ROWS, FIRST, VECS) \
    GROUP(ROWS, FIRST, VECS, scales_stored, w, x, m, group, c, accumulate, prefetch)

/* A PanelProduct by a pass for each group. `row_bytes`: of a packed row of a group; `step`: rows of K between two
   prefetches of `pass`. */
AVX2 INLINE void panel_of_groups(const Matrix *matrix, const void *packed, long m, long k, long panel, float *c,
                                 GroupPass *pass, long row_bytes, long step) {
    const char *w = (const char *)matrix->data + panel * panel_bytes(matrix, k);
    long passes = (m + ROWS_AVX2 - 1) / ROWS_AVX2, group = matrix->group, bytes = panel_bytes(matrix, group);
    for (long first = 0; first < k; first += group, w += bytes) {
        const char *x = (const char *)packed + first / group * row_bytes * m;
        for (long i = 0, done = 0, rows; i < m; i += rows, done++) {
            rows = rows_of_pass(m - i, ROWS_AVX2);
            pass(rows, (int)matrix->stored, matrix->scales, w, x + 4 * i, m, group, c + i * PANEL, first > 0,
                 prefetch_of(w, bytes, group / step, done, passes));
        }
    }
}
