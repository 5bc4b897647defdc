/* Products of int8 and int4 codes with activations rounded to int8, with AVX-VNNI: the dot products of bytes of
   products_int8.h in vectors of 32 bytes, for CPUs that have no AVX-512. Weights, packed activations and bits are those
   of products_int8.h. */

#include "products_avx2.h"

#define VNNI __attribute__((target("avx2,fma,f16c,avxvnni")))

#ifndef __clang__ /* gcc would load numbers of the next iteration at the end of this one, and then lacks registers */
#pragma GCC push_options
#pragma GCC optimize("no-tree-pre")
#endif

/* Columns [8 * first, 8 * (first + vecs)) of c [rows][PANEL] = x w, or c += x w with `accumulate`, for one group of a
   panel. `x` is the first row's. Where `first` is 0, all columns are prefetched. */
VNNI INLINE void vnni_group(const int source, const int rows, const int first, const int vecs, int64_t scales_stored,
                            const char *w, const char *x, long m, long group, float *c, int accumulate,
                            Prefetch prefetch) {
    const long step_bytes = source == INT8 ? 256 : 128;
    const __m256i low_half = _mm256_set1_epi8(15);
    const char *scales = w;
    const int32_t *quads = (const int32_t *)x;
    const float *x_scale = (const float *)(x + group * m);
    const int32_t *x_sum = (const int32_t *)x_scale + m; /* minus the sums */
    w += PANEL * number_bytes(scales_stored);
    __m256i sum[ROWS_AVX2][4];
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

#define VNNI_INT8(...) vnni_group(INT8, __VA_ARGS__)
#define VNNI_INT4(...) vnni_group(INT4, __VA_ARGS__)
VNNI static void vnni_pass(long rows, int source, int64_t scales_stored, const char *w, const char *x, long m,
                           long group, float *c, int accumulate, Prefetch prefetch) {
    GROUP_PASS(VNNI_INT8, VNNI_INT4)
}

VNNI void panel_product_int8_vnni(const Matrix *matrix, const void *packed, long m, long k, long panel, float *c,
                                  void *scratch) {
    (void)scratch;
    panel_of_groups(matrix, packed, m, k, panel, c, vnni_pass, matrix->group + 8, 8);
}

#ifndef __clang__
#pragma GCC pop_options
#endif
