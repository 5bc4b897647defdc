/* Packing of matrices into panels, once when a model is loaded. */

/* n codes from number `first` on, both even, of a matrix as quantised.py stores it. */
static void read_codes(const uint8_t *w, int64_t stored, int64_t first, int64_t n, int8_t *codes) {
    if (stored == INT8) memcpy(codes, w + first, (size_t)n);
    else
        for (int64_t i = 0; i < n / 2; i++) {
            int both = w[first / 2 + i];
            codes[2 * i] = (int8_t)(((both & 15) ^ 8) - 8);
            codes[2 * i + 1] = (int8_t)((both >> 4 ^ 8) - 8);
        }
}

/* Column of the matrix [..][n] in column j of panel p. With `halves`, a panel holds PANEL/2 columns of the first half
   of the matrix, then PANEL/2 of the second half. */
static inline int64_t column_of(int64_t p, int64_t j, int64_t n, int halves) {
    if (!halves) return p * PANEL + j;
    return j < PANEL / 2 ? p * (PANEL / 2) + j : n / 2 + p * (PANEL / 2) + j - PANEL / 2;
}

/* out = what a layout of int8 has of the codes of 8 rows of a panel: `together` rows of a column in neighbouring bytes. */
INLINE void rows_together(const int together, const uint8_t bytes[8][PANEL], uint8_t *out) {
    for (int r = 0; r < 8; r++)
        for (int j = 0; j < PANEL; j++)
            out[(r / together * PANEL + j) * together + r % together] = bytes[r][j];
}

/* For PAIRS_SIGN8: of 16 bytes, unpacking takes 8 to the first vector and 8 to the second one. */
static void pairs_of_signs(const uint8_t bytes[8][PANEL], uint8_t *out) {
    for (int r = 0; r < 8; r += 2)
        for (int block = 0; block < PANEL / 4; block++) { /* of 4 columns */
            uint8_t *to = out + r / 2 * 64 + block % 4 * 16 + block / 4 * 8;
            for (int j = 0; j < 4; j++) to[2 * j] = bytes[r][4 * block + j], to[2 * j + 1] = bytes[r + 1][4 * block + j];
        }
}

/* The codes of 8 rows of a panel, in the order of `layout`. */
static void pack_codes(int64_t layout, const int8_t codes[8][PANEL], uint8_t *out) {
    uint8_t bytes[8][PANEL];
    const int8_t *each = codes[0];
    uint8_t *byte = bytes[0];
    int plus = layout == QUADS_INT8 ? 128 : layout == ROWS_INT8 || layout == PAIRS_INT8 ? 0 : 8;
    if (layout == PAIRS_SIGN8)
        for (int i = 0; i < 8 * PANEL; i++) {
            int magnitude = each[i] < 0 ? -each[i] : each[i];
            byte[i] = (uint8_t)((magnitude > 127 ? 127 : magnitude) | (each[i] & 128));
        }
    else
        for (int i = 0; i < 8 * PANEL; i++) byte[i] = (uint8_t)(each[i] + plus);
    switch (layout) {
    case ROWS_INT8: memcpy(out, bytes, sizeof bytes); break;
    case PAIRS_SIGN8: pairs_of_signs(bytes, out); break;
    case PAIRS_INT8: rows_together(2, bytes, out); break;
    case QUADS_INT8: rows_together(4, bytes, out); break;
    case ROWS_INT4:
        for (int i = 0; i < 4 * PANEL; i++) {
            int r = i / PANEL * 2, j = i % PANEL;
            out[i] = (uint8_t)(bytes[r][j] | bytes[r + 1][j] << 4);
        }
        break;
    case WORDS_INT4: /* words of 16 bits: nibble r/2, of which two are in a byte */
        for (int i = 0; i < 4 * PANEL; i++) {
            int j = i / 4, r = i / 2 % 2 + i % 2 * 4;
            out[i] = (uint8_t)(bytes[r][j] | bytes[r + 2][j] << 4);
        }
        break;
    default: /* QUADS_INT4, BYTES_INT4 */
        for (int i = 0; i < 4 * PANEL; i++) out[i] = (uint8_t)(bytes[i % 4][i / 4] | bytes[i % 4 + 4][i / 4] << 4);
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
                for (int64_t j = 0; j < PANEL; j += run)
                    read_codes((const uint8_t *)w, matrix->stored, (row + r) * n + column_of(p, j, n, halves), run,
                               codes[r] + j);
            pack_codes(matrix->layout, codes, (uint8_t *)to + PANEL * scale_bytes + row % group * row_bytes);
        }
}

/* Packs a matrix without codes, as it is stored: w [k][n]. */
static void pack_floats(const Matrix *matrix, const char *w, int64_t k, int64_t n, int halves, char *out) {
    int64_t size = panel_bytes(matrix, k), run = halves ? PANEL / 2 : PANEL, bytes = number_bytes(matrix->stored);
    for (int64_t row = 0; row < k; row++)
        for (int64_t p = 0; p < n / PANEL; p++)
            for (int64_t j = 0; j < PANEL; j += run)
                memcpy(out + p * size + (row * PANEL + j) * bytes, w + (row * n + column_of(p, j, n, halves)) * bytes,
                       (size_t)(run * bytes));
}

/* The same in bf16, for ROWS_BF16 or PAIRS_BF16. */
static void pack_bf16(const Matrix *matrix, const char *w, int64_t k, int64_t n, int halves, char *out) {
    const Kernels *kernels = select_kernels();
    int64_t size = panel_bytes(matrix, k), run = halves ? PANEL / 2 : PANEL, bytes = number_bytes(matrix->stored);
    for (int64_t row = 0; row < k; row += 2)
        for (int64_t p = 0; p < n / PANEL; p++) {
            float numbers[2][PANEL];
            uint16_t rounded[2 * PANEL], *to = (uint16_t *)(out + p * size) + row * PANEL;
            for (int64_t j = 0; j < PANEL; j += run)
                for (int r = 0; r < 2; r++) {
                    const char *from = w + ((row + r) * n + column_of(p, j, n, halves)) * bytes;
                    kernels->read_numbers(from, matrix->stored, run, numbers[r] + j);
                }
            kernels->round_bf16(numbers[0], 2 * PANEL, rounded);
            if (matrix->layout == ROWS_BF16) memcpy(to, rounded, sizeof rounded);
            else
                for (int j = 0; j < PANEL; j++) to[2 * j] = rounded[j], to[2 * j + 1] = rounded[PANEL + j];
        }
}

/* Packs w [k][n], and the scales [k/group][n] of a quantised one, into panels at `out`, [n/PANEL] of parvis_matrix_bytes()
   together. n is a multiple of PANEL; k of 32 and of the group. With `halves`, a panel holds PANEL/2 columns
   of the first half of w, then PANEL/2 of the second half. */
void parvis_pack(const Matrix *matrix, const char *w, const char *scales, int64_t k, int64_t n, int halves, char *out) {
    /* w is read in order: it is a mapped file with small pages. `out` has huge pages. */
    if (matrix->group) pack_quantised(matrix, w, scales, k, n, halves, out);
    else if (matrix->layout != matrix->stored) pack_bf16(matrix, w, k, n, halves, out);
    else pack_floats(matrix, w, k, n, halves, out); /* ROWS_FP32, ROWS_FP16, ROWS_BF16 */
}

/* Bytes of a packed matrix [k][n]. */
int64_t parvis_matrix_bytes(const Matrix *matrix, int64_t k, int64_t n) { return n / PANEL * panel_bytes(matrix, k); }
