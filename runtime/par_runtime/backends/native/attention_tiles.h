/* The product of attention_bf16.h with AMX; products_tiles.h says more of tiles. */

/* To be called in each thread before its first product of m rows. */
static void shape_tiles_of_attention(long m) { shape_tiles(TILE_ROWS, m % TILE_ROWS ? m % TILE_ROWS : TILE_ROWS, 64); }

/* Copies of x and w for the last tile along K, which has fewer pairs than 16. Behind these are zeros: what lies there in
   the cache may be no number. */
TILED INLINE void copy_last_pairs(const uint16_t *x, long ldx, long rows, const uint16_t *w, long ldw, long pairs,
                                  uint16_t *x_copy /* [rows][16][2] */, uint16_t *w_copy /* [16][PANEL][2] */) {
    const __mmask16 there = (__mmask16)((1u << pairs) - 1);
    for (long i = 0; i < rows; i++)
        _mm512_storeu_si512(x_copy + i * 32, _mm512_maskz_loadu_epi32(there, x + i * ldx));
    for (long p = 0; p < 16; p++)
        for (long half = 0; half < 2 * PANEL; half += PANEL) {
            const __m512i row = p < pairs ? _mm512_loadu_si512(w + p * ldw + half) : _mm512_setzero_si512();
            _mm512_storeu_si512(w_copy + p * 2 * PANEL + half, row);
        }
    ACCESSED;
}

/* c [rows][PANEL] = x w, as pairs_of_rows(), for a whole tile of rows or, with `last`, for the last one. */
TILED INLINE void pairs_of_tile(const int last, long rows, const uint16_t *x, long ldx, const uint16_t *w, long ldw,
                                long pairs, float *c, long ldc, Ahead fetch) {
    _Alignas(64) uint16_t x_copy[TILE_ROWS * 32], w_copy[16 * 2 * PANEL];
    if (last) {
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (long p = 0; p < pairs; p += 16, x += 32, w += 16 * ldw) {
        for (long row = 0; row < 16 && p + row < fetch.rows; row++)
            for (long line = 0; line < ldw; line += 32) __builtin_prefetch(w + row * ldw + fetch.ahead + line);
        if (pairs - p < 16) {
            copy_last_pairs(x, ldx, rows, w, ldw, pairs - p, x_copy, w_copy);
            x = x_copy, ldx = 32, w = w_copy, ldw = 2 * PANEL;
        }
        _tile_loadd(6, w, 2 * ldw);
        _tile_loadd(7, w + PANEL, 2 * ldw);
        if (last) {
            _tile_loadd(5, x, 2 * ldx);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        } else {
            _tile_loadd(4, x, 2 * ldx);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
    }
    ACCESSED;
    if (last) {
        _tile_stored(2, c, 4 * ldc);
        _tile_stored(3, c + 16, 4 * ldc);
    } else {
        _tile_stored(0, c, 4 * ldc);
        _tile_stored(1, c + 16, 4 * ldc);
    }
    ACCESSED;
}

/* As pairs_product(), after shape_tiles_of_attention(m). */
TILED static void pairs_product_tiles(const uint16_t *x, long ldx, long m, const uint16_t *w, long ldw, long pairs,
                                      float *c, long ldc, Ahead fetch) {
    ACCESSED;
    for (; m > TILE_ROWS; m -= TILE_ROWS, x += TILE_ROWS * ldx, c += TILE_ROWS * ldc, fetch.rows = 0)
        pairs_of_tile(0, TILE_ROWS, x, ldx, w, ldw, pairs, c, ldc, fetch);
    pairs_of_tile(1, m, x, ldx, w, ldw, pairs, c, ldc, fetch);
}
