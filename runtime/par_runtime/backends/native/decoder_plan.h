/* The structures of decoder.c, which decoder.py fills, and the sizes that follow from them.

   Layouts, in which [A][B] is an array of A times B numbers in C order:
   map      [items][C/LANES][height][width][LANES]; an item is an image, or a frame of a clip
   rows     [images][pixels][C + LANES]
   keys     [images][pixels/PANEL][C][PANEL]
   values   [images][C/PANEL][pixels][PANEL]
   weights  of 3x3: [N/PANEL][K][9][PANEL] as stored, or [N/PANEL][points][K*PANEL + LANES] transformed, or with AMX as
            decoder_amx.h says; of 1x1: [N/PANEL][K][PANEL]. With `dots` the transformed ones are words of 32 bits, each
            of the numbers of two channels: [N/PANEL][points][K/2*PANEL + LANES]. K and N are the channels of input and
            output; a causal convolution has those of FRAMES_BEFORE + 1 frames beside each other as input, the earliest
            first.
   past     [images][past_floats]: of each causal convolution, at its offset, the last FRAMES_BEFORE frames of its input
            in the call before, each a map and then factors and shifts of its norm [2][C]
   LANES numbers at the end of a row keep rows apart in a cache, where a power of two would put them in one place. */

#include <stdint.h>

#define LANES 16            /* channels that lie together in a map */
#define PANEL 32            /* columns of a panel */
#define POINTS 36           /* products of a tile */
#define UPSAMPLED_POINTS 25 /* of them in the tile of a doubled map: those of five rows and columns */
#define VANISHING 2         /* the row and column of the point -1 */
#define TILES 24            /* that go through a convolution together */
#define PIXELS 96           /* that go through a 1x1 convolution together */
#define AMX_CHANNELS 32     /* of a tile of AMX, which is another one than those of Winograd */
#define AMX_PIXELS 16       /* of a tile of AMX, at most */
#define AMX_ROWS 16         /* of pixels of the input that go through a convolution with AMX together; even */
#define PRODUCT_FLOATS (4 * AMX_ROWS * AMX_PIXELS * PANEL) /* room for the products of a block with a panel */
_Static_assert(PRODUCT_FLOATS >= POINTS * (TILES * PANEL + LANES) && PRODUCT_FLOATS >= PIXELS * PANEL, "more room");
#define PIECES_PER_THREAD 4 /* with fewer blocks of tiles, threads share the panels of a block */
#define PHASES_PER_OP 4     /* at most: the norm, the input, the products, the frames that stay */
#define FRAMES_BEFORE 2     /* that a causal convolution sees beside its own */

/* As in decoder.py */
enum { LOOKUP, CONV, UPSAMPLE, POINT, ATTEND, IMAGE, SPACE };
enum { MAP, ROWS, KEYS, VALUES };

/* One operation. The Python class Op of decoder.py has the same fields. */
typedef struct {
    int64_t kind;
    int64_t reads, writes;             /* layouts of input and output */
    int64_t input, keys, values;       /* buffers; keys and values of ATTEND only, whose output is its input */
    int64_t output;                    /* buffer */
    int64_t height, width;             /* of the output */
    int64_t in_channels, out_channels; /* multiples of LANES; zeros where the tokenizer has fewer; of one frame */
    int64_t groups, group_channels;    /* of the group norm in front, with swish in CONV; 0: none */
    int64_t accumulate;                /* the result is added to the output */
    int64_t transformed;               /* the weights of a CONV or UPSAMPLE are */
    int64_t amx;                       /* a CONV or UPSAMPLE is computed in bf16 with AMX: decoder_amx.h */
    int64_t dots;                      /* a CONV is computed in Winograd's form in bf16: decoder_dots.h */
    int64_t code_dim;                  /* of LOOKUP: numbers of a code */
    int64_t frames;                    /* that a CONV sees: its own and those before it; else 1 */
    int64_t edge;                      /* a CONV pads with the numbers at the edge; else with zeros */
    int64_t time;                      /* frames of the output for each latent frame but the first, which has one */
    int64_t stride_t, stride_y, stride_x; /* of SPACE: what channels become */
    int64_t past;                      /* of a CONV that sees earlier frames: its offset */
    double epsilon;                    /* of the norm */
    float scale, offset;               /* of the scores of ATTEND; of IMAGE: what makes levels of numbers */
    const float *weights;              /* of LOOKUP: the codebook [codes][code_dim] */
    const float *bias;                 /* [out_channels] */
    const float *gain, *shift;         /* [in_channels] of the norm */
    const float *beta;                 /* [in_channels] of x * sigmoid(beta * x) behind the norm; NULL: 1 */
} Op;

/* One call. The Python class Decode of decoder.py has the same fields. */
typedef struct {
    const Op *ops;
    int64_t n_ops, images;
    int64_t latent, first, more; /* of clips: latent frames of this call; whether they begin them; whether more come */
    const int64_t *tokens;       /* [images][latent][pixels] row by row */
    uint8_t *pixels;             /* [items][height][width][3] the result */
    float **buffers;       /* maps and so on */
    float **sums;          /* for each buffer: [items][blocks][3][C] */
    float *past;
    int64_t past_floats;
    /* Shared by all threads: */
    float *norm;    /* [items][2][in_channels] factors and shifts of the current norm */
    float *weights; /* the transformed weights of the current operation */
    float *input;   /* the transformed input of the current operation */
    /* Each thread's own: */
    float *scratch;         /* [threads][scratch_floats] */
    int64_t scratch_floats;
} Decode;

/* -- sizes --------------------------------------------------------------------------------------------------------- */

static int is_winograd(const Op *op) { return (op->kind == CONV || op->kind == UPSAMPLE) && !op->amx; }
static long points_of(const Op *op) { return !is_winograd(op) ? 1 : op->kind == UPSAMPLE ? UPSAMPLED_POINTS : POINTS; }
static long panels_of(const Op *op) { return (op->out_channels + PANEL - 1) / PANEL; }
/* K, the channels that a product sees. */
static long depth_of(const Op *op) { return op->in_channels * op->frames; }
/* The same in words of 32 bits, of which a number of bf16 is half. */
static long depth_words(const Op *op) { return op->dots ? depth_of(op) / 2 : depth_of(op); }
/* Words of the weights of one product with one panel. */
static long point_floats(const Op *op) { return depth_words(op) * PANEL + (is_winograd(op) ? LANES : 0); }
/* Frames of a map with `time` frames for each of `latent` latent frames; of the first of a clip there is one. */
static long frames_of(long time, long latent, long first) { return first ? 1 + (latent - 1) * time : latent * time; }

/* Of the input: a doubled map is the input as it is before. */
static long input_height(const Op *op) { return op->kind == UPSAMPLE ? op->height / 2 : op->height; }
static long input_width(const Op *op) { return op->kind == UPSAMPLE ? op->width / 2 : op->width; }

/* With AMX: pixels of a tile, a part of a row. Tiles are equally wide, with few pixels behind the last of a row. */
static long amx_width(const Op *op) {
    long width = input_width(op), tiles = (width + AMX_PIXELS - 1) / AMX_PIXELS;
    return (width + tiles - 1) / tiles;
}
static long amx_across(const Op *op) { return (input_width(op) + amx_width(op) - 1) / amx_width(op); }

/* With AMX: the place of a block in the input. It is a tile wide. */
typedef struct {
    long y, x, rows, columns;
} Block;
static Block amx_block(const Op *op, long block) {
    long y = block / amx_across(op) * AMX_ROWS, x = block % amx_across(op) * amx_width(op);
    long below = input_height(op) - y, right = input_width(op) - x;
    return (Block){y, x, below < AMX_ROWS ? below : AMX_ROWS, right < amx_width(op) ? right : amx_width(op)};
}

/* Of a frame: parts of its channels that are gathered by themselves. */
static long chunks_of(const Op *op) {
    return op->amx ? (op->in_channels + AMX_CHANNELS - 1) / AMX_CHANNELS : op->in_channels / LANES;
}

static long block_units(const Op *op) { return op->amx ? 1 : is_winograd(op) ? TILES : PIXELS; }

/* Tiles of an image; pixels in a 1x1 convolution; with AMX blocks. */
static long units_of(const Op *op) {
    if (op->amx) return (input_height(op) + AMX_ROWS - 1) / AMX_ROWS * amx_across(op);
    return is_winograd(op) ? (op->height + 3) / 4 * ((op->width + 3) / 4) : op->height * op->width;
}

static long blocks_of(const Op *op) { return (units_of(op) + block_units(op) - 1) / block_units(op); }
static long units_in(const Op *op, long block) {
    long first = block * block_units(op), left = units_of(op) - first;
    return left < block_units(op) ? left : block_units(op);
}

/* How many pixels of the output a block has. */
static long pixels_in(const Op *op, long block) {
    long count = units_in(op, block), first = block * block_units(op), pixels = 0;
    if (op->amx) {
        Block at = amx_block(op, block);
        return at.rows * at.columns * (op->kind == UPSAMPLE ? 4 : 1);
    }
    if (!is_winograd(op)) return count;
    for (long tile = first, across = (op->width + 3) / 4; tile < first + count; tile++) {
        long below = op->height - tile / across * 4, right = op->width - tile % across * 4;
        pixels += (below < 4 ? below : 4) * (right < 4 ? right : 4);
    }
    return pixels;
}

static long map_floats(const Op *op, long images, long channels) { return images * channels * op->height * op->width; }
/* Numbers, of 16 bits, of a chunk of a block's input with AMX. */
static long amx_chunk(const Op *op) { return (AMX_ROWS + 2) * (amx_width(op) + 2) * AMX_CHANNELS; }
/* Numbers, of 16 bits, of the weights of a panel with AMX. */
static long amx_panel(const Op *op) {
    return op->frames * chunks_of(op) * (op->kind == UPSAMPLE ? 16 : 9) * AMX_CHANNELS * PANEL;
}
static long input_floats(const Op *op) {
    if (op->amx) return op->frames * chunks_of(op) * amx_chunk(op) / 2;
    return points_of(op) * block_units(op) * (depth_words(op) + LANES);
}

/* Whether threads share the panels of a block: there are too few blocks for a block each. */
static int shares_blocks(const Op *op, long images, long threads) {
    return blocks_of(op) * images < PIECES_PER_THREAD * threads;
}

/* Numbers of a row of scores, with room for whole panels. */
static long score_floats(const Op *op) { return (op->height * op->width + PANEL - 1) / PANEL * PANEL + LANES; }

/* Numbers of an image in a buffer that attention reads. */
static long attention_floats(const Op *op, long layout) {
    long pixels = op->height * op->width, channels = op->out_channels;
    if (layout == ROWS) return pixels * (channels + LANES);
    if (layout == KEYS) return (pixels + PANEL - 1) / PANEL * PANEL * channels;
    return (channels + PANEL - 1) / PANEL * PANEL * pixels;
}
