/* The vectors of each instruction set for decoder_kernels.h, which explains the macros, and with them its kernels. */

#ifdef HAS_AVX
#include <immintrin.h>

#define SUFFIX avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,fma,avx2")))
#define VEC_FLOATS 16
#define PASS_ROWS 12
#define PASS_VECS 2
#define vec __m512
#define vec_load _mm512_loadu_ps
#define vec_store _mm512_storeu_ps
#define vec_set1 _mm512_set1_ps
#define vec_fma _mm512_fmadd_ps
#define vec_max _mm512_max_ps
#define vec_min _mm512_min_ps
#define vec_round(x) _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT)
#define vec_scale _mm512_scalef_ps
#include "decoder_kernels.h"

#define SUFFIX avx2
#define TARGET __attribute__((target("avx2,fma")))
#define VEC_FLOATS 8
#define PASS_ROWS 6
#define PASS_VECS 2
#define vec __m256
#define vec_load _mm256_loadu_ps
#define vec_store _mm256_storeu_ps
#define vec_set1 _mm256_set1_ps
#define vec_fma _mm256_fmadd_ps
#define vec_max _mm256_max_ps
#define vec_min _mm256_min_ps
#define vec_round(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define vec_scale(x, n) \
    ((x) * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)))
#include "decoder_kernels.h"

#define SUFFIX sse /* for tests: instructions.h */
#define TARGET __attribute__((target("avx2,fma")))
#define VEC_FLOATS 4
#define PASS_ROWS 6
#define PASS_VECS 4
#define vec __m128
#define vec_load _mm_loadu_ps
#define vec_store _mm_storeu_ps
#define vec_set1 _mm_set1_ps
#define vec_fma _mm_fmadd_ps
#define vec_max _mm_max_ps
#define vec_min _mm_min_ps
#define vec_round(x) _mm_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define vec_scale(x, n) ((x) * _mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(_mm_cvtps_epi32(n), _mm_set1_epi32(127)), 23)))
#include "decoder_kernels.h"
#elif defined(HAS_VECTORS)
#include <arm_neon.h>

#define SUFFIX neon
#define TARGET
#define VEC_FLOATS 4
#define PASS_ROWS 6
#define PASS_VECS 4
#define vec float32x4_t
#define vec_load vld1q_f32
#define vec_store vst1q_f32
#define vec_set1 vdupq_n_f32
#define vec_fma(a, b, c) vfmaq_f32(c, a, b)
/* As those of x86: b where one of both is a NaN. */
#define vec_max(a, b) vbslq_f32(vcgtq_f32(a, b), a, b)
#define vec_min(a, b) vbslq_f32(vcltq_f32(a, b), a, b)
#define vec_round vrndnq_f32
#define vec_scale(x, n) ((x) * vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23)))
#include "decoder_kernels.h"
#endif
