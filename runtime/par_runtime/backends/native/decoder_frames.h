/* The part of decoder.c that is about the frames of clips: which frames an operation sees, channels that become frames
   and pixels, and what stays of one call for the next.

   An item of a map is a frame; those of a clip follow each other. In images every item is one. */

/* How many items the output of `op` has. */
static long items_of(const Work *w, const Op *op) {
    return w->call->images * frames_of(op->time, w->call->latent, w->call->first);
}

/* A frame of the input of an operation. */
typedef struct {
    const float *map, *norm; /* norm: factors and shifts [2][in_channels]; NULL where there is none */
} Frame;

/* Numbers of a frame of the input, and of a frame that stays. */
static long frame_floats(const Op *op) {
    return op->in_channels * op->height * op->width / (op->kind == UPSAMPLE ? 4 : 1);
}
static long past_frame_floats(const Op *op) { return frame_floats(op) + 2 * op->in_channels; }
static float *past_frame(const Work *w, long clip, long frame) {
    return w->call->past + clip * w->call->past_floats + w->op->past + frame * past_frame_floats(w->op);
}

/* The frame `back` frames before that of an `item` of the output. In front of a clip stands its first frame, in front of
   what a call is given stands what stayed. */
static Frame frame_of(const Work *w, long item, long back) {
    const Op *op = w->op;
    long frames = frames_of(op->time, w->call->latent, w->call->first), clip = item / frames;
    long frame = item % frames - back;
    if (frame < 0 && !w->call->first) {
        const float *map = past_frame(w, clip, FRAMES_BEFORE + frame);
        return (Frame){map, op->groups ? map + frame_floats(op) : NULL};
    }
    item = clip * frames + (frame < 0 ? 0 : frame);
    return (Frame){w->call->buffers[op->input] + item * frame_floats(op),
                   op->groups ? w->call->norm + item * 2 * op->in_channels : NULL};
}

/* Keep the last frames of the input for the next call: the earlier one first, since it may come from the place of the
   later one. */
static void remember(const Work *w) {
    const Op *op = w->op;
    long frames = frames_of(op->time, w->call->latent, w->call->first);
    begin_phase(w->worker, w->call->images, 1);
    for (long clip; (clip = next_item(w->worker)) >= 0;)
        for (long i = 0; i < FRAMES_BEFORE; i++) {
            Frame frame = frame_of(w, clip * frames + frames - 1, FRAMES_BEFORE - 1 - i);
            float *to = past_frame(w, clip, i);
            memmove(to, frame.map, (size_t)frame_floats(op) * sizeof(float));
            if (frame.norm) memmove(to + frame_floats(op), frame.norm, (size_t)op->in_channels * 2 * sizeof(float));
        }
    end_phase(w->worker);
}

/* Channels become frames and pixels. Of a block of frames only the last is there for the first frame of a clip. */
static void rearrange(const Work *w) {
    const Op *op = w->op;
    const Decode *call = w->call;
    long frames = frames_of(op->time, call->latent, call->first), blocks = blocks_of(op);
    long frames_in = frames_of(op->time / op->stride_t, call->latent, call->first);
    long floats_in = op->in_channels * (op->height / op->stride_y) * (op->width / op->stride_x);
    begin_phase(w->worker, items_of(w, op) * blocks, 1);
    for (long piece; (piece = next_item(w->worker)) >= 0;) {
        long item = piece / blocks, block = piece % blocks;
        long frame = item % frames + (call->first ? op->stride_t - 1 : 0);
        const float *from = call->buffers[op->input];
        from += (item / frames * frames_in + frame / op->stride_t) * floats_in;
        w->kernels->to_space(op, from, frame % op->stride_t, block * block_units(op), units_in(op, block),
                             call->buffers[op->output] + item * map_floats(op, 1, op->out_channels),
                             call->sums[op->output] + piece * 3 * op->out_channels);
    }
    end_phase(w->worker);
}
