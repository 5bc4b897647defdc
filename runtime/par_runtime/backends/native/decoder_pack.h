/* Weights of the decoder as its products take them, once when a tokenizer is loaded; by all threads of its pool. */

#define MOST_TAPS 9 /* weights of a pair of channels, at most */

/* What a call is given. `faults` counts pieces with numbers that are not finite. */
typedef struct {
    const char *from;
    int64_t stored, out, width, frames, taps, parts;
    float *to;
    atomic_int *faults;
} Packing;

static int has_no_number(const float *x, long n) {
    uint32_t found = 0;
    for (long i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        found |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return found != 0;
}

/* Of the channels of a frame of the input: parts that are packed by themselves. */
static long chunks_of_width(const Packing *of) { return (of->width + LANES - 1) / LANES; }

/* The columns that a part of the output takes. */
static long part_columns(const Packing *of) { return (of->out / of->parts + LANES - 1) / LANES * LANES; }

/* The weights of LANES channels of a frame with the columns of one panel. */
static void pack_chunk(const Packing *of, const Kernels *kernels, long panel, long frame, long chunk) {
    const long taps = of->taps, left = of->width - chunk * LANES, channels = left < LANES ? left : LANES;
    const long each = of->out / of->parts;
    float columns[PANEL][LANES * MOST_TAPS];
    for (long j = 0; j < PANEL; j++) {
        const long part = (panel * PANEL + j) / part_columns(of), column = (panel * PANEL + j) % part_columns(of);
        if (part >= of->parts || column >= each) {
            memset(columns[j], 0, sizeof columns[j]);
            continue;
        }
        const long place = (((part * each + column) * of->frames + frame) * of->width + chunk * LANES) * taps;
        kernels->read_numbers(of->from + place * (of->stored == FP32 ? 4 : 2), of->stored, channels * taps, columns[j]);
        if (has_no_number(columns[j], channels * taps)) atomic_fetch_add_explicit(of->faults, 1, memory_order_relaxed);
    }
    float *to = of->to + ((panel * of->frames + frame) * chunks_of_width(of) + chunk) * LANES * taps * PANEL;
    for (long i = 0; i < LANES * taps; i++, to += PANEL)
        for (long j = 0; j < PANEL; j++) to[j] = i < channels * taps ? columns[j][i] : 0;
}

/* The task of the pool. */
static void pack_convolution(Worker *worker, const void *argument) {
    const Packing *of = argument;
    long chunks = chunks_of_width(of), each = of->frames * chunks;
    begin_phase(worker, (of->parts * part_columns(of) + PANEL - 1) / PANEL * each, 1);
    for (long i; (i = next_item(worker)) >= 0;)
        pack_chunk(of, worker->pool->kernels, i / each, i % each / chunks, i % chunks);
    end_phase(worker);
}

/* Packs the weights of a convolution, stored as FP32, FP16 or BF16 [out][frames][width][taps]: to
   [N/PANEL][frames][K][taps][PANEL], where K is `width` up to whole LANES. The columns are `parts` of equally many, each of
   which begins at whole LANES. Zeros fill what is added. Returns 0; 1 where a number is not finite; -1, before any work,
   where memory is exhausted. */
int parvis_decoder_pack(void *pool, const void *from, int64_t stored, int64_t out, int64_t width, int64_t frames,
                        int64_t taps, int64_t parts, float *to) {
    atomic_int faults = 0;
    Packing of = {from, stored, out, width, frames, taps, parts, to, &faults};
    int failed = pool_run_settled(pool, pack_convolution, &of, sizeof of, 1);
    return failed ? failed : atomic_load(&faults) != 0;
}

/* What follows is given packed weights of a 3x3 convolution: w [N/PANEL][K][9][PANEL], where K has those of all frames. */
typedef struct {
    const Op *op;
    const float *w;
    float *u;
} Transforming;

static void transform_all(Worker *worker, const void *argument) {
    const Transforming *of = argument;
    const Winograd *form = form_of(worker->pool->kernels, of->op);
    long k = depth_of(of->op), chunks = k / LANES, points = points_of(of->op);
    begin_phase(worker, panels_of(of->op) * chunks, 1);
    for (long i; (i = next_item(worker)) >= 0;) {
        long panel = i / chunks, first = i % chunks * LANES;
        form->transform_weights(of->w + panel * k * 9 * PANEL, k, first, first + LANES, (int)points,
                                of->u + panel * points * point_floats(of->op));
    }
    end_phase(worker);
}

/* In Winograd's form: words u [panels][parvis_decoder_winograd_panel()]. Returns 0, or -1 as above. */
int parvis_decoder_transform(void *pool, const Op *op, const float *w, float *u) {
    Transforming of = {op, w, u};
    return pool_run_settled(pool, transform_all, &of, sizeof of, 1);
}

int64_t parvis_decoder_winograd_panel(const Op *op) { return points_of(op) * point_floats(op); }

typedef struct {
    const Op *op;
    const float *w;
    uint16_t *u;
} PackingAmx;

static void pack_all_amx(Worker *worker, const void *argument) {
    const PackingAmx *of = argument;
    begin_phase(worker, panels_of(of->op), 1);
    for (long p; (p = next_item(worker)) >= 0;) {
#ifdef HAS_TILES
        pack_amx(of->op, of->w + p * depth_of(of->op) * 9 * PANEL, of->u + p * amx_panel(of->op));
#endif
    }
    end_phase(worker);
}

/* Of an operation with `amx`: u [panels][parvis_decoder_amx_panel()]. Returns 0, or -1 as above. */
int parvis_decoder_pack_amx(void *pool, const Op *op, const float *w, uint16_t *u) {
    PackingAmx of = {op, w, u};
    return pool_run_settled(pool, pack_all_amx, &of, sizeof of, 1);
}
