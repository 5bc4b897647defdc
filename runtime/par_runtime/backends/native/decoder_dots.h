/* Winograd's form in bf16, for AVX-512's dot products of pairs: its transforms, and its products. decoder_winograd.h
   includes it. */

#define DOT __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma,f16c,avx2")))
#define NEAR (2.0f / 3) /* the points, */
#define FAR (3.0f / 2)  /* of which each is 1 over the other */

/* t [6] = B^T d: six numbers of a line to the six products that they enter. */
#define TRANSFORM_INPUT(d, t)                                                                                \
    do {                                                                                                     \
        vec even = vec_fma(vec_set1(-FAR * FAR), (d)[2], (d)[4]);                                            \
        vec odd = vec_fma(vec_set1(-FAR), (d)[1], vec_set1(NEAR) * (d)[3]);                                  \
        vec even_2 = vec_fma(vec_set1(-NEAR * NEAR), (d)[2], (d)[4]);                                        \
        vec odd_2 = vec_fma(vec_set1(-NEAR), (d)[1], vec_set1(FAR) * (d)[3]);                                \
        (t)[0] = vec_fma(vec_set1(-NEAR * NEAR - FAR * FAR), (d)[2], (d)[0] + (d)[4]);                       \
        (t)[1] = even + odd, (t)[2] = even - odd, (t)[3] = even_2 + odd_2, (t)[4] = even_2 - odd_2;          \
        (t)[5] = vec_fma(vec_set1(-NEAR * NEAR - FAR * FAR), (d)[3], (d)[1] + (d)[5]);                       \
    } while (0)

/* y [4] = A^T m: six products of a line to four numbers of the result. */
#define TRANSFORM_OUTPUT(m, y)                                                                               \
    do {                                                                                                     \
        vec plus = (m)[1] + (m)[2], minus = (m)[1] - (m)[2];                                                 \
        vec plus_2 = (m)[3] + (m)[4], minus_2 = (m)[3] - (m)[4];                                             \
        (y)[0] = (m)[0] + plus + plus_2;                                                                     \
        (y)[1] = vec_fma(vec_set1(NEAR), minus, vec_set1(FAR) * minus_2);                                    \
        (y)[2] = vec_fma(vec_set1(NEAR * NEAR), plus, vec_set1(FAR * FAR) * plus_2);                         \
        (y)[3] = vec_fma(vec_set1(NEAR * NEAR * NEAR), minus, vec_fma(vec_set1(FAR * FAR * FAR), minus_2, (m)[5]));\
    } while (0)

/* t [6] = G g: three weights of a line to the six products that they enter. */
#define TRANSFORM_WEIGHTS(g, t)                                                                              \
    do {                                                                                                     \
        vec ends = vec_fma(vec_set1(NEAR * NEAR), (g)[2], (g)[0]), middle = vec_set1(NEAR) * (g)[1];         \
        vec ends_2 = vec_fma(vec_set1(FAR * FAR), (g)[2], (g)[0]), middle_2 = vec_set1(FAR) * (g)[1];        \
        (t)[0] = (g)[0];                                                                                     \
        (t)[1] = (ends + middle) * vec_set1(-81.0f / 130);                                                   \
        (t)[2] = (ends - middle) * vec_set1(-81.0f / 130);                                                   \
        (t)[3] = (ends_2 + middle_2) * vec_set1(8.0f / 65);                                                  \
        (t)[4] = (ends_2 - middle_2) * vec_set1(8.0f / 65);                                                  \
        (t)[5] = (g)[2];                                                                                     \
    } while (0)

/* Numbers of LANES channels, or of LANES columns of two channels, as bf16. */
DOT INLINE void store_numbers_dots(float *to, vec x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }
DOT INLINE void store_weights_dots(float *to, vec first, vec second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

/* c [rows][PANEL] = x w for words x [rows][words], `ldx` apart, and w [words][PANEL]: a word is the numbers of two channels. */
DOT INLINE void pairs_rows(const int rows, const float *x, long ldx, const float *w, long words, float *c) {
    __m512 sum[12][2];
    UNROLL
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (long p = 0; p < words; p++, w += PANEL) {
        const __m512bh columns[2] = {(__m512bh)_mm512_loadu_ps(w), (__m512bh)_mm512_loadu_ps(w + LANES)};
        UNROLL
        for (int i = 0; i < rows; i++) {
            const __m512bh pair = (__m512bh)_mm512_set1_ps(x[i * ldx + p]);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], columns[0], pair);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], columns[1], pair);
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2; j++) _mm512_storeu_ps(c + i * PANEL + j * LANES, sum[i][j]);
}

DOT static void product_dots(const float *x, long ldx, const float *w, long words, long rows, float *c) {
    for (long i = 0, pass; i < rows; i += pass) {
        const float *from = x + i * ldx;
        float *to = c + i * PANEL;
        if (rows - i >= 12) pass = 12, pairs_rows(12, from, ldx, w, words, to);
        else if (rows - i >= 8) pass = 8, pairs_rows(8, from, ldx, w, words, to);
        else if (rows - i >= 4) pass = 4, pairs_rows(4, from, ldx, w, words, to);
        else if (rows - i >= 2) pass = 2, pairs_rows(2, from, ldx, w, words, to);
        else pass = 1, pairs_rows(1, from, ldx, w, words, to);
    }
}
