/* Products of int8 and int4 codes with activations rounded to int8, with what 64-bit ARM has for bytes: what
   products_int8.h computes, with the same bits.

   SDOT (Armv8.2: all of Apple's M, Graviton since the second one) adds four products of bytes of a column. Both sides
   are signed, so codes of int8 are stored as they are; codes of int4 plus 8, and sums begin at minus 8 times the sum of
   the activations. A vector holds quads of four columns, or of four rows of activations, of which the instruction takes
   one.

   SMMLA (I8MM: Apple's since M2, Graviton since the third one) multiplies two columns by two rows of activations, eight
   products each: twice as many. Activations are, for each group of K: octets [group/8][2P][8] of int8 for P pairs of
   rows (what is made of a row behind the last is not used), then scales [M] fp32, and minus the sums of the octets [M]
   int32. */

#define ARM_ROWS 10 /* of activations in a pass, at most: sums take 20 of 32 registers; with 24, gcc lacks some */

/* Between two steps: a compiler that reads for the next one meanwhile has too few registers for the sums. */
#define READ_LATER __asm__ volatile("" ::: "memory")

/* The scales of columns 4*j .. 4*j+3 of a panel, as fp32. */
INLINE float32x4_t scales_arm(int64_t stored, const char *scales, int j) {
    if (stored == FP32) return vld1q_f32((const float *)scales + 4 * j);
    uint16x4_t halves = vld1_u16((const uint16_t *)scales + 4 * j);
    if (stored == FP16) return vcvt_f32_f16(vreinterpret_f16_u16(halves));
    return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
}

/* c = total * x_scale * scales, or c += that, for 4 columns. */
INLINE void scaled_arm(int32x4_t total, float x_scale, float32x4_t scales, float *c, int accumulate) {
    float32x4_t part = vmulq_n_f32(vcvtq_f32_s32(total), x_scale);
    vst1q_f32(c, vfmaq_f32(accumulate ? vld1q_f32(c) : vdupq_n_f32(0.0f), part, scales));
}

/* Of 16 bytes with two codes of int4 each, those of the low or the high halves. */
INLINE int8x16_t halves_arm(int8x16_t both, int high) {
    uint8x16_t bytes = vreinterpretq_u8_s8(both);
    return vreinterpretq_s8_u8(high ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15)));
}

/* Rows of activations from one on, in a group. */
typedef struct {
    const int8_t *x;      /* the first row's, of `packed_rows` */
    long packed_rows;     /* that lie beside each other */
    const float *scale;   /* [rows] */
    const int32_t *minus; /* [rows], minus the sum of each */
} ArmRows;

/* A group of a panel, and what is prefetched at each of its steps of 8 rows of K: `bytes` from `ahead` on. */
typedef struct {
    const char *scales, *codes;
    int64_t scales_stored;
    long group;
    const char *ahead;
    long bytes;
} ArmGroup;

/* c [rows][PANEL] = x w, or c += x w with `accumulate`, for one group of a panel and up to ARM_ROWS rows. */
typedef void ArmPass(long rows, int source, const ArmGroup *w, const ArmRows *x, float *c, int accumulate);

/* A PanelProduct by passes over each group. A pass begins at a multiple of `together` rows; `step`: the bytes of a row
   that lie beside those of the next one. */
INLINE void panel_of_groups_arm(const Matrix *matrix, const void *packed, long m, long k, long panel, float *c,
                                ArmPass *pass, long together, long step) {
    const char *w = (const char *)matrix->data + panel * panel_bytes(matrix, k);
    const int8_t *x = packed;
    long units = (m + together - 1) / together, most = ARM_ROWS / together, passes = (units + most - 1) / most;
    long group = matrix->group, bytes = panel_bytes(matrix, group), packed_rows = units * together;
    long scale_bytes = PANEL * number_bytes(matrix->scales), step_bytes = matrix->stored == INT8 ? 256 : 128;
    for (long first = 0; first < k; first += group, w += bytes, x += packed_rows * group + 8 * m) {
        const float *scale = (const float *)(x + packed_rows * group);
        const int32_t *minus = (const int32_t *)scale + m;
        for (long unit = 0, done = 0, some; unit < units; unit += some, done++) {
            some = rows_of_pass(units - unit, most);
            long i = unit * together, rows = m - i < some * together ? m - i : some * together;
            Prefetch prefetch = prefetch_of(w, bytes, group / 8, done, passes);
            ArmGroup of = {w, w + scale_bytes, matrix->scales, group, prefetch.from, prefetch.bytes};
            if (!prefetch.from) {
                prefetch_step(&prefetch, w, scale_bytes, 0);
                of.ahead = of.codes + PREFETCH_BYTES, of.bytes = step_bytes;
            }
            ArmRows from = {x + i * step, packed_rows, scale + i, minus + i};
            pass(rows, (int)matrix->stored, &of, &from, c + i * PANEL, first > 0);
        }
    }
}

/* Columns of a panel are multiplied `VECS` vectors of 4 at a time by COLUMNS(...), so that all sums are in registers.
   The first columns prefetch. */
#define ARM_AT(COLUMNS, SOURCE, ROWS, VECS, HIGH, FIRST) \
    COLUMNS(SOURCE, ROWS, VECS, HIGH, FIRST, (FIRST) ? 0 : w->bytes, w, x, c, accumulate)
#define ARM_CASE(ROWS, SOURCE, COLUMNS, VECS)                                                                     \
    case ROWS * 8 + SOURCE:                                                                                       \
        if ((VECS) == 8) ARM_AT(COLUMNS, SOURCE, ROWS, VECS, 0, 0);                                               \
        else if (SOURCE == INT8)                                                                                  \
            for (int first = 0; first < 8; first += VECS) ARM_AT(COLUMNS, SOURCE, ROWS, VECS, 0, first);          \
        else {                                                                                                    \
            for (int first = 0; first < 4; first += VECS) ARM_AT(COLUMNS, SOURCE, ROWS, VECS, 0, first);          \
            for (int first = 4; first < 8; first += VECS) ARM_AT(COLUMNS, SOURCE, ROWS, VECS, 1, first);          \
        }                                                                                                         \
        break;
#define ARM_CASES(ROWS, COLUMNS, VECS) ARM_CASE(ROWS, INT8, COLUMNS, VECS) ARM_CASE(ROWS, INT4, COLUMNS, VECS)

/* Prefetches what a step shall. */
INLINE const char *prefetch_arm(const char *ahead, long bytes) {
    for (long line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line, 0, 3);
    return ahead + bytes;
}

#ifndef __clang__ /* gcc would load numbers of the next iteration at the end of this one, and then lacks registers */
#pragma GCC push_options
#pragma GCC optimize("no-tree-pre")
#endif

#ifdef HAS_SDOT
/* sum += codes * row `lane` of the four in `rows`. */
WITH_SDOT INLINE int32x4_t sdot_row(int32x4_t sum, int8x16_t codes, int8x16_t rows, int lane) {
    switch (lane) { /* the instruction has it */
    case 0: return vdotq_laneq_s32(sum, codes, rows, 0);
    case 1: return vdotq_laneq_s32(sum, codes, rows, 1);
    case 2: return vdotq_laneq_s32(sum, codes, rows, 2);
    default: return vdotq_laneq_s32(sum, codes, rows, 3);
    }
}

/* Columns [4 * first, 4 * (first + vecs)) of a pass. Rows are read by fours; what lies behind the last one is in the
   buffer, and counts for nothing. */
WITH_SDOT INLINE void sdot_columns(const int source, const int rows, const int vecs, const int high, int first,
                                   long bytes, const ArmGroup *w, const ArmRows *of, float *c, int accumulate) {
    const long step_bytes = source == INT8 ? 256 : 128, line = 4 * of->packed_rows, group = w->group;
    const int8_t *x = of->x, *at = (const int8_t *)w->codes + first * 16;
    const char *ahead = w->ahead;
    int32x4_t sum[ARM_ROWS][8];
    (void)high;
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < vecs; j++) sum[i][j] = vdupq_n_s32(source == INT8 ? 0 : of->minus[i] * 8);
    for (long p = 0; p < group; p += 8, at += step_bytes) {
        ahead = prefetch_arm(ahead, bytes);
        UNROLL
        for (int t = 0; t < 2; t++, x += line) {
            READ_LATER;
            int8x16_t fours[(ARM_ROWS + 3) / 4];
            UNROLL
            for (int i = 0; i < (rows + 3) / 4; i++) fours[i] = vld1q_s8(x + 16 * i);
            UNROLL
            for (int j = 0; j < vecs; j++) {
                int8x16_t codes = vld1q_s8(at + (source == INT8 ? t * 128 : 0) + j * 16);
                if (source == INT4) codes = halves_arm(codes, t);
                UNROLL
                for (int i = 0; i < rows; i++) sum[i][j] = sdot_row(sum[i][j], codes, fours[i / 4], i % 4);
            }
        }
    }
    UNROLL
    for (int j = 0; j < vecs; j++) {
        float32x4_t scales = scales_arm(w->scales_stored, w->scales, first + j);
        UNROLL
        for (int i = 0; i < rows; i++)
            scaled_arm(sum[i][j], of->scale[i], scales, c + i * PANEL + (first + j) * 4, accumulate);
    }
}

WITH_SDOT static void sdot_pass(long rows, int source, const ArmGroup *w, const ArmRows *x, float *c, int accumulate) {
    switch (rows * 8 + source) {
        ARM_CASES(1, sdot_columns, 8)
        ARM_CASES(2, sdot_columns, 8)
        ARM_CASES(3, sdot_columns, 4)
        ARM_CASES(4, sdot_columns, 4)
        ARM_CASES(5, sdot_columns, 4)
        ARM_CASES(6, sdot_columns, 2)
        ARM_CASES(7, sdot_columns, 2)
        ARM_CASES(8, sdot_columns, 2)
        ARM_CASES(9, sdot_columns, 2)
        ARM_CASES(10, sdot_columns, 2)
    }
}

void panel_product_int8_sdot(const Matrix *matrix, const void *packed, long m, long k, long panel, float *c,
                             void *scratch) {
    (void)scratch;
    panel_of_groups_arm(matrix, packed, m, k, panel, c, sdot_pass, 1, 4);
}
#endif

#ifdef HAS_SMMLA
/* The same with `pairs` of rows, the last one of which may be one row. A vector of codes has two columns; `high`: of
   int4, whether those of the second half of the panel. */
WITH_SMMLA INLINE void smmla_columns(const int source, const int pairs, const int vecs, const int high, int first,
                                     long bytes, long rows, const ArmGroup *w, const ArmRows *of, float *c,
                                     int accumulate) {
    const long step_bytes = source == INT8 ? 256 : 128, line = 8 * of->packed_rows, group = w->group;
    const int8_t *x = of->x, *at = (const int8_t *)w->codes + (first - 4 * high) * 32;
    const char *ahead = w->ahead;
    int32x4_t sum[ARM_ROWS / 2][16]; /* of columns 2j and 2j+1: row 2i's two, then row 2i+1's */
    UNROLL
    for (int i = 0; i < pairs; i++) {
        int32_t one = source == INT8 ? 0 : of->minus[2 * i] * 8;
        int32_t other = source == INT8 || 2 * i + 1 == rows ? 0 : of->minus[2 * i + 1] * 8;
        UNROLL
        for (int j = 0; j < 2 * vecs; j++) sum[i][j] = vcombine_s32(vdup_n_s32(one), vdup_n_s32(other));
    }
    for (long p = 0; p < group; p += 8, at += step_bytes, x += line) {
        ahead = prefetch_arm(ahead, bytes);
        READ_LATER;
        int8x16_t two[ARM_ROWS / 2];
        UNROLL
        for (int i = 0; i < pairs; i++) two[i] = vld1q_s8(x + 16 * i);
        UNROLL
        for (int j = 0; j < 2 * vecs; j++) {
            int8x16_t codes = vld1q_s8(at + (source == INT8 ? j : j % 8) * 16);
            if (source == INT4) codes = halves_arm(codes, high || j >= 8);
            UNROLL
            for (int i = 0; i < pairs; i++) sum[i][j] = vmmlaq_s32(sum[i][j], two[i], codes);
        }
    }
    UNROLL
    for (int j = 0; j < vecs; j++) {
        float32x4_t scales = scales_arm(w->scales_stored, w->scales, first + j);
        UNROLL
        for (int i = 0; i < pairs; i++) {
            int64x2_t left = vreinterpretq_s64_s32(sum[i][2 * j]), right = vreinterpretq_s64_s32(sum[i][2 * j + 1]);
            float *to = c + 2 * i * PANEL + (first + j) * 4;
            scaled_arm(vreinterpretq_s32_s64(vzip1q_s64(left, right)), of->scale[2 * i], scales, to, accumulate);
            if (2 * i + 1 < rows)
                scaled_arm(vreinterpretq_s32_s64(vzip2q_s64(left, right)), of->scale[2 * i + 1], scales, to + PANEL,
                           accumulate);
        }
    }
}

#define SMMLA_COLUMNS(SOURCE, PAIRS, VECS, HIGH, FIRST, BYTES, W, X, C, ACCUMULATE) \
    smmla_columns(SOURCE, PAIRS, VECS, HIGH, FIRST, BYTES, rows, W, X, C, ACCUMULATE)
WITH_SMMLA static void smmla_pass(long rows, int source, const ArmGroup *w, const ArmRows *x, float *c,
                                  int accumulate) {
    switch ((rows + 1) / 2 * 8 + source) {
        ARM_CASES(1, SMMLA_COLUMNS, 8)
        ARM_CASES(2, SMMLA_COLUMNS, 4)
        ARM_CASES(3, SMMLA_COLUMNS, 2)
        ARM_CASES(4, SMMLA_COLUMNS, 2)
        ARM_CASES(5, SMMLA_COLUMNS, 2)
    }
}

void panel_product_int8_smmla(const Matrix *matrix, const void *packed, long m, long k, long panel, float *c,
                              void *scratch) {
    (void)scratch;
    panel_of_groups_arm(matrix, packed, m, k, panel, c, smmla_pass, 2, 8);
}
#endif

#ifdef HAS_BFMMLA
#include "products_bfmmla.h"
#endif

#ifndef __clang__
#pragma GCC pop_options
#endif
