/* The other kernels of step.c for one instruction set: norms, SwiGLU, attention. step.c includes products.h and this file
   once per set, with these macros defined:

   SUFFIX          name of the set; NAME(f) is f_SUFFIX
   TARGET          attribute that allows the set's instructions
   ROWS_MAX        rows of activations that are multiplied at once: as many as have their sums in registers
   ROWS_MID        a smaller number of rows
   VEC_FLOATS      floats of a vector
   vec             the type of a vector; vec_set1, vec_store, vec_fma, vec_load_fp32, vec_load_fp16, vec_load_bf16

   step.c explains the letters R, q, M, K, N, H, D, S, T. */

/* -- SwiGLU and RMSNorm -------------------------------------------------------------------------------------------- */

/* e^x with a relative error of about 1e-7: 2^n times a polynomial in the remainder. The coefficients are those of expf
   in the Cephes library. */
TARGET static inline float NAME(exp_approx)(float x) {
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
    union {
        int32_t bits;
        float value;
    } two_to_n = {((int32_t)n + 127) << 23};
    return y * two_to_n.value;
}

/* out [M][PANEL/2] = silu(a) * b, rows `ldo` apart, for c [M][PANEL]: each row holds PANEL/2 columns of a, then of b. */
TARGET static void NAME(swiglu)(const float *c, long m, float *out, long ldo) {
    for (long i = 0; i < m; i++) {
        const float *row = c + i * PANEL; /* [PANEL] */
        float *y = out + i * ldo;         /* [PANEL/2] */
        for (long j = 0; j < PANEL / 2; j++) y[j] = row[j] / (1.0f + NAME(exp_approx)(-row[j])) * row[j + PANEL / 2];
    }
}

/* scale [M] = 1 / sqrt(mean of squares + epsilon) of each row of x [M][dim]. */
TARGET static void NAME(inverse_rms)(const float *x, long dim, long m, float *scale) {
    for (long i = 0; i < m; i++) {
        const float *row = x + i * dim; /* [dim] */
        float part[16] = {0}, sum = 0;
        long j = 0;
        for (; j + 16 <= dim; j += 16)
            for (int l = 0; l < 16; l++) part[l] += row[j + l] * row[j + l];
        for (; j < dim; j++) sum += row[j] * row[j];
        for (int l = 0; l < 16; l++) sum += part[l];
        scale[i] = 1.0f / sqrtf(sum / (float)dim + RMS_EPSILON);
    }
}

/* -- attention ----------------------------------------------------------------------------------------------------- */

/* Maximum and sum of row [n]. They reduce 16 parts separately, which the compiler turns into vectors. In a single
   chain, each operation would wait for the one before. */
TARGET static inline float NAME(reduce_max)(const float *row, long n) {
    float part[16], largest;
    long j = 0;
    for (int l = 0; l < 16; l++) part[l] = row[0];
    for (; j + 16 <= n; j += 16)
        for (int l = 0; l < 16; l++) part[l] = row[j + l] > part[l] ? row[j + l] : part[l];
    for (largest = part[0]; j < n; j++) largest = row[j] > largest ? row[j] : largest;
    for (int l = 1; l < 16; l++) largest = part[l] > largest ? part[l] : largest;
    return largest;
}

TARGET static inline float NAME(reduce_sum)(const float *row, long n) {
    float part[16] = {0}, sum = 0;
    long j = 0;
    for (; j + 16 <= n; j += 16)
        for (int l = 0; l < 16; l++) part[l] += row[j + l];
    for (; j < n; j++) sum += row[j];
    for (int l = 0; l < 16; l++) sum += part[l];
    return sum;
}

/* Attention of head h of row r: rotates its q queries and keys (RoPE), writes keys and values into the cache, and
   writes its part of attention_out [M][H*D]. `scratch` is [scratch_floats]. */
TARGET static void NAME(attention_head)(const Step *s, long layer, long r, long h, float *scratch) {
    const Model *model = s->model;
    long n_heads = model->n_heads, head_dim = model->head_dim, slots = model->cache_slots;
    long q = s->query, inner = n_heads * head_dim;
    long cache_head = (s->cache_row[r] * n_heads + h) * slots * head_dim;
    float *k_cache = s->keys[layer] + cache_head;   /* [S/PANEL][D][PANEL] */
    float *v_cache = s->values[layer] + cache_head; /* [S][D] */
    long visible = s->write[r] + q;                 /* T, the keys that this row attends to */
    long panels = (visible + PANEL - 1) / PANEL, padded = panels * PANEL;
    float *queries = scratch;               /* [D][q] */
    float *scores = queries + head_dim * q; /* [q][padded] */
    for (long t = 0; t < q; t++) {
        /* [D] of the query; those of the key are `inner` numbers further on, those of the value 2 * inner */
        const float *row = s->qkv + (r * q + t) * 3 * inner + h * head_dim;
        long slot = s->write[r] + t;
        const float *cosine = model->cosine + slot * head_dim / 2;             /* [D/2] */
        const float *sine = model->sine + slot * head_dim / 2;                 /* [D/2] */
        float *key = k_cache + slot / PANEL * PANEL * head_dim + slot % PANEL; /* [D], PANEL apart */
        for (long j = 0; j < head_dim / 2; j++) {
            float a = row[2 * j], b = row[2 * j + 1];
            queries[2 * j * q + t] = (a * cosine[j] - b * sine[j]) * model->attention_scale;
            queries[(2 * j + 1) * q + t] = (b * cosine[j] + a * sine[j]) * model->attention_scale;
            a = row[inner + 2 * j], b = row[inner + 2 * j + 1];
            key[2 * j * PANEL] = a * cosine[j] - b * sine[j];
            key[(2 * j + 1) * PANEL] = b * cosine[j] + a * sine[j];
        }
        memcpy(v_cache + slot * head_dim, row + 2 * inner, head_dim * sizeof(float));
    }
    for (long p = 0; p < panels; p++)
        NAME(product_fp32)(queries, q, k_cache + p * PANEL * head_dim, head_dim, scores + p * PANEL, padded);
    float *probabilities_t = scores + q * padded; /* [T][q] */
    for (long t = 0; t < q; t++) {
        float *row = scores + t * padded; /* [T] */
        float largest = NAME(reduce_max)(row, visible);
        for (long j = 0; j < visible; j++) row[j] = NAME(exp_approx)(row[j] - largest);
        float inverse_sum = 1.0f / NAME(reduce_sum)(row, visible);
        for (long j = 0; j < visible; j++) probabilities_t[j * q + t] = row[j] * inverse_sum;
    }
    float *out = probabilities_t + q * padded; /* [q][D]; PANEL columns at a time, then the remaining columns */
    long first = 0;
    for (; first + PANEL <= head_dim; first += PANEL)
        for (long t = 0, rows; t < q; t += rows) {
            const char *prefetch = (const char *)(v_cache + first + PREFETCH_SLOTS * head_dim);
            rows = NAME(rows_of_pass)(q - t);
            NAME(product_fp32_rows)(rows, probabilities_t + t, q, v_cache + first, head_dim, visible,
                                    out + t * head_dim + first, head_dim, 0, prefetch, head_dim * 4, 0);
        }
    for (long t = 0; t < q; t++) {
        for (long j = first; j < head_dim; j++) out[t * head_dim + j] = 0;
        if (first < head_dim)
            for (long l = 0; l < visible; l++)
                for (long j = first; j < head_dim; j++)
                    out[t * head_dim + j] += probabilities_t[l * q + t] * v_cache[l * head_dim + j];
        memcpy(s->attention_out + (r * q + t) * inner + h * head_dim, out + t * head_dim, head_dim * sizeof(float));
    }
}

#undef DEFINE_PRODUCT_OF_ROWS
#undef DEFINE_PRODUCT
#undef PANEL_VECS
#undef NAME
#undef CAT
#undef CAT_
