/* Vectors of one instruction set under one name, for the kernels of step.c and decoder.c, which include this file once per
   set, with VECTORS defined as 512 (AVX-512), 256 (AVX2, FMA, F16C) or 128 (vectors_short.h):

   SUFFIX      name of the set; NAME(f) is f_SUFFIX
   TARGET      attribute that allows the set's instructions
   VEC_FLOATS  floats of a vector
   vec         the type of a vector of floats; vec_* are operations on it, on each number by itself
   ROWS_MAX       rows of activations that are multiplied at once, at most
   ROWS_WHOLE     rows whose sums for all columns of a panel are in registers at once, at most
   COLUMN_VECS    vectors of columns that are multiplied at a time where there are more rows than that
   PASSES_NARROW  passes over weights of 16 bits, at most, that each convert the weights for themselves
   CODES_DIRECT   whether a single pass makes numbers of codes in registers, and not in memory first */

#undef SUFFIX
#undef TARGET
#undef ROWS_MAX
#undef ROWS_WHOLE
#undef COLUMN_VECS
#undef PASSES_NARROW
#undef CODES_DIRECT
#undef VEC_FLOATS
#undef vec
#undef vec_load_fp32
#undef vec_load_fp16
#undef vec_load_bf16
#undef vec_load_int8
#undef vec_load_int4
#undef vec_store
#undef vec_set1
#undef vec_add
#undef vec_sub
#undef vec_mul
#undef vec_div
#undef vec_max
#undef vec_min
#undef vec_fma
#undef vec_round
#undef vec_reduce_add
#undef vec_reduce_max
#undef vec_or_zero

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define NAME(f) CAT(f, SUFFIX)
#define PANEL_VECS (PANEL / VEC_FLOATS)
#define HALF_VECS (PANEL_VECS / 2)

#if VECTORS == 512
#define SUFFIX avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,fma,f16c,avx2")))
#define ROWS_MAX 12
#define ROWS_WHOLE 12
#define COLUMN_VECS 2
#define PASSES_NARROW 1
#define CODES_DIRECT 0
#define VEC_FLOATS 16
#define vec __m512
#define vec_load_fp32 _mm512_loadu_ps
#define vec_load_fp16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define vec_load_bf16(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define vec_load_int8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define vec_load_int4(p, shift)                                                                                        \
    _mm512_cvtepi32_ps(_mm512_sub_epi32(                                                                               \
        _mm512_and_si512(_mm512_srli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p))), shift),        \
                         _mm512_set1_epi32(15)),                                                                       \
        _mm512_set1_epi32(8)))
#define vec_store _mm512_storeu_ps
#define vec_set1 _mm512_set1_ps
#define vec_add _mm512_add_ps
#define vec_sub _mm512_sub_ps
#define vec_mul _mm512_mul_ps
#define vec_div _mm512_div_ps
#define vec_max _mm512_max_ps
#define vec_min _mm512_min_ps
#define vec_fma _mm512_fmadd_ps
#define vec_round(x) _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define vec_reduce_add _mm512_reduce_add_ps
#define vec_reduce_max _mm512_reduce_max_ps
/* x where a >= b, else 0 */
#define vec_or_zero(x, a, b) _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), x)

/* x * 2^n for whole numbers n from -150 to 128 */
TARGET static inline vec NAME(vec_scale)(vec x, vec n) { return _mm512_scalef_ps(x, n); }

#elif VECTORS == 256
#define SUFFIX avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define ROWS_MAX 6
#define ROWS_WHOLE 3
#define COLUMN_VECS 2
#define PASSES_NARROW 3
#define CODES_DIRECT 1
#define VEC_FLOATS 8
#define vec __m256
#define vec_load_fp32 _mm256_loadu_ps
#define vec_load_fp16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define vec_load_bf16(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define vec_load_int8(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define vec_load_int4(p, shift)                                                                                        \
    _mm256_cvtepi32_ps(_mm256_sub_epi32(                                                                               \
        _mm256_and_si256(_mm256_srli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p))), shift),        \
                         _mm256_set1_epi32(15)),                                                                       \
        _mm256_set1_epi32(8)))
#define vec_store _mm256_storeu_ps
#define vec_set1 _mm256_set1_ps
#define vec_add _mm256_add_ps
#define vec_sub _mm256_sub_ps
#define vec_mul _mm256_mul_ps
#define vec_div _mm256_div_ps
#define vec_max _mm256_max_ps
#define vec_min _mm256_min_ps
#define vec_fma _mm256_fmadd_ps
#define vec_round(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define vec_reduce_add NAME(sum_of)
#define vec_reduce_max NAME(largest_of)
#define vec_or_zero(x, a, b) _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), x)

TARGET static inline float NAME(sum_of)(vec x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

TARGET static inline float NAME(largest_of)(vec x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

/* x * 2^n for whole numbers n from -150 to 128: in two steps, because a float has no 2^-150 and no 2^128 */
TARGET static inline vec NAME(vec_scale)(vec x, vec n) {
    __m256i all = _mm256_cvtps_epi32(n), first = _mm256_srai_epi32(all, 1), one = _mm256_set1_epi32(127);
    __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, one), 23));
    __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(all, first), one), 23));
    return _mm256_mul_ps(_mm256_mul_ps(x, a), b);
}

#else
#include "vectors_short.h"
#endif
