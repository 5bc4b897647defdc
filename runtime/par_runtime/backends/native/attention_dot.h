/* The product of attention_bf16.h with the dot product of AVX-512, which multiplies a pair at once. */

/* c [rows][PANEL]; as pairs_of_rows(). */
DOT INLINE void pairs_of_rows_dot(const int rows, const uint16_t *x, long ldx, const uint16_t *w, long ldw, long pairs,
                                  float *c, long ldc, Ahead fetch) {
    __m512 sum[8][2];
    UNROLL for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (long p = 0; p < pairs; p++) {
        const uint16_t *row = w + p * ldw;
        if (p < fetch.rows)
            for (long line = 0; line < ldw; line += 32) __builtin_prefetch(row + fetch.ahead + line);
        __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(row + PANEL);
        UNROLL for (int i = 0; i < rows; i++) {
            int32_t pair;
            memcpy(&pair, x + i * ldx + 2 * p, 4);
            __m512i both = _mm512_set1_epi32(pair);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], (__m512bh)both, (__m512bh)a);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], (__m512bh)both, (__m512bh)b);
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        _mm512_storeu_ps(c + i * ldc, sum[i][0]);
        _mm512_storeu_ps(c + i * ldc + 16, sum[i][1]);
    }
}

/* As pairs_product(). */
DOT static void pairs_product_dot(const uint16_t *x, long ldx, long m, const uint16_t *w, long ldw, long pairs, float *c,
                                  long ldc, Ahead fetch) {
    for (; m >= 8; m -= 8, x += 8 * ldx, c += 8 * ldc, fetch.rows = 0)
        pairs_of_rows_dot(8, x, ldx, w, ldw, pairs, c, ldc, fetch);
    for (; m >= 4; m -= 4, x += 4 * ldx, c += 4 * ldc, fetch.rows = 0)
        pairs_of_rows_dot(4, x, ldx, w, ldw, pairs, c, ldc, fetch);
    for (; m >= 2; m -= 2, x += 2 * ldx, c += 2 * ldc, fetch.rows = 0)
        pairs_of_rows_dot(2, x, ldx, w, ldw, pairs, c, ldc, fetch);
    if (m) pairs_of_rows_dot(1, x, ldx, w, ldw, pairs, c, ldc, fetch);
}
