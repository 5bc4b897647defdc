/* The phases of a call of the step network. pool.h describes phases; every function here is called by all threads. */

/* A call as the threads get it. */
typedef struct {
    Step step;
    Buffers shared;
    const Kernels *kernels;
    char *scratch;         /* [threads][scratch_bytes] */
    int64_t scratch_bytes; /* from scratch_bytes_of() */
} StepCall;

_Static_assert(sizeof(StepCall) <= ARGUMENT_BYTES, "a call must fit into the argument of a pool");

/* Phases of a call, at most: recording makes two of each product. */
static long phases_of(const Model *model) { return (1 + 4 + 4) * model->n_layers + 3; }

/* What a thread has for itself. Only one of the three last ones is in use at a time, so they share their memory with
   `tile` and `packed`. */
typedef struct {
    float *scale;          /* [M] */
    float *tile;           /* [product_rows(M)][PANEL] one panel of a product */
    void *packed;          /* the packed activations of a product */
    void *product_scratch; /* product_scratch_bytes() */
    float *attention;      /* attention_floats() */
    float *draw;           /* [4*V] */
    float *recorded;       /* where the next product's rows go; NULL where nothing is recorded */
} Scratch;

/* Bytes of the packed activations of any product of a model. */
static int64_t largest_packed(const Model *model, int64_t m) {
    return packed_rows_bytes(m, larger(model->ffn_dim, larger(model->dim, model->n_heads * model->head_dim)));
}

/* Floats of the scratch memory of attention_head() and attention_head_bf16(), or more. */
static int64_t attention_floats(const Model *model, int64_t query) {
    int64_t padded_slots = (model->cache_slots + PANEL - 1) / PANEL * PANEL;
    return query * (model->head_dim + 2 * padded_slots + 1) + 2 * model->head_dim;
}

/* Bytes of the scratch memory of a thread, a multiple of 64. */
static int64_t scratch_bytes_of(const Model *model, int64_t rows, int64_t query) {
    int64_t m = rows * query;
    int64_t products = product_rows(m) * PANEL * 4 + aligned(largest_packed(model, m)) + product_scratch_bytes();
    int64_t others = 4 * larger(attention_floats(model, query), 4 * model->head_columns);
    return aligned(m * 4) + aligned(larger(others, products)) + 64;
}

static Scratch scratch_of(const StepCall *call, int thread) {
    const Step *s = &call->step;
    int64_t m = s->rows * s->query;
    char *at = call->scratch + thread * call->scratch_bytes;
    Scratch own = {.scale = (float *)at, .tile = (float *)(at + aligned(m * 4)), .recorded = s->record};
    own.packed = (char *)own.tile + product_rows(m) * PANEL * 4;
    own.product_scratch = (char *)own.packed + aligned(largest_packed(s->model, m));
    own.attention = own.draw = own.tile;
    return own;
}

/* Keeps x [M][k], or with `gain` [k] its RMSNorm, where a step is recorded: `parvis calibrate` needs it. A phase of one
   item: only who has taken it may be sure that x is not yet changed. */
static void record(Worker *worker, const StepCall *call, const float *x, const float *gain, long k, Scratch *own) {
    long m = call->step.rows * call->step.query;
    if (!own->recorded) return;
    begin_phase(worker, 1, 1);
    if (next_item(worker) >= 0) {
        if (gain) call->kernels->inverse_rms(x, k, m, own->scale);
        for (long i = 0; i < m; i++)
            for (long j = 0; j < k; j++)
                own->recorded[i * k + j] = gain ? x[i * k + j] * own->scale[i] * gain[j] : x[i * k + j];
        next_item(worker);
    }
    end_phase(worker);
    own->recorded += m * k;
}

/* Begins the product of x [M][k], or with `gain` [k] its RMSNorm, with the panels of w [k][n]: takes the first panel,
   and packs x while the beginning of that panel comes from memory. Every thread packs for itself: that takes less time
   than waiting for what another thread packs. `first` becomes the panel, or -1 where there is none for this thread.
   Returns the product. */
static PanelProduct *begin_product(Worker *worker, const StepCall *call, const float *x, const float *gain,
                                   const Matrix *w, long k, long n, long *first, Scratch *own) {
    long m = call->step.rows * call->step.query;
    Product product = product_of(call->kernels, w, m);
    record(worker, call, x, gain, k, own);
    begin_phase(worker, n / PANEL, items_at_once(worker->pool, n / PANEL));
    *first = next_item(worker);
    if (*first >= 0) {
        int64_t bytes = panel_bytes(w, k);
        const char *panel = (const char *)w->data + *first * bytes;
        if (n / PANEL * bytes >= PREFETCH_FROM_BYTES)
            for (int64_t line = 0; line < bytes && line < PREFETCH_PANEL_BYTES; line += 64)
                __builtin_prefetch(panel + line, 0, 2);
        if (gain) call->kernels->inverse_rms(x, k, m, own->scale);
        product.pack_rows(w, x, k, m, k, gain ? own->scale : NULL, gain, own->packed);
    }
    return product.panel_product;
}

/* c [M][n] = x w, or c += x w with `accumulate`, for x as in begin_product(). Each panel's result is first summed in a
   tile of its own: the rows of c are a multiple of 4 KB apart, and would evict each other from L1. */
static void matmul(Worker *worker, const StepCall *call, const float *x, const float *gain, const Matrix *w, long k,
                   long n, float *c, int accumulate, Scratch *own) {
    long m = call->step.rows * call->step.query;
    long p;
    PanelProduct *panel_product = begin_product(worker, call, x, gain, w, k, n, &p, own);
    for (; p >= 0; p = next_item(worker)) {
        panel_product(w, own->packed, m, k, p, own->tile, own->product_scratch);
        for (long i = 0; i < m; i++) {
            float *to = c + i * n + p * PANEL;         /* [PANEL] */
            const float *from = own->tile + i * PANEL; /* [PANEL] */
            if (accumulate)
                for (long j = 0; j < PANEL; j++) to[j] += from[j];
            else memcpy(to, from, PANEL * sizeof(float));
        }
    }
    end_phase(worker);
}

/* The cached keys of item i of attention(). */
static const char *keys_of(const Step *s, long layer, long i) {
    const Model *model = s->model;
    long head = s->cache_row[i / model->n_heads] * model->n_heads + i % model->n_heads;
    return (const char *)s->keys[layer] + head * model->cache_slots * model->head_dim * number_bytes(model->cache);
}

/* qkv [M][3*H*D] -> attention_out [M][H*D]; the new keys and values enter the cache. An item is one head of one row. */
static void attention(Worker *worker, const StepCall *call, long layer, Scratch *own) {
    const Step *s = &call->step;
    const Kernels *kernels = call->kernels;
    long n_heads = s->model->n_heads, items = s->rows * n_heads;
    begin_phase(worker, items, items_at_once(worker->pool, items));
    if (s->model->cache == BF16) begin_attention(kernels, s->query);
    for (long i; (i = next_item(worker)) >= 0;) {
        const char *next = worker->next < worker->end ? keys_of(s, layer, i + 1) : NULL;
        if (s->model->cache == BF16)
            kernels->attention_head_bf16(s, &call->shared, layer, i / n_heads, i % n_heads, own->attention, next,
                                         kernels->pairs_product);
        else kernels->attention_head(s, &call->shared, layer, i / n_heads, i % n_heads, own->attention, next);
    }
    end_phase(worker);
}

/* ffn_hidden [M][F] = silu(x w1) * (x w3) for the RMSNorm of x [M][dim]. */
static void ffn_hidden(Worker *worker, const StepCall *call, const float *gain, const Matrix *w13, Scratch *own) {
    const Model *model = call->step.model;
    long m = call->step.rows * call->step.query, dim = model->dim, p;
    PanelProduct *panel_product =
        begin_product(worker, call, call->shared.x, gain, w13, dim, 2 * model->ffn_dim, &p, own);
    for (; p >= 0; p = next_item(worker)) {
        panel_product(w13, own->packed, m, dim, p, own->tile, own->product_scratch);
        call->kernels->swiglu(own->tile, m, call->shared.ffn_hidden + p * (PANEL / 2), model->ffn_dim);
    }
    end_phase(worker);
}

/* The guided logits of each position of each image, and the token that is drawn from them. */
static void draw_tokens(Worker *worker, const StepCall *call, Scratch *own) {
    const Step *s = &call->step;
    long query = s->query, v = s->model->vocab_size, columns = s->model->head_columns;
    begin_phase(worker, s->images * query, 1);
    for (long i; (i = next_item(worker)) >= 0;) {
        long image = i / query, other = s->uncond_row[image];
        const float *cond = call->shared.logits + i * columns;
        const float *uncond = call->shared.logits + (other * query + i % query) * columns;
        float *guided = own->draw; /* [columns], and scratch memory behind it */
        if (other == image) memcpy(guided, cond, (size_t)v * sizeof(float));
        else call->kernels->guide(cond, uncond, s->guidance[image], columns, guided);
        if (s->logits) memcpy(s->logits + i * v, guided, (size_t)v * sizeof(float));
        end_of_logits(guided, v, columns);
        if (s->tokens)
            s->tokens[i] = call->kernels->draw(guided, v, s->uniform[i], s->temperature[image], s->top_k[image],
                                               s->top_p[image], guided + columns);
    }
    end_phase(worker);
}

/* The task of the pool: one call of the network. */
static void run_step(Worker *worker, const void *argument) {
    const StepCall *call = argument;
    const Buffers *shared = &call->shared;
    const Model *model = call->step.model;
    long dim = model->dim, inner = model->n_heads * model->head_dim;
    Scratch own = scratch_of(call, worker->thread);
    for (long l = 0; l < model->n_layers; l++) {
        matmul(worker, call, shared->x, model->attention_norm[l], model->wqkv + l, dim, 3 * inner, shared->qkv, 0, &own);
        attention(worker, call, l, &own);
        matmul(worker, call, shared->attention_out, NULL, model->wo + l, inner, dim, shared->x, 1, &own);
        ffn_hidden(worker, call, model->ffn_norm[l], model->w13 + l, &own);
        matmul(worker, call, shared->ffn_hidden, NULL, model->w2 + l, model->ffn_dim, dim, shared->x, 1, &own);
    }
    matmul(worker, call, shared->x, model->norm, &model->output, dim, model->head_columns, shared->logits, 0, &own);
    end_products(call->kernels);
    draw_tokens(worker, call, &own);
}
