/* The weights of one matrix product: how they are stored in panels, and sizes. products_choose.h has the products.

   A product is c [M][PANEL] = x w for M rows of activations and one panel of a matrix, in one of three arithmetics:

   MULTIPLY_FP32  both are fp32. Weights of fewer bits are widened, which is exact.
   MULTIPLY_BF16  activations, and weights of more bits, are rounded to bf16; sums are fp32.
   MULTIPLY_INT8  activations are rounded to int8, with a scale for each row and group of K; sums of a group are exact
                  integers.

   A product has two parts: pack_rows() brings activations into the order in which the product reads them, once for all
   panels of a matrix; panel_product() multiplies them by one panel. Each instruction set has its own order of numbers
   inside of a panel (a Layout), so that it reads a panel from the first byte to the last and decodes with as few
   instructions as it can. In a quantised panel the scales of a group stand in front of its codes.

   Letters: M rows of activations, K inner size, N columns of a matrix. [A][B] is an array in C order. */

#include <stdint.h>
#include <string.h>

#include "compilers.h"
#include "stored.h"

#define PANEL 32 /* columns of a panel */

/* What a matrix is multiplied in; as in library.py. */
enum { MULTIPLY_FP32, MULTIPLY_BF16, MULTIPLY_INT8 };

/* The order of the numbers of a panel, or of the codes of a group of a panel: */
typedef enum {
    ROWS_FP32,   /* [K][PANEL] fp32 */
    ROWS_FP16,   /* [K][PANEL] fp16 */
    ROWS_BF16,   /* [K][PANEL] bf16 */
    ROWS_INT8,   /* [K][PANEL] signed bytes */
    ROWS_INT4,   /* [K/2][PANEL] bytes: code + 8 of an even row in the low half, of the next row in the high half */
    PAIRS_BF16,  /* [K/2][PANEL][2] bf16 */
    PAIRS_SIGN8, /* [K/2] lines of 64 bytes, sign and 7 bits of magnitude; line_place() has the order */
    PAIRS_INT8,  /* [K/2][PANEL][2] signed bytes */
    WORDS_INT4,  /* [K/8][PANEL][2] words of 16 bits: code + 8 of rows 8p+e, 8p+e+2, +4, +6, the lowest bits first */
    QUADS_INT8,  /* [K/4][PANEL][4] bytes, multiplied with dot products: code + 128; on ARM the code, signed */
    QUADS_INT4,  /* [K/8][PANEL][4] bytes: code + 8 of rows 8p .. 8p+3 in the low half, 8p+4 .. 8p+7 in the high half */
    BYTES_INT4,  /* the same, multiplied by products_twin.h */
    OCTETS_INT8, /* [K/8][PANEL][8] signed bytes, multiplied with SMMLA */
    OCTETS_INT4, /* [K/8][PANEL/2][8] bytes: code + 8 of a column of the first half of a panel in the low half, of the
                    same column of the second half in the high half */
    FOURS_BF16,  /* [K/4][PANEL][4] bf16, multiplied with BFMMLA */
} Layout;

/* A matrix [K][N] in panels. The Python class Matrix of library.py has the same fields. */
typedef struct {
    const void *data;   /* [N/PANEL] panels of panel_bytes() */
    int64_t stored;     /* FP32, FP16, BF16, INT8 or INT4 */
    int64_t group;      /* rows of K that share a scale; 0 where there are no scales */
    int64_t arithmetic; /* MULTIPLY_FP32, MULTIPLY_BF16 or MULTIPLY_INT8; the last one for int8 and int4 only */
    int64_t scales;     /* FP32, FP16 or BF16: what the scales are stored in */
    int64_t layout;     /* a Layout: what parvis_layout() chose for this CPU */
} Matrix;

/* Packs x [m][k], `ldx` numbers from row to row, for products with w. With `row_scale` [m] and `gain` [k], both or
   none, each number is multiplied by both first (RMSNorm). k is a multiple of 32 and of w's group. */
typedef void PackRows(const Matrix *w, const float *x, long ldx, long m, long k, const float *row_scale,
                      const float *gain, void *packed);
/* c [m][PANEL] = x w for packed x [m][k] and one panel of w. c has product_rows(m) rows, `scratch` has
   product_scratch_bytes(). */
typedef void PanelProduct(const Matrix *w, const void *packed, long m, long k, long panel, float *c, void *scratch);

typedef struct {
    PackRows *pack_rows;
    PanelProduct *panel_product;
} Product;

#define K_BLOCK 64          /* rows of a panel that stay in the L1 cache while all rows of activations are multiplied, */
#define K_BLOCK_DOT 128     /* and where they take fewer bytes; a multiple of every group */
#define PREFETCH_BYTES 6144 /* how far ahead weights are prefetched in products of one pass. At once into L1: two requests
                               for each line, into L2 and later into L1, read a tenth less */

/* Bytes of the packed activations of m rows of k numbers: what the largest form takes, floats with a scale for each
   LEAST_GROUP of them. */
#define LEAST_GROUP 32
INLINE int64_t packed_rows_bytes(int64_t m, int64_t k) {
    return m * (k + k / LEAST_GROUP) * (int64_t)sizeof(float);
}

/* Rows of activations in tiles (products_tiles.h): so many tiles, of equally many rows. */
#define TILE_ROWS 16
INLINE long tiles_of_rows(long m) { return m ? (m + TILE_ROWS - 1) / TILE_ROWS : 1; }
INLINE long tile_rows(long m) { return (m + tiles_of_rows(m) - 1) / tiles_of_rows(m); }

/* Rows of the tile that a product of m rows writes: tiles are written whole. */
INLINE long product_rows(long m) { return tiles_of_rows(m) * tile_rows(m); }

/* Bytes that one thread needs during a product: of a block of weights in fp32, or of a group in bf16, and of the sums of
   two tiles of rows. Products in tiles have two of each. */
#define DECODED_BYTES (K_BLOCK * PANEL * 4)
#define SUMS_BYTES (2 * TILE_ROWS * PANEL * 4)
_Static_assert(K_BLOCK_DOT * PANEL * 2 <= DECODED_BYTES, "the largest group must fit in bf16");
INLINE int64_t product_scratch_bytes(void) { return 2 * (DECODED_BYTES + SUMS_BYTES); }

INLINE long number_bytes(int64_t stored) { return stored == FP32 ? 4 : 2; } /* of floating point */

/* Bytes of a number, or of the code of INT8, or of the two codes of INT4 that share a byte. */
INLINE long unit_bytes(int64_t stored) { return stored >= INT8 ? 1 : number_bytes(stored); }

/* Bytes of `k` rows of a panel, scales included. */
INLINE int64_t panel_bytes(const Matrix *w, int64_t k) {
    int64_t numbers = k * PANEL, scales = w->group ? k / w->group * PANEL * number_bytes(w->scales) : 0;
    switch (w->layout) {
    case ROWS_FP32: return numbers * 4;
    case ROWS_FP16:
    case ROWS_BF16:
    case FOURS_BF16:
    case PAIRS_BF16: return numbers * 2;
    case ROWS_INT8:
    case PAIRS_SIGN8:
    case PAIRS_INT8:
    case OCTETS_INT8:
    case QUADS_INT8: return numbers + scales;
    default: return numbers / 2 + scales;
    }
}

INLINE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* The bf16 nearest to a float, ties to even. A NaN stays one. */
INLINE uint32_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* How `m` rows are divided into passes of at most `most` rows, as equal as possible: the rows of the next pass where
   `left` rows are left. */
INLINE long rows_of_pass(long left, long most) {
    long passes = (left + most - 1) / most;
    return (left + passes - 1) / passes;
}

/* What a pass over a block prefetches. Where there is only one pass, it prefetches at a distance from where it reads,
   and `from` is NULL. Of several passes each prefetches its share of the next block: `bytes` in each step. */
typedef struct {
    const char *from;
    long bytes;
} Prefetch;

/* For pass number `pass`, of `passes`, over a block of `bytes` at `w` in `steps` steps. */
INLINE Prefetch prefetch_of(const char *w, long bytes, long steps, long pass, long passes) {
    if (passes == 1) return (Prefetch){NULL, 0};
    return (Prefetch){w + bytes + bytes * pass / passes, bytes / (passes * steps)};
}

/* For a step that reads `bytes` at `w`. */
INLINE void prefetch_step(const Prefetch *prefetch, const char *w, long bytes, long step) {
    if (!prefetch->from) {
        for (long line = 0; line < bytes; line += 64) __builtin_prefetch(w + line + PREFETCH_BYTES, 0, 3);
    } else {
        const char *at = prefetch->from + step * prefetch->bytes;
        for (long line = 0; line <= prefetch->bytes - 1; line += 64) __builtin_prefetch(at + line, 0, 3);
    }
}
