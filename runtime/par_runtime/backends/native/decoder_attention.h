/* The part of decoder.c that is attention over the pixels of an image: the layouts of what it reads, and itself. */

/* Rows c [count][PANEL] plus bias into the layouts of attention. */
static void scatter_attention(const Op *op, const float *c, long first, long count, long panel, float *to) {
    long pixels = op->height * op->width, channels = op->out_channels;
    for (long i = 0; i < count; i++)
        for (long j = 0; j < PANEL && panel * PANEL + j < channels; j++) {
            long pixel = first + i, channel = panel * PANEL + j;
            float value = c[i * PANEL + j] + op->bias[channel];
            if (op->writes == ROWS) to[pixel * (channels + LANES) + channel] = value;
            else if (op->writes == KEYS) to[(pixel / PANEL * channels + channel) * PANEL + pixel % PANEL] = value;
            else to[(panel * pixels + pixel) * PANEL + j] = value;
        }
}

/* Queries in rows become the result of attention: some rows at a time. */
static void attend(const Work *w) {
    const Op *op = w->op;
    const Decode *call = w->call;
    long pixels = op->height * op->width, channels = op->out_channels, ld = channels + LANES, lds = score_floats(op);
    long blocks = (pixels + TILES - 1) / TILES;
    float *tile = w->scratch, *scores = w->scratch + PRODUCT_FLOATS, inverse[TILES];
    begin_phase(w->worker, call->images * blocks, 1);
    for (long piece; (piece = next_item(w->worker)) >= 0;) {
        long image = piece / blocks, first = piece % blocks * TILES, count = pixels - first;
        if (count > TILES) count = TILES;
        float *rows = call->buffers[op->input] + (image * pixels + first) * ld;
        const float *keys = call->buffers[op->keys] + image * attention_floats(op, KEYS);
        const float *values = call->buffers[op->values] + image * attention_floats(op, VALUES);
        for (long key = 0; key < pixels; key += PANEL) {
            w->kernels->product(rows, ld, keys + key * channels, channels, count, tile);
            for (long i = 0; i < count; i++) memcpy(scores + i * lds + key, tile + i * PANEL, PANEL * sizeof(float));
        }
        for (long i = 0; i < count; i++) inverse[i] = w->kernels->softmax(scores + i * lds, pixels, op->scale);
        for (long channel = 0; channel < channels; channel += PANEL) {
            w->kernels->product(scores, lds, values + channel * pixels, pixels, count, tile);
            for (long i = 0; i < count; i++)
                for (long j = 0; j < PANEL && channel + j < channels; j++)
                    rows[i * ld + channel + j] = tile[i * PANEL + j] * inverse[i];
        }
    }
    end_phase(w->worker);
}
