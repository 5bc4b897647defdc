/* What dots.c has for step.c: products with the dot products of AVX-512 (HAS_DOT), of AVX2 (HAS_VNNI) and of ARM
   (HAS_SDOT), and of small matrices with ARM's instructions (HAS_SMMLA, HAS_BFMMLA) and with AMX (HAS_TILES). */

#ifdef HAS_ARM
/* What a function may use beyond what the compiler was told of the CPU. Of gcc, "arch=" takes the place of that, and a
   function inlines only one that needs no more; "+" adds to it, and gcc's own functions want Armv8.2 below. */
#if defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC) || defined(__ARM_FEATURE_DOTPROD) || \
    defined(__ARM_FEATURE_MATMUL_INT8) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define WITH(FEATURE) __attribute__((target("+" FEATURE)))
#else
#define WITH(FEATURE) __attribute__((target("arch=armv8.2-a+" FEATURE)))
#endif
#ifdef __ARM_FEATURE_DOTPROD
#define WITH_SDOT
#else
#define WITH_SDOT WITH("dotprod")
#endif
#ifdef __ARM_FEATURE_MATMUL_INT8
#define WITH_SMMLA
#else
#define WITH_SMMLA WITH("i8mm")
#endif
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define WITH_BF16
#else
#define WITH_BF16 WITH("bf16") /* BFMMLA and BFDOT */
#endif
#endif

#ifdef HAS_SDOT
__attribute__((visibility("hidden"))) PanelProduct panel_product_int8_sdot;
#endif
#ifdef HAS_BFMMLA
__attribute__((visibility("hidden"))) PanelProduct panel_product_bf16_bfmmla;
#endif
#ifdef HAS_SMMLA
__attribute__((visibility("hidden"))) PanelProduct panel_product_int8_smmla;
#endif

#ifdef HAS_DOT
#define DOT __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16,fma,f16c,avx2")))

__attribute__((visibility("hidden"))) PanelProduct panel_product_bf16_dot, panel_product_int8_dot;
#ifdef HAS_VNNI
__attribute__((visibility("hidden"))) PanelProduct panel_product_int8_vnni;
#endif
#ifdef HAS_TILES
#include "tiles.h"

__attribute__((visibility("hidden"))) PanelProduct panel_product_bf16_tiles, panel_product_int8_tiles;
__attribute__((visibility("hidden"))) void shape_tiles_of_product(const Matrix *w, long m);
#endif
#endif
