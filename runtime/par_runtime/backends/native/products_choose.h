/* Which product a matrix is multiplied with: its layout says it, and the layout is chosen by what this CPU can. */

#define TILES_FROM_ROWS 16 /* in int8: fewer rows are as fast in dot products, or faster */

/* The layout in which this CPU multiplies a matrix. */
int64_t parvis_layout(int64_t stored, int64_t arithmetic) {
    Instructions have = instructions_of_cpu();
    if (arithmetic == MULTIPLY_BF16 && have.bf16_dot)
        return stored == INT8 ? PAIRS_SIGN8 : stored == INT4 ? WORDS_INT4 : PAIRS_BF16;
    if (arithmetic == MULTIPLY_BF16 && have.bf16_matrix)
        return stored == INT8 ? QUADS_INT8 : stored == INT4 ? QUADS_INT4 : FOURS_BF16;
    if (arithmetic == MULTIPLY_INT8 && have.int8_matrix) return stored == INT8 ? OCTETS_INT8 : OCTETS_INT4;
    if (arithmetic == MULTIPLY_INT8 && (have.int8_dot || have.vnni)) return stored == INT8 ? QUADS_INT8 : QUADS_INT4;
    if (have.short_vectors) return arithmetic == MULTIPLY_BF16 && stored < INT8 ? ROWS_BF16 : stored;
    if (arithmetic == MULTIPLY_INT8) return stored == INT8 ? PAIRS_INT8 : BYTES_INT4;
    return arithmetic == MULTIPLY_BF16 && stored < INT8 ? ROWS_BF16 : stored;
}

/* The product of m rows with a matrix. In bf16 it is the same for every m, since tiles sum up in another order; in int8
   all have the same bits. */
static Product product_of(const Kernels *kernels, const Matrix *w, long m) {
#ifdef HAS_VECTORS
    if (kernels->bits == 128) {
#ifdef HAS_BFMMLA
        if (w->arithmetic == MULTIPLY_BF16 && w->layout >= QUADS_INT8) /* QUADS_INT8, QUADS_INT4, FOURS_BF16 */
            return (Product){pack_rows_fours_neon, panel_product_bf16_bfmmla};
#endif
#ifdef HAS_SMMLA
        if (w->layout == OCTETS_INT8 || w->layout == OCTETS_INT4)
            return (Product){pack_rows_octets_neon, panel_product_int8_smmla};
#endif
#ifdef HAS_SDOT
        if (w->layout == QUADS_INT8 || w->layout == QUADS_INT4)
            return (Product){pack_rows_quads_neon, panel_product_int8_sdot};
#endif
        if (w->arithmetic == MULTIPLY_INT8) return (Product){SHORT(pack_rows_codes), SHORT(panel_product_int8)};
        if (w->arithmetic == MULTIPLY_BF16) return (Product){SHORT(pack_rows_bf16), SHORT(panel_product_fp32)};
        return (Product){SHORT(pack_rows_fp32), SHORT(panel_product_fp32)};
    }
#endif
#ifdef HAS_AVX
    int avx512 = kernels->bits == 512;
#ifdef HAS_TILES
    if (kernels->tiles && (w->layout == PAIRS_BF16 || w->layout == PAIRS_SIGN8 || w->layout == WORDS_INT4))
        return (Product){pack_rows_tiles_avx512, panel_product_bf16_tiles};
    if (kernels->tiles && m >= TILES_FROM_ROWS && (w->layout == QUADS_INT8 || w->layout == QUADS_INT4))
        return (Product){pack_rows_code_tiles_avx512, panel_product_int8_tiles};
#endif
    switch (w->layout) {
#ifdef HAS_DOT
    case PAIRS_BF16:
    case PAIRS_SIGN8:
    case WORDS_INT4: return (Product){pack_rows_pairs_avx512, panel_product_bf16_dot};
    case QUADS_INT8:
    case QUADS_INT4:
#ifdef HAS_VNNI
        if (!avx512) return (Product){pack_rows_quads_avx2, panel_product_int8_vnni};
#endif
        return (Product){pack_rows_quads_avx512, panel_product_int8_dot};
#endif
    case PAIRS_INT8: return (Product){avx512 ? pack_rows_words_avx512 : pack_rows_words_avx2, panel_product_int8_twin};
    case BYTES_INT4: return (Product){avx512 ? pack_rows_quads_avx512 : pack_rows_quads_avx2, panel_product_int8_twin};
    default: /* ROWS_* */
        if (w->arithmetic == MULTIPLY_BF16)
            return avx512 ? (Product){pack_rows_bf16_avx512, panel_product_fp32_avx512}
                          : (Product){pack_rows_bf16_avx2, panel_product_fp32_avx2};
        return avx512 ? (Product){pack_rows_fp32_avx512, panel_product_fp32_avx512}
                      : (Product){pack_rows_fp32_avx2, panel_product_fp32_avx2};
    }
#endif
    (void)kernels, (void)w, (void)m;
    return (Product){NULL, NULL};
}
