/* Numbers as a bundle stores them, for one instruction set; vectors.h describes the macros. */

/* out [n] = the numbers of an array of FP32, FP16 or BF16. */
TARGET static void NAME(read_numbers)(const void *from, int64_t stored, long n, float *out) {
    const uint16_t *half = from;
    long whole = n - n % VEC_FLOATS;
    if (stored == FP32) {
        memcpy(out, from, (size_t)n * sizeof(float));
        return;
    }
    if (stored == FP16)
        for (long i = 0; i < whole; i += VEC_FLOATS) vec_store(out + i, vec_load_fp16(half + i));
    else
        for (long i = 0; i < whole; i += VEC_FLOATS) vec_store(out + i, vec_load_bf16(half + i));
    if (whole < n) { /* nothing is read behind the last one */
        uint16_t last[VEC_FLOATS] = {0};
        float numbers[VEC_FLOATS];
        memcpy(last, half + whole, (size_t)(n - whole) * sizeof *last);
        vec_store(numbers, stored == FP16 ? vec_load_fp16(last) : vec_load_bf16(last));
        memcpy(out + whole, numbers, (size_t)(n - whole) * sizeof(float));
    }
}
