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
