/* Products of int8 and int4 codes with activations rounded to int8 in AVX2: what products_int8.h computes, for CPUs
   without dot products of bytes. Sums of a group are exact integers here too, so both differ only in the rounding of
   the sums of groups.

   Packed activations are, for each group of K: pairs [group/2][M][2] of int16, then scales [M] fp32. */

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define TWIN_ROWS 3

AVX2 INLINE __m256 twin_scale(int64_t stored, const char *scales, int j) {
    if (stored == FP32) return _mm256_loadu_ps((const float *)scales + 8 * j);
    __m128i halves = _mm_loadu_si128((const __m128i *)scales + j);
    if (stored == FP16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* c [rows][PANEL] = x w, or c += x w with `accumulate`, for one group. */
AVX2 INLINE void twin_rows(const int rows, const int source, int64_t scales_stored, const char *w, const char *x,
                           long m, long group, float *c, int accumulate, Prefetch prefetch) {
    const char *scales = w;
    const int32_t *pairs = (const int32_t *)x;
    const float *x_scale = (const float *)(x + group * 2 * m);
    if (!prefetch.from) prefetch_step(&prefetch, w, PANEL * number_bytes(scales_stored), 0);
    w += PANEL * number_bytes(scales_stored);
    __m256i sum[TWIN_ROWS][4];
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < 4; j++) sum[i][j] = _mm256_setzero_si256();
    for (long p = 0; p < group; p += 4, pairs += 2 * m) {
        UNROLL
        for (int t = 0; t < 2; t++)
            UNROLL
            for (int j = 0; j < 4; j++) {
                const __m128i *from = (const __m128i *)(w + (source == INT8 ? t * 64 : 0) + j * 16);
                __m256i codes;
                if (source == INT8) codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(from));
                else {
                    codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(from));
                    codes = t ? _mm256_srli_epi16(codes, 4) : _mm256_and_si256(codes, _mm256_set1_epi16(15));
                    codes = _mm256_sub_epi16(codes, _mm256_set1_epi16(8));
                }
                UNROLL
                for (int i = 0; i < rows; i++) {
                    __m256i value = _mm256_set1_epi32(pairs[t * m + i]);
                    sum[i][j] = _mm256_add_epi32(sum[i][j], _mm256_madd_epi16(codes, value));
                }
            }
        prefetch_step(&prefetch, w, source == INT8 ? 128 : 64, p / 4);
        w += source == INT8 ? 128 : 64;
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < 4; j++) {
            __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][j]), _mm256_set1_ps(x_scale[i]));
            float *to = c + i * PANEL + j * 8;
            __m256 before = accumulate ? _mm256_loadu_ps(to) : _mm256_setzero_ps();
            _mm256_storeu_ps(to, _mm256_fmadd_ps(part, twin_scale(scales_stored, scales, j), before));
        }
}

AVX2 static void panel_product_int8_twin(const Matrix *matrix, const void *packed, long m, long k, long panel, float *c,
                                         void *scratch) {
    (void)scratch;
    int source = (int)matrix->stored;
    const char *w = (const char *)matrix->data + panel * panel_bytes(matrix, k);
    long passes = (m + TWIN_ROWS - 1) / TWIN_ROWS, group = matrix->group, bytes = panel_bytes(matrix, group);
    for (long first = 0; first < k; first += group, w += bytes) {
        const char *x = (const char *)packed + first / group * (group * 2 + 4) * m;
        for (long i = 0, pass = 0, rows; i < m; i += rows, pass++) {
            Prefetch prefetch = prefetch_of(w, bytes, group / 4, pass, passes);
            rows = rows_of_pass(m - i, TWIN_ROWS);
#define CASE(ROWS, SOURCE)                                                                                        \
    case ROWS * 8 + SOURCE:                                                                                       \
        twin_rows(ROWS, SOURCE, matrix->scales, w, x + 4 * i, m, group, c + i * PANEL, first > 0, prefetch); \
        break;
            switch (rows * 8 + source) {
                CASE(1, INT8) CASE(2, INT8) CASE(3, INT8)
                CASE(1, INT4) CASE(2, INT4) CASE(3, INT4)
            }
#undef CASE
        }
    }
}
