/* What dots.c has for step.c: products with the dot products of AVX-512 (HAS_DOT), of AVX2 (HAS_VNNI) and of ARM (HAS_SDOT,
   HAS_SMMLA), and with AMX (HAS_TILES). */

#ifdef HAS_SDOT
__attribute__((visibility("hidden"))) PanelProduct panel_product_int8_sdot;
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
