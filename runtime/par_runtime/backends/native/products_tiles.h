/* Products in bf16 and int8 with AMX, which multiplies tiles: up to 16 rows of 64 bytes in a register.

   One instruction multiplies a tile of activations [h][32] by a tile of weights [32][16] in bf16, or [h][64] by [64][16]
   in int8. Weights lie in panels as the dot products of AVX-512 take them, which is what a tile takes too: pairs
   [K/2][PANEL][2] and quads [K/4][PANEL][4] are read where they lie, and codes are first written into scratch memory in
   that order, once for all rows. The M rows of activations are divided into tiles of equally many rows; those behind
   the last row are 0. A pass multiplies two tiles of rows by the two tiles of a panel's columns, so that each is read
   once for two products.

   Packed activations: in bf16 [T][K/32][h][32] for T tiles of h rows; in int8, for each group of K, [T*h][group] codes,
   then scales [M] fp32 and minus the sums of the codes [M] int32.

   In bf16 an instruction makes two sums, of the first and of the second numbers of 16 pairs, and adds them to what is
   there. So bits are not those of dot products, but the same for any number of rows. In int8 they are the same as
   products_int8.h has. */

void shape_tiles_of_product(const Matrix *w, long m) {
    shape_tiles(tile_rows(m), tile_rows(m), w->arithmetic == MULTIPLY_BF16 || w->group > 64 ? 64 : w->group);
}

/* c [h or 2*h][PANEL] = the products of `steps` tiles along K, 4 bytes each: of the tile of rows at x, or with `both`
   of that and the one `next_rows` bytes behind it, with the panel's columns at w. `x_step`: bytes of x from tile to
   tile along K; `x_row`: from row to row. */
TILED INLINE void multiply_tiles(const int dtype, const int both, const char *x, long next_rows, long x_step,
                                 long x_row, const char *w, long w_step, long steps, Prefetch prefetch, long h,
                                 void *c) {
    char *to = c, *next_to = to + h * 4 * PANEL;
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long s = 0; s < steps; s++, x += x_step, w += w_step) {
        prefetch_step(&prefetch, w, w_step, s);
        _tile_loadd(6, w, 4 * PANEL);
        _tile_loadd(7, w + 64, 4 * PANEL);
        _tile_loadd(4, x, x_row);
        if (both) _tile_loadd(5, x + next_rows, x_row);
        if (dtype == BF16) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (both) {
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        } else {
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            if (both) {
                _tile_dpbsud(2, 5, 6);
                _tile_dpbsud(3, 5, 7);
            }
        }
    }
    ACCESSED;
    _tile_stored(0, to, 4 * PANEL);
    _tile_stored(1, to + 64, 4 * PANEL);
    if (both) {
        _tile_stored(2, next_to, 4 * PANEL);
        _tile_stored(3, next_to + 64, 4 * PANEL);
    }
    ACCESSED;
}

/* Sums of a group in scratch memory, and where they go: c [rows][PANEL] = sums * scales, or c += with `accumulate`. */
typedef struct {
    const char *sums, *scales; /* [rows][PANEL], fp32 or whole numbers; scales of a panel, in the dtype of the matrix */
    const float *x_scale;      /* [rows], in int8; and minus the sums of the rows' codes: */
    const int32_t *x_sum;
    float *c;
    long rows;
    int accumulate;
} Sums;

TILED INLINE void add_sums(const int dtype, const int source, int64_t scales_stored, const Sums *from) {
    for (int j = 0; j < 2 && from->rows; j++) {
        const __m512 scale = scale_of(scales_stored, from->scales, j);
        for (long i = 0; i < from->rows; i++) {
            const void *sum = from->sums + (i * PANEL + j * 16) * 4;
            float *to = from->c + i * PANEL + j * 16;
            __m512 total = _mm512_loadu_ps(sum);
            if (dtype == INT8) {
                const __m512i shift = _mm512_slli_epi32(_mm512_set1_epi32(from->x_sum[i]), source == INT8 ? 7 : 3);
                total = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_loadu_si512(sum), shift));
                total = _mm512_mul_ps(total, _mm512_set1_ps(from->x_scale[i]));
            }
            const __m512 before = from->accumulate ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
            _mm512_storeu_ps(to, _mm512_fmadd_ps(total, scale, before));
        }
    }
}

/* Float weights in bf16: sums stay in their tiles for all of K. */
TILED static void floats_in_tiles(const Matrix *matrix, const char *packed, long m, long k, const char *w, float *c) {
    const long h = tile_rows(m), tiles = tiles_of_rows(m), passes = (tiles + 1) / 2, steps = k / 32;
    for (long t = 0, pass = 0; t < tiles; t += 2, pass++) {
        const Prefetch prefetch = prefetch_of(w, panel_bytes(matrix, k), steps, pass, passes);
        const char *x = packed + t * steps * h * 64;
        float *to = c + t * h * PANEL;
        if (t + 1 < tiles) multiply_tiles(BF16, 1, x, steps * h * 64, h * 64, 64, w, 2048, steps, prefetch, h, to);
        else multiply_tiles(BF16, 0, x, 0, h * 64, 64, w, 2048, steps, prefetch, h, to);
    }
}

/* Writes `rows` rows of codes as pairs of bf16, [rows/2][PANEL][2]. */
TILED INLINE void codes_to_pairs(const int source, const Tables *tables, const char *w, long rows, char *out) {
    for (long p = 0; p < rows; p += 8, w += STEP_BYTES(source), out += 512) {
        prefetch_step(&(Prefetch){NULL, 0}, w, STEP_BYTES(source), 0);
        UNROLL
        for (int t = 0; t < 4; t++) {
            __m512bh pairs[2];
            pairs_of(source, tables, w, t, pairs);
            _mm512_storeu_si512(out + t * 128, (__m512i)pairs[0]);
            _mm512_storeu_si512(out + t * 128 + 64, (__m512i)pairs[1]);
        }
    }
}

/* Writes `rows` rows of int4 codes, plus 8, as quads of bytes, [rows/4][PANEL][4]. */
TILED INLINE void codes_to_quads(const char *w, long rows, char *out) {
    const __m512i low_half = _mm512_set1_epi8(15);
    for (long p = 0; p < rows; p += 8, w += 128, out += 256) {
        prefetch_step(&(Prefetch){NULL, 0}, w, 128, 0);
        UNROLL
        for (int j = 0; j < 2; j++) {
            __m512i codes = _mm512_loadu_si512(w + j * 64);
            _mm512_storeu_si512(out + j * 64, _mm512_and_si512(codes, low_half));
            _mm512_storeu_si512(out + 128 + j * 64, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low_half));
        }
    }
}

TILED INLINE void decode_group(const int dtype, const int source, const Tables *tables, const char *w, long rows,
                               char *out) {
    if (dtype == BF16) codes_to_pairs(source, tables, w, rows, out);
    else codes_to_quads(w, rows, out);
    ACCESSED;
}

/* c [m][PANEL] = x w for a matrix with codes: group by group, whose sums are multiplied by its scales. A tile that was
   written a moment ago takes long to be read; so codes are decoded a group ahead, and sums are taken when the next ones
   are on their way. */
TILED INLINE void codes_in_tiles(const int dtype, const int source, const Matrix *matrix, const char *packed, long m,
                                 long k, const char *w, float *c, char *scratch) {
    const long h = tile_rows(m), tiles = tiles_of_rows(m), group = matrix->group, groups = k / group;
    const long depth = dtype == BF16 || group < 64 ? 32 : 64, steps = group / depth;
    const long w_step = depth * PANEL * (dtype == BF16 ? 2 : 1);
    const long scale_bytes = PANEL * number_bytes(matrix->scales), code_bytes = panel_bytes(matrix, group) - scale_bytes;
    const Tables tables = tables_of(source);
    const int decode = dtype == BF16 || source == INT4;
    char *decoded = scratch, *next_decoded = decoded + DECODED_BYTES;
    char *sums = scratch + 2 * DECODED_BYTES, *next_sums = sums + SUMS_BYTES;
    Sums last = {.rows = 0};
    if (decode) decode_group(dtype, source, &tables, w + scale_bytes, group, decoded);
    for (long g = 0; g < groups; g++, w += code_bytes) {
        const char *scales = w, *codes = decoded;
        prefetch_step(&(Prefetch){NULL, 0}, w, scale_bytes, 0);
        w += scale_bytes;
        if (!decode) codes = w;
        else if (g + 1 < groups)
            decode_group(dtype, source, &tables, w + code_bytes + scale_bytes, group, next_decoded);
        for (long t = 0; t < tiles; t += 2) {
            const Prefetch prefetch = {decode || t ? w : NULL, 0}; /* in the first pass over w alone, or in none */
            const long first = t * h, both = t + 1 < tiles, most = (1 + both) * h;
            Sums now = {sums, scales, NULL, NULL, c + first * PANEL, m - first < most ? m - first : most, g > 0};
            if (dtype == BF16) {
                const char *x = packed + (t * groups + g) * steps * h * 64;
                const long next = groups * steps * h * 64;
                if (both) multiply_tiles(BF16, 1, x, next, h * 64, 64, codes, w_step, steps, prefetch, h, sums);
                else multiply_tiles(BF16, 0, x, 0, h * 64, 64, codes, w_step, steps, prefetch, h, sums);
            } else {
                const char *of_group = packed + g * (tiles * h * group + 8 * m), *x = of_group + first * group;
                now.x_scale = (const float *)(of_group + tiles * h * group) + first;
                now.x_sum = (const int32_t *)now.x_scale + m;
                if (both) multiply_tiles(INT8, 1, x, h * group, depth, group, codes, w_step, steps, prefetch, h, sums);
                else multiply_tiles(INT8, 0, x, 0, depth, group, codes, w_step, steps, prefetch, h, sums);
            }
            add_sums(dtype, source, matrix->scales, &last);
            last = now;
            char *used = sums;
            sums = next_sums, next_sums = used;
        }
        char *used = decoded;
        decoded = next_decoded, next_decoded = used;
    }
    add_sums(dtype, source, matrix->scales, &last);
}

TILED void panel_product_bf16_tiles(const Matrix *matrix, const void *packed, long m, long k, long panel, float *c,
                                    void *scratch) {
    const char *w = (const char *)matrix->data + panel * panel_bytes(matrix, k);
    if (matrix->layout == PAIRS_BF16) floats_in_tiles(matrix, packed, m, k, w, c);
    else if (matrix->layout == PAIRS_SIGN8) codes_in_tiles(BF16, INT8, matrix, packed, m, k, w, c, scratch);
    else codes_in_tiles(BF16, INT4, matrix, packed, m, k, w, c, scratch);
}

TILED void panel_product_int8_tiles(const Matrix *matrix, const void *packed, long m, long k, long panel, float *c,
                                    void *scratch) {
    const char *w = (const char *)matrix->data + panel * panel_bytes(matrix, k);
    if (matrix->stored == INT8) codes_in_tiles(INT8, INT8, matrix, packed, m, k, w, c, scratch);
    else codes_in_tiles(INT8, INT4, matrix, packed, m, k, w, c, scratch);
}
