/* Scales of a group of quantised weights, for the products of AVX2: products_twin.h and products_vnni.h. */

#define AVX2 __attribute__((target("avx2,fma,f16c")))

/* The scales of columns 8*j and after of a panel, as fp32; `stored`: FP32, FP16 or BF16. */
AVX2 INLINE __m256 scales_avx2(int64_t stored, const char *scales, int j) {
    if (stored == FP32) return _mm256_loadu_ps((const float *)scales + 8 * j);
    __m128i halves = _mm_loadu_si128((const __m128i *)scales + j);
    if (stored == FP16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* c = total * x_scale * scales, or c += that, for 8 columns. */
AVX2 INLINE void scaled_avx2(__m256i total, float x_scale, __m256 scales, float *c, int accumulate) {
    __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps(x_scale));
    _mm256_storeu_ps(c, _mm256_fmadd_ps(part, scales, accumulate ? _mm256_loadu_ps(c) : _mm256_setzero_ps()));
}
