/* The kernels of decoder.c for one instruction set. decoder.c includes this file once per set, behind vectors.h, which
   explains the macros. A product has ROWS_MAX rows with their sums in registers, for COLUMN_VECS vectors of columns.

   All sets do the same operations on a number in the same order, so their images are the same.
   decoder.c explains the letters and the layouts. */

/* -- products ------------------------------------------------------------------------------------------------------ */

/* Defines FUNCTION: c [N_ROWS][PANEL] = x w, for x [N_ROWS][k], rows `ldx` apart, and one panel w [k][PANEL]. */
#define DEFINE_ROWS(FUNCTION, N_ROWS)                                                                                \
    TARGET static void NAME(FUNCTION)(const float *x, long ldx, const float *w, long k, float *c) {                  \
        for (int first = 0; first < PANEL; first += COLUMN_VECS * VEC_FLOATS) {                                        \
            vec sum[N_ROWS][COLUMN_VECS];                                                                              \
            for (int i = 0; i < N_ROWS; i++)                                                                         \
                for (int j = 0; j < COLUMN_VECS; j++) sum[i][j] = vec_set1(0.0f);                                      \
            for (long p = 0; p < k; p++) {                                                                           \
                vec w_row[COLUMN_VECS];                                                                                \
                for (int j = 0; j < COLUMN_VECS; j++)                                                                \
                    w_row[j] = vec_load_fp32(w + p * PANEL + first + j * VEC_FLOATS);                                \
                for (int i = 0; i < N_ROWS; i++) {                                                                   \
                    vec value = vec_set1(x[i * ldx + p]);                                                            \
                    for (int j = 0; j < COLUMN_VECS; j++) sum[i][j] = vec_fma(value, w_row[j], sum[i][j]);             \
                }                                                                                                    \
            }                                                                                                        \
            for (int i = 0; i < N_ROWS; i++)                                                                         \
                for (int j = 0; j < COLUMN_VECS; j++) vec_store(c + i * PANEL + first + j * VEC_FLOATS, sum[i][j]);    \
        }                                                                                                            \
    }

DEFINE_ROWS(product_1, 1)
DEFINE_ROWS(product_2, 2)
DEFINE_ROWS(product_4, 4)
#if ROWS_MAX > 8
DEFINE_ROWS(product_8, 8)
#endif
DEFINE_ROWS(product_most, ROWS_MAX)

/* c [rows][PANEL] = x w, for x [rows][k], rows `ldx` apart, and one panel w [k][PANEL]. */
TARGET static void NAME(product)(const float *x, long ldx, const float *w, long k, long rows, float *c) {
    for (long i = 0, pass; i < rows; i += pass) {
        long left = rows - i;
        const float *from = x + i * ldx;
        float *to = c + i * PANEL;
        if (left >= ROWS_MAX) pass = ROWS_MAX, NAME(product_most)(from, ldx, w, k, to);
#if ROWS_MAX > 8
        else if (left >= 8) pass = 8, NAME(product_8)(from, ldx, w, k, to);
#endif
        else if (left >= 4) pass = 4, NAME(product_4)(from, ldx, w, k, to);
        else if (left >= 2) pass = 2, NAME(product_2)(from, ldx, w, k, to);
        else pass = 1, NAME(product_1)(from, ldx, w, k, to);
    }
}

/* -- functions ----------------------------------------------------------------------------------------------------- */

/* e^x with a relative error of about 1e-7: 2^n times a polynomial in the remainder. The coefficients are those of expf
   in the Cephes library. */
TARGET static inline vec NAME(exp_of)(vec x) {
    x = vec_max(vec_min(x, vec_set1(88.0f)), vec_set1(-87.0f));
    vec n = vec_round(x * vec_set1(1.44269504088896341f));
    vec r = vec_fma(n, vec_set1(-0.693359375f), x);
    r = vec_fma(n, vec_set1(2.12194440e-4f), r);
    vec y = vec_set1(1.9875691500e-4f);
    y = vec_fma(y, r, vec_set1(1.3981999507e-3f));
    y = vec_fma(y, r, vec_set1(8.3334519073e-3f));
    y = vec_fma(y, r, vec_set1(4.1665795894e-2f));
    y = vec_fma(y, r, vec_set1(1.6666665459e-1f));
    y = vec_fma(y, r, vec_set1(5.0000001201e-1f));
    y = vec_fma(y, r * r, r + vec_set1(1.0f));
    return NAME(vec_scale)(y, n);
}

/* What an input goes through before it is multiplied. */
enum { NAME(PLAIN), NAME(NORM), NAME(SWISH), NAME(BETA) };

/* Group norm with factor `a` and shift `b`; then x * sigmoid(x) in SWISH, x * sigmoid(beta * x) in BETA. */
TARGET static inline vec NAME(normalised)(vec x, int kind, vec a, vec b, vec beta) {
    if (kind == NAME(PLAIN)) return x;
    x = vec_fma(x, a, b);
    if (kind == NAME(SWISH)) x = x / (vec_set1(1.0f) + NAME(exp_of)(vec_set1(0.0f) - x));
    if (kind == NAME(BETA)) x = x / (vec_set1(1.0f) + NAME(exp_of)(vec_set1(0.0f) - beta * x));
    return x;
}

/* -- Winograd's transforms ----------------------------------------------------------------------------------------- */

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

/* Weights of input channels `first` to `end` of one panel: w [K][9][PANEL] to u [points][K*PANEL + LANES]. */
TARGET static void NAME(transform_weights)(const float *w, long k, long first, long end, int points, float *u) {
    for (long p = first; p < end; p++)
        for (int v = 0; v < PANEL; v += VEC_FLOATS) {
            const float *from = w + p * 9 * PANEL + v;
            vec lines[3][6]; /* [column of the kernel][point] */
            for (int x = 0; x < 3; x++) {
                vec g[3];
                for (int y = 0; y < 3; y++) g[y] = vec_load_fp32(from + (3 * y + x) * PANEL);
                TRANSFORM_WEIGHTS(g, lines[x]);
            }
            float *to = u + p * PANEL + v;
            for (int i = 0; i < 6; i++) {
                if (i == VANISHING && points == UPSAMPLED_POINTS) continue;
                vec g[3] = {lines[0][i], lines[1][i], lines[2][i]}, t[6];
                TRANSFORM_WEIGHTS(g, t);
                for (int j = 0; j < 6; j++) {
                    if (j == VANISHING && points == UPSAMPLED_POINTS) continue;
                    vec_store(to, t[j]);
                    to += k * PANEL + LANES;
                }
            }
        }
}

/* The column `x` of the input map of one tile row, through B^T from above to below: t [6]. Rows: those of the six rows
   of the tile, NULL where a row is outside of the map. With `edge` the numbers at the edge stand outside too. */
TARGET static inline __attribute__((always_inline)) void NAME(input_column)(
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
   a row for each. `map` [height][width][LANES] is the input. */
TARGET static inline __attribute__((always_inline)) void NAME(input_tiles)(
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
    for (int j = 0; j < 2; j++) NAME(input_column)(rows, x++, width, upsample, edge, kind, a, b, beta, columns[j]);
    for (long tile = 0; tile < count; tile++, v += ldv) {
        for (int j = 2; j < step + 2; j++)
            NAME(input_column)(rows, x++, width, upsample, edge, kind, a, b, beta, columns[j]);
        float *to = v;
        for (int i = 0; i < 6; i++) {
            if (upsample && i == VANISHING) continue;
            vec d[6], t[6];
            for (int j = 0; j < 6; j++) d[j] = columns[upsample ? (j + 1) / 2 : j][i];
            TRANSFORM_INPUT(d, t);
            for (int j = 0; j < 6; j++) {
                if (upsample && j == VANISHING) continue;
                vec_store(to, t[j]);
                to += stride;
            }
        }
        for (int j = 0; j < 2; j++)
            for (int i = 0; i < 6; i++) columns[j][i] = columns[step + j][i];
    }
}

/* The input of tiles `first` to `first + count` of a map, through B^T d B, for its channel blocks `block` to `end`, whose
   first one is `place` in v [points][TILES][ldv]. */
TARGET static void NAME(transform_input)(const Op *op, const float *map, const float *norm, long first, long count,
                                         long block, long end, long place, float *v) {
    int upsample = op->kind == UPSAMPLE;
    long height = op->height, width = op->width, across = (width + 3) / 4; /* tiles in a row */
    if (upsample) height /= 2, width /= 2;
    long ldv = depth_of(op) + LANES, stride = TILES * ldv;
    v += (place - block) * LANES;
    for (long lane = block * LANES; lane < end * LANES; lane += VEC_FLOATS) {
        const float *from = map + lane / LANES * height * width * LANES + lane % LANES;
        vec a = vec_set1(1.0f), b = vec_set1(0.0f), beta = a;
        if (norm) a = vec_load_fp32(norm + lane), b = vec_load_fp32(norm + op->in_channels + lane);
        if (op->beta) beta = vec_load_fp32(op->beta + lane);
        for (long tile = first, count_now; tile < first + count; tile += count_now) {
            long row = tile / across, x = tile % across;
            count_now = across - x < first + count - tile ? across - x : first + count - tile;
            float *to = v + (tile - first) * ldv + lane;
#define TILES_WITH(upsample, edge, kind) \
    NAME(input_tiles)(from, height, width, row, x, count_now, upsample, edge, kind, a, b, beta, to, ldv, stride)
            if (upsample) TILES_WITH(1, 0, NAME(PLAIN));
            else if (!op->edge && !norm) TILES_WITH(0, 0, NAME(PLAIN));
            else if (!op->edge) TILES_WITH(0, 0, NAME(SWISH));
            else if (!norm) TILES_WITH(0, 1, NAME(PLAIN));
            else TILES_WITH(0, 1, NAME(BETA));
#undef TILES_WITH
        }
    }
}

/* What the next group norm needs of the numbers of a channel: the first, and the sums of the distances of all from it and
   of the squares of these. */
typedef struct {
    vec origin, sum, squares;
} NAME(Sums);

TARGET static inline __attribute__((always_inline)) void NAME(add_up)(NAME(Sums) * of, vec value, int first) {
    if (first) of->origin = value;
    value -= of->origin;
    of->sum += value;
    of->squares = vec_fma(value, value, of->squares);
}

TARGET static inline __attribute__((always_inline)) void NAME(keep_sums)(const NAME(Sums) * of, float *sums,
                                                                          long channels) {
    vec_store(sums, of->origin);
    vec_store(sums + channels, of->sum);
    vec_store(sums + 2 * channels, of->squares);
}

/* The products c [points][TILES*PANEL + LANES] of tiles `first` to `first + count` of an image, through A^T c A, plus
   the bias, into the channels of one panel of `map`. `sums` [3][out_channels] gets, for each channel, what the next group
   norm needs: its first number, and the sums over all of their distances from it and of the squares of these. */
TARGET static void NAME(transform_output)(const Op *op, const float *c, long first, long count, long panel, float *map,
                                          float *sums) {
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

/* -- one pixel at a time ------------------------------------------------------------------------------------------- */

/* Pixels `first` to `first + count` of `map`, normalised where `norm` is given: v [count][ldv], a row for each. */
TARGET static void NAME(gather_pixels)(const Op *op, const float *map, const float *norm, long first, long count,
                                       long block, long end, long place, float *v) {
    long pixels = op->height * op->width, ldv = depth_of(op) + LANES;
    v += (place - block) * LANES;
    for (long lane = block * LANES; lane < end * LANES; lane += VEC_FLOATS) {
        const float *from = map + (lane / LANES * pixels + first) * LANES + lane % LANES;
        vec a = vec_set1(1.0f), b = vec_set1(0.0f);
        if (norm) a = vec_load_fp32(norm + lane), b = vec_load_fp32(norm + op->in_channels + lane);
        for (long i = 0; i < count; i++) {
            vec x = vec_load_fp32(from + i * LANES);
            x = NAME(normalised)(x, norm ? NAME(NORM) : NAME(PLAIN), a, b, a);
            vec_store(v + i * ldv + lane, x);
        }
    }
}

/* Rows c [count][PANEL] of a product, plus the bias, into the channels of one panel of pixels `first` and after of
   `map`; `sums` as in transform_output. */
TARGET static void NAME(scatter_pixels)(const Op *op, const float *c, long first, long count, long panel, float *map,
                                        float *sums) {
    long pixels = op->height * op->width;
    for (long lane = panel * PANEL; lane < (panel + 1) * PANEL && lane < op->out_channels; lane += VEC_FLOATS) {
        vec bias = vec_load_fp32(op->bias + lane);
        NAME(Sums) of = {vec_set1(0.0f), vec_set1(0.0f), vec_set1(0.0f)};
        float *to = map + (lane / LANES * pixels + first) * LANES + lane % LANES;
        for (long i = 0; i < count; i++) {
            vec value = vec_load_fp32(c + i * PANEL + lane - panel * PANEL) + bias;
            if (op->accumulate) value += vec_load_fp32(to + i * LANES);
            vec_store(to + i * LANES, value);
            NAME(add_up)(&of, value, i == 0);
        }
        NAME(keep_sums)(&of, sums + lane, op->out_channels);
    }
}

/* Channels become pixels: pixels `first` to `first + count` of a frame of the output `map`, whose row, column and frame
   in its block of stride_t x stride_y x stride_x follow from its place; `from` is the map of the frame before, of
   which the channels of frame `t` are taken. `sums` as in transform_output. */
TARGET static void NAME(to_space)(const Op *op, const float *from, long t, long first, long count, float *map,
                                  float *sums) {
    long pixels = op->height * op->width, width = op->width / op->stride_x, height = op->height / op->stride_y;
    for (long lane = 0; lane < op->out_channels; lane += VEC_FLOATS) {
        NAME(Sums) of = {vec_set1(0.0f), vec_set1(0.0f), vec_set1(0.0f)};
        float *to = map + lane / LANES * pixels * LANES + lane % LANES;
        for (long i = first; i < first + count; i++) {
            long y = i / op->width, x = i % op->width;
            long part = (t * op->stride_y + y % op->stride_y) * op->stride_x + x % op->stride_x;
            long channel = part * op->out_channels + lane, pixel = y / op->stride_y * width + x / op->stride_x;
            vec value = vec_load_fp32(from + (channel / LANES * height * width + pixel) * LANES + channel % LANES);
            vec_store(to + i * LANES, value);
            NAME(add_up)(&of, value, i == first);
        }
        NAME(keep_sums)(&of, sums + lane, op->out_channels);
    }
}

/* scores [count] = e^(scale * (score - largest)), and 1 over their sum as the result. What follows them up to a whole
   vector of LANES is overwritten. The order of the additions is the same for vectors of any size. */
TARGET static float NAME(softmax)(float *scores, long count, float scale) {
    enum { VECS = LANES / VEC_FLOATS };
    float lanes[LANES], largest, sum = 0;
    vec best[VECS], total[VECS];
    for (long i = count; i % LANES; i++) scores[i] = -FLT_MAX; /* e^ of it is nothing beside the largest one's 1 */
    for (int j = 0; j < VECS; j++) best[j] = vec_load_fp32(scores + j * VEC_FLOATS), total[j] = vec_set1(0.0f);
    for (long i = LANES; i < count; i += LANES)
        for (int j = 0; j < VECS; j++) best[j] = vec_max(best[j], vec_load_fp32(scores + i + j * VEC_FLOATS));
    for (int j = 0; j < VECS; j++) vec_store(lanes + j * VEC_FLOATS, best[j]);
    largest = lanes[0];
    for (int j = 1; j < LANES; j++) largest = lanes[j] > largest ? lanes[j] : largest;
    for (long i = 0; i < count; i += LANES)
        for (int j = 0; j < VECS; j++) {
            float *at = scores + i + j * VEC_FLOATS;
            vec x = NAME(exp_of)((vec_load_fp32(at) - vec_set1(largest)) * vec_set1(scale));
            vec_store(at, x);
            total[j] += x;
        }
    for (int j = 0; j < VECS; j++) vec_store(lanes + j * VEC_FLOATS, total[j]);
    for (int j = 0; j < LANES; j++) sum += lanes[j];
    return 1 / sum;
}
