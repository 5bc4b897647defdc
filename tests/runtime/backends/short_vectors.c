/* The step of step.c with numbers of its own: all weights, arithmetics and caches; then products in int8 and
   bf16 of one to 33 rows with all groups and scales. Writes what comes out, so that two builds can be compared: test_short_vectors.py. */

#include "step.c"

#include <stdio.h>

enum { DIM = 128, LAYERS = 2, HEADS = 4, D = 40, INNER = HEADS * D, FFN = 192, CODES = 100, COLUMNS_OF_HEAD = 128 };
enum { SLOTS = 64, ROWS = 4, QUERY = 5, IMAGES = 2, CALLS = 6, GROUP = 32 };

static uint32_t state = 1;
static uint32_t random_bits(void) { return (state = state * 1664525u + 1013904223u) >> 8; }
static float uniform(void) { return (float)(random_bits() & 0xffff) / 65536; }

static void *zeros(size_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 127) / 64 * 64);
    if (!memory) abort();
    return memset(memory, 0, (bytes + 127) / 64 * 64);
}

/* `high` - `low` is a power of 2, so that no build rounds anything here, whether it fuses products and sums or not. */
static float *floats(long n, float low, float high) {
    float *out = zeros((size_t)n * 4);
    for (long i = 0; i < n; i++) out[i] = low + (high - low) * uniform();
    return out;
}

/* n numbers of FP32, FP16 or BF16 of about `size`, or codes of INT8 (not -128) or INT4. */
static void *numbers(int stored, long n) {
    uint8_t *out = zeros((size_t)n * 4);
    for (long i = 0; i < n; i++) {
        float value = (uniform() - 0.5f) / 4;
        uint16_t half = (uint16_t)(to_bf16(value));
        if (stored == FP16) half = (uint16_t)((random_bits() & 0x83ff) | (9 + random_bits() % 4) << 10);
        if (stored == FP32) memcpy(out + 4 * i, &value, 4);
        else if (stored < INT8) memcpy(out + 2 * i, &half, 2);
        else if (stored == INT8) out[i] = (uint8_t)((int)(random_bits() % 255) - 127);
        else if (i % 2 == 0) out[i / 2] = (uint8_t)random_bits();
    }
    return out;
}

static void pack(void *pool, Matrix *m, const void *scales, long k, long n, int halves) {
    m->layout = parvis_layout(m->stored, m->arithmetic);
    char *panels = zeros((size_t)parvis_matrix_bytes(m, k, n));
    if (parvis_pack_matrix(pool, m, numbers((int)m->stored, k * n), scales, k, n, halves, panels)) abort();
    m->data = panels;
}

static Matrix matrix(void *pool, int stored, int arithmetic, long k, long n, int halves) {
    int quantised = stored >= INT8;
    if (!quantised && arithmetic == MULTIPLY_INT8) arithmetic = MULTIPLY_BF16;
    Matrix m = {.stored = stored, .group = quantised ? GROUP : 0, .arithmetic = arithmetic, .scales = FP32};
    float least = stored == INT8 ? 1.0f / 2048 : 1.0f / 128;
    pack(pool, &m, quantised ? floats(k / GROUP * n, least, 2 * least) : NULL, k, n, halves);
    return m;
}

/* Of each number of rows a product with a panel, which is a half of each half of a matrix, the first or the second. */
static void products(void *pool, int stored, int arithmetic, long group, int scales, long k) {
    enum { N = 2 * PANEL, MOST = 33 };
    Matrix w = {.stored = stored, .group = group, .arithmetic = arithmetic, .scales = scales};
    pack(pool, &w, group ? numbers(scales, k / group * N) : NULL, k, N, 1);
    float *x = floats(MOST * k, -1, 1), *tile = zeros((size_t)parvis_product_rows(MOST) * PANEL * 4);
    x[3] = 64, x[k + 5] = -32; /* their groups have other scales */
    char *packed = zeros((size_t)parvis_packed_bytes(MOST, k));
    for (int m = 1; m <= MOST; m++) {
        memset(packed, 0xff, (size_t)parvis_packed_bytes(MOST, k)); /* NaN in floats */
        parvis_products(&w, x + (MOST - m) * k, m, k, 1 + m % 2, 1, tile, packed); /* the last of them is seen */
        fwrite(tile, 4, (size_t)m * PANEL, stdout);
    }
}

static void run(void *pool, int stored, int arithmetic, int cache) {
    static Matrix wqkv[LAYERS], wo[LAYERS], w13[LAYERS], w2[LAYERS];
    static const float *attention_norm[LAYERS], *ffn_norm[LAYERS];
    static void *keys[LAYERS], *values[LAYERS];
    for (int l = 0; l < LAYERS; l++) {
        wqkv[l] = matrix(pool, stored, arithmetic, DIM, 3 * INNER, 0);
        wo[l] = matrix(pool, stored, arithmetic, INNER, DIM, 0);
        w13[l] = matrix(pool, stored, arithmetic, DIM, 2 * FFN, 1), w2[l] = matrix(pool, stored, arithmetic, FFN, DIM, 0);
        attention_norm[l] = floats(DIM, 0.5f, 1.5f), ffn_norm[l] = floats(DIM, 0.5f, 1.5f);
        keys[l] = zeros(ROWS * HEADS * SLOTS * D * 4), values[l] = zeros(ROWS * HEADS * SLOTS * D * 4);
    }
    int embed = stored < INT8 ? stored : FP16;
    Model model = {
        .dim = DIM, .n_layers = LAYERS, .n_heads = HEADS, .head_dim = D, .ffn_dim = FFN, .vocab_size = CODES,
        .cache_slots = SLOTS, .head_columns = COLUMNS_OF_HEAD, .cache = cache, .attention_scale = 0.16f,
        .embed = numbers(embed, CODES * DIM), .embed_rows = CODES, .embed_stored = embed,
        .cosine = floats(SLOTS * D / 2, -1, 1), .sine = floats(SLOTS * D / 2, -1, 1), .wqkv = wqkv, .wo = wo,
        .w13 = w13, .w2 = w2, .attention_norm = attention_norm, .ffn_norm = ffn_norm, .norm = floats(DIM, 5, 9),
        .output = matrix(pool, stored, arithmetic, DIM, COLUMNS_OF_HEAD, 0),
    };
    int64_t ids[ROWS * QUERY], write[ROWS], cache_row[ROWS] = {2, 0, 3, 1}, uncond_row[IMAGES] = {2, 1};
    float guidance[IMAGES] = {2, 1}, temperature[IMAGES] = {1, 0.8f}, top_p[IMAGES] = {1, 0.9f};
    int64_t top_k[IMAGES] = {20, 0}, tokens[IMAGES * QUERY];
    float draws[IMAGES * QUERY], *logits = zeros(IMAGES * QUERY * CODES * 4);
    Step step = {
        .model = &model, .rows = ROWS, .query = QUERY, .images = IMAGES, .ids = ids, .write = write,
        .cache_row = cache_row, .uncond_row = uncond_row, .guidance = guidance, .temperature = temperature,
        .top_k = top_k, .top_p = top_p, .uniform = draws, .keys = keys, .values = values,
        .workspace = zeros((size_t)parvis_workspace(&model, ROWS, QUERY, 3)),
    };
    for (int call = 0; call < CALLS; call++) {
        for (int i = 0; i < ROWS * QUERY; i++) ids[i] = random_bits() % CODES;
        for (int i = 0; i < ROWS; i++) write[i] = call * QUERY + i % 2; /* rows at different positions */
        for (int i = 0; i < IMAGES * QUERY; i++) draws[i] = uniform();
        step.tokens = NULL, step.logits = logits;
        if (parvis_step(pool, &step)) abort();
        fwrite(logits, 4, IMAGES * QUERY * CODES, stdout);
        step.tokens = tokens, step.logits = NULL;
        if (parvis_step(pool, &step)) abort();
        fwrite(tokens, 8, IMAGES * QUERY, stdout);
    }
    parvis_settle(pool);
}

/* Of anything behind the program's name, the products alone. */
int main(int count, char **given) {
    (void)given;
    fprintf(stderr, "%s %d", parvis_instructions(), parvis_extra_instructions());
    void *pool;
    parvis_pool_open(3, &pool);
    for (int stored = FP32; stored <= INT4 && count == 1; stored++)
        for (int arithmetic = MULTIPLY_FP32; arithmetic <= MULTIPLY_INT8; arithmetic++)
            for (int cache = FP32; cache <= BF16; cache += BF16 - FP32) run(pool, stored, arithmetic, cache);
    state = 2; /* the same numbers whatever ran before */
    for (int arithmetic = MULTIPLY_INT8; arithmetic >= MULTIPLY_BF16; arithmetic--)
        for (int stored = INT8; stored <= INT4; stored++)
            for (long group = 32; group <= 128; group *= 2)
                for (int scales = FP32; scales <= BF16; scales++) products(pool, stored, arithmetic, group, scales, 256);
    for (int stored = FP32; stored <= BF16; stored++)
        for (long k = 416; k <= 3328; k *= 8) products(pool, stored, MULTIPLY_BF16, 0, FP32, k);
    parvis_settle(pool), parvis_pool_close(&pool);
    return 0;
}
