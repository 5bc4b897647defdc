/* Packing of matrices into panels, once when a model is loaded; by all threads of its pool. */

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

/* Four bytes, the first one lowest, as all of these CPUs have it: compilers make such loops of vectors, and no loop that
   writes single bytes. */
INLINE uint32_t word_of(int a, int b, int c, int d) {
    return (uint32_t)a | (uint32_t)b << 8 | (uint32_t)c << 16 | (uint32_t)d << 24;
}

static void quads_of_rows(const uint8_t bytes[4][PANEL], uint32_t out[PANEL]) {
    for (int j = 0; j < PANEL; j++) out[j] = word_of(bytes[0][j], bytes[1][j], bytes[2][j], bytes[3][j]);
}

/* Octets of the columns from `first` on: [columns][8]. */
INLINE void octets_of_rows(const uint8_t bytes[8][PANEL], int first, int columns, uint8_t *out) {
    for (int j = 0; j < columns; j++)
        for (int r = 0; r < 8; r++) out[8 * j + r] = bytes[r][first + j];
}

/* For PAIRS_SIGN8: of 16 bytes, unpacking takes 8 to the first vector and 8 to the second one. */
static void pairs_of_signs(const uint8_t bytes[8][PANEL], uint8_t *out) {
    for (int r = 0; r < 8; r += 2)
        for (int block = 0; block < PANEL / 4; block++) { /* of 4 columns */
            uint8_t *to = out + r / 2 * 64 + block % 4 * 16 + block / 4 * 8;
            for (int j = 0; j < 4; j++) to[2 * j] = bytes[r][4 * block + j], to[2 * j + 1] = bytes[r + 1][4 * block + j];
        }
}

static int added_to_codes(int64_t layout) {
    switch (layout) {
    case ROWS_INT8:
    case PAIRS_INT8:
    case OCTETS_INT8: return 0;
#ifdef HAS_ARM
    case QUADS_INT8: return 0;
#else
    case QUADS_INT8: return 128;
#endif
    default: return 8; /* of INT4 */
    }
}

/* The codes of 8 rows of a panel, in the order of `layout`. */
static void pack_codes(int64_t layout, const int8_t codes[8][PANEL], uint8_t *out) {
    uint8_t bytes[8][PANEL];
    const int8_t *each = codes[0];
    uint8_t *byte = bytes[0];
    int plus = added_to_codes(layout);
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
    case PAIRS_INT8:
        for (int r = 0; r < 8; r += 2) {
            uint16_t pairs[PANEL];
            for (int j = 0; j < PANEL; j++) pairs[j] = (uint16_t)(bytes[r][j] | bytes[r + 1][j] << 8);
            memcpy(out + r * PANEL, pairs, sizeof pairs);
        }
        break;
    case QUADS_INT8:
        for (int r = 0; r < 8; r += 4) {
            uint32_t quads[PANEL];
            quads_of_rows(bytes + r, quads);
            memcpy(out + r * PANEL, quads, sizeof quads);
        }
        break;
    case OCTETS_INT8: octets_of_rows(bytes, 0, PANEL, out); break;
    case OCTETS_INT4: {
        uint8_t low[4 * PANEL], high[4 * PANEL];
        octets_of_rows(bytes, 0, PANEL / 2, low), octets_of_rows(bytes, PANEL / 2, PANEL / 2, high);
        for (int i = 0; i < 4 * PANEL; i++) out[i] = (uint8_t)(low[i] | high[i] << 4);
        break;
    }
    case ROWS_INT4:
        for (int i = 0; i < 4 * PANEL; i++) {
            int r = i / PANEL * 2, j = i % PANEL;
            out[i] = (uint8_t)(bytes[r][j] | bytes[r + 1][j] << 4);
        }
        break;
    case WORDS_INT4: { /* words of 16 bits: of the even rows, then of the odd ones */
        uint32_t words[PANEL];
        for (int j = 0; j < PANEL; j++)
            words[j] = word_of(bytes[0][j] | bytes[2][j] << 4, bytes[4][j] | bytes[6][j] << 4,
                               bytes[1][j] | bytes[3][j] << 4, bytes[5][j] | bytes[7][j] << 4);
        memcpy(out, words, sizeof words);
        break;
    }
    default: { /* QUADS_INT4, BYTES_INT4 */
        uint32_t low[PANEL], high[PANEL];
        quads_of_rows(bytes, low), quads_of_rows(bytes + 4, high);
        for (int j = 0; j < PANEL; j++) low[j] |= high[j] << 4; /* codes have four bits */
        memcpy(out, low, sizeof low);
    }
    }
}

/* What parvis_pack_matrix() is given, and the part of it that threads share. */
typedef struct {
    const Matrix *matrix;
    const char *w, *scales;
    int64_t k, n;
    int halves;
    char *out;
} Packing;

#define PACKED_ROWS 32 /* of K that a thread packs at a time */

/* Packs rows `first` to `end` of a matrix with codes: w [k][n], scales [k/group][n]. */
static void pack_quantised(const Packing *of, int64_t first, int64_t end) {
    const Matrix *matrix = of->matrix;
    int64_t size = panel_bytes(matrix, of->k), run = of->halves ? PANEL / 2 : PANEL, group = matrix->group, n = of->n;
    int64_t scale_bytes = number_bytes(matrix->scales), group_bytes = panel_bytes(matrix, group);
    int64_t row_bytes = group_bytes / group - PANEL * scale_bytes / group; /* of codes of a panel */
    for (int64_t row = first; row < end; row += 8)
        for (int64_t p = 0; p < n / PANEL; p++) {
            char *to = of->out + p * size + row / group * group_bytes;
            if (row % group == 0)
                for (int64_t j = 0; j < PANEL; j += run) {
                    int64_t column = column_of(p, j, n, of->halves);
                    const char *scales = of->scales + (row / group * n + column) * scale_bytes;
                    memcpy(to + j * scale_bytes, scales, (size_t)(run * scale_bytes));
                }
            int8_t codes[8][PANEL];
            for (int r = 0; r < 8; r++)
                for (int64_t j = 0; j < PANEL; j += run)
                    read_codes((const uint8_t *)of->w, matrix->stored, (row + r) * n + column_of(p, j, n, of->halves), run,
                               codes[r] + j);
            pack_codes(matrix->layout, codes, (uint8_t *)to + PANEL * scale_bytes + row % group * row_bytes);
        }
}

/* The same of a matrix without codes, as it is stored: w [k][n]. */
static void pack_floats(const Packing *of, int64_t first, int64_t end) {
    int64_t size = panel_bytes(of->matrix, of->k), run = of->halves ? PANEL / 2 : PANEL, n = of->n;
    int64_t bytes = number_bytes(of->matrix->stored);
    for (int64_t row = first; row < end; row++)
        for (int64_t p = 0; p < n / PANEL; p++)
            for (int64_t j = 0; j < PANEL; j += run)
                memcpy(of->out + p * size + (row * PANEL + j) * bytes,
                       of->w + (row * n + column_of(p, j, n, of->halves)) * bytes, (size_t)(run * bytes));
}

/* The same in bf16, for ROWS_BF16 or PAIRS_BF16. */
static void pack_bf16(const Packing *of, int64_t first, int64_t end, const Kernels *kernels) {
    int64_t size = panel_bytes(of->matrix, of->k), run = of->halves ? PANEL / 2 : PANEL, n = of->n;
    int64_t bytes = number_bytes(of->matrix->stored);
    for (int64_t row = first; row < end; row += 2)
        for (int64_t p = 0; p < n / PANEL; p++) {
            float numbers[2][PANEL];
            uint16_t rounded[2 * PANEL], *to = (uint16_t *)(of->out + p * size) + row * PANEL;
            for (int64_t j = 0; j < PANEL; j += run)
                for (int r = 0; r < 2; r++) {
                    const char *from = of->w + ((row + r) * n + column_of(p, j, n, of->halves)) * bytes;
                    kernels->read_numbers(from, of->matrix->stored, run, numbers[r] + j);
                }
            kernels->round_bf16(numbers[0], 2 * PANEL, rounded);
            if (of->matrix->layout == ROWS_BF16) memcpy(to, rounded, sizeof rounded);
            else if (of->matrix->layout == FOURS_BF16) { /* rows `row` and `row` + 1 of four */
                to = (uint16_t *)(of->out + p * size) + row / 4 * 4 * PANEL + row % 4;
                for (int j = 0; j < PANEL; j++) to[4 * j] = rounded[j], to[4 * j + 1] = rounded[PANEL + j];
            } else
                for (int j = 0; j < PANEL; j++) to[2 * j] = rounded[j], to[2 * j + 1] = rounded[PANEL + j];
        }
}

/* The task of the pool. */
static void pack_rows_of(Worker *worker, const void *argument) {
    const Packing *of = argument;
    begin_phase(worker, (of->k + PACKED_ROWS - 1) / PACKED_ROWS, 1);
    for (long i; (i = next_item(worker)) >= 0;) {
        /* w is read in order: it is a mapped file with small pages. `out` has huge pages. */
        int64_t first = i * PACKED_ROWS, end = first + PACKED_ROWS < of->k ? first + PACKED_ROWS : of->k;
        if (of->matrix->group) pack_quantised(of, first, end);
        else if (of->matrix->layout != of->matrix->stored) pack_bf16(of, first, end, worker->pool->kernels);
        else pack_floats(of, first, end); /* ROWS_FP32, ROWS_FP16, ROWS_BF16 */
    }
    end_phase(worker);
}

/* Packs w [k][n], and the scales [k/group][n] of a quantised one, into panels at `out`, [n/PANEL] of parvis_matrix_bytes()
   together, by the threads of a pool. n is a multiple of PANEL; k of 32 and of the group. With `halves`, a panel holds
   PANEL/2 columns of the first half of w, then PANEL/2 of the second half. Returns 0, or -1 where memory is exhausted. */
int parvis_pack_matrix(void *pool, const Matrix *matrix, const char *w, const char *scales, int64_t k, int64_t n,
                       int halves, char *out) {
    Packing of = {matrix, w, scales, k, n, halves, out};
    return pool_run_settled(pool, pack_rows_of, &of, sizeof of, 1);
}

/* Bytes of a packed matrix [k][n]. */
int64_t parvis_matrix_bytes(const Matrix *matrix, int64_t k, int64_t n) { return n / PANEL * panel_bytes(matrix, k); }
