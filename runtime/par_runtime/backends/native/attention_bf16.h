/* Attention with cached keys and values in bf16, for one instruction set; attention.h has the one in fp32, vectors.h
   describes the macros.

   The keys of a head are cached as [S/PANEL][D/2][PANEL][2], its values as [S/2][D][2]: two numbers that are multiplied
   by two neighbours of a row lie together, as the dot product of AVX-512 takes them. Queries and probabilities are
   rounded to bf16 too; sums are fp32. */

#if VECTORS == 512
#define int_vec __m512i
#define int_load(p) _mm512_loadu_si512((const void *)(p))
#define int_set1 _mm512_set1_epi32
/* The first and the second number of each pair, as fp32. */
#define first_of(pairs) _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))
#define second_of(pairs) _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)))
#elif VECTORS == 256
#define int_vec __m256i
#define int_load(p) _mm256_loadu_si256((const void *)(p))
#define int_set1 _mm256_set1_epi32
#define first_of(pairs) _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))
#define second_of(pairs) _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)))
#elif defined(__aarch64__)
#define int_vec uint32x4_t
#define int_load(p) vreinterpretq_u32_u16(vld1q_u16(p))
#define int_set1(x) vdupq_n_u32((uint32_t)(x))
#define first_of(pairs) vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16))
#define second_of(pairs) vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000)))
#else
#define int_vec __m128i
#define int_load(p) _mm_loadu_si128((const void *)(p))
#define int_set1 _mm_set1_epi32
#define first_of(pairs) _mm_castsi128_ps(_mm_slli_epi32(pairs, 16))
#define second_of(pairs) _mm_castsi128_ps(_mm_and_si128(pairs, _mm_set1_epi32((int)0xffff0000)))
#endif

/* out [n] = the bf16 nearest to x [n], ties to even; a NaN stays one. n is a multiple of 8. */
TARGET static inline void NAME(round_bf16)(const float *x, long n, uint16_t *out) {
#if VECTORS == 128
    for (long i = 0; i < n; i++) out[i] = (uint16_t)to_bf16(x[i]); /* the compiler makes vectors of it */
#else
    const __m256i half = _mm256_set1_epi32(0x7fff), one = _mm256_set1_epi32(1), quiet = _mm256_set1_epi32(0x40);
    for (long i = 0; i < n; i += 8) {
        __m256 value = _mm256_loadu_ps(x + i), is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
        __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
        __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(half, _mm256_and_si256(high, one)));
        bits = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_or_si256(high, quiet),
                                  _mm256_castps_si256(is_nan));
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
        _mm_storeu_si128((__m128i *)(out + i), _mm256_castsi256_si128(packed));
    }
#endif
}

#if VECTORS == 512
#define ROWS_OF_PAIRS 8
#else
#define ROWS_OF_PAIRS 4
#endif

/* Columns [0, vecs * VEC_FLOATS) of c [rows][PANEL] = x w for x [rows][2*pairs], rows `ldx` numbers apart, and
   w [pairs][PANEL][2], `ldw` numbers apart. Inlined for each number of rows. */
TARGET INLINE void NAME(pairs_of_rows)(const int rows, const int vecs, const uint16_t *x, long ldx, const uint16_t *w,
                                       long ldw, long pairs, float *c, long ldc, Ahead fetch) {
    vec sum[ROWS_OF_PAIRS][PANEL_VECS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vecs; j++) sum[i][j] = vec_set1(0.0f);
    for (long p = 0; p < pairs; p++) {
        const uint16_t *row = w + p * ldw;
        if (p < fetch.rows)
            for (long line = 0; line < ldw; line += 32) __builtin_prefetch(row + fetch.ahead + line);
        vec first[PANEL_VECS], second[PANEL_VECS];
        UNROLL for (int j = 0; j < vecs; j++) {
            int_vec numbers = int_load(row + 2 * j * VEC_FLOATS);
            first[j] = first_of(numbers), second[j] = second_of(numbers);
        }
        UNROLL for (int i = 0; i < rows; i++) {
            int32_t pair;
            memcpy(&pair, x + i * ldx + 2 * p, 4);
            int_vec both = int_set1(pair);
            UNROLL for (int j = 0; j < vecs; j++) sum[i][j] = vec_fma(second_of(both), second[j], sum[i][j]);
            UNROLL for (int j = 0; j < vecs; j++) sum[i][j] = vec_fma(first_of(both), first[j], sum[i][j]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vecs; j++) vec_store(c + i * ldc + j * VEC_FLOATS, sum[i][j]);
}

/* All columns: those of several rows in two halves where registers are few, of which the first fetches whole rows. */
TARGET INLINE void NAME(panel_of_pairs)(const int rows, const uint16_t *x, long ldx, const uint16_t *w, long ldw,
                                        long pairs, float *c, long ldc, Ahead fetch) {
    const int vecs = rows > 1 ? COLUMN_VECS : PANEL_VECS;
    NAME(pairs_of_rows)(rows, vecs, x, ldx, w, ldw, pairs, c, ldc, fetch);
    if (vecs < PANEL_VECS)
        NAME(pairs_of_rows)(rows, vecs, x, ldx, w + PANEL, ldw, pairs, c + PANEL / 2, ldc, (Ahead){0, 0});
}

/* The same for any number m of rows. */
TARGET static void NAME(pairs_product)(const uint16_t *x, long ldx, long m, const uint16_t *w, long ldw, long pairs,
                                       float *c, long ldc, Ahead fetch) {
    for (; m >= ROWS_OF_PAIRS; m -= ROWS_OF_PAIRS, x += ROWS_OF_PAIRS * ldx, c += ROWS_OF_PAIRS * ldc, fetch.rows = 0)
        NAME(panel_of_pairs)(ROWS_OF_PAIRS, x, ldx, w, ldw, pairs, c, ldc, fetch);
    for (; m >= 4 && ROWS_OF_PAIRS > 4; m -= 4, x += 4 * ldx, c += 4 * ldc, fetch.rows = 0)
        NAME(panel_of_pairs)(4, x, ldx, w, ldw, pairs, c, ldc, fetch);
    for (; m >= 2 && ROWS_OF_PAIRS > 2; m -= 2, x += 2 * ldx, c += 2 * ldc, fetch.rows = 0)
        NAME(panel_of_pairs)(2, x, ldx, w, ldw, pairs, c, ldc, fetch);
    for (; m >= 1; m--, x += ldx, c += ldc, fetch.rows = 0) NAME(panel_of_pairs)(1, x, ldx, w, ldw, pairs, c, ldc, fetch);
}

/* Columns [first, d) of c [m][d] = x w for w [pairs][d][2]: those behind the last full panel, a multiple of 8. */
TARGET static void NAME(last_pairs)(const uint16_t *x, long ldx, long m, const uint16_t *w, long d, long pairs,
                                    long first, float *c, long ldc) {
#if VECTORS == 128
    for (long i = 0; i < m; i++)
        for (long j = first; j < d; j += 4) {
            vec sum = vec_set1(0.0f);
            for (long p = 0; p < pairs; p++) {
                int_vec row = int_load(w + (p * d + j) * 2);
                sum = vec_fma(vec_set1(bits_float((uint32_t)x[i * ldx + 2 * p + 1] << 16)), second_of(row), sum);
                sum = vec_fma(vec_set1(bits_float((uint32_t)x[i * ldx + 2 * p] << 16)), first_of(row), sum);
            }
            vec_store(c + i * ldc + j, sum);
        }
#else
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    for (long i = 0; i < m; i++)
        for (long j = first; j < d; j += 8) {
            __m256 sum = _mm256_setzero_ps();
            for (long p = 0; p < pairs; p++) {
                __m256i row = _mm256_loadu_si256((const __m256i *)(w + (p * d + j) * 2));
                __m256 a = _mm256_set1_ps(bits_float((uint32_t)x[i * ldx + 2 * p] << 16));
                __m256 b = _mm256_set1_ps(bits_float((uint32_t)x[i * ldx + 2 * p + 1] << 16));
                sum = _mm256_fmadd_ps(b, _mm256_castsi256_ps(_mm256_and_si256(row, high)), sum);
                sum = _mm256_fmadd_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(row, 16)), sum);
            }
            _mm256_storeu_ps(c + i * ldc + j, sum);
        }
#endif
}

/* pairs [D][2], of which x [D] becomes the first number, or the second one. With the first one, the second is multiplied
   by 0, so it must be a number: 0. */
TARGET static inline void NAME(put_values)(const uint16_t *x, long d, int second, uint16_t *pairs) {
    for (long j = 0; j < d; j++) {
        uint32_t pair = x[j];
        if (second) {
            memcpy(&pair, pairs + 2 * j, 4);
            pair = (pair & 0xffff) | (uint32_t)x[j] << 16;
        }
        memcpy(pairs + 2 * j, &pair, 4);
    }
}

/* As attention_head(), with a cache in bf16 and the given product. */
TARGET static void NAME(attention_head_bf16)(const Step *s, const Buffers *at, long layer, long r, long h,
                                             float *scratch, const char *next, PairsProduct *product) {
    const Model *model = s->model;
    long n_heads = model->n_heads, d = model->head_dim, slots = model->cache_slots, q = s->query, inner = n_heads * d;
    long cache_head = (s->cache_row[r] * n_heads + h) * slots * d;
    uint16_t *k_cache = (uint16_t *)s->keys[layer] + cache_head;   /* [S/PANEL][D/2][PANEL][2] */
    uint16_t *v_cache = (uint16_t *)s->values[layer] + cache_head; /* [S/2][D][2] */
    long first = s->write[r], visible = first + q;                 /* T, the keys that this row attends to */
    long padded = (visible + PANEL - 1) / PANEL * PANEL, pairs = (visible + 1) / 2;
    float *scores = scratch;                                        /* [q][padded] */
    float *inverse_sum = scores + q * padded;                       /* [q] */
    float *row_of = inverse_sum + q;                                /* [D] */
    uint16_t *queries = (uint16_t *)(row_of + d);                   /* [q][D] */
    uint16_t *rounded = queries + q * d;                            /* [D] */
    uint16_t *masses = rounded + d;                                 /* [q][padded] */
    for (long t = 0; t < q; t++) {
        const float *row = at->qkv + (r * q + t) * 3 * inner + h * d; /* as in attention_head() */
        long slot = first + t;
        const float *cosine = model->cosine + slot * d / 2, *sine = model->sine + slot * d / 2; /* [D/2] */
        uint16_t *key = k_cache + slot / PANEL * PANEL * d + slot % PANEL * 2; /* [D/2] pairs, 2*PANEL apart */
        uint16_t *value = v_cache + slot / 2 * 2 * d;                          /* [D] pairs */
        NAME(rotate)(row, cosine, sine, d, model->attention_scale, row_of);
        NAME(round_bf16)(row_of, d, queries + t * d);
        NAME(rotate)(row + inner, cosine, sine, d, 1.0f, row_of);
        NAME(round_bf16)(row_of, d, rounded);
        for (long j = 0; j < d / 2; j++) memcpy(key + j * 2 * PANEL, rounded + 2 * j, 4);
        NAME(round_bf16)(row + 2 * inner, d, rounded);
        NAME(put_values)(rounded, d, slot % 2, value);
    }
    for (long p = 0; p < padded; p += PANEL)
        product(queries, d, q, k_cache + p * d, 2 * PANEL, d / 2, scores + p, padded,
                ahead_of_keys((char *)(k_cache + p * d), (char *)v_cache, p, padded, d, 2));
    float *out = at->attention_out + r * q * inner + h * d; /* [q][D], `inner` apart */
    for (long t = 0; t < q; t++) {
        prefetch_share(next, t, q);
        inverse_sum[t] = NAME(softmax)(scores + t * padded, visible);
        for (long j = visible; j < 2 * pairs; j++) scores[t * padded + j] = 0;
        NAME(round_bf16)(scores + t * padded, padded, masses + t * padded);
    }
    long column = 0;
    for (; column + PANEL <= d; column += PANEL)
        product(masses, padded, q, v_cache + 2 * column, 2 * d, pairs, out + column, inner,
                ahead_of_values(column, pairs, 4 * d, 2));
    if (column < d) NAME(last_pairs)(masses, padded, q, v_cache, d, pairs, column, out, inner);
    for (long t = 0; t < q; t++)
        for (long j = 0; j < d; j++) out[t * inner + j] *= inverse_sum[t];
}

#undef int_vec
#undef int_load
#undef int_set1
#undef first_of
#undef second_of
#undef ROWS_OF_PAIRS
