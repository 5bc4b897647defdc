/* The weights of one matrix product, and the sizes that step.c reserves for it. products.h has the products. */

#include <stdint.h>
#include <string.h>

#define PANEL 32 /* columns of a panel */

/* How a matrix is stored, and what it is multiplied in; as in library.py. */
enum { FP32, FP16, BF16, INT8, INT4 };
enum { MULTIPLY_FP32, MULTIPLY_BF16, MULTIPLY_INT8 };

/* A matrix [K][N] in panels. The Python class Matrix of library.py has the same fields. */
typedef struct {
    const void *data;   /* [N/PANEL] panels of panel_bytes() */
    int64_t stored;     /* FP32, FP16, BF16, INT8 or INT4 */
    int64_t group;      /* rows of K that share a scale; 0 where there are no scales */
    int64_t arithmetic; /* MULTIPLY_FP32, MULTIPLY_BF16 or MULTIPLY_INT8: the panels were packed for it */
} Matrix;

/* Bytes of one panel [K][PANEL]. */
static inline int64_t panel_bytes(const Matrix *w, int64_t k) { return PANEL * k * (w->stored == FP32 ? 4 : 2); }

/* Bytes of the packed activations of m rows of k numbers. */
static inline int64_t packed_rows_bytes(int arithmetic, int64_t m, int64_t k, int64_t group) {
    (void)arithmetic, (void)group;
    return m * k * (int64_t)sizeof(float);
}

/* Bytes that one thread needs during a product. */
static inline int64_t product_scratch_bytes(int arithmetic, int64_t m, int64_t k) {
    (void)arithmetic, (void)m, (void)k;
    return 0;
}

/* Packs w [k][n], of `bytes` per number, into panels: out [n/PANEL][k][PANEL]; n is a multiple of PANEL. With
   `interleave_halves`, a panel holds PANEL/2 columns of the first half of w, then PANEL/2 of the second half. */
void parvis_pack(const char *w /* [k][n] */, int64_t k, int64_t n, int64_t bytes, int interleave_halves,
                 char *out /* [n/PANEL][k][PANEL] */) {
    int64_t run = (interleave_halves ? PANEL / 2 : PANEL) * bytes;
    /* w is read in order: it is a mapped file with small pages. `out` has huge pages. */
    for (int64_t row = 0; row < k; row++)
        for (int64_t p = 0; p < n / PANEL; p++) {
            const char *from = w + row * n * bytes + p * run;
            char *to = out + (p * k + row) * PANEL * bytes;
            memcpy(to, from, (size_t)run);
            if (interleave_halves) memcpy(to + run, from + n / 2 * bytes, (size_t)run);
        }
}
