/* The product of attention_bf16.h with the dot product of ARM (BFDOT), which multiplies a pair at once. It rounds as
   BFMMLA does (products_bfmmla.h). */

/* Columns [0, 4 * vecs) of c [rows][PANEL]; as pairs_of_rows(). */
WITH_BF16 INLINE void pairs_of_rows_bfdot(const int rows, const int vecs, const uint16_t *x, long ldx,
                                          const uint16_t *w, long ldw, long pairs, float *c, long ldc, Ahead fetch) {
    float32x4_t sum[4][8];
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < vecs; j++) sum[i][j] = vdupq_n_f32(0.0f);
    for (long p = 0; p < pairs; p++) {
        const uint16_t *row = w + p * ldw;
        bfloat16x8_t both[4];
        if (p < fetch.rows)
            for (long line = 0; line < ldw; line += 32) __builtin_prefetch(row + fetch.ahead + line);
        UNROLL
        for (int i = 0; i < rows; i++) {
            uint32_t pair;
            memcpy(&pair, x + i * ldx + 2 * p, 4);
            both[i] = vreinterpretq_bf16_u32(vdupq_n_u32(pair));
        }
        UNROLL
        for (int j = 0; j < vecs; j++) {
            bfloat16x8_t columns = vreinterpretq_bf16_u16(vld1q_u16(row + 8 * j));
            UNROLL
            for (int i = 0; i < rows; i++) sum[i][j] = vbfdotq_f32(sum[i][j], both[i], columns);
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < vecs; j++) vst1q_f32(c + i * ldc + 4 * j, sum[i][j]);
}

/* As pairs_product(). */
WITH_BF16 static void pairs_product_bfdot(const uint16_t *x, long ldx, long m, const uint16_t *w, long ldw, long pairs,
                                          float *c, long ldc, Ahead fetch) {
    for (; m >= 4; m -= 4, x += 4 * ldx, c += 4 * ldc, fetch.rows = 0) {
        pairs_of_rows_bfdot(4, 4, x, ldx, w, ldw, pairs, c, ldc, fetch);
        pairs_of_rows_bfdot(4, 4, x, ldx, w + PANEL, ldw, pairs, c + PANEL / 2, ldc, (Ahead){0, 0});
    }
    for (; m >= 2; m -= 2, x += 2 * ldx, c += 2 * ldc, fetch.rows = 0)
        pairs_of_rows_bfdot(2, 8, x, ldx, w, ldw, pairs, c, ldc, fetch);
    if (m) pairs_of_rows_bfdot(1, 8, x, ldx, w, ldw, pairs, c, ldc, fetch);
}
