/* The decoder of a tokenizer on a CPU: tokens to pixels, as decoder.onnx computes them, in fp32. Where it is asked for,
   3x3 convolutions are in bf16: with AMX (decoder_amx.h), or with AMD's dot products (decoder_dots.h).

   Nearly all of its time are 3x3 convolutions. Without AMX they are computed in Winograd's form F(4x4,3x3): a tile of
   6x6 numbers of the input is transformed, 36 products of matrices over the channels follow, and their results are
   transformed into 4x4 numbers. That takes 36 multiplications where the convolution itself takes 144. The tile of a
   doubled map holds each number twice, so those products whose row or column belongs to the point -1 vanish: 25 are
   left. Some tiles at a time go through all three parts, so what lies between them stays in a core's cache.

   The frames of a clip are images side by side, but for convolutions, which see the frames before their own: a product
   goes over the channels of all three. Of a long clip some latent frames are decoded at a time; decoder_frames.h.

   Group norm: whoever writes a map also writes the sums over its pixels, and the transform of the input normalises.

   The Python side is decoder.py, which turns the sizes of a tokenizer into a list of operations. decoder_plan.h has the
   layouts. */

#define _GNU_SOURCE /* for pool.h; before any header */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "compilers.h"
#include "decoder_plan.h"
#include "instructions.h"
#include "pool.h"
#include "stored.h"

#include "decoder_sets.h"

/* -- the operations, each called by every thread of the pool ------------------------------------------------------ */

typedef struct {
    Worker *worker;
    const Kernels *kernels;
    const Decode *call;
    const Op *op;
    const Op *writer;     /* of the input: its blocks are those of the sums */
    const float *weights; /* transformed */
    float *scratch;       /* this thread's */
} Work;

#include "decoder_attention.h"
#include "decoder_frames.h"
#ifdef HAS_TILES
#include "tiles.h"
#include "decoder_amx.h"
#endif

/* Factor and shift of each channel of one group of an item, from the sums of the operation that wrote the map. */
static void norm_group(const Work *w, long image, long group) {
    const Op *op = w->op;
    long channels = op->in_channels, blocks = blocks_of(w->writer), first = group * op->group_channels;
    const float *sums = w->call->sums[op->input] + image * blocks * 3 * channels;
    double sum = 0, squares = 0, count = 0;
    /* Twice, since squares are of the distances from the mean: no digits are lost where the mean is large. */
    for (long block = 0; block < blocks; block++) {
        long n = pixels_in(w->writer, block);
        for (long c = first; c < first + op->group_channels; c++) {
            const float *of = sums + block * 3 * channels + c;
            sum += n * (double)of[0] + of[channels], count += n;
        }
    }
    double mean = sum / count;
    for (long block = 0; block < blocks; block++) {
        long n = pixels_in(w->writer, block);
        for (long c = first; c < first + op->group_channels; c++) {
            const float *of = sums + block * 3 * channels + c;
            double away = of[0] - mean;
            squares += of[2 * channels] + 2 * away * of[channels] + n * away * away;
        }
    }
    double deviation = sqrt(squares / count + op->epsilon);
    float *norm = w->call->norm + image * 2 * channels;
    for (long c = first; c < first + op->group_channels; c++) {
        norm[c] = (float)(op->gain[c] / deviation);
        norm[channels + c] = (float)(op->shift[c] - mean * op->gain[c] / deviation);
    }
    /* Channels that are only there to fill the lanes: their weights are 0, and times that must be 0. */
    if (group == op->groups - 1)
        for (long c = op->groups * op->group_channels; c < channels; c++) norm[c] = norm[channels + c] = 0;
}

/* The phase before an operation: its norm, and its weights where they are kept as they are stored. */
static void prepare(const Work *w) {
    const Op *op = w->op;
    int transforms = is_winograd(op) && !op->transformed;
    long norms = items_of(w, op) * op->groups, k = depth_of(op), chunks = k / LANES;
    long pieces = norms + (transforms ? panels_of(op) * chunks : 0), points = points_of(op);
    if (!pieces) return;
    begin_phase(w->worker, pieces, 1);
    for (long piece; (piece = next_item(w->worker)) >= 0;) {
        if (piece < norms) {
            norm_group(w, piece / op->groups, piece % op->groups);
            continue;
        }
        long panel = (piece - norms) / chunks, first = (piece - norms) % chunks * LANES;
        form_of(w->kernels, op)->transform_weights(op->weights + panel * k * 9 * PANEL, k, first, first + LANES,
                                                   (int)points, w->call->weights + panel * points * point_floats(op));
    }
    end_phase(w->worker);
}

/* The input of one block as its products take it, chunks `first` to `end` of all frames that it sees: v. */
static void gather(const Work *w, long item, long block, long first, long end, float *v) {
    const Op *op = w->op;
    long chunks = chunks_of(op);
    for (long place = first, next; place < end; place = next) {
        long seen = place / chunks;
        next = (seen + 1) * chunks < end ? (seen + 1) * chunks : end;
        Frame frame = frame_of(w, item, op->frames - 1 - seen);
        long from = place - seen * chunks, to = next - seen * chunks;
#ifdef HAS_TILES
        if (op->amx) {
            gather_amx(op, frame, block, from, to, (uint16_t *)v + place * amx_chunk(op));
            continue;
        }
#endif
        (is_winograd(op) ? form_of(w->kernels, op)->transform_input : w->kernels->gather_pixels)(
            op, frame.map, frame.norm, block * block_units(op), units_in(op, block), from, to, place, v);
    }
}

/* The products of one block with one panel, and what they become in the output. */
static void multiply(const Work *w, long image, long block, long panel, const float *v) {
    const Op *op = w->op;
    long words = depth_words(op), ldv = words + LANES, first = block * block_units(op), count = units_in(op, block);
    long points = points_of(op), units = block_units(op);
    const Winograd *form = form_of(w->kernels, op);
    float *c = w->scratch, *out = w->call->buffers[op->output];
    float *sums = w->call->sums[op->output] + (image * blocks_of(op) + block) * 3 * op->out_channels;
#ifdef HAS_TILES
    if (op->amx) {
        multiply_amx(op, block, (const uint16_t *)v, (const uint16_t *)w->weights + panel * amx_panel(op), c);
        scatter_amx(op, c, block, panel, out + image * map_floats(op, 1, op->out_channels), sums);
        return;
    }
#endif
    for (long point = 0; point < points; point++)
        form->product(v + point * units * ldv, ldv, w->weights + (panel * points + point) * point_floats(op), words,
                      count, c + point * (units * PANEL + LANES));
    if (op->writes != MAP) {
        scatter_attention(op, c, first, count, panel, out + image * attention_floats(op, op->writes));
        return;
    }
    (is_winograd(op) ? form->transform_output : w->kernels->scatter_pixels)(
        op, c, first, count, panel, out + image * map_floats(op, 1, op->out_channels), sums);
}

static void convolve(const Work *w) {
    const Op *op = w->op;
    const Decode *call = w->call;
    long items = items_of(w, op), blocks = blocks_of(op), all = blocks * items, panels = panels_of(op);
    long chunks = op->frames * chunks_of(op), v_floats = input_floats(op);
    const float *rows = op->reads == ROWS ? call->buffers[op->input] : NULL; /* needs no transform */
#ifdef HAS_TILES
    if (op->amx) shape_tiles(amx_width(op), amx_width(op), AMX_CHANNELS * 2);
#endif
    int shares = rows || shares_blocks(op, items, w->worker->pool->n_threads);
    if (!shares) {
        float *v = w->scratch + PRODUCT_FLOATS;
        begin_phase(w->worker, all, 1);
        for (long i; (i = next_item(w->worker)) >= 0;) {
            gather(w, i / blocks, i % blocks, 0, chunks, v);
            for (long panel = 0; panel < panels; panel++) multiply(w, i / blocks, i % blocks, panel, v);
        }
        end_phase(w->worker);
        return;
    }
    if (!rows) {
        begin_phase(w->worker, all * chunks, 1);
        for (long i; (i = next_item(w->worker)) >= 0;) {
            long at = i / chunks, chunk = i % chunks;
            gather(w, at / blocks, at % blocks, chunk, chunk + 1, call->input + at * v_floats);
        }
        end_phase(w->worker);
    }
    begin_phase(w->worker, all * panels, 1);
    for (long i; (i = next_item(w->worker)) >= 0;) {
        long at = i % all, image = at / blocks, block = at % blocks;
        const float *v = call->input + at * v_floats;
        if (rows) v = rows + (image * units_of(op) + block * PIXELS) * (depth_of(op) + LANES);
        multiply(w, image, block, i / all, v);
    }
    end_phase(w->worker);
}

/* The codes of tokens, as a map. */
static void look_up(const Work *w) {
    const Op *op = w->op;
    long pixels = op->height * op->width, channels = op->out_channels;
    begin_phase(w->worker, items_of(w, op), 1);
    for (long image; (image = next_item(w->worker)) >= 0;) {
        float *map = w->call->buffers[op->output] + image * channels * pixels;
        for (long i = 0; i < pixels; i++) {
            const float *code = op->weights + w->call->tokens[image * pixels + i] * op->code_dim;
            for (long c = 0; c < channels; c++)
                map[(c / LANES * pixels + i) * LANES + c % LANES] = c < op->code_dim ? code[c] : 0;
        }
    }
    end_phase(w->worker);
}

/* A map to pixels, row by row. */
static void write_image(const Work *w) {
    const Op *op = w->op;
    long height = op->height, width = op->width;
    begin_phase(w->worker, items_of(w, op) * height, 1);
    for (long piece; (piece = next_item(w->worker)) >= 0;) {
        long image = piece / height, y = piece % height;
        const float *from = w->call->buffers[op->input] + (image * height + y) * width * LANES;
        uint8_t *to = w->call->pixels + piece * width * 3;
        for (long x = 0; x < width; x++)
            for (long c = 0; c < 3; c++) {
                float level = op->scale * from[x * LANES + c] + op->offset;
                to[3 * x + c] = (uint8_t)(level > 255.0f ? 255.0f : level > 0.0f ? level : 0.0f);
            }
    }
    end_phase(w->worker);
}

/* The task of the pool: one call of the decoder. */
static void run_decoder(Worker *worker, const void *argument) {
    const Decode *call = argument;
    const Op *writers[64] = {NULL};
    float *scratch = call->scratch + worker->thread * call->scratch_floats;
    Work w = {.worker = worker, .kernels = worker->pool->kernels, .call = call, .scratch = scratch};
    int tiles = 0;
    for (long i = 0; i < call->n_ops; i++) {
        const Op *op = w.op = call->ops + i;
        tiles |= op->amx;
        w.writer = writers[op->input];
        w.weights = is_winograd(op) && !op->transformed ? call->weights : op->weights;
        writers[op->output] = op;
        prepare(&w);
        if (op->kind == LOOKUP) look_up(&w);
        else if (op->kind == ATTEND) attend(&w);
        else if (op->kind == IMAGE) write_image(&w);
        else if (op->kind == SPACE) rearrange(&w);
        else convolve(&w);
        if (op->frames > 1 && call->more) remember(&w);
    }
#ifdef HAS_TILES
    if (tiles) give_back_tiles();
#else
    (void)tiles;
#endif
}

/* -- what Python calls --------------------------------------------------------------------------------------------- */

#include "decoder_pack.h"

/* "avx512", "avx2", "neon", or "" where this CPU has none of them; "sse" where a test asked for it. */
const char *parvis_decoder_instructions(void) { return select_kernels() ? select_kernels()->instructions : ""; }

/* The sizes of both structures and the offsets of their last fields; decoder.py compares them with its own. */
void parvis_decoder_struct_sizes(int64_t *sizes /* [4] */) {
    sizes[0] = sizeof(Op);
    sizes[1] = offsetof(Op, beta);
    sizes[2] = sizeof(Decode);
    sizes[3] = offsetof(Decode, scratch_floats);
}

static void at_least(int64_t *size, long floats) {
    if (*size < floats) *size = floats;
}

/* Numbers that a call of up to `images` images, or of `latent` latent frames of as many clips, needs: for each of
   n_buffers buffers, then for the sums of each; then for norm, weights, input, and scratch of each thread. */
void parvis_decoder_sizes(const Op *ops, int64_t n_ops, int64_t images, int64_t latent, int64_t first, int64_t threads,
                          int64_t n_buffers, int64_t *sizes /* [2 * n_buffers + 4] */) {
    int64_t *sums = sizes + n_buffers, *norm = sums + n_buffers, *weights = norm + 1, *input = norm + 2;
    int64_t *scratch = norm + 3;
    memset(sizes, 0, (size_t)(2 * n_buffers + 4) * sizeof(int64_t));
    for (const Op *op = ops; op < ops + n_ops; op++) {
        int64_t items = images * frames_of(op->time, latent, first);
        at_least(norm, items * 2 * op->in_channels);
        if (op->kind == IMAGE) continue;
        if (op->kind == ATTEND) {
            at_least(scratch, PRODUCT_FLOATS + TILES * score_floats(op));
            continue;
        }
        at_least(&sizes[op->output], op->writes == MAP ? map_floats(op, items, op->out_channels)
                                                       : images * attention_floats(op, op->writes));
        if (op->kind == LOOKUP) continue;
        at_least(&sums[op->output], items * blocks_of(op) * 3 * op->out_channels);
        if (op->kind == SPACE) continue;
        if (is_winograd(op) && !op->transformed)
            at_least(weights, panels_of(op) * points_of(op) * point_floats(op));
        at_least(scratch, PRODUCT_FLOATS + input_floats(op));
        /* With fewer images, blocks may be shared that are not with all. */
        int64_t blocks = items * blocks_of(op), most = PIECES_PER_THREAD * threads;
        if (shares_blocks(op, 1, threads)) at_least(input, (blocks < most ? blocks : most) * input_floats(op));
    }
}

/* As way_of_bf16() says. */
int parvis_decoder_bf16(int least_exact) { return way_of_bf16(least_exact); }

/* Numbers of a panel of the weights of an operation with `amx`. */
int64_t parvis_decoder_amx_panel(const Op *op) { return amx_panel(op); }

/* Puts a pool of up to n_threads threads, or NULL, into *pool. */
void parvis_decoder_pool_open(int n_threads, void **pool) { *pool = pool_open(n_threads, select_kernels()); }

/* Closes *pool, which may be NULL, and is afterwards. */
void parvis_decoder_pool_close(void **pool) { pool_take(pool); }

/* Returns 0; or -1, before any work, where memory is exhausted. */
int parvis_decode(void *pool, const Decode *call) {
    return pool_run_settled(pool, run_decoder, call, sizeof *call, PHASES_PER_OP * call->n_ops);
}
