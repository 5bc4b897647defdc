/* 3x3 convolutions with AMX, of operations with `amx`: they multiply in bf16; sums, norms and maps stay in fp32.

   A tile of activations is up to 16 pixels of a row, 32 channels of each. A block of pixels and those around it are
   written as bf16, behind their norm: [K/32][rows + 2][columns + 2][32]. What another weight of the kernel is multiplied
   with lies a pixel or a row further there, and is not copied. All weights of 32 channels are multiplied before those of
   the next 32, since so much fits into the L1 cache; the sums wait in memory meanwhile.

   A doubled map holds each number twice. Weights that see the same number are added up, so each of the four pixels that
   become of one sees 2x2 numbers, with weights of its own.

   Weights in bf16: [N/PANEL][K/32][parts][taps][16][PANEL][2], a column of the kernel after the other; parts and taps of
   a doubled map are 4, else 1 and 9. Each frame begins at a whole 32 channels, with zeros behind its last. */

/* One chunk of a frame, of the pixels of a block and those around them: v [rows + 2][amx_width + 2][32]. `halves`: how
   many of the chunk's two vectors there are; `kind`: what stands in front of the convolution (decoder_kernels.h). */
TILED INLINE void gather_chunk(const int halves, const int kind, const Op *op, Frame frame, Block at, long chunk,
                               uint16_t *v) {
    const long height = input_height(op), width = input_width(op), plane = height * width * LANES;
    const long row_numbers = (amx_width(op) + 2) * AMX_CHANNELS, end = at.x + at.columns + 1;
    const float *map = frame.map + chunk * AMX_CHANNELS / LANES * plane;
    __m512 factor[2], shift[2], beta[2];
    for (int h = 0; h < halves && kind != PLAIN_avx512; h++) {
        const long lane = chunk * AMX_CHANNELS + h * LANES;
        factor[h] = _mm512_loadu_ps(frame.norm + lane);
        shift[h] = _mm512_loadu_ps(frame.norm + op->in_channels + lane);
        beta[h] = kind == BETA_avx512 ? _mm512_loadu_ps(op->beta + lane) : factor[h];
    }
    for (long y = at.y - 1; y <= at.y + at.rows; y++, v += row_numbers) {
        const long row = y < 0 ? 0 : y < height ? y : height - 1;
        uint16_t *to = v;
        if (row != y && !op->edge) { /* the padding of a convolution comes after its norm */
            memset(to, 0, (size_t)(at.columns + 2) * AMX_CHANNELS * sizeof *to);
            continue;
        }
        for (long x = at.x - 1; x < end; x++, to += AMX_CHANNELS) {
            const long column = x < 0 ? 0 : x < width ? x : width - 1;
            __m512 half[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int h = 0; h < halves && (column == x || op->edge); h++) {
                half[h] = _mm512_loadu_ps(map + h * plane + (row * width + column) * LANES);
                if (kind != PLAIN_avx512) half[h] = normalised_avx512(half[h], kind, factor[h], shift[h], beta[h]);
            }
            _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(half[1], half[0]));
        }
    }
}

/* The input of a block, of chunks `first` to `end` of a frame. */
TILED static void gather_amx(const Op *op, Frame frame, long block, long first, long end, uint16_t *v) {
    const Block at = amx_block(op, block);
    for (long chunk = first; chunk < end; chunk++, v += amx_chunk(op)) {
#define CHUNK_OF(halves)                                                                                    \
    do {                                                                                                    \
        if (!frame.norm) gather_chunk(halves, PLAIN_avx512, op, frame, at, chunk, v);                       \
        else if (!op->beta) gather_chunk(halves, SWISH_avx512, op, frame, at, chunk, v);                    \
        else gather_chunk(halves, BETA_avx512, op, frame, at, chunk, v);                                    \
    } while (0)
        if (chunk * AMX_CHANNELS + LANES < op->in_channels) CHUNK_OF(2);
        else CHUNK_OF(1);
#undef CHUNK_OF
    }
}

/* The products of side x side weights of a chunk with a row of pixels, and with the `next` one: they are added to what
   is there, or with `begins` written. `row`: numbers of a row of v. */
TILED INLINE void multiply_taps(const int side, const uint16_t *v, long row, const uint16_t *w, int begins, float *c,
                                float *next) {
    const long line = PANEL * sizeof *c, pixel = AMX_CHANNELS * sizeof *v;
    ACCESSED;
    if (begins) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, c, line);
        _tile_loadd(1, c + LANES, line);
        _tile_loadd(2, next, line);
        _tile_loadd(3, next + LANES, line);
    }
    UNROLL for (int j = 0; j < side; j++, v += AMX_CHANNELS) {
        _tile_loadd(4, v, pixel);
        UNROLL for (int i = 0; i < side; i++, w += AMX_CHANNELS * PANEL) {
            _tile_loadd(6, w, PANEL * 2 * sizeof *w);
            _tile_loadd(7, w + PANEL, PANEL * 2 * sizeof *w);
            if (i % 2 == 0) { /* what is the next row for one weight is the first one for the weight below it */
                _tile_loadd(5, v + (i + 1) * row, pixel);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            } else {
                _tile_loadd(4, v + (i + 1) * row, pixel);
                _tile_dpbf16ps(0, 5, 6);
                _tile_dpbf16ps(1, 5, 7);
                _tile_dpbf16ps(2, 4, 6);
                _tile_dpbf16ps(3, 4, 7);
            }
        }
    }
    _tile_stored(0, c, line);
    _tile_stored(1, c + LANES, line);
    _tile_stored(2, next, line);
    _tile_stored(3, next + LANES, line);
    ACCESSED;
}

/* The products of a block with a panel: c [parts][AMX_ROWS][amx_width][PANEL]. Where rows are odd, the one behind the
   last is computed too, from what lies there. */
TILED static void multiply_amx(const Op *op, long block, const uint16_t *v, const uint16_t *w, float *c) {
    const long columns = amx_width(op), row = (columns + 2) * AMX_CHANNELS, rows = amx_block(op, block).rows;
    for (long chunk = 0; chunk < op->frames * chunks_of(op); chunk++, v += amx_chunk(op)) {
        if (op->kind == UPSAMPLE) {
            for (long part = 0; part < 4; part++, w += 4 * AMX_CHANNELS * PANEL)
                for (long y = 0; y < rows; y += 2) {
                    const uint16_t *x = v + (y + part / 2) * row + part % 2 * AMX_CHANNELS;
                    float *to = c + (part * AMX_ROWS + y) * columns * PANEL;
                    multiply_taps(2, x, row, w, chunk == 0, to, to + columns * PANEL);
                }
            continue;
        }
        for (long y = 0; y < rows; y += 2) {
            float *to = c + y * columns * PANEL;
            multiply_taps(3, v + y * row, row, w, chunk == 0, to, to + columns * PANEL);
        }
        w += 9 * AMX_CHANNELS * PANEL;
    }
}

/* As transform_output(), of the products of a block. */
TILED static void scatter_amx(const Op *op, const float *c, long block, long panel, float *map, float *sums) {
    const Block at = amx_block(op, block);
    const long pixels = op->height * op->width, columns = amx_width(op), side = op->kind == UPSAMPLE ? 2 : 1;
    for (long lane = panel * PANEL; lane < (panel + 1) * PANEL && lane < op->out_channels; lane += LANES) {
        const __m512 bias = _mm512_loadu_ps(op->bias + lane);
        Sums_avx512 of = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (long y = 0; y < at.rows * side; y++) {
            float *to = map + lane / LANES * pixels * LANES;
            to += ((at.y * side + y) * op->width + at.x * side) * LANES;
            for (long x = 0; x < at.columns * side; x++, to += LANES) {
                const long part = y % side * side + x % side, pixel = (part * AMX_ROWS + y / side) * columns + x / side;
                __m512 value = _mm512_add_ps(_mm512_loadu_ps(c + pixel * PANEL + lane % PANEL), bias);
                if (op->accumulate) value = _mm512_add_ps(value, _mm512_loadu_ps(to));
                _mm512_storeu_ps(to, value);
                add_up_avx512(&of, value, x + y == 0);
            }
        }
        keep_sums_avx512(&of, sums + lane, op->out_channels);
    }
}

/* The weights of an input channel w [9][PANEL] that one tap of a part sees, of a vector of columns. */
TILED INLINE __m512 tap_of(const Op *op, const float *w, long part, long tap) {
    if (op->kind != UPSAMPLE) return _mm512_loadu_ps(w + (tap % 3 * 3 + tap / 3) * PANEL);
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < 9; i++) {
        /* The row and the column of the 2x2 numbers that those of the kernel fall upon. */
        const long y = (part / 2 + i / 3 + 1) / 2 - part / 2, x = (part % 2 + i % 3 + 1) / 2 - part % 2;
        if (x * 2 + y == tap) sum = _mm512_add_ps(sum, _mm512_loadu_ps(w + i * PANEL));
    }
    return sum;
}

/* The weights of a panel [K][9][PANEL] as multiply_amx() takes them: u. */
TILED static void pack_amx(const Op *op, const float *w, uint16_t *u) {
    const long parts = op->kind == UPSAMPLE ? 4 : 1, taps = op->kind == UPSAMPLE ? 4 : 9;
    for (long frame = 0; frame < op->frames; frame++, w += op->in_channels * 9 * PANEL)
        for (long first = 0; first < op->in_channels; first += AMX_CHANNELS)
            for (long tap = 0; tap < parts * taps; tap++)
                for (long k = first; k < first + AMX_CHANNELS; k += 2)
                    for (long lane = 0; lane < PANEL; lane += LANES, u += 2 * LANES) {
                        __m512 even = _mm512_setzero_ps(), odd = even;
                        if (k < op->in_channels) {
                            even = tap_of(op, w + k * 9 * PANEL + lane, tap / taps, tap % taps);
                            odd = tap_of(op, w + (k + 1) * 9 * PANEL + lane, tap / taps, tap % taps);
                        }
                        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
                        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
                        _mm512_storeu_si512(u, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
                    }
}
