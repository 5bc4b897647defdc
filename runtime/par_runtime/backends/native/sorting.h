/* What draws.h needs once for all instruction sets: sorting floats, as whole numbers whose order is the reverse of that
   of the floats. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define MIN_TEMPERATURE 1e-5f /* as in the graphs */
#define DIGIT_BITS 8
#define DIGITS (32 / DIGIT_BITS)

/* The codes that the filters keep: those of at least `least`, and of those that are equal to `edge`, the first `tied`.
   A code below `edge` is not kept. */
typedef struct {
    float least, edge;
    long tied;
} Kept;

/* Fills y [V] up to `columns`, a multiple of PANEL, with what is never drawn. */
static inline void end_of_logits(float *y, long v, long columns) {
    for (long i = v; i < columns; i++) y[i] = -INFINITY;
}

static inline uint32_t key_of_value(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits >> 31 ? bits : ~(bits | 0x80000000u); /* the larger the float, the smaller the key */
}

static inline float value_of_key(uint32_t key) {
    uint32_t bits = key >> 31 ? key : ~key & 0x7fffffffu;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* The keys of those numbers of y [V] that are at least `least`, sorted into keys[0 ..], so the largest number first.
   Returns how many there are. `keys` is [2*V]. */
static long sorted_keys(const float *y, long v, float least, uint32_t *keys) {
    uint32_t counts[DIGITS][1 << DIGIT_BITS] = {{0}};
    uint32_t *from = keys, *to = keys + v;
    long n = 0;
    for (long i = 0; i < v; i++) {
        from[n] = key_of_value(y[i]);
        n += y[i] >= least;
    }
    for (long i = 0; i < n; i++)
        for (int digit = 0; digit < DIGITS; digit++)
            counts[digit][from[i] >> digit * DIGIT_BITS & ((1 << DIGIT_BITS) - 1)]++;
    for (int digit = 0; digit < DIGITS; digit++) {
        int shift = digit * DIGIT_BITS;
        uint32_t *count = counts[digit], place = 0, mask = (1 << DIGIT_BITS) - 1;
        if (n && count[from[0] >> shift & mask] == n) continue; /* all keys have the same digit */
        for (int value = 0; value <= (int)mask; value++) {
            uint32_t each = count[value];
            count[value] = place;
            place += each;
        }
        for (long i = 0; i < n; i++) to[count[from[i] >> shift & mask]++] = from[i];
        uint32_t *other = from;
        from = to, to = other;
    }
    if (from != keys) memcpy(keys, from, (size_t)n * sizeof *keys);
    return n;
}
