/* Winograd's form F(4x4,3x3) of 3x3 convolutions, for one instruction set. decoder.c includes this file once per set, behind
   decoder_kernels.h, and once more with DOTS for AVX-512's dot products of pairs in bf16.

   A form has six points. Those of fp32 are 0, 1, -1, 2, -2 and infinity: few operations, and of a doubled map the point -1
   vanishes. In bf16 the numbers between the transforms have 8 bits, so what the transforms make of their rounding counts:
   0, 2/3, -2/3, 3/2, -3/2 and infinity are the best of this kind, in one convolution 7 dB better than those of fp32.
   Doubled maps stay in fp32.

   NUMBERS  how many transformed numbers are in a word of 32 bits, which layouts are measured in */

#undef WINOGRAD
#undef WINOGRAD_TARGET
#undef NUMBERS
#undef TRANSFORM_INPUT
#undef TRANSFORM_OUTPUT
#undef TRANSFORM_WEIGHTS
#ifdef DOTS
#define WINOGRAD(f) f##_dots
#define WINOGRAD_TARGET DOT
#define NUMBERS 2

#include "decoder_dots.h"
#else
#define WINOGRAD NAME
#define WINOGRAD_TARGET TARGET
#define NUMBERS 1

/* t [6] = B^T d: six numbers of a line to the six products that they enter. */
#define TRANSFORM_INPUT(d, t)                                              \
    do {                                                                   \
        vec even = vec_fma(vec_set1(-4.0f), (d)[2], (d)[4]);               \
        vec odd = vec_fma(vec_set1(-4.0f), (d)[1], (d)[3]);                \
        vec even_2 = (d)[4] - (d)[2], odd_2 = (d)[3] - (d)[1];             \
        (t)[0] = vec_fma(vec_set1(4.0f), (d)[0] - (d)[2], (d)[4] - (d)[2]); \
        (t)[1] = even + odd;                                               \
        (t)[2] = even - odd;                                               \
        (t)[3] = vec_fma(vec_set1(2.0f), odd_2, even_2);                   \
        (t)[4] = vec_fma(vec_set1(-2.0f), odd_2, even_2);                  \
        (t)[5] = vec_fma(vec_set1(4.0f), (d)[1] - (d)[3], (d)[5] - (d)[3]); \
    } while (0)

/* y [4] = A^T m: six products of a line to four numbers of the result. */
#define TRANSFORM_OUTPUT(m, y)                                         \
    do {                                                               \
        vec plus = (m)[1] + (m)[2], minus = (m)[1] - (m)[2];           \
        vec plus_2 = (m)[3] + (m)[4], minus_2 = (m)[3] - (m)[4];       \
        (y)[0] = (m)[0] + plus + plus_2;                               \
        (y)[1] = vec_fma(vec_set1(2.0f), minus_2, minus);              \
        (y)[2] = vec_fma(vec_set1(4.0f), plus_2, plus);                \
        (y)[3] = vec_fma(vec_set1(8.0f), minus_2, minus) + (m)[5];     \
    } while (0)

/* t [6] = G g: three weights of a line to the six products that they enter. */
#define TRANSFORM_WEIGHTS(g, t)                                                         \
    do {                                                                                \
        vec ends = (g)[0] + (g)[2], ends_4 = vec_fma(vec_set1(4.0f), (g)[2], (g)[0]);   \
        (t)[0] = (g)[0] * vec_set1(0.25f);                                              \
        (t)[1] = (ends + (g)[1]) * vec_set1(-1.0f / 6);                                 \
        (t)[2] = (ends - (g)[1]) * vec_set1(-1.0f / 6);                                 \
        (t)[3] = vec_fma(vec_set1(2.0f), (g)[1], ends_4) * vec_set1(1.0f / 24);         \
        (t)[4] = vec_fma(vec_set1(-2.0f), (g)[1], ends_4) * vec_set1(1.0f / 24);        \
        (t)[5] = (g)[2];                                                                \
    } while (0)

TARGET static inline void NAME(store_numbers)(float *to, vec x) { vec_store(to, x); }
TARGET static inline void NAME(store_weights)(float *to, vec first, vec last) { vec_store(to, first), (void)last; }
#endif

/* The weights of a kernel with a vector of columns, from [9][PANEL]: of each point. */
WINOGRAD_TARGET static inline __attribute__((always_inline)) void WINOGRAD(weights_of)(const float *from, vec t[6][6]) {
    vec lines[3][6]; /* [column of the kernel][point] */
    for (int x = 0; x < 3; x++) {
        vec g[3];
        for (int y = 0; y < 3; y++) g[y] = vec_load_fp32(from + (3 * y + x) * PANEL);
        TRANSFORM_WEIGHTS(g, lines[x]);
    }
    for (int i = 0; i < 6; i++) {
        vec g[3] = {lines[0][i], lines[1][i], lines[2][i]};
        TRANSFORM_WEIGHTS(g, t[i]);
    }
}

/* Weights of input channels `first` to `end` of one panel: w [K][9][PANEL] to words u [points][K/NUMBERS*PANEL + LANES]. */
WINOGRAD_TARGET static void WINOGRAD(transform_weights)(const float *w, long k, long first, long end, int points,
                                                        float *u) {
    for (long p = first; p < end; p += NUMBERS)
        for (int v = 0; v < PANEL; v += VEC_FLOATS) {
            vec t[NUMBERS][6][6];
            for (int n = 0; n < NUMBERS; n++) WINOGRAD(weights_of)(w + (p + n) * 9 * PANEL + v, t[n]);
            float *to = u + p / NUMBERS * PANEL + v;
            for (int i = 0; i < 6; i++)
                for (int j = 0; j < 6; j++) {
                    if ((i == VANISHING || j == VANISHING) && points == UPSAMPLED_POINTS) continue;
                    WINOGRAD(store_weights)(to, t[0][i][j], t[NUMBERS - 1][i][j]);
                    to += k / NUMBERS * PANEL + LANES;
                }
        }
}

/* The column `x` of the input map of one tile row, through B^T from above to below: t [6]. Rows: those of the six rows
   of the tile, NULL where a row is outside of the map. With `edge` the numbers at the edge stand outside too. */
WINOGRAD_TARGET static inline __attribute__((always_inline)) void WINOGRAD(input_column)(
    const float *const *rows, long x, long width, int upsample, int edge, int kind, vec a, vec b, vec beta, vec *t) {
    vec d[6];
    if (edge) x = x < 0 ? 0 : x < width ? x : width - 1;
    if (x < 0 || x >= width) {
        for (int i = 0; i < 6; i++) t[i] = vec_set1(0.0f);
        return;
    }
    int n_rows = upsample ? 4 : 6;
    for (int i = 0; i < n_rows; i++) {
        d[i] = vec_set1(0.0f); /* the padding of a convolution comes after its norm */
        if (!rows[i]) continue;
        d[i] = vec_load_fp32(rows[i] + x * LANES);
        d[i] = NAME(normalised)(d[i], kind, a, b, beta);
    }
    if (upsample) d[5] = d[3], d[4] = d[3] = d[2], d[2] = d[1];
    TRANSFORM_INPUT(d, t);
}

/* Tiles `first` to `first + count` of a row of tiles at `row`, for the channels of one vector: v [points][..][ldv] gets
   a row of words for each. `map` [height][width][LANES] is the input. */
WINOGRAD_TARGET static inline __attribute__((always_inline)) void WINOGRAD(input_tiles)(
    const float *map, long height, long width, long row, long first, long count, int upsample, int edge, int kind,
    vec a, vec b, vec beta, float *v, long ldv, long stride) {
    const float *rows[6];
    long step = upsample ? 2 : 4; /* columns of the input from a tile to the next */
    for (int i = 0; i < step + 2; i++) {
        long y = row * step - 1 + i;
        if (edge) y = y < 0 ? 0 : y < height ? y : height - 1;
        rows[i] = y < 0 || y >= height ? NULL : map + y * width * LANES;
    }
    vec columns[6][6]; /* [column of the tile][point] */
    long x = first * step - 1;
    for (int j = 0; j < 2; j++) WINOGRAD(input_column)(rows, x++, width, upsample, edge, kind, a, b, beta, columns[j]);
    for (long tile = 0; tile < count; tile++, v += ldv) {
        for (int j = 2; j < step + 2; j++)
            WINOGRAD(input_column)(rows, x++, width, upsample, edge, kind, a, b, beta, columns[j]);
        float *to = v;
        for (int i = 0; i < 6; i++) {
            if (upsample && i == VANISHING) continue;
            vec d[6], t[6];
            for (int j = 0; j < 6; j++) d[j] = columns[upsample ? (j + 1) / 2 : j][i];
            TRANSFORM_INPUT(d, t);
            for (int j = 0; j < 6; j++) {
                if (upsample && j == VANISHING) continue;
                WINOGRAD(store_numbers)(to, t[j]);
                to += stride;
            }
        }
        for (int j = 0; j < 2; j++)
            for (int i = 0; i < 6; i++) columns[j][i] = columns[step + j][i];
    }
}

/* The input of tiles `first` to `first + count` of a map, through B^T d B, for its channel blocks `block` to `end`, whose
   first one is `place` in words v [points][TILES][ldv]. */
WINOGRAD_TARGET static void WINOGRAD(transform_input)(const Op *op, const float *map, const float *norm, long first,
                                                      long count, long block, long end, long place, float *v) {
    int upsample = op->kind == UPSAMPLE;
    long height = op->height, width = op->width, across = (width + 3) / 4; /* tiles in a row */
    if (upsample) height /= 2, width /= 2;
    long ldv = depth_words(op) + LANES, stride = TILES * ldv;
    v += (place - block) * LANES / NUMBERS;
    for (long lane = block * LANES; lane < end * LANES; lane += VEC_FLOATS) {
        const float *from = map + lane / LANES * height * width * LANES + lane % LANES;
        vec a = vec_set1(1.0f), b = vec_set1(0.0f), beta = a;
        if (norm) a = vec_load_fp32(norm + lane), b = vec_load_fp32(norm + op->in_channels + lane);
        if (op->beta) beta = vec_load_fp32(op->beta + lane);
        for (long tile = first, count_now; tile < first + count; tile += count_now) {
            long row = tile / across, x = tile % across;
            count_now = across - x < first + count - tile ? across - x : first + count - tile;
            float *to = v + (tile - first) * ldv + lane / NUMBERS;
#define TILES_WITH(upsample, edge, kind) \
    WINOGRAD(input_tiles)(from, height, width, row, x, count_now, upsample, edge, kind, a, b, beta, to, ldv, stride)
            if (upsample) TILES_WITH(1, 0, NAME(PLAIN));
            else if (!op->edge && !norm) TILES_WITH(0, 0, NAME(PLAIN));
            else if (!op->edge) TILES_WITH(0, 0, NAME(SWISH));
            else if (!norm) TILES_WITH(0, 1, NAME(PLAIN));
            else TILES_WITH(0, 1, NAME(BETA));
#undef TILES_WITH
        }
    }
}

/* The products c [points][TILES*PANEL + LANES] of tiles `first` to `first + count` of an image, through A^T c A, plus
   the bias, into the channels of one panel of `map`. `sums` [3][out_channels] gets, for each channel, what the next group
   norm needs: its first number, and the sums over all of their distances from it and of the squares of these. */
WINOGRAD_TARGET static void WINOGRAD(transform_output)(const Op *op, const float *c, long first, long count, long panel,
                                                       float *map, float *sums) {
    int upsample = op->kind == UPSAMPLE;
    long height = op->height, width = op->width, across = (width + 3) / 4, stride = TILES * PANEL + LANES;
    for (long lane = panel * PANEL; lane < (panel + 1) * PANEL && lane < op->out_channels; lane += VEC_FLOATS) {
        vec bias = vec_load_fp32(op->bias + lane);
        NAME(Sums) of = {vec_set1(0.0f), vec_set1(0.0f), vec_set1(0.0f)};
        float *to = map + lane / LANES * height * width * LANES + lane % LANES;
        for (long tile = 0; tile < count; tile++) {
            long row = (first + tile) / across * 4, column = (first + tile) % across * 4;
            const float *from = c + tile * PANEL + lane - panel * PANEL;
            vec lines[4][6], y[4][4]; /* [row of the result][column] */
            for (int j = 0; j < 6; j++) {
                vec m[6], out[4];
                if (upsample && j == VANISHING) {
                    for (int i = 0; i < 4; i++) lines[i][j] = vec_set1(0.0f);
                    continue;
                }
                for (int i = 0; i < 6; i++) {
                    int point = upsample ? (i - (i > VANISHING)) * 5 + j - (j > VANISHING) : i * 6 + j;
                    m[i] = upsample && i == VANISHING ? vec_set1(0.0f) : vec_load_fp32(from + point * stride);
                }
                TRANSFORM_OUTPUT(m, out);
                for (int i = 0; i < 4; i++) lines[i][j] = out[i];
            }
            for (int i = 0; i < 4; i++) TRANSFORM_OUTPUT(lines[i], y[i]);
            for (int i = 0; i < 4 && row + i < height; i++)
                for (int j = 0; j < 4 && column + j < width; j++) {
                    float *at = to + ((row + i) * width + column + j) * LANES;
                    vec value = y[i][j] + bias;
                    if (op->accumulate) value += vec_load_fp32(at);
                    vec_store(at, value);
                    NAME(add_up)(&of, value, tile + i + j == 0);
                }
        }
        NAME(keep_sums)(&of, sums + lane, op->out_channels);
    }
}

