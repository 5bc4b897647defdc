/* Products of int8 and int4 codes with activations rounded to int8 in AVX2: what products_int8.h computes, with the same
   bits, for CPUs without dot products of bytes. Sums of a group are exact integers here too.

   Codes of int8 are widened to 16 bits; vpmaddwd multiplies pairs and adds them in 32 bits. Packed activations are, for
   each group of K: pairs [group/2][M][2] of int16, then scales [M] fp32.

   Codes of int4 stay bytes, plus 8, so 0 .. 15. vpmaddubsw multiplies them with signed bytes and adds pairs in 16 bits:
   at most 2 * 15 * 127, so the pairs of 32 rows of K, 8 for each column's half, fit into 16 bits (30480). That takes
   half as many instructions. Packed activations are those of products_int8.h. */

#include "products_avx2.h"

#define BLOCK_INT4 32 /* rows of K whose pairs are added in 16 bits; every group is a multiple */

/* Columns [8 * first, 8 * (first + vecs)) of c [rows][PANEL] = x w, or c += x w with `accumulate`, for one group of
   int8. `x` is the first row's. Where `first` is 0, all columns are prefetched. */
AVX2 INLINE void twin_int8(const int rows, const int first, const int vecs, int64_t scales_stored, const char *w,
                           const char *x, long m, long group, float *c, int accumulate, Prefetch prefetch) {
    const char *scales = w;
    const int32_t *pairs = (const int32_t *)x;
    const float *x_scale = (const float *)(x + group * 2 * m);
    w += PANEL * number_bytes(scales_stored);
    __m256i sum[ROWS_AVX2][4];
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < vecs; j++) sum[i][j] = _mm256_setzero_si256();
    for (long p = 0; p < group; p += 4, w += 128) {
        UNROLL
        for (int t = 0; t < 2; t++, pairs += m)
            UNROLL
            for (int j = 0; j < vecs; j++) {
                const __m128i *from = (const __m128i *)(w + t * 64 + (first + j) * 16);
                __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(from));
                UNROLL
                for (int i = 0; i < rows; i++)
                    sum[i][j] = _mm256_add_epi32(sum[i][j], _mm256_madd_epi16(codes, _mm256_set1_epi32(pairs[i])));
            }
        if (!first) prefetch_step(&prefetch, w, 128, p / 4);
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < vecs; j++)
            scaled_avx2(sum[i][j], x_scale[i], scales_avx2(scales_stored, scales, first + j),
                        c + i * PANEL + (first + j) * 8, accumulate);
}

/* The same of int4. */
AVX2 INLINE void twin_int4(const int rows, const int first, const int vecs, int64_t scales_stored, const char *w,
                           const char *x, long m, long group, float *c, int accumulate, Prefetch prefetch) {
    const char *scales = w;
    const int32_t *quads = (const int32_t *)x;
    const float *x_scale = (const float *)(x + group * m);
    const int32_t *x_sum = (const int32_t *)x_scale + m; /* minus the sums */
    w += PANEL * number_bytes(scales_stored);
    __m256i total[ROWS_AVX2][4];
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < vecs; j++) total[i][j] = _mm256_set1_epi32(x_sum[i] * 8);
    for (long block = 0, step = 0; block < group; block += BLOCK_INT4) {
        __m256i sum[ROWS_AVX2][4];
        UNROLL
        for (int i = 0; i < rows; i++)
            UNROLL
            for (int j = 0; j < vecs; j++) sum[i][j] = _mm256_setzero_si256();
        for (long p = 0; p < BLOCK_INT4; p += 8, w += 128, quads += 2 * m, step++) {
            UNROLL
            for (int j = 0; j < vecs; j++) {
                __m256i both = _mm256_loadu_si256((const __m256i *)w + first + j);
                UNROLL
                for (int t = 0; t < 2; t++) {
                    __m256i codes = _mm256_and_si256(t ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
                    UNROLL
                    for (int i = 0; i < rows; i++)
                        sum[i][j] = _mm256_add_epi16(
                            sum[i][j], _mm256_maddubs_epi16(codes, _mm256_set1_epi32(quads[t * m + i])));
                }
            }
            if (!first) prefetch_step(&prefetch, w, 128, step);
        }
        UNROLL
        for (int i = 0; i < rows; i++)
            UNROLL
            for (int j = 0; j < vecs; j++)
                total[i][j] = _mm256_add_epi32(total[i][j], _mm256_madd_epi16(sum[i][j], _mm256_set1_epi16(1)));
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < vecs; j++)
            scaled_avx2(total[i][j], x_scale[i], scales_avx2(scales_stored, scales, first + j),
                        c + i * PANEL + (first + j) * 8, accumulate);
}

AVX2 static void twin_pass(long rows, int source, int64_t scales_stored, const char *w, const char *x, long m,
                           long group, float *c, int accumulate, Prefetch prefetch) {
    GROUP_PASS(twin_int8, twin_int4)
}

AVX2 static void panel_product_int8_twin(const Matrix *matrix, const void *packed, long m, long k, long panel, float *c,
                                         void *scratch) {
    (void)scratch;
    long group = matrix->group;
    if (matrix->stored == INT8) panel_of_groups(matrix, packed, m, k, panel, c, twin_pass, group * 2 + 4, 4);
    else panel_of_groups(matrix, packed, m, k, panel, c, twin_pass, group + 8, 8);
}
