/* The tiles of AMX, for what multiplies with them in the step and in the decoder; where HAS_TILES is defined. */

#include <immintrin.h>
#include <stdint.h>

#define TILED __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16,avx512vnni,amx-tile,amx-bf16,"  \
                                    "amx-int8,fma,f16c,avx2")))
/* A compiler may not know what memory is read and written where tiles are loaded, stored or shaped. */
#define ACCESSED __asm__ volatile("" ::: "memory")

/* What `ldtilecfg` reads. */
typedef struct {
    uint8_t palette, start_row, zeros[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

/* Shapes the tiles of this thread. Tiles 4 and 5 are rows of activations, 6 and 7 the panel's columns, `depth` bytes of K
   of each; 0 and 1 are the sums of the `rows` rows of tile 4, 2 and 3 those of the `other_rows` of tile 5. */
TILED static inline void shape_tiles(long rows, long other_rows, long depth) {
    _Alignas(64) TileShapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? depth : 64);
        shapes.rows[i] = (uint8_t)(i >= 6 ? depth / 4 : i == 0 || i == 1 || i == 4 ? rows : other_rows);
    }
    ACCESSED;
    _tile_loadconfig(&shapes);
    ACCESSED;
}

/* Of a thread whose tiles are in use, the system saves 8 KB more whenever it takes the CPU from it. */
TILED static inline void give_back_tiles(void) { _tile_release(); }
