/* Products of int8 and int4 codes with activations rounded to int8, with AVX-VNNI: the dot products of bytes of
   products_int8.h in vectors of 32 bytes, for CPUs that have no AVX-512. Weights, packed activations and bits are those
   of products_int8.h; the sums of one to three rows are in registers for all columns of a panel, those of four to six
   rows for a half, as in products_twin.h. */

#include "scales.h"

#define VNNI __attribute__((target("avx2,fma,f16c,avxvnni")))
#define VNNI_ROWS 6
#define VNNI_ROWS_WHOLE 3

#ifndef __clang__ /* gcc would load numbers of the next iteration at the end of this one, and then lacks registers */
#pragma GCC push_options
#pragma GCC optimize("no-tree-pre")
#endif

/* Columns [8 * first, 8 * (first + vecs)) of c [rows][PANEL] = x w, or c += x w with `accumulate`, for one group of a
   panel. `x` is the first row's. Where `first` is 0, all columns are prefetched. */
VNNI INLINE void vnni_group(const int rows, const int first, const int vecs, const int source, int64_t scales_stored,
                            const char *w, const char *x, long m, long group, float *c, int accumulate,
                            Prefetch prefetch) {
    const long step_bytes = source == INT8 ? 256 : 128;
    const __m256i low_half = _mm256_set1_epi8(15);
    const char *scales = w;
    const int32_t *quads = (const int32_t *)x;
    const float *x_scale = (const float *)(x + group * m);
    const int32_t *x_sum = (const int32_t *)x_scale + m; /* minus the sums */
    w += PANEL * number_bytes(scales_stored);
    __m256i sum[VNNI_ROWS][4];
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < vecs; j++) sum[i][j] = _mm256_set1_epi32(x_sum[i] * (source == INT8 ? 128 : 8));
    for (long p = 0; p < group; p += 8, w += step_bytes) {
        UNROLL
        for (int t = 0; t < 2; t++, quads += m) {
            __m256i codes[4];
            UNROLL
            for (int j = 0; j < vecs; j++) {
                codes[j] = _mm256_loadu_si256((const __m256i *)(w + (source == INT8 ? t * 128 : 0)) + first + j);
                if (source == INT4)
                    codes[j] = _mm256_and_si256(t ? _mm256_srli_epi16(codes[j], 4) : codes[j], low_half);
            }
            UNROLL
            for (int i = 0; i < rows; i++) {
                __m256i value = _mm256_set1_epi32(quads[i]);
                UNROLL
                for (int j = 0; j < vecs; j++) sum[i][j] = _mm256_dpbusd_avx_epi32(sum[i][j], codes[j], value);
            }
        }
        if (!first) prefetch_step(&prefetch, w, step_bytes, p / 8);
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < vecs; j++)
            scaled_avx2(sum[i][j], x_scale[i], scales_avx2(scales_stored, scales, first + j),
                        c + i * PANEL + (first + j) * 8, accumulate);
}

/* One pass over a group: c [rows][PANEL] for any number of rows up to VNNI_ROWS. */
VNNI static void vnni_pass(long rows, int source, int64_t scales_stored, const char *w, const char *x, long m,
                           long group, float *c, int accumulate, Prefetch prefetch) {
    if (!prefetch.from) prefetch_step(&prefetch, w, PANEL * number_bytes(scales_stored), 0);
#define AT(ROWS, FIRST, VECS, SOURCE) \
    vnni_group(ROWS, FIRST, VECS, SOURCE, scales_stored, w, x, m, group, c, accumulate, prefetch)
#define CASE(ROWS, SOURCE)                                                \
    case ROWS * 8 + SOURCE:                                               \
        if (ROWS <= VNNI_ROWS_WHOLE) AT(ROWS, 0, 4, SOURCE);              \
        else AT(ROWS, 0, 2, SOURCE), AT(ROWS, 2, 2, SOURCE);              \
        break;
#define CASES(ROWS) CASE(ROWS, INT8) CASE(ROWS, INT4)
    switch (rows * 8 + source) { CASES(1) CASES(2) CASES(3) CASES(4) CASES(5) CASES(6) }
#undef CASES
#undef CASE
#undef AT
}

VNNI void panel_product_int8_vnni(const Matrix *matrix, const void *packed, long m, long k, long panel, float *c,
                                  void *scratch) {
    (void)scratch;
    const char *w = (const char *)matrix->data + panel * panel_bytes(matrix, k);
    long passes = (m + VNNI_ROWS - 1) / VNNI_ROWS, group = matrix->group, bytes = panel_bytes(matrix, group);
    for (long first = 0; first < k; first += group, w += bytes) {
        const char *x = (const char *)packed + first / group * (group + 8) * m;
        for (long i = 0, pass = 0, rows; i < m; i += rows, pass++) {
            rows = rows_of_pass(m - i, VNNI_ROWS);
            vnni_pass(rows, (int)matrix->stored, matrix->scales, w, x + 4 * i, m, group, c + i * PANEL, first > 0,
                      prefetch_of(w, bytes, group / 8, pass, passes));
        }
    }
}

#ifndef __clang__
#pragma GCC pop_options
#endif
