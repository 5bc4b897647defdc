/* Products in bf16 with what 64-bit ARM has for it (BF16: Apple's since M2, Graviton since the third one).

   BFMMLA multiplies two columns by two rows of activations, four products each: 16 an instruction, where fp32 has 4. It
   rounds sums in a way of its own, to odd, and takes numbers too small for fp32's exponent as 0.

   Activations are stored as fours [K/4][2P][4] of bf16 for P pairs of rows; what is made of a row behind the last is
   not used. Weights are fours too (FOURS_BF16 of matrix.h). Codes become bf16 in scratch memory, a group at a time, which
   is exact, once for all rows; a group's sum is multiplied by its scale in fp32.

   A number's sum is made in the order of K, so it does not depend on the number of rows. */

/* 16 codes as bf16, in their order. */
INLINE void widen_codes(int8x16_t codes, uint16_t *out) {
    int16x8_t halves[2] = {vmovl_s8(vget_low_s8(codes)), vmovl_s8(vget_high_s8(codes))};
    UNROLL
    for (int i = 0; i < 2; i++) {
        float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves[i])));
        float32x4_t high = vcvtq_f32_s32(vmovl_s16(vget_high_s16(halves[i])));
        /* The lower halves are 0: whole numbers of 8 bits are exact in bf16. */
        vst1q_u16(out + 8 * i, vuzp2q_u16(vreinterpretq_u16_f32(low), vreinterpretq_u16_f32(high)));
    }
}

/* out [group/4][PANEL][4] bf16 = the codes of a group, which lie at w as QUADS_INT8 or QUADS_INT4. */
static void widen_group(int source, const int8_t *w, long group, uint16_t *out) {
    const int8x16_t eight = vdupq_n_s8(8);
    const long step = source == INT8 ? 4 : 8;
    for (long p = 0; p < group; p += step, w += 4 * PANEL, out += step * PANEL) {
        prefetch_arm((const char *)w + PREFETCH_BYTES, 4 * PANEL);
        for (int j = 0; j < 4 * PANEL; j += 16) {
            int8x16_t codes = vld1q_s8(w + j);
            if (source == INT8) widen_codes(codes, out + j);
            else
                for (int high = 0; high < 2; high++)
                    widen_codes(vsubq_s8(halves_arm(codes, high), eight), out + high * 4 * PANEL + j);
        }
    }
}

/* A block of weights in bf16, and the rows of activations that it is multiplied by. */
typedef struct {
    const uint16_t *w, *x;
    long k, packed_rows, rows;
    const char *scales; /* of codes, else NULL */
    int64_t scales_stored;
    const char *ahead; /* prefetched, `bytes` at each step of 4 rows of K */
    long bytes;
} BlockBf16;

/* Columns [4 * first, 4 * (first + vecs)) of c [rows][PANEL] = x w, or c += x w with `accumulate`. With `codes`, sums
   begin at 0, and are multiplied by the scales before they are added. */
WITH_BF16 INLINE void bfmmla_columns(const int codes, const int pairs, const int vecs, int first, long bytes,
                                  const BlockBf16 *of, float *c, int accumulate) {
    const uint16_t *x = of->x, *w = of->w + first * 16;
    const long line = 4 * of->packed_rows, rows = of->rows;
    const char *ahead = of->ahead;
    float32x4_t sum[ARM_ROWS / 2][16]; /* of columns 2j and 2j+1: row 2i's two, then row 2i+1's */
    c += 4 * first;
    UNROLL
    for (int i = 0; i < pairs; i++)
        UNROLL
        for (int j = 0; j < vecs; j++) {
            float32x4_t one = vdupq_n_f32(0.0f), other = one;
            if (!codes && accumulate) {
                one = vld1q_f32(c + 2 * i * PANEL + 4 * j);
                if (2 * i + 1 < rows) other = vld1q_f32(c + (2 * i + 1) * PANEL + 4 * j);
            }
            float64x2_t left = vreinterpretq_f64_f32(one), right = vreinterpretq_f64_f32(other);
            sum[i][2 * j] = vreinterpretq_f32_f64(vzip1q_f64(left, right));
            sum[i][2 * j + 1] = vreinterpretq_f32_f64(vzip2q_f64(left, right));
        }
    for (long p = 0; p < of->k; p += 4, w += 4 * PANEL, x += line) {
        ahead = prefetch_arm(ahead, bytes);
        READ_LATER;
        bfloat16x8_t two[ARM_ROWS / 2];
        UNROLL
        for (int i = 0; i < pairs; i++) two[i] = vreinterpretq_bf16_u16(vld1q_u16(x + 8 * i));
        UNROLL
        for (int j = 0; j < 2 * vecs; j++) {
            bfloat16x8_t columns = vreinterpretq_bf16_u16(vld1q_u16(w + 8 * j));
            UNROLL
            for (int i = 0; i < pairs; i++) sum[i][j] = vbfmmlaq_f32(sum[i][j], two[i], columns);
        }
    }
    UNROLL
    for (int j = 0; j < vecs; j++) {
        float32x4_t scales = codes ? scales_arm(of->scales_stored, of->scales, first + j) : vdupq_n_f32(0.0f);
        UNROLL
        for (int i = 0; i < pairs; i++) {
            float64x2_t left = vreinterpretq_f64_f32(sum[i][2 * j]), right = vreinterpretq_f64_f32(sum[i][2 * j + 1]);
            float32x4_t each[2] = {vreinterpretq_f32_f64(vzip1q_f64(left, right)),
                                   vreinterpretq_f32_f64(vzip2q_f64(left, right))};
            UNROLL
            for (int r = 0; r < 2; r++)
                if (2 * i + r < rows) {
                    float *to = c + (2 * i + r) * PANEL + 4 * j;
                    if (codes) each[r] = vfmaq_f32(accumulate ? vld1q_f32(to) : vdupq_n_f32(0.0f), each[r], scales);
                    vst1q_f32(to, each[r]);
                }
        }
    }
}

/* All columns, for up to ARM_ROWS rows. */
WITH_BF16 static void bfmmla_pass(const BlockBf16 *of, float *c, int accumulate) {
#define AT(CODES, PAIRS, VECS)                                    \
    for (int first = 0; first < 8; first += VECS)                 \
        bfmmla_columns(CODES, PAIRS, VECS, first, first ? 0 : of->bytes, of, c, accumulate);
#define CASE(PAIRS, VECS)                                 \
    case 2 * PAIRS: AT(0, PAIRS, VECS) break; \
    case 2 * PAIRS + 1: AT(1, PAIRS, VECS) break;
    switch ((of->rows + 1) / 2 * 2 + (of->scales != NULL)) {
        CASE(1, 8)
        CASE(2, 4)
        CASE(3, 2)
        CASE(4, 2)
        CASE(5, 2)
    }
#undef CASE
#undef AT
}

void panel_product_bf16_bfmmla(const Matrix *matrix, const void *packed, long m, long k, long panel, float *c,
                               void *scratch) {
    const char *w = (const char *)matrix->data + panel * panel_bytes(matrix, k);
    long units = (m + 1) / 2, most = ARM_ROWS / 2, passes = (units + most - 1) / most, packed_rows = 2 * units;
    long codes = matrix->group, at_once = codes ? codes : passes == 1 ? k : K_BLOCK_DOT;
    long scale_bytes = codes ? PANEL * number_bytes(matrix->scales) : 0;
    for (long first = 0, block, size; first < k; first += block, w += size) {
        block = k - first < at_once ? k - first : at_once;
        size = panel_bytes(matrix, block);
        if (codes) widen_group((int)matrix->stored, (const int8_t *)w + scale_bytes, block, scratch);
        for (long unit = 0, done = 0, some; unit < units; unit += some, done++) {
            some = rows_of_pass(units - unit, most);
            long i = 2 * unit;
            BlockBf16 of = {.k = block, .packed_rows = packed_rows, .rows = m - i < 2 * some ? m - i : 2 * some};
            of.x = (const uint16_t *)packed + first * packed_rows + 4 * i;
            of.w = codes ? scratch : (const void *)w;
            if (codes) of.scales = w, of.scales_stored = matrix->scales;
            else {
                Prefetch prefetch = prefetch_of(w, size, block / 4, done, passes);
                of.ahead = prefetch.from ? prefetch.from : w + PREFETCH_BYTES;
                of.bytes = prefetch.from ? prefetch.bytes : 8 * PANEL;
            }
            bfmmla_pass(&of, c + i * PANEL, first > 0);
        }
    }
}
