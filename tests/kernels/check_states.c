/* The native decoding of packed states on buffers of the exact size, so that the sanitizers see a byte read
 * or written beyond them; random bytes are states like any others. Built by test_states.py. Prints the number
 * of states decoded. */

#include "states.c"

#include <stdio.h>

static uint32_t seed = 1;
static uint32_t next_random(void) {
    return seed = seed * 1664525u + 1013904223u;
}

static int64_t check(int64_t bits, int64_t head_dim, int64_t tokens, int outliers, int64_t kind,
                     int64_t path) {
    enum { HEADS = 4, OWN = 2 };
    int64_t groups = head_dim / GROUP, eighth = head_dim / OUTLIERS;
    int64_t row = groups * (GROUP / 8 * bits + 2 + (outliers ? OUTLIERS / 2 + 1 : 0));
    size_t packed_size = (size_t)(HEADS * tokens * row), dense_size = (size_t)(HEADS * tokens * head_dim);
    uint8_t *packed = malloc(packed_size), *dense = malloc(dense_size * (size_t)SIZE_OF[kind]);
    int32_t *channels = malloc((size_t)(OWN * eighth) * sizeof *channels);
    float *steps = malloc(256 * sizeof *steps);
    for (size_t i = 0; i < packed_size; i++) packed[i] = (uint8_t)(next_random() >> 24);
    for (int64_t i = 0; i < OWN * eighth; i++) channels[i] = (int32_t)(next_random() % (uint32_t)head_dim);
    for (int i = 0; i < 256; i++) steps[i] = (float)i;
    States states = {
        packed, HEADS, tokens, head_dim,          row, tokens * row, bits, outliers ? channels : NULL, OWN,
        steps,  dense, kind,   tokens * head_dim, 1,   path,         NULL};
    svdq_decode_states(&states);
    free(packed), free(dense), free(channels), free(steps);
    return HEADS * tokens;
}

int main(void) {
    const int64_t all_bits[] = {2, 3, 4, 8}, dims[] = {64, 192, 1024}, counts[] = {1, 7, 8, 65};
    int64_t done = 0;
    for (int b = 0; b < 4; b++)
        for (int d = 0; d < 3; d++)
            for (int c = 0; c < 4; c++)
                for (int which = 0; which < 8; which++)
                    done += check(all_bits[b], dims[d], counts[c], which & 1, which >> 1 & 1, which >> 2);
    printf("%lld\n", (long long)done);
    return 0;
}
