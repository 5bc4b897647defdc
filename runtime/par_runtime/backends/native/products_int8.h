/* Products of int8 and int4 codes with activations rounded to int8, with AVX-512's dot products of bytes (vpdpbusd).

   Packed activations are, for each group of K: quads [group/4][M][4] of int8, scales [M] fp32, and minus the sums of the
   quads [M] int32. The instruction multiplies unsigned with signed bytes. So codes are stored plus 128 (int4: plus 8),
   and sums begin at minus as many times the sum of the activations. */

#define QUADS __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,fma,f16c,avx2")))

/* c [rows][PANEL] = x w, or c += x w with `accumulate`, for `groups` groups of `group` rows of a panel. `x` is the
   first row's in the first group. */
QUADS INLINE void int8_rows(const int rows, const int source, int64_t scales_stored, const char *w, const char *x,
                            long m, long groups, long group, float *c, int accumulate, Prefetch prefetch) {
    const int chains = rows <= 6 ? 2 : 1;
    const long step_bytes = source == INT8 ? 256 : 128, scale_bytes = PANEL * number_bytes(scales_stored);
    const __m512i low_half = _mm512_set1_epi8(15);
    for (long g = 0, step = 0; g < groups; g++, accumulate = 1, x += (group + 8) * m) {
        const char *scales = w;
        const float *x_scale = (const float *)(x + group * m);
        const int32_t *x_sum = (const int32_t *)x_scale + m;
        if (!prefetch.from) prefetch_step(&prefetch, w, scale_bytes, 0);
        w += scale_bytes;
        __m512i sum[2][12][2];
        UNROLL
        for (int i = 0; i < rows; i++)
            UNROLL
            for (int j = 0; j < 2; j++) {
                sum[0][i][j] = _mm512_slli_epi32(_mm512_set1_epi32(x_sum[i]), source == INT8 ? 7 : 3);
                sum[1][i][j] = _mm512_setzero_si512();
            }
        const int32_t *quads = (const int32_t *)x;
        for (long p = 0; p < group; p += 8, step++, w += step_bytes) {
            prefetch_step(&prefetch, w, step_bytes, step);
            UNROLL
            for (int t = 0; t < 2; t++) {
                __m512i codes[2];
                UNROLL
                for (int j = 0; j < 2; j++) {
                    codes[j] = _mm512_loadu_si512(w + (source == INT8 ? t * 128 : 0) + j * 64);
                    if (source == INT4) {
                        if (t) codes[j] = _mm512_srli_epi16(codes[j], 4);
                        codes[j] = _mm512_and_si512(codes[j], low_half);
                    }
                }
                UNROLL
                for (int i = 0; i < rows; i++) {
                    __m512i value = _mm512_set1_epi32(quads[i]);
                    UNROLL
                    for (int j = 0; j < 2; j++)
                        sum[t % chains][i][j] = _mm512_dpbusd_epi32(sum[t % chains][i][j], codes[j], value);
                }
                quads += m;
            }
        }
        UNROLL
        for (int i = 0; i < rows; i++)
            UNROLL
            for (int j = 0; j < 2; j++) {
                __m512i total = chains == 1 ? sum[0][i][j] : _mm512_add_epi32(sum[0][i][j], sum[1][i][j]);
                __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(x_scale[i]));
                float *to = c + i * PANEL + j * 16;
                __m512 before = accumulate ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
                _mm512_storeu_ps(to, _mm512_fmadd_ps(part, scale_of(scales_stored, scales, j), before));
            }
    }
}

QUADS static void int8_pass(long rows, int source, int64_t scales_stored, const char *w, const char *x, long m,
                            long groups, long group, float *c, int accumulate, Prefetch prefetch) {
#define CASE(ROWS, SOURCE)                                                                                \
    case ROWS * 8 + SOURCE:                                                                               \
        int8_rows(ROWS, SOURCE, scales_stored, w, x, m, groups, group, c, accumulate, prefetch); \
        break;
#define CASES(ROWS) CASE(ROWS, INT8) CASE(ROWS, INT4)
    switch (rows * 8 + source) {
        CASES(1) CASES(2) CASES(3) CASES(4) CASES(5) CASES(6) CASES(7) CASES(8) CASES(9) CASES(10) CASES(11) CASES(12)
    }
#undef CASES
#undef CASE
}

QUADS void panel_product_int8_dot(const Matrix *matrix, const void *packed, long m, long k, long panel, float *c,
                                  void *scratch) {
    (void)scratch;
    const char *w = (const char *)matrix->data + panel * panel_bytes(matrix, k);
    long passes = (m + 11) / 12, group = matrix->group, most = passes == 1 ? k : K_BLOCK_DOT;
    for (long first = 0, block; first < k; first += block) {
        block = k - first < most ? k - first : most;
        long bytes = panel_bytes(matrix, block);
        const char *x = (const char *)packed + first / group * (group + 8) * m;
        for (long i = 0, pass = 0, rows; i < m; i += rows, pass++) {
            rows = rows_of_pass(m - i, 12);
            int8_pass(rows, (int)matrix->stored, matrix->scales, w, x + 4 * i, m, block / group, group, c + i * PANEL,
                      first > 0, prefetch_of(w, bytes, block / 8, pass, passes));
        }
        w += bytes;
    }
}
