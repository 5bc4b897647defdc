/* The kernels of decoder.c for each instruction set, and which of them this CPU takes. */

/* Winograd's form in fp32, or in bf16; decoder_winograd.h describes it. */
typedef struct {
    void (*transform_weights)(const float *w, long k, long first, long end, int points, float *u);
    void (*transform_input)(const Op *op, const float *map, const float *norm, long first, long count, long block,
                            long end, long place, float *v);
    void (*product)(const float *x, long ldx, const float *w, long words, long rows, float *c);
    void (*transform_output)(const Op *op, const float *c, long first, long count, long panel, float *map, float *sums);
} Winograd;

#define WINOGRAD_OF(SET) {transform_weights_##SET, transform_input_##SET, product_##SET, transform_output_##SET}

/* The kernels of one instruction set; decoder_kernels.h describes them. */
typedef struct {
    const char *instructions;
    void (*read_numbers)(const void *from, int64_t stored, long n, float *out);
    void (*product)(const float *x, long ldx, const float *w, long k, long rows, float *c);
    Winograd exact;
    void (*gather_pixels)(const Op *op, const float *map, const float *norm, long first, long count, long block,
                          long end, long place, float *v);
    void (*scatter_pixels)(const Op *op, const float *c, long first, long count, long panel, float *map, float *sums);
    void (*to_space)(const Op *op, const float *from, long t, long first, long count, float *map, float *sums);
    float (*softmax)(float *scores, long count, float scale);
} Kernels;

#define KERNELS_OF(SET, NAME)                         \
    {                                                 \
        .instructions = NAME,                         \
        .read_numbers = read_numbers_##SET,           \
        .product = product_##SET,                     \
        .exact = WINOGRAD_OF(SET),                    \
        .gather_pixels = gather_pixels_##SET,         \
        .scatter_pixels = scatter_pixels_##SET,       \
        .to_space = to_space_##SET,                   \
        .softmax = softmax_##SET,                     \
    }
#ifdef HAS_AVX
#include <immintrin.h>
#define VECTORS 512
#include "vectors.h"
#include "numbers.h"
#include "decoder_kernels.h"
#include "decoder_winograd.h"
#ifdef HAS_DOT
#define DOTS
#include "decoder_winograd.h"
#undef DOTS
#endif
#undef VECTORS
#define VECTORS 256
#include "vectors.h"
#include "numbers.h"
#include "decoder_kernels.h"
#include "decoder_winograd.h"
#undef VECTORS
#elif defined(HAS_VECTORS)
#include <arm_neon.h>
#endif
#ifdef HAS_VECTORS
#define VECTORS 128
#include "vectors.h"
#include "numbers.h"
#include "decoder_kernels.h"
#include "decoder_winograd.h"
#endif

/* The kernels for this CPU; NULL where there are none. PARVIS_NATIVE in the environment selects others (instructions.h). */
static const Kernels *select_kernels(void) {
#ifdef HAS_AVX
    static const Kernels avx512 = KERNELS_OF(avx512, "avx512"), avx2 = KERNELS_OF(avx2, "avx2"),
                         sse = KERNELS_OF(sse, "sse");
    Instructions have = instructions_of_cpu();
    if (have.avx512) return &avx512;
    if (have.avx2) return &avx2;
    if (have.short_vectors) return &sse;
#elif defined(HAS_VECTORS)
    static const Kernels neon = KERNELS_OF(neon, "neon");
    return &neon;
#endif
    return NULL;
}

/* The form that an operation is computed in. */
static const Winograd *form_of(const Kernels *kernels, const Op *op) {
#ifdef HAS_DOT
    static const Winograd dots = WINOGRAD_OF(dots);
    if (op->dots) return &dots;
#else
    (void)op;
#endif
    return &kernels->exact;
}

/* How operations are computed in bf16 here: 1 with `amx`, 2 with `dots`, 0 not at all. Dot products in bf16 multiply
   twice as fast as fp32 on AMD's CPUs, and no faster on Intel's. So Intel's take them in two cases only: where
   PARVIS_NATIVE says "dots", and where `least_exact` asks for the way that rounds the most, which proofs need. */
static int way_of_bf16(int least_exact) {
    Instructions have = instructions_of_cpu();
    const char *requested = getenv("PARVIS_NATIVE");
    if (!least_exact && tiles_of_cpu(have)) return 1;
#ifdef HAS_DOT
    int faster = __builtin_cpu_is("amd") || (requested && !strcmp(requested, "dots"));
    if (have.bf16_dot && (faster || least_exact)) return 2;
#else
    (void)requested;
#endif
    return 0;
}
