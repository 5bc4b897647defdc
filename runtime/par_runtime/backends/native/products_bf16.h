/* Products in bf16 with AVX-512's dot products of pairs (vdpbf16ps).

   Activations are stored as pairs [K/2][M][2]. Codes become bf16 in registers, which is exact: those of int4 by a table
   of 32 words, of which two halves are the same, so that one shift serves four codes; those of int8, sign and
   magnitude, by two tables of 128 bytes, one for each byte of a bf16. A group's sum is multiplied by its scale in fp32.

   A number's sum is made in the same order for any number of rows: pair after pair in a group (or in K_BLOCK_DOT rows
   of K), then group after group. So an image does not depend on the batch that it is made in. For one or two rows that
   costs time that only codes of int4 notice: a dot product waits for the one before into the same register. */

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,fma,f16c,avx2")))

/* Scales of columns 16*j .. 16*j+15 of a group. */
AVX512 INLINE __m512 scale_of(int64_t stored, const char *scales, int j) {
    if (stored == FP32) return _mm512_loadu_ps((const float *)scales + 16 * j);
    __m256i halves = _mm256_loadu_si256((const __m256i *)scales + j);
    if (stored == FP16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* Bytes of 8 rows of a panel. */
#define STEP_BYTES(SOURCE) ((SOURCE) == BF16 ? 512 : (SOURCE) == INT8 ? 256 : 128)

/* The bf16 of a whole number 0 .. 127, in 16 bits. */
#define LOG2(I) ((I) >= 64 ? 6 : (I) >= 32 ? 5 : (I) >= 16 ? 4 : (I) >= 8 ? 3 : (I) >= 4 ? 2 : (I) >= 2)
#define WHOLE(I) ((I) ? (127 + LOG2(I)) << 7 | ((I) << (7 - LOG2(I)) & 0x7f) : 0)
#define LOW(I) (WHOLE(I) & 0xff)
#define HIGH(I) (WHOLE(I) >> 8)
#define TIMES4(F, I) F(I), F((I) + 1), F((I) + 2), F((I) + 3)
#define TIMES16(F, I) TIMES4(F, I), TIMES4(F, (I) + 4), TIMES4(F, (I) + 8), TIMES4(F, (I) + 12)
#define TIMES64(F, I) TIMES16(F, I), TIMES16(F, (I) + 16), TIMES16(F, (I) + 32), TIMES16(F, (I) + 48)
static const uint8_t low_bytes[128] = {TIMES64(LOW, 0), TIMES64(LOW, 64)};
static const uint8_t high_bytes[128] = {TIMES64(HIGH, 0), TIMES64(HIGH, 64)};
#define CODE(I) (WHOLE((I) < 8 ? 8 - (I) : (I)-8) | ((I) < 8) << 15)
static const uint16_t code_words[32] = {TIMES16(CODE, 0), TIMES16(CODE, 0)};
#undef LOG2
#undef WHOLE
#undef LOW
#undef HIGH
#undef TIMES4
#undef TIMES16
#undef TIMES64
#undef CODE

typedef struct {
    __m512i low[2], high[2]; /* of int8: the bytes of the bf16 of each magnitude. low[0] of int4: bf16 of each code */
} Tables;

DOT INLINE Tables tables_of(int source) {
    Tables tables;
    UNROLL
    for (int i = 0; i < 2; i++) {
        tables.low[i] = _mm512_loadu_si512(source == INT4 ? (const char *)code_words : (const char *)low_bytes + 64 * i);
        tables.high[i] = _mm512_loadu_si512(high_bytes + 64 * i);
    }
    return tables;
}

/* Two rows of a panel as pairs: pair `t` of the 8 rows at w. */
DOT INLINE void pairs_of(int source, const Tables *tables, const char *w, int t, __m512bh *pairs) {
    if (source == BF16) {
        UNROLL
        for (int j = 0; j < 2; j++) pairs[j] = (__m512bh)_mm512_loadu_si512(w + t * 128 + j * 64);
    } else if (source == INT8) {
        __m512i codes = _mm512_loadu_si512(w + t * 64);
        __m512i low = _mm512_permutex2var_epi8(tables->low[0], codes, tables->low[1]);
        __m512i high = _mm512_permutex2var_epi8(tables->high[0], codes, tables->high[1]);
        high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xf8); /* high | (codes & sign) */
        pairs[0] = (__m512bh)_mm512_unpacklo_epi8(low, high);
        pairs[1] = (__m512bh)_mm512_unpackhi_epi8(low, high);
    } else {
        UNROLL
        for (int j = 0; j < 2; j++) {
            __m512i words = _mm512_loadu_si512(w + j * 64);
            if (t) words = _mm512_srli_epi16(words, (unsigned)t * 4);
            pairs[j] = (__m512bh)_mm512_permutexvar_epi16(words, tables->low[0]); /* reads the lowest 5 bits */
        }
    }
}

/* c [rows][PANEL] = x w, or c += x w with `accumulate`, for `groups` groups of `group` rows of a panel. */
DOT INLINE void bf16_rows(const int rows, const int source, int64_t scales_stored, const char *w, const uint32_t *x,
                          long m, long groups, long group, float *c, int accumulate, Prefetch prefetch) {
    const long step_bytes = STEP_BYTES(source), scale_bytes = source == BF16 ? 0 : PANEL * number_bytes(scales_stored);
    const Tables tables = tables_of(source);
    for (long g = 0, step = 0; g < groups; g++, accumulate = 1) {
        const char *scales = w;
        if (!prefetch.from) prefetch_step(&prefetch, w, scale_bytes, 0);
        w += scale_bytes;
        __m512 sum[12][2];
        UNROLL
        for (int i = 0; i < rows; i++)
            UNROLL
            for (int j = 0; j < 2; j++) sum[i][j] = _mm512_setzero_ps();
        for (long p = 0; p < group; p += 8, step++, w += step_bytes, x += 4 * m) {
            prefetch_step(&prefetch, w, step_bytes, step);
            UNROLL
            for (int t = 0; t < 4; t++) {
                __m512bh pairs[2];
                pairs_of(source, &tables, w, t, pairs);
                UNROLL
                for (int i = 0; i < rows; i++) {
                    __m512bh value = (__m512bh)_mm512_set1_epi32((int)x[t * m + i]);
                    UNROLL
                    for (int j = 0; j < 2; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], pairs[j], value);
                }
            }
        }
        UNROLL
        for (int i = 0; i < rows; i++)
            UNROLL
            for (int j = 0; j < 2; j++) {
                __m512 total = sum[i][j];
                float *to = c + i * PANEL + j * 16;
                __m512 before = accumulate ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
                if (source == BF16) total = _mm512_add_ps(before, total);
                else total = _mm512_fmadd_ps(total, scale_of(scales_stored, scales, j), before);
                _mm512_storeu_ps(to, total);
            }
    }
}

DOT static void bf16_pass(long rows, int source, int64_t scales_stored, const char *w, const uint32_t *x, long m,
                          long groups, long group, float *c, int accumulate, Prefetch prefetch) {
#define CASE(ROWS, SOURCE)                                                                                \
    case ROWS * 8 + SOURCE:                                                                               \
        bf16_rows(ROWS, SOURCE, scales_stored, w, x, m, groups, group, c, accumulate, prefetch); \
        break;
#define CASES(ROWS) CASE(ROWS, BF16) CASE(ROWS, INT8) CASE(ROWS, INT4)
    switch (rows * 8 + source) {
        CASES(1) CASES(2) CASES(3) CASES(4) CASES(5) CASES(6) CASES(7) CASES(8) CASES(9) CASES(10) CASES(11) CASES(12)
    }
#undef CASES
#undef CASE
}

DOT void panel_product_bf16_dot(const Matrix *matrix, const void *packed, long m, long k, long panel, float *c,
                                void *scratch) {
    (void)scratch;
    int source = matrix->layout == PAIRS_BF16 ? BF16 : matrix->layout == PAIRS_SIGN8 ? INT8 : INT4;
    const char *w = (const char *)matrix->data + panel * panel_bytes(matrix, k);
    const uint32_t *x = packed; /* [K/2][M] */
    long passes = (m + 11) / 12, most = passes == 1 && source != BF16 ? k : K_BLOCK_DOT;
    for (long first = 0, block; first < k; first += block) {
        block = k - first < most ? k - first : most;
        long group = source == BF16 ? block : matrix->group, bytes = panel_bytes(matrix, block);
        for (long i = 0, pass = 0, rows; i < m; i += rows, pass++) {
            rows = rows_of_pass(m - i, 12);
            bf16_pass(rows, source, matrix->scales, w, x + first / 2 * m + i, m, block / group, group, c + i * PANEL,
                      first > 0, prefetch_of(w, bytes, block / 8, pass, passes));
        }
        w += bytes;
    }
}
