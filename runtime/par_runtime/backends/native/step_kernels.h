/* The kernels of step.c for one instruction set; included once for each, with these defined:

   SUFFIX  name of the set    TARGET  attribute that allows its instructions
   ROWS    rows of activations that are multiplied at once: as many as sums fit into registers; SOME: fewer
   VEC     numbers of a vector    vec, load, store, set1, fma, load_half, load_brain

   Every matrix is stored in panels of PANEL columns, [N/PANEL][K][PANEL]: a product reads it from the first byte to the last.
   Activations are transposed, [K][M], so that the numbers that one step needs lie side by side. */

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define NAME(f) CAT(f, SUFFIX)
#define VECS (PANEL / VEC)

/* c[i][0..PANEL) (+)= sum over k of x[k * m + i] * b[k * ldb ..], for so many rows. Meanwhile memory from `soon` on is fetched,
   `stride` bytes for each k: reading weights is what a step waits for, and no hardware guesses far enough. */
#define MULTIPLY(NAME_, TYPE, LOAD, ROWS_)                                                                                    \
    TARGET static void NAME(NAME_)(const float *x, long m, const TYPE *b, long ldb, long k, float *c, long ldc, int add,      \
                                   const char *soon, long stride, long back) {                                                           \
        vec sum[ROWS_][VECS];                                                                                                 \
        for (int i = 0; i < ROWS_; i++)                                                                                       \
            for (int j = 0; j < VECS; j++) sum[i][j] = add ? load(c + i * ldc + j * VEC) : set1(0.0f);                        \
        for (long p = 0; p < k; p++) {                                                                                        \
            for (long line = 0; line <= (stride > 64 ? 64 : 0); line += 64) {                                                 \
                __builtin_prefetch(soon + p * stride + line, 0, 2);        /* into the second cache, */                       \
                __builtin_prefetch(soon + p * stride + line - back, 0, 3); /* and from there into the first */                \
            }                                                                                                                 \
            vec w[VECS];                                                                                                      \
            for (int j = 0; j < VECS; j++) w[j] = LOAD(b + p * ldb + j * VEC);                                                \
            for (int i = 0; i < ROWS_; i++) {                                                                                 \
                vec one = set1(x[p * m + i]);                                                                                 \
                for (int j = 0; j < VECS; j++) sum[i][j] = fma(one, w[j], sum[i][j]);                                         \
            }                                                                                                                 \
        }                                                                                                                     \
        for (int i = 0; i < ROWS_; i++)                                                                                       \
            for (int j = 0; j < VECS; j++) store(c + i * ldc + j * VEC, sum[i][j]);                                           \
    }

/* One panel for all m rows, k in pieces that stay in the first cache while the rows pass over them, some at a time. Each pass
   fetches its part of what comes next, so that memory is busy while the core is. */
#define MULTIPLY_ALL(TYPE, LOAD, TAG)                                                                                         \
    MULTIPLY(CAT(TAG, 1), TYPE, LOAD, 1)                                                                                      \
    MULTIPLY(CAT(TAG, 2), TYPE, LOAD, 2)                                                                                      \
    MULTIPLY(CAT(TAG, 4), TYPE, LOAD, 4)                                                                                      \
    MULTIPLY(CAT(TAG, 8), TYPE, LOAD, SOME)                                                                                   \
    MULTIPLY(CAT(TAG, R), TYPE, LOAD, ROWS)                                                                                   \
    TARGET static void NAME(CAT(TAG, some))(long rows, const float *x, long m, const TYPE *b, long ldb, long k, float *c,     \
                                            long ldc, int add, const char *soon, long stride, long back) {                               \
        if (rows == ROWS) NAME(CAT(TAG, R))(x, m, b, ldb, k, c, ldc, add, soon, stride, back);                                      \
        else if (rows == SOME) NAME(CAT(TAG, 8))(x, m, b, ldb, k, c, ldc, add, soon, stride, back);                                 \
        else if (rows == 4) NAME(CAT(TAG, 4))(x, m, b, ldb, k, c, ldc, add, soon, stride, back);                                    \
        else if (rows == 2) NAME(CAT(TAG, 2))(x, m, b, ldb, k, c, ldc, add, soon, stride, back);                                    \
        else NAME(CAT(TAG, 1))(x, m, b, ldb, k, c, ldc, add, soon, stride, back);                                                   \
    }                                                                                                                         \
    TARGET static void NAME(TAG)(const float *x, long m, const TYPE *b, long ldb, long k, float *c, long ldc, int add,        \
                                 long ahead) {                                                                                \
        long passes = NAME(passes)(m), bytes = PANEL * (long)sizeof(TYPE);                                                    \
        long distance = ahead ? (passes == 1 ? AHEAD : PIECE * bytes) : 0, stride = ahead ? bytes / passes : 0;               \
        long back = ahead && passes == 1 ? AHEAD - NEAR : 0;                                                                  \
        for (long first = 0; first < k; first += PIECE) {                                                                     \
            long here = k - first < PIECE ? k - first : PIECE, pass = 0, i = 0;                                               \
            const TYPE *at = b + first * ldb;                                                                                 \
            const float *from = x + first * m;                                                                                \
            int more = add || first;                                                                                          \
            for (long step; i < m; i += step, pass++) {                                                                       \
                const char *soon = (const char *)at + distance + pass * here * stride;                                        \
                const float *y = from + i;                                                                                    \
                float *out = c + i * ldc;                                                                                     \
                step = NAME(rows)(m - i);                                                                                     \
                NAME(CAT(TAG, some))(step, y, m, at, ldb, here, out, ldc, more, soon, stride, back);                                \
            }                                                                                                                 \
        }                                                                                                                     \
    }

/* How many of so many rows the next pass takes. */
static inline long NAME(rows)(long left) {
    if (left >= ROWS) return ROWS;
    if (left >= SOME) return SOME;
    if (left >= 4 && ROWS > 4) return 4;
    return left >= 2 ? 2 : 1;
}

static inline long NAME(passes)(long m) {
    long count = 0;
    for (; m > 0; count++) m -= NAME(rows)(m);
    return count;
}

MULTIPLY_ALL(float, load, single)
MULTIPLY_ALL(uint16_t, load_half, half)
MULTIPLY_ALL(uint16_t, load_brain, brain)

TARGET static void NAME(panel)(int type, const float *x, long m, const void *b, long k, float *c, long ldc, int add) {
    if (type == SINGLE) NAME(single)(x, m, b, PANEL, k, c, ldc, add, 1);
    else if (type == HALF) NAME(half)(x, m, b, PANEL, k, c, ldc, add, 1);
    else NAME(brain)(x, m, b, PANEL, k, c, ldc, add, 1);
}

/* e^x, to about one part in 10^7: 2^n times a polynomial in what is left (Cephes' coefficients). */
TARGET static inline float NAME(power)(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = __builtin_floorf(x * 1.44269504088896341f + 0.5f);
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    union { int32_t i; float f; } two = {((int32_t)n + 127) << 23};
    return y * two.f;
}

/* silu(a) * b of a panel c [M][PANEL] that holds PANEL/2 columns of each, into out [PANEL/2][M]. */
TARGET static void NAME(gated)(const float *c, long m, float *out) {
    for (long i = 0; i < m; i++) {
        float y[PANEL / 2];
        const float *row = c + i * PANEL;
        for (long j = 0; j < PANEL / 2; j++) y[j] = row[j] / (1.0f + NAME(power)(-row[j])) * row[j + PANEL / 2];
        for (long j = 0; j < PANEL / 2; j++) out[j * m + i] = y[j];
    }
}

/* What each row of x [M,d] is multiplied with: 1 / sqrt(mean of squares + epsilon). */
TARGET static void NAME(scales)(const float *x, long d, long m, float *scale) {
    for (long i = 0; i < m; i++) {
        const float *row = x + i * d;
        float part[16] = {0}, sum = 0;
        long j = 0;
        for (; j + 16 <= d; j += 16)
            for (int l = 0; l < 16; l++) part[l] += row[j + l] * row[j + l];
        for (; j < d; j++) sum += row[j] * row[j];
        for (int l = 0; l < 16; l++) sum += part[l];
        scale[i] = 1.0f / sqrtf(sum / (float)d + EPSILON);
    }
}

/* Columns [first, end) of the normed rows, transposed: out [d][M]. Threads share columns, not rows, so that no two of them write
   into one cache line. */
TARGET static void NAME(norm)(const float *x, const float *gain, const float *scale, long d, long m, long first, long end, float *out) {
    for (long j = first; j < end; j++)
        for (long i = 0; i < m; i++) out[j * m + i] = x[i * d + j] * scale[i] * gain[j];
}

/* Reductions in 16 parts, which become vectors; in order, each would wait for the one before. */
TARGET static inline float NAME(largest)(const float *row, long n) {
    float part[16], most;
    long j = 0;
    for (int l = 0; l < 16; l++) part[l] = row[0];
    for (; j + 16 <= n; j += 16)
        for (int l = 0; l < 16; l++) part[l] = row[j + l] > part[l] ? row[j + l] : part[l];
    for (most = part[0]; j < n; j++) most = row[j] > most ? row[j] : most;
    for (int l = 1; l < 16; l++) most = part[l] > most ? part[l] : most;
    return most;
}

TARGET static inline float NAME(total)(const float *row, long n) {
    float part[16] = {0}, sum = 0;
    long j = 0;
    for (; j + 16 <= n; j += 16)
        for (int l = 0; l < 16; l++) part[l] += row[j + l];
    for (; j < n; j++) sum += row[j];
    for (int l = 0; l < 16; l++) sum += part[l];
    return sum;
}

/* One head of one row r of the batch: its q queries turn, its keys and values go into the cache, its outputs into y. */
TARGET static void NAME(head)(const Step *s, long r, long h, float *scratch) {
    const Model *w = s->model;
    long size = w->head, q = s->query, m = s->rows * q, width = w->heads * size, slots = w->slots;
    float *k_cache = s->keys + (r * w->heads + h) * slots * size; /* panels [slots/PANEL][size][PANEL] */
    float *v_cache = s->values + (r * w->heads + h) * slots * size; /* [slots][size] */
    long seen = s->write[r] + q, panels = (seen + PANEL - 1) / PANEL, padded = panels * PANEL;
    float *queries = scratch, *scores = queries + size * q; /* [size][q], [q][padded] */
    for (long t = 0; t < q; t++) {
        const float *row = s->qkv + (r * q + t) * 3 * width + h * size;
        const float *cosine = s->cosine + (r * q + t) * size / 2, *sine = s->sine + (r * q + t) * size / 2;
        long slot = s->write[r] + t;
        float *key = k_cache + slot / PANEL * PANEL * size + slot % PANEL;
        for (long j = 0; j < size / 2; j++) {
            float a = row[2 * j], b = row[2 * j + 1];
            queries[2 * j * q + t] = (a * cosine[j] - b * sine[j]) * w->scale;
            queries[(2 * j + 1) * q + t] = (b * cosine[j] + a * sine[j]) * w->scale;
            a = row[width + 2 * j], b = row[width + 2 * j + 1];
            key[2 * j * PANEL] = a * cosine[j] - b * sine[j];
            key[(2 * j + 1) * PANEL] = b * cosine[j] + a * sine[j];
        }
        memcpy(v_cache + slot * size, row + 2 * width, size * sizeof(float));
    }
    for (long p = 0; p < panels; p++)
        NAME(single)(queries, q, k_cache + p * PANEL * size, PANEL, size, scores + p * PANEL, padded, 0, 1);
    float *turned = scores + q * padded; /* [seen][q] */
    for (long t = 0; t < q; t++) {
        float *row = scores + t * padded, most = NAME(largest)(row, seen);
        for (long j = 0; j < seen; j++) row[j] = NAME(power)(row[j] - most);
        float share = 1.0f / NAME(total)(row, seen);
        for (long j = 0; j < seen; j++) turned[j * q + t] = row[j] * share;
    }
    float *sums = turned + q * padded; /* [q][size], in pieces of PANEL columns; what is left over one by one */
    long first = 0;
    for (; first + PANEL <= size; first += PANEL)
        for (long t = 0, step; t < q; t += step) {
            const char *soon = (const char *)(v_cache + first + VALUES_AHEAD * size);
            step = NAME(rows)(q - t);
            NAME(single_some)(step, turned + t, q, v_cache + first, size, seen, sums + t * size + first, size, 0, soon, size * 4, 0);
        }
    for (long t = 0; t < q; t++) {
        for (long j = first; j < size; j++) sums[t * size + j] = 0;
        if (first < size)
            for (long l = 0; l < seen; l++)
                for (long j = first; j < size; j++) sums[t * size + j] += turned[l * q + t] * v_cache[l * size + j];
        for (long j = 0; j < size; j++) s->mixed[(h * size + j) * m + r * q + t] = sums[t * size + j];
    }
}

#undef MULTIPLY
#undef MULTIPLY_ALL
#undef VECS
#undef NAME
#undef CAT
#undef CAT_
