/* Packing of activations for the products. step.c includes this file once for each instruction set, with the macros
   that it explains there.

   Rows are packed some columns at a time, in a row of scratch memory first: arithmetic runs along a row, and only what
   is stored, one to four numbers together, is transposed. */

#define COLUMNS 128 /* columns of a piece; a multiple of every group */

/* row [k] = x, or x * scale * gain. */
TARGET INLINE void NAME(normed)(const float *x, long k, const float *scale, const float *gain, float *row) {
    if (scale)
        for (long j = 0; j < k; j++) row[j] = x[j] * *scale * gain[j];
    else memcpy(row, x, (size_t)k * sizeof(float));
}

/* out [K][M] fp32, as it is or rounded to bf16. */
TARGET INLINE void NAME(transpose)(const float *x, long ldx, long m, long k, const float *row_scale, const float *gain,
                                   int rounded, float *out) {
    float row[COLUMNS];
    for (long first = 0; first < k; first += COLUMNS)
        for (long i = 0, count = k - first < COLUMNS ? k - first : COLUMNS; i < m; i++) {
            NAME(normed)(x + i * ldx + first, count, row_scale ? row_scale + i : NULL, gain ? gain + first : NULL, row);
            if (rounded)
                for (long j = 0; j < count; j++) row[j] = bits_float(to_bf16(row[j]) << 16);
            for (long j = 0; j < count; j++) out[(first + j) * m + i] = row[j];
        }
}

TARGET static void NAME(pack_rows_fp32)(const Matrix *w, const float *x, long ldx, long m, long k,
                                        const float *row_scale, const float *gain, void *packed) {
    (void)w;
    NAME(transpose)(x, ldx, m, k, row_scale, gain, 0, packed);
}

TARGET static void NAME(pack_rows_bf16)(const Matrix *w, const float *x, long ldx, long m, long k,
                                        const float *row_scale, const float *gain, void *packed) {
    (void)w;
    NAME(transpose)(x, ldx, m, k, row_scale, gain, 1, packed);
}

#if VEC_FLOATS == 16
/* out [K/2][M][2] bf16, for dot products of pairs. */
TARGET static void NAME(pack_rows_pairs)(const Matrix *w, const float *x, long ldx, long m, long k,
                                         const float *row_scale, const float *gain, void *packed) {
    (void)w;
    uint32_t *out = packed, pairs[COLUMNS / 2];
    float row[COLUMNS];
    for (long first = 0; first < k; first += COLUMNS)
        for (long i = 0, count = k - first < COLUMNS ? k - first : COLUMNS; i < m; i++) {
            NAME(normed)(x + i * ldx + first, count, row_scale ? row_scale + i : NULL, gain ? gain + first : NULL, row);
            uint16_t rounded[COLUMNS];
            for (long j = 0; j < count; j++) rounded[j] = (uint16_t)to_bf16(row[j]);
            memcpy(pairs, rounded, sizeof pairs);
            for (long j = 0; j < count / 2; j++) out[(first / 2 + j) * m + i] = pairs[j];
        }
}
#endif

/* codes [k] = row [k] rounded to whole numbers times `scale`, the largest of them 127. A group that holds a NaN or an
   infinity has the scale NaN, so that all that is computed from it becomes NaN. Numbers below 1e-30 count as 0. */
TARGET INLINE void NAME(round_group)(const float *row, long k, int16_t *codes, float *scale, int32_t *sum) {
    int32_t largest_bits = 0, total = 0;
    for (long j = 0; j < k; j++) {
        int32_t bits;
        memcpy(&bits, row + j, 4);
        bits &= 0x7fffffff; /* of positive numbers, the order of the bits is the order of the numbers */
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    float largest = bits_float((uint32_t)largest_bits), inverse = 0;
    int finite = largest_bits < 0x7f800000;
    *scale = finite ? 0 : bits_float(0x7fc00000);
    if (finite && largest > 1e-30f) *scale = largest / 127, inverse = 127 / largest;
    for (long j = 0; j < k; j++) {
        /* 1.5 * 2^23: the sum is rounded to a whole number, once, whether the compiler would fuse both or not. */
        float shifted = __builtin_fmaf(finite ? row[j] : 0, inverse, 12582912.0f);
        int32_t code;
        memcpy(&code, &shifted, 4);
        code -= 0x4b400000;
        codes[j] = (int16_t)code;
        total += code;
    }
    *sum = total;
}

/* The same of x [k], a group of a row, normed first; `minus` their sum, which is what products take. */
TARGET INLINE void NAME(codes_of)(const float *x, long k, const float *row_scale, const float *gain, int16_t *codes,
                                  float *scale, int32_t *minus) {
    float row[COLUMNS];
    int32_t sum;
    NAME(normed)(x, k, row_scale, gain, row);
    NAME(round_group)(row, k, codes, scale, &sum);
    *minus = -sum;
}

#if VECTORS == 128
/* For panel_product_int8() of products_fp32.h. */
TARGET static void NAME(pack_rows_codes)(const Matrix *w, const float *x, long ldx, long m, long k,
                                         const float *row_scale, const float *gain, void *packed) {
    float *out = packed;
    int16_t codes[COLUMNS];
    long group = w->group;
    for (long first = 0; first < k; first += group, out += (group + 1) * m)
        for (long i = 0; i < m; i++) {
            int32_t minus; /* not needed */
            NAME(codes_of)(x + i * ldx + first, group, row_scale ? row_scale + i : NULL, gain ? gain + first : NULL,
                           codes, out + group * m + i, &minus);
            for (long j = 0; j < group; j++) out[j * m + i] = codes[j];
        }
}
#endif

#if VECTORS != 128 || defined(HAS_SDOT)
/* For products of bytes (products_int8.h, products_vnni.h, products_arm.h, int4 of products_twin.h), with `quads`, or for
   those of 16 bits (int8 of products_twin.h). */
TARGET INLINE void NAME(pack_rows_int8)(const float *x, long ldx, long m, long k, const float *row_scale,
                                        const float *gain, long group, int quads, char *packed) {
    int16_t codes[COLUMNS];
    int8_t bytes[COLUMNS];
    int32_t words[COLUMNS / 2];
    long count = group / (quads ? 4 : 2); /* words of 32 bits */
    for (long first = 0; first < k; first += group, packed += (count + (quads ? 2 : 1)) * m * 4)
        for (long i = 0; i < m; i++) {
            int32_t *out = (int32_t *)packed + i, minus;
            float scale;
            NAME(codes_of)(x + i * ldx + first, group, row_scale ? row_scale + i : NULL, gain ? gain + first : NULL,
                           codes, &scale, &minus);
            if (quads) {
                for (long j = 0; j < group; j++) bytes[j] = (int8_t)codes[j];
                memcpy(words, bytes, (size_t)group);
            } else memcpy(words, codes, (size_t)group * 2);
            for (long j = 0; j < count; j++) out[j * m] = words[j];
            memcpy(out + count * m, &scale, 4);
            if (quads) out[(count + 1) * m] = minus;
        }
}

TARGET static void NAME(pack_rows_quads)(const Matrix *w, const float *x, long ldx, long m, long k,
                                         const float *row_scale, const float *gain, void *packed) {
    NAME(pack_rows_int8)(x, ldx, m, k, row_scale, gain, w->group, 1, packed);
}
#endif

#if VECTORS != 128
TARGET static void NAME(pack_rows_words)(const Matrix *w, const float *x, long ldx, long m, long k,
                                         const float *row_scale, const float *gain, void *packed) {
    NAME(pack_rows_int8)(x, ldx, m, k, row_scale, gain, w->group, 0, packed);
}
#endif

#ifdef HAS_BFMMLA
/* For BFMMLA; products_bfmmla.h describes the order. */
TARGET static void NAME(pack_rows_fours)(const Matrix *w, const float *x, long ldx, long m, long k,
                                         const float *row_scale, const float *gain, void *packed) {
    (void)w;
    uint16_t *out = packed;
    float row[COLUMNS];
    long rows = (m + 1) / 2 * 2;
    for (long first = 0; first < k; first += COLUMNS)
        for (long i = 0, count = k - first < COLUMNS ? k - first : COLUMNS; i < m; i++) {
            NAME(normed)(x + i * ldx + first, count, row_scale ? row_scale + i : NULL, gain ? gain + first : NULL, row);
            for (long j = 0; j < count; j += 4)
                for (long l = 0; l < 4; l++) out[(first + j) * rows + i * 4 + l] = (uint16_t)to_bf16(row[j + l]);
        }
}
#endif

#ifdef HAS_SMMLA
/* For SMMLA; products_arm.h describes the order. */
TARGET static void NAME(pack_rows_octets)(const Matrix *w, const float *x, long ldx, long m, long k,
                                          const float *row_scale, const float *gain, void *packed) {
    int16_t codes[COLUMNS];
    int8_t *out = packed;
    long group = w->group, rows = (m + 1) / 2 * 2;
    for (long first = 0; first < k; first += group, out += rows * group + 8 * m) {
        float *scales = (float *)(out + rows * group);
        int32_t *minus = (int32_t *)scales + m;
        for (long i = 0; i < m; i++) {
            NAME(codes_of)(x + i * ldx + first, group, row_scale ? row_scale + i : NULL, gain ? gain + first : NULL,
                           codes, scales + i, minus + i);
            for (long j = 0; j < group; j += 8)
                for (long l = 0; l < 8; l++) out[j * rows + i * 8 + l] = (int8_t)codes[j + l];
        }
    }
}
#endif

#if VECTORS == 512 && defined(HAS_TILES)
/* For products_tiles.h in bf16: out [T][K/32][h][32]. */
TARGET static void NAME(pack_rows_tiles)(const Matrix *w, const float *x, long ldx, long m, long k,
                                         const float *row_scale, const float *gain, void *packed) {
    long h = tile_rows(m);
    float row[COLUMNS];
    for (long first = 0; first < k; first += COLUMNS)
        for (long i = 0, count = k - first < COLUMNS ? k - first : COLUMNS; i < product_rows(m); i++) {
            uint16_t *out = (uint16_t *)packed + (i / h * (k / 32) + first / 32) * h * 32 + i % h * 32;
            if (i < m)
                NAME(normed)(x + i * ldx + first, count, row_scale ? row_scale + i : NULL, gain ? gain + first : NULL,
                             row);
            else memset(row, 0, sizeof row);
            for (long j = 0; j < count; j += 32)
                for (long l = 0; l < 32; l++) out[j * h + l] = (uint16_t)to_bf16(row[j + l]);
        }
    shape_tiles_of_product(w, m);
}

/* In int8: for each group of K [T*h][group] codes, scales [M], and minus the sums of the codes [M]. */
TARGET static void NAME(pack_rows_code_tiles)(const Matrix *w, const float *x, long ldx, long m, long k,
                                              const float *row_scale, const float *gain, void *packed) {
    long group = w->group, rows = product_rows(m);
    int16_t codes[COLUMNS];
    char *out = packed;
    for (long first = 0; first < k; first += group, out += rows * group + 8 * m) {
        float *scales = (float *)(out + rows * group);
        int32_t *minus = (int32_t *)scales + m;
        for (long i = 0; i < m; i++) {
            NAME(codes_of)(x + i * ldx + first, group, row_scale ? row_scale + i : NULL, gain ? gain + first : NULL,
                           codes, scales + i, minus + i);
            for (long j = 0; j < group; j++) out[i * group + j] = (int8_t)codes[j];
        }
        memset(out + m * group, 0, (size_t)((rows - m) * group));
    }
    shape_tiles_of_product(w, m);
}
#endif

#undef COLUMNS
