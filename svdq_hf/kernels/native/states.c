/* Packed keys or values of a KV cache, decoded to dense rows.
 *
 * Plain C with a plain C interface, as svdq.c: the caller (kernels/native/states.py) has checked shapes,
 * dtypes and bounds. What it computes is what core/state_codes.py computes in torch, bit for bit: codes are
 * turned as small integers, which float32 adds exactly, and are scaled once. Not here: packing, which happens
 * once for each token (core/), and attention itself.
 */

#include "dense.h"

enum {
    STATES_ABI = 1,
    GROUP = 64, /* values that share a step and are turned together */
    LANES = 8,  /* of 32 bits in a register */
    WIDE = 16,  /* of 16 bits */
    REGISTERS = GROUP / WIDE,
    OUTLIERS = 8,   /* coarse codes of a group */
    COARSE_TOP = 7, /* the largest of them; stored are sums with it */
    TILE = 8,       /* tokens that are decoded side by side */
    PIECE = 64,     /* tokens that a thread decodes before it asks for more */
    MOST_DIM = 1024 /* channels of a head */
};

static const int64_t SIZE_OF[] = {[FLOAT32] = 4, [BFLOAT16] = 2};

/* Packed states and where their dense rows go; rows of a head are contiguous, heads are not. */
typedef struct {
    const uint8_t *packed; /* [heads][tokens][row_bytes] */
    int64_t heads, tokens, head_dim, row_bytes, packed_stride;
    int64_t bits;
    const int32_t *channels; /* [own_heads][head_dim / 8]; NULL: no outlier channels */
    int64_t own_heads;       /* heads of one sequence of the batch */
    const float *steps;      /* [256] */
    void *dense;             /* [heads][tokens][head_dim] */
    int64_t kind, dense_stride;
    int64_t threads, path;
    void *parallel; /* GOMP_parallel of torch's own OpenMP; NULL: one thread */
} States;

typedef struct {
    const States *states;
    int64_t pieces, next;
} Shared;

typedef float Lanes __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), may_alias));
typedef int16_t Shorts __attribute__((vector_size(2 * WIDE), may_alias));
typedef uint16_t Words __attribute__((vector_size(2 * LANES), may_alias, aligned(2)));
typedef uint8_t Bytes __attribute__((vector_size(WIDE), may_alias, aligned(1)));
#define CONVERT(vector, type) __builtin_convertvector(vector, type)
#if defined(__clang__)
#define SHUFFLED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLED(x, ...) __builtin_shuffle(x, (Shorts){__VA_ARGS__})
#endif

/* ------------------------------------------------------------------------------------------------- codes */

/* Codes 16 r to 16 r + 15 of a field of 2, 4 or 8 bits: plane 16 r / (8 width), and its bytes. */
INLINE Shorts field_of(const uint8_t *field, const int r, const int width) {
    Shorts bytes = CONVERT(*(const Bytes *)(field + WIDE * r % (8 * width)), Shorts);
    return bytes >> (int16_t)(width * (WIDE * r / (8 * width))) & (int16_t)((1 << width) - 1);
}

/* 4 times codes 16 r to 16 r + 15 of a field of one bit: planes 2 r and 2 r + 1 of its eight bytes. */
INLINE Shorts top_bits_of(const uint8_t *field, const int r) {
    const int16_t low = (int16_t)(1 << 2 * r), high = (int16_t)(2 << 2 * r);
    uint8_t twice[WIDE];
    memcpy(twice, field, WIDE / 2), memcpy(twice + WIDE / 2, field, WIDE / 2);
    Shorts mask = {low, low, low, low, low, low, low, low, high, high, high, high, high, high, high, high};
    return ((CONVERT(*(const Bytes *)twice, Shorts) & mask) != 0) & 4;
}

INLINE Shorts codes_of(const uint8_t *group, const int r, const int bits) {
    if (bits == 3) return field_of(group, r, 2) | top_bits_of(group + WIDE, r);
    return field_of(group, r, bits);
}

/* ---------------------------------------------------------------------------------------------- rotation */

/* Lanes i and i ^ (1, 2, 4, 8) added; the upper of the two is subtracted from the lower. */
INLINE Shorts in_lanes(Shorts x) {
    const Shorts one = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
                 two = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
                 four = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
                 eight = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
    x = SHUFFLED(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14) + x * one;
    x = SHUFFLED(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13) + x * two;
    x = SHUFFLED(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11) + x * four;
    return SHUFFLED(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7) + x * eight;
}

/* The Walsh-Hadamard matrix of order 64, of ones and minus ones, times a group. A code and the lowest are
 * together at most 255 + 127 in size, and 64 of them fit into 16 bits. */
INLINE void turn(Shorts x[REGISTERS]) {
    for (int half = 1; half < REGISTERS; half *= 2)
        for (int r = 0; r < REGISTERS; r++)
            if (!(r & half)) {
                Shorts low = x[r], high = x[r + half];
                x[r] = low + high, x[r + half] = low - high;
            }
    for (int r = 0; r < REGISTERS; r++) x[r] = in_lanes(x[r]);
}

/* -------------------------------------------------------------------------------------------------- rows */

INLINE void decode_group(const States *states, const uint8_t *group, float *to, const int bits) {
    const uint8_t *scales = group + GROUP / 8 * bits + (states->channels ? OUTLIERS / 2 : 0);
    int16_t lowest = (int8_t)scales[1];
    float unit = states->steps[scales[0]] * 0.125f; /* 1 / sqrt(64) */
    Shorts x[REGISTERS];
    int16_t turned[GROUP];
    for (int r = 0; r < REGISTERS; r++) x[r] = codes_of(group, r, bits) + lowest;
    turn(x);
    memcpy(turned, x, sizeof turned);
    for (int i = 0; i < GROUP; i++) to[i] = (float)turned[i] * unit;
}

/* Coarse parts, added to their channels. */
INLINE void add_coarse(const States *states, const uint8_t *group, const int32_t *channels, float *row,
                       const int bits) {
    const uint8_t *codes = group + GROUP / 8 * bits;
    float coarse[OUTLIERS];
    int32_t word;
    memcpy(&word, codes, sizeof word);
    Ints code = ((Ints){0} + word) >> (Ints){0, 8, 16, 24, 4, 12, 20, 28} & 15;
    *(Lanes *)coarse = CONVERT(code - COARSE_TOP, Lanes) * states->steps[codes[OUTLIERS / 2 + 2]];
    for (int i = 0; i < OUTLIERS; i++) row[channels[i]] += coarse[i];
}

/* float32 to what the model computes in; to bfloat16, ties go to even. */
INLINE void write_row(const float *row, int64_t width, void *to, int64_t kind) {
    if (kind == FLOAT32) {
        memcpy(to, row, (size_t)width * sizeof *row);
        return;
    }
    for (int64_t c = 0; c < width; c += LANES) {
        Ints bits = (Ints) * (const Lanes *)(row + c);
        bits += 0x7FFF + (bits >> 16 & 1);
        *(Words *)((uint16_t *)to + c) = CONVERT(bits >> 16 & 0xFFFF, Words);
    }
}

/* Some tokens of a head. Each step is done for all of them before the next, since what was stored by numbers
 * is slow to load by registers at once. */
INLINE void decode_tile(const States *states, const uint8_t *packed, const int32_t *channels, uint8_t *dense,
                        int64_t tokens, const int bits) {
    float rows[TILE][MOST_DIM];
    int64_t groups = states->head_dim / GROUP, bytes = states->row_bytes / groups;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t g = 0; g < groups; g++)
            decode_group(states, packed + t * states->row_bytes + bytes * g, rows[t] + GROUP * g, bits);
    for (int64_t t = 0; channels && t < tokens; t++)
        for (int64_t g = 0; g < groups; g++)
            add_coarse(states, packed + t * states->row_bytes + bytes * g, channels + OUTLIERS * g, rows[t],
                       bits);
    for (int64_t t = 0; t < tokens; t++)
        write_row(rows[t], states->head_dim, dense + t * states->head_dim * SIZE_OF[states->kind],
                  states->kind);
}

/* Pieces of tokens of a head, until none is left. */
INLINE void decode_pieces(Shared *shared, const int bits) {
    const States *states = shared->states;
    int64_t each = (states->tokens + PIECE - 1) / PIECE, size = SIZE_OF[states->kind];
    for (int64_t piece; (piece = next_of(&shared->next)) < shared->pieces;) {
        int64_t head = piece / each, token = piece % each * PIECE, stop = token + PIECE;
        if (stop > states->tokens) stop = states->tokens;
        const uint8_t *packed = states->packed + head * states->packed_stride;
        uint8_t *dense = (uint8_t *)states->dense + head * states->dense_stride * size;
        const int32_t *channels = states->channels;
        if (channels) channels += head % states->own_heads * (states->head_dim / OUTLIERS);
        for (; token < stop; token += TILE)
            decode_tile(states, packed + token * states->row_bytes, channels,
                        dense + token * states->head_dim * size, stop - token < TILE ? stop - token : TILE,
                        bits);
    }
}

/* Each number of bits is compiled on its own. */
#define EACH_BITS(shared)                                                                                    \
    switch ((shared)->states->bits) {                                                                        \
    case 2: decode_pieces(shared, 2); break;                                                                 \
    case 3: decode_pieces(shared, 3); break;                                                                 \
    case 4: decode_pieces(shared, 4); break;                                                                 \
    default: decode_pieces(shared, 8);                                                                       \
    }

static void work_plain(void *what){EACH_BITS((Shared *)what)}

#if defined(__x86_64__)
AVX2 static void work_avx2(void *what){EACH_BITS((Shared *)what)}
#else
#define work_avx2 work_plain
#endif

/* Decode all rows. */
EXPORT void svdq_decode_states(const States *states) {
    int64_t each = (states->tokens + PIECE - 1) / PIECE;
    Shared shared = {.states = states, .pieces = states->heads * each};
    share(states->parallel, states->threads, states->heads * states->tokens * states->head_dim,
          states->path >= WITH_AVX2 ? work_avx2 : work_plain, &shared);
}

EXPORT int64_t svdq_states_abi(void) {
    return STATES_ABI;
}
