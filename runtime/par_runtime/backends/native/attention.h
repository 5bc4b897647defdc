/* Attention of the step network for one instruction set; vectors.h describes the macros, step.c the letters.

   The keys of a head are cached in panels of slots, [S/PANEL][D][PANEL], and its values as rows, [S][D]. So scores and
   outputs are both products of rows of activations with rows of PANEL neighbouring numbers. */

/* Defines product_N_of: c [N][COLUMNS] = x w for x [N][k], rows `ldx` apart, and w [k][COLUMNS], rows `ldw` apart, for
   N = N_ROWS and COLUMNS = N_VECS vectors: those of a half or a whole panel, as OF says. */
#define DEFINE_PRODUCT(N_ROWS, OF, N_VECS)                                                                         \
    TARGET static inline void NAME(product_##N_ROWS##_##OF)(const float *x, long ldx, const float *w, long ldw,     \
                                                                long k, float *c, long ldc, Ahead fetch) {         \
        vec sum[N_ROWS][N_VECS];                                                                                   \
        for (int i = 0; i < N_ROWS; i++)                                                                           \
            for (int j = 0; j < N_VECS; j++) sum[i][j] = vec_set1(0.0f);                                           \
        for (long p = 0; p < k; p++) {                                                                             \
            const float *row = w + p * ldw;                                                                        \
            if (p < fetch.rows)                                                                                    \
                for (long line = 0; line < ldw; line += 16) __builtin_prefetch(row + fetch.ahead + line);          \
            vec w_row[N_VECS];                                                                                     \
            for (int j = 0; j < N_VECS; j++) w_row[j] = vec_load_fp32(row + j * VEC_FLOATS);                       \
            for (int i = 0; i < N_ROWS; i++) {                                                                     \
                vec number = vec_set1(x[i * ldx + p]);                                                             \
                for (int j = 0; j < N_VECS; j++) sum[i][j] = vec_fma(number, w_row[j], sum[i][j]);                 \
            }                                                                                                      \
        }                                                                                                          \
        for (int i = 0; i < N_ROWS; i++)                                                                           \
            for (int j = 0; j < N_VECS; j++) vec_store(c + i * ldc + j * VEC_FLOATS, sum[i][j]);                   \
    }

#if VECTORS == 512
DEFINE_PRODUCT(8, whole, PANEL_VECS)
DEFINE_PRODUCT(4, whole, PANEL_VECS)
DEFINE_PRODUCT(2, whole, PANEL_VECS)
DEFINE_PRODUCT(1, whole, PANEL_VECS)
#else
DEFINE_PRODUCT(6, half, HALF_VECS)
DEFINE_PRODUCT(4, half, HALF_VECS)
DEFINE_PRODUCT(3, whole, PANEL_VECS)
DEFINE_PRODUCT(2, whole, PANEL_VECS)
DEFINE_PRODUCT(1, whole, PANEL_VECS)
/* Six or four rows have the sums of half of the columns in registers; the first half fetches whole rows. */
#define IN_HALVES(N_ROWS)                                                                                 \
    do {                                                                                                  \
        rows = N_ROWS;                                                                                    \
        NAME(product_##N_ROWS##_half)(from, ldx, w, ldw, k, to, ldc, fetch);                                 \
        NAME(product_##N_ROWS##_half)(from, ldx, w + PANEL / 2, ldw, k, to + PANEL / 2, ldc, (Ahead){0, 0}); \
    } while (0)
#endif

/* c [m][PANEL] = x w for x [m][k] and w [k][PANEL]; rows are ldx, ldw, ldc numbers apart. */
TARGET static void NAME(panel_of_rows)(const float *x, long ldx, long m, const float *w, long ldw, long k, float *c,
                                       long ldc, Ahead fetch) {
    for (long i = 0, rows; i < m; i += rows) {
        const float *from = x + i * ldx;
        float *to = c + i * ldc;
        long left = m - i;
#if VECTORS == 512
        if (left >= 8) rows = 8, NAME(product_8_whole)(from, ldx, w, ldw, k, to, ldc, fetch);
        else if (left >= 4) rows = 4, NAME(product_4_whole)(from, ldx, w, ldw, k, to, ldc, fetch);
        else if (left >= 2) rows = 2, NAME(product_2_whole)(from, ldx, w, ldw, k, to, ldc, fetch);
        else rows = 1, NAME(product_1_whole)(from, ldx, w, ldw, k, to, ldc, fetch);
#else
        if (left == 4 || left == 7 || left == 8) IN_HALVES(4);
        else if (left >= 6) IN_HALVES(6);
        else if (left >= 3) rows = 3, NAME(product_3_whole)(from, ldx, w, ldw, k, to, ldc, fetch);
        else if (left == 2) rows = 2, NAME(product_2_whole)(from, ldx, w, ldw, k, to, ldc, fetch);
        else rows = 1, NAME(product_1_whole)(from, ldx, w, ldw, k, to, ldc, fetch);
#endif
        fetch.rows = 0; /* the first rows fetch for all */
    }
}

/* Columns [first, d) of c [m][d] = x w for x [m][k] and w [k][d]: those behind the last full panel, a multiple of 8. */
TARGET static void NAME(last_columns)(const float *x, long ldx, long m, const float *w, long d, long k, long first,
                                      float *c, long ldc) {
    for (long i = 0; i < m; i++) {
        float *to = c + i * ldc;
        for (long j = first; j < d; j += 8) {
#if VECTORS == 128
            vec sum[2] = {vec_set1(0.0f), vec_set1(0.0f)};
            for (long p = 0; p < k; p++)
                for (int l = 0; l < 2; l++)
                    sum[l] = vec_fma(vec_set1(x[i * ldx + p]), vec_load_fp32(w + p * d + j + 4 * l), sum[l]);
            for (int l = 0; l < 2; l++) vec_store(to + j + 4 * l, sum[l]);
#else
            __m256 sum = _mm256_setzero_ps();
            for (long p = 0; p < k; p++)
                sum = _mm256_fmadd_ps(_mm256_set1_ps(x[i * ldx + p]), _mm256_loadu_ps(w + p * d + j), sum);
            _mm256_storeu_ps(to + j, sum);
#endif
        }
    }
}

/* out [D] = x [D], each pair of neighbours (a, b) rotated by its angle: (a cos - b sin, b cos + a sin). Then times
   `scale`. D is a multiple of 8. */
TARGET static void NAME(rotate)(const float *x, const float *cosine, const float *sine, long d, float scale,
                                float *out) {
#if VECTORS == 128
    for (long j = 0; j < d; j += 2) { /* the compiler makes vectors of it */
        float a = x[j], b = x[j + 1], c = cosine[j / 2], s = sine[j / 2];
        out[j] = __builtin_fmaf(a, c, -(b * s)) * scale;
        out[j + 1] = __builtin_fmaf(b, c, a * s) * scale;
    }
#else
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    for (long j = 0; j < d; j += 8) {
        __m256 pairs = _mm256_loadu_ps(x + j), swapped = _mm256_permute_ps(pairs, 0xB1);
        __m256 c = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(cosine + j / 2)), twice);
        __m256 s = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(sine + j / 2)), twice);
        __m256 rotated = _mm256_fmaddsub_ps(pairs, c, _mm256_mul_ps(swapped, s));
        _mm256_storeu_ps(out + j, _mm256_mul_ps(rotated, _mm256_set1_ps(scale)));
    }
#endif
}

/* row [n] becomes e^(row - its maximum), without the sum's division; returns 1 / the sum. What stands behind n, up to a
   multiple of a vector, becomes 0. */
TARGET static float NAME(softmax)(float *row, long n) {
    long full = n / VEC_FLOATS * VEC_FLOATS, padded = (n + VEC_FLOATS - 1) / VEC_FLOATS * VEC_FLOATS;
    float largest = row[full < n ? full : 0];
    for (long j = full; j < n; j++) largest = row[j] > largest ? row[j] : largest;
    for (long j = n; j < padded; j++) row[j] = -INFINITY;
    vec most = vec_set1(largest), sum = vec_set1(0.0f);
    for (long j = 0; j < full; j += VEC_FLOATS) most = vec_max(most, vec_load_fp32(row + j));
    most = vec_set1(vec_reduce_max(most));
    for (long j = 0; j < padded; j += VEC_FLOATS) {
        vec mass = NAME(exp_approx)(vec_sub(vec_load_fp32(row + j), most));
        sum = vec_add(sum, mass);
        vec_store(row + j, mass);
    }
    return 1.0f / vec_reduce_add(sum);
}

/* Attention of head h of row r: rotates its q queries and keys (RoPE), writes keys and values into the cache, and
   writes its part of attention_out [M][H*D]. `scratch` has attention_floats(). `next`: the keys of the head that comes
   next, or NULL. D is a multiple of 8. */
TARGET static void NAME(attention_head)(const Step *s, const Buffers *at, long layer, long r, long h, float *scratch,
                                        const char *next) {
    const Model *model = s->model;
    long n_heads = model->n_heads, d = model->head_dim, slots = model->cache_slots, q = s->query, inner = n_heads * d;
    long cache_head = (s->cache_row[r] * n_heads + h) * slots * d;
    float *k_cache = (float *)s->keys[layer] + cache_head;   /* [S/PANEL][D][PANEL] */
    float *v_cache = (float *)s->values[layer] + cache_head; /* [S][D] */
    long first = s->write[r], visible = first + q;           /* T, the keys that this row attends to */
    long padded = (visible + PANEL - 1) / PANEL * PANEL;
    float *queries = scratch;          /* [q][D] */
    float *scores = queries + q * d;   /* [q][padded] */
    float *new_key = scores + q * padded; /* [D] */
    for (long t = 0; t < q; t++) {
        /* [D] of the query; those of the key are `inner` numbers further on, those of the value 2 * inner */
        const float *row = at->qkv + (r * q + t) * 3 * inner + h * d;
        long slot = first + t;
        const float *cosine = model->cosine + slot * d / 2, *sine = model->sine + slot * d / 2; /* [D/2] */
        float *key = k_cache + slot / PANEL * PANEL * d + slot % PANEL;                         /* [D], PANEL apart */
        NAME(rotate)(row, cosine, sine, d, model->attention_scale, queries + t * d);
        NAME(rotate)(row + inner, cosine, sine, d, 1.0f, new_key);
        for (long j = 0; j < d; j++) key[j * PANEL] = new_key[j];
        memcpy(v_cache + slot * d, row + 2 * inner, d * sizeof(float));
    }
    for (long p = 0; p < padded; p += PANEL)
        NAME(panel_of_rows)(queries, d, q, k_cache + p * d, PANEL, d, scores + p, padded,
                            ahead_of_keys((char *)(k_cache + p * d), (char *)v_cache, p, padded, d, 4));
    float *out = at->attention_out + r * q * inner + h * d; /* [q][D], `inner` apart */
    float *inverse_sum = queries;                           /* [q]; the queries are done with */
    for (long t = 0; t < q; t++) {
        prefetch_share(next, t, q);
        inverse_sum[t] = NAME(softmax)(scores + t * padded, visible);
    }
    long column = 0;
    for (; column + PANEL <= d; column += PANEL)
        NAME(panel_of_rows)(scores, padded, q, v_cache + column, d, visible, out + column, inner,
                            ahead_of_values(column, visible, 4 * d, 4));
    if (column < d) NAME(last_columns)(scores, padded, q, v_cache, d, visible, column, out, inner);
    for (long t = 0; t < q; t++)
        for (long j = 0; j < d; j++) out[t * inner + j] *= inverse_sum[t];
}

#undef DEFINE_PRODUCT
#undef IN_HALVES
