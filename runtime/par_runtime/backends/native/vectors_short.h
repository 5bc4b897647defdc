/* Vectors of 16 bytes for vectors.h: NEON of 64-bit ARM. On x86-64 the same kernels exist in SSE with FMA and F16C, so
   that tests there run them (PARVIS_NATIVE=sse). NEON has 32 registers: 24 sums. */

#define VEC_FLOATS 4
#define ROWS_MAX 6
#define ROWS_WHOLE 3
#define COLUMN_VECS HALF_VECS
#define PASSES_NARROW 3
#define CODES_DIRECT 1

#if defined(__aarch64__)
#define SUFFIX neon
#define TARGET
#define vec float32x4_t
#define vec_load_fp32 vld1q_f32
#define vec_load_fp16(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define vec_load_bf16(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))
#define vec_load_int8(p) vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four_bytes(p))))))
#define vec_load_int4(p, shift)                                                                                   \
    vcvtq_f32_s32(vsubq_s32(                                                                                      \
        vreinterpretq_s32_u32(vandq_u32(                                                                          \
            vshlq_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four_bytes(p))))), vdupq_n_s32(-(shift))),       \
            vdupq_n_u32(15))),                                                                                    \
        vdupq_n_s32(8)))
#define vec_store vst1q_f32
#define vec_set1 vdupq_n_f32
#define vec_add vaddq_f32
#define vec_sub vsubq_f32
#define vec_mul vmulq_f32
#define vec_div vdivq_f32
#define vec_max(a, b) NAME(larger_of)(a, b)
#define vec_min(a, b) NAME(smaller_of)(a, b)
#define vec_fma(a, b, c) vfmaq_f32(c, a, b)
#define vec_round vrndnq_f32
#define vec_or_zero(x, a, b) vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vcgeq_f32(a, b)))
/* As those of x86: b where one of both is a NaN. */
TARGET static inline vec NAME(larger_of)(vec a, vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
TARGET static inline vec NAME(smaller_of)(vec a, vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
/* 2^n for whole numbers n from -126 to 127 */
#define power_of_2(n) vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23))
#define whole_of vcvtnq_s32_f32
#define half_of(n) vshrq_n_s32(n, 1)
#define difference_of vsubq_s32
#define whole int32x4_t
#else
#define SUFFIX sse
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define vec __m128
#define vec_load_fp32 _mm_loadu_ps
#define vec_load_fp16(p) _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(p)))
#define vec_load_bf16(p) \
    _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)(p))), 16))
#define vec_load_int8(p) _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128((int)four_bytes(p))))
#define vec_load_int4(p, shift)                                                                                    \
    _mm_cvtepi32_ps(_mm_sub_epi32(                                                                                 \
        _mm_and_si128(_mm_srli_epi32(_mm_cvtepu8_epi32(_mm_cvtsi32_si128((int)four_bytes(p))), shift),             \
                      _mm_set1_epi32(15)),                                                                         \
        _mm_set1_epi32(8)))
#define vec_store _mm_storeu_ps
#define vec_set1 _mm_set1_ps
#define vec_add _mm_add_ps
#define vec_sub _mm_sub_ps
#define vec_mul _mm_mul_ps
#define vec_div _mm_div_ps
#define vec_max _mm_max_ps
#define vec_min _mm_min_ps
#define vec_fma _mm_fmadd_ps
#define vec_round(x) _mm_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define vec_or_zero(x, a, b) _mm_and_ps(_mm_cmp_ps(a, b, _CMP_GE_OQ), x)
#define power_of_2(n) _mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(n, _mm_set1_epi32(127)), 23))
#define whole_of _mm_cvtps_epi32
#define half_of(n) _mm_srai_epi32(n, 1)
#define difference_of _mm_sub_epi32
#define whole __m128i
#endif

#define vec_reduce_add NAME(sum_of)
#define vec_reduce_max NAME(largest_of)

static inline uint32_t four_bytes(const void *from) {
    uint32_t bytes;
    memcpy(&bytes, from, 4);
    return bytes;
}

TARGET static inline float NAME(sum_of)(vec x) {
    float each[4];
    vec_store(each, x);
    return (each[0] + each[2]) + (each[1] + each[3]);
}

TARGET static inline float NAME(largest_of)(vec x) {
    float each[4];
    vec_store(each, x);
    float even = each[0] > each[2] ? each[0] : each[2], odd = each[1] > each[3] ? each[1] : each[3];
    return even > odd ? even : odd;
}

/* x * 2^n for whole numbers n from -150 to 128: in two steps, because a float has no 2^-150 and no 2^128 */
TARGET static inline vec NAME(vec_scale)(vec x, vec n) {
    whole all = whole_of(n), first = half_of(all);
    return vec_mul(vec_mul(x, power_of_2(first)), power_of_2(difference_of(all, first)));
}

#undef power_of_2
#undef whole_of
#undef half_of
#undef difference_of
#undef whole
