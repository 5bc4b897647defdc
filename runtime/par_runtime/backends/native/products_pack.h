/* Packing of matrices into panels, once when a model is loaded. */

/* fp16 -> fp32, exactly. */
static float from_fp16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    /* As the bits of a fp32 it is 2^112 times too small; that holds for subnormal numbers too. */
    float magnitude = bits_float(0x77800000) * bits_float(rest << 13);
    return sign ? -magnitude : magnitude;
}

static float number_at(const char *w, int64_t stored, int64_t i) {
    uint16_t half;
    float number;
    if (stored == FP32) return memcpy(&number, w + 4 * i, 4), number;
    memcpy(&half, w + 2 * i, 2);
    return stored == FP16 ? from_fp16(half) : bits_float((uint32_t)half << 16);
}

/* The code at number i of a matrix as quantised.py stores it. */
static inline int code_at(const uint8_t *w, int64_t stored, int64_t i) {
    if (stored == INT8) return (int8_t)w[i];
    int half = i % 2 ? w[i / 2] >> 4 : w[i / 2] & 15;
    return (half ^ 8) - 8;
}

/* Column of the matrix [..][n] in column j of panel p. With `halves`, a panel holds PANEL/2 columns of the first half
   of the matrix, then PANEL/2 of the second half. */
static inline int64_t column_of(int64_t p, int64_t j, int64_t n, int halves) {
    if (!halves) return p * PANEL + j;
    return j < PANEL / 2 ? p * (PANEL / 2) + j : n / 2 + p * (PANEL / 2) + j - PANEL / 2;
}

/* The codes of 8 rows of a panel, in the order of `layout`. */
static void pack_codes(int64_t layout, const int8_t codes[8][PANEL], uint8_t *out) {
    if (layout >= ROWS_INT4 && layout != PAIRS_SIGN8 && layout != PAIRS_INT8 && layout != QUADS_INT8)
        memset(out, 0, 4 * PANEL);
    for (int r = 0; r < 8; r++)
        for (int j = 0; j < PANEL; j++) {
            int code = codes[r][j];
            unsigned plus8 = (unsigned)(code + 8);
            switch (layout) {
            case ROWS_INT8: out[r * PANEL + j] = (uint8_t)code; break;
            case ROWS_INT4: out[r / 2 * PANEL + j] |= (uint8_t)(plus8 << r % 2 * 4); break;
            case PAIRS_SIGN8: /* unpacking of bytes takes 8 of each 16 to the first vector, 8 to the second one */
                out[r / 2 * 64 + j % 16 / 4 * 16 + j / 16 * 8 + j % 4 * 2 + r % 2] =
                    (uint8_t)(code >= 0 ? code : code < -127 ? 255 : 128 - code);
                break;
            case PAIRS_INT8: out[r / 2 * 64 + j * 2 + r % 2] = (uint8_t)code; break;
            case WORDS_INT4: /* words of 16 bits: nibble r/2, of which two are in a byte */
                out[(j * 2 + r % 2) * 2 + r / 4] |= (uint8_t)(plus8 << r / 2 % 2 * 4);
                break;
            case QUADS_INT8: out[r / 4 * 128 + j * 4 + r % 4] = (uint8_t)(code + 128); break;
            default: out[j * 4 + r % 4] |= (uint8_t)(plus8 << r / 4 * 4); break; /* QUADS_INT4, BYTES_INT4 */
            }
        }
}

/* Packs a matrix with codes: w [k][n], scales [k/group][n]. */
static void pack_quantised(const Matrix *matrix, const char *w, const char *scales, int64_t k, int64_t n, int halves,
                           char *out) {
    int64_t size = panel_bytes(matrix, k), run = halves ? PANEL / 2 : PANEL, group = matrix->group;
    int64_t scale_bytes = number_bytes(matrix->scales), group_bytes = panel_bytes(matrix, group);
    int64_t row_bytes = group_bytes / group - PANEL * scale_bytes / group; /* of codes of a panel */
    for (int64_t row = 0; row < k; row += 8)
        for (int64_t p = 0; p < n / PANEL; p++) {
            char *to = out + p * size + row / group * group_bytes;
            if (row % group == 0)
                for (int64_t j = 0; j < PANEL; j += run)
                    memcpy(to + j * scale_bytes, scales + (row / group * n + column_of(p, j, n, halves)) * scale_bytes,
                           (size_t)(run * scale_bytes));
            int8_t codes[8][PANEL];
            for (int r = 0; r < 8; r++)
                for (int64_t j = 0; j < PANEL; j += run) {
                    int64_t from = (row + r) * n + column_of(p, j, n, halves);
                    for (int64_t l = 0; l < run; l++)
                        codes[r][j + l] = (int8_t)code_at((const uint8_t *)w, matrix->stored, from + l);
                }
            pack_codes(matrix->layout, codes, (uint8_t *)to + PANEL * scale_bytes + row % group * row_bytes);
        }
}

/* Packs a matrix without codes: w [k][n]. */
static void pack_floats(const Matrix *matrix, const char *w, int64_t k, int64_t n, int halves, char *out) {
    int64_t size = panel_bytes(matrix, k), run = halves ? PANEL / 2 : PANEL, bytes = number_bytes(matrix->stored);
    for (int64_t row = 0; row < k; row++)
        for (int64_t p = 0; p < n / PANEL; p++)
            for (int64_t j = 0; j < PANEL; j += run) {
                int64_t from = row * n + column_of(p, j, n, halves);
                char *to = out + p * size;
                if (matrix->layout == matrix->stored) { /* ROWS_FP32, ROWS_FP16, ROWS_BF16 */
                    memcpy(to + (row * PANEL + j) * bytes, w + from * bytes, (size_t)(run * bytes));
                    continue;
                }
                for (int64_t l = 0; l < run; l++) {
                    uint16_t rounded = (uint16_t)to_bf16(number_at(w, matrix->stored, from + l));
                    int64_t at = row * PANEL + j + l;
                    if (matrix->layout == PAIRS_BF16) at = row / 2 * 2 * PANEL + (j + l) * 2 + row % 2;
                    memcpy(to + at * 2, &rounded, 2);
                }
            }
}

/* Packs w [k][n], and the scales [k/group][n] of a quantised one, into panels at `out`, [n/PANEL] of parvis_matrix_bytes()
   together. n is a multiple of PANEL; k of the group, or any even number. With `halves`, a panel holds PANEL/2 columns
   of the first half of w, then PANEL/2 of the second half. */
void parvis_pack(const Matrix *matrix, const char *w, const char *scales, int64_t k, int64_t n, int halves, char *out) {
    /* w is read in order: it is a mapped file with small pages. `out` has huge pages. */
    if (matrix->group) pack_quantised(matrix, w, scales, k, n, halves, out);
    else pack_floats(matrix, w, k, n, halves, out);
}

/* Bytes of a packed matrix [k][n]. */
int64_t parvis_matrix_bytes(const Matrix *matrix, int64_t k, int64_t n) { return n / PANEL * panel_bytes(matrix, k); }
