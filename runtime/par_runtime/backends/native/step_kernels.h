/* Embedding, RMSNorm and SwiGLU of the step network for one instruction set; vectors.h describes the macros, step.c the
   letters. */

/* e^x with a relative error of about 1e-7: 2^n times a polynomial in the remainder. The coefficients are those of expf
   in the Cephes library. Below -87 it is e^-87. */
TARGET static inline vec NAME(exp_approx)(vec x) {
    x = vec_min(vec_max(x, vec_set1(-87.0f)), vec_set1(88.0f));
    vec n = vec_round(vec_mul(x, vec_set1(1.44269504088896341f)));
    x = vec_fma(n, vec_set1(2.12194440e-4f), vec_fma(n, vec_set1(-0.693359375f), x));
    vec y = vec_set1(1.9875691500e-4f);
    y = vec_fma(y, x, vec_set1(1.3981999507e-3f));
    y = vec_fma(y, x, vec_set1(8.3334519073e-3f));
    y = vec_fma(y, x, vec_set1(4.1665795894e-2f));
    y = vec_fma(y, x, vec_set1(1.6666665459e-1f));
    y = vec_fma(y, x, vec_set1(5.0000001201e-1f));
    y = vec_add(vec_fma(vec_mul(y, x), x, x), vec_set1(1.0f));
    return NAME(vec_scale)(y, n);
}

/* out [M][PANEL/2] = silu(a) * b, rows `ldo` apart, for c [M][PANEL]: each row holds PANEL/2 columns of a, then of b. */
TARGET static void NAME(swiglu)(const float *c, long m, float *out, long ldo) {
    for (long i = 0; i < m; i++)
        for (long j = 0; j < PANEL / 2; j += VEC_FLOATS) {
            vec a = vec_load_fp32(c + i * PANEL + j), b = vec_load_fp32(c + i * PANEL + PANEL / 2 + j);
            vec mass = NAME(exp_approx)(vec_sub(vec_set1(0.0f), a));
            vec_store(out + i * ldo + j, vec_mul(vec_div(a, vec_add(vec_set1(1.0f), mass)), b));
        }
}

/* scale [M] = 1 / sqrt(mean of squares + epsilon) of each row of x [M][dim]; dim is a multiple of PANEL. */
TARGET static void NAME(inverse_rms)(const float *x, long dim, long m, float *scale) {
    for (long i = 0; i < m; i++) {
        const float *row = x + i * dim; /* [dim] */
        vec part[4];                    /* more than one sum, so that additions need not wait for each other */
        for (int l = 0; l < 4; l++) part[l] = vec_set1(0.0f);
        for (long j = 0; j < dim; j += PANEL)
            for (int l = 0; l < PANEL_VECS; l++) {
                vec numbers = vec_load_fp32(row + j + l * VEC_FLOATS);
                part[l % 4] = vec_fma(numbers, numbers, part[l % 4]);
            }
        float sum = vec_reduce_add(vec_add(vec_add(part[0], part[1]), vec_add(part[2], part[3])));
        scale[i] = 1.0f / sqrtf(sum / (float)dim + RMS_EPSILON);
    }
}
