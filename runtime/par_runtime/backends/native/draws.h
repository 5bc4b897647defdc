/* Guidance and the draw of a token, for one instruction set; vectors.h describes the macros.

   The tokens are those of draws.py in the Python package for the same logits: every number is rounded as numpy rounds
   it. So products and sums are kept apart here (a fused multiply-add rounds once instead of twice), sums go through the
   codes one after the other, and e^x is numpy's of x86-64. (On ARM numpy's differs in the last bit of every third number,
   so there a token may be the next one where the noise falls between two codes.) */

/* The compiler must not fuse the product `x` with the sum that it is used in. */
#define KEEP_ROUNDED(x) __asm__("" : FLOAT_REGISTER(x))

/* out [n] = uncond + (cond - uncond) * guidance; n is a multiple of PANEL. */
TARGET static void NAME(guide)(const float *cond, const float *uncond, float guidance, long n, float *out) {
    vec scale = vec_set1(guidance);
    for (long i = 0; i < n; i += VEC_FLOATS) {
        vec without = vec_load_fp32(uncond + i);
        vec change = vec_mul(vec_sub(vec_load_fp32(cond + i), without), scale);
        KEEP_ROUNDED(change);
        vec_store(out + i, vec_add(change, without));
    }
}

/* e^x as numpy computes it for float32 on x86-64: 2^n times a quotient of polynomials in the remainder. */
TARGET static inline vec NAME(exp_numpy)(vec x) {
    vec n = vec_round(vec_mul(x, vec_set1(1.44269504088896341f)));
    vec r = vec_fma(n, vec_set1(-1.42860677e-6f), vec_fma(n, vec_set1(-6.93145752e-1f), x));
    vec p = vec_set1(5.082762527590693718096e-04f);
    p = vec_fma(p, r, vec_set1(6.757896990527504603057e-03f));
    p = vec_fma(p, r, vec_set1(5.114512081637298353406e-02f));
    p = vec_fma(p, r, vec_set1(2.473615434895520810817e-01f));
    p = vec_fma(p, r, vec_set1(7.257664613233124478488e-01f));
    p = vec_fma(p, r, vec_set1(9.999999999980870924916e-01f));
    vec q = vec_set1(2.159509375685829852307e-02f);
    q = vec_fma(q, r, vec_set1(-2.742335390411667452936e-01f));
    q = vec_fma(q, r, vec_set1(1.0f));
    vec lowest = vec_set1(-103.97208404541015625f); /* below, e^x is 0 */
    return vec_or_zero(NAME(vec_scale)(vec_div(p, q), vec_max(n, vec_set1(-150.0f))), x, lowest);
}

/* What top-k and top-p keep of the scaled logits y [V], whose maximum is `largest`. `keys` is [2*V].

   Top-p needs the sum of e^(y - largest) over all codes, the largest first, in fp32. From the first code on, whose term
   is 1, the sum is at least 1, so a term below 2^-25 does not change it. Such codes are not sorted (unless top-k looks
   for one of them). They are kept where the sum before them is within the threshold, so all of them or none. */
TARGET static Kept NAME(filter)(const float *y, long v, float largest, int64_t top_k, float top_p,
                                      uint32_t *keys) {
    Kept kept = {.least = -INFINITY, .edge = -INFINITY, .tied = v};
    int by_k = top_k > 0 && top_k < v, by_p = top_p < 1;
    float least = largest - 18.0f; /* e^-18 < 2^-25 */
    long n = sorted_keys(y, v, least, keys);
    if (by_k && top_k > n) n = sorted_keys(y, v, -INFINITY, keys);
    if (by_k && top_k <= n) kept.least = value_of_key(keys[top_k - 1]);
    if (!by_p || !n) return kept;
    float *ranked = (float *)keys, *mass = ranked + v; /* ranked: the keys as numbers, in place */
    for (long i = 0; i < n; i++) ranked[i] = value_of_key(keys[i]);
    long counted = 0; /* those that top-k keeps; the terms of the others are 0 */
    while (counted < n && ranked[counted] >= kept.least) counted++;
    for (long i = 0; i < counted; i += VEC_FLOATS) { /* behind the end it writes what nobody reads */
        vec x = vec_sub(vec_load_fp32(ranked + i), vec_set1(ranked[0]));
        vec_store(mass + i, NAME(exp_numpy)(x));
    }
    for (long i = counted; i < n; i++) mass[i] = 0;
    float total = 0;
    for (long i = 0; i < counted; i++) total += mass[i];
    float most = top_p * total, sum = 0;
    long within = total <= most ? v - n : 0; /* of the codes that were not sorted */
    for (long i = 0; i < n; i++) {
        sum += mass[i];
        within += sum - mass[i] <= most;
    }
    if (within > n || within >= v) return kept;
    long last = within > 0 ? within - 1 : 0;
    kept.edge = ranked[last];
    long first = last; /* of the codes that are equal to the edge */
    while (first > 0 && ranked[first - 1] == kept.edge) first--;
    kept.tied = last - first + 1;
    return kept;
}

/* The token that `uniform` in [0,1) draws from the logits y [V], which are overwritten. Vectors go on behind the last
   logit: y has -INFINITY there, up to a multiple of PANEL (end_of_logits), and `scratch` three times as much room. */
TARGET static int64_t NAME(draw)(float *y, long v, float uniform, float temperature, int64_t top_k, float top_p,
                                 float *scratch) {
    vec divisor = vec_set1(temperature > MIN_TEMPERATURE ? temperature : MIN_TEMPERATURE), most = vec_set1(-INFINITY);
    for (long i = 0; i < v; i += VEC_FLOATS) {
        vec scaled = vec_div(vec_load_fp32(y + i), divisor);
        most = vec_max(most, scaled);
        vec_store(y + i, scaled);
    }
    float largest = vec_reduce_max(most);
    if (top_k == 1 && uniform == 0) { /* greedy; ties go to the lowest id */
        for (long i = 0; i < v; i++)
            if (y[i] == largest) return i;
        return 0;
    }
    float *cdf = scratch; /* [V] */
    int filtered = top_p < 1 || (top_k > 0 && top_k < v);
    Kept kept = {0};
    if (filtered) kept = NAME(filter)(y, v, largest, top_k, top_p, (uint32_t *)(scratch + v));
    vec least = vec_set1(filtered ? (kept.least > kept.edge ? kept.least : kept.edge) : -INFINITY);
    for (long i = 0; i < v; i += VEC_FLOATS) {
        vec x = vec_load_fp32(y + i), mass = NAME(exp_numpy)(vec_sub(x, vec_set1(largest)));
        if (filtered) mass = vec_or_zero(mass, x, least);
        vec_store(cdf + i, mass);
    }
    float sum = 0;
    for (long i = 0; i < v; i++) {
        if (filtered && y[i] == kept.edge && kept.tied-- <= 0) cdf[i] = 0;
        cdf[i] = sum += cdf[i];
    }
    float threshold = uniform * sum;
    long low = 0, high = v - 1; /* the first code whose sum is above the threshold; the last code if there is none */
    while (low < high) {
        long middle = (low + high) / 2;
        if (cdf[middle] <= threshold) low = middle + 1;
        else high = middle;
    }
    return low;
}
