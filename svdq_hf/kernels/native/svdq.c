/* y = x W^T + bias straight from the stored 4-bit weights, and W itself a block of rows at a time.
 *
 * Plain C with a plain C interface: no header of torch or Python, so that one build serves every torch.
 * The caller (kernels/native) has checked shapes, dtypes and contiguity; what only the data can tell
 * (positions out of range or out of order) is checked here and answered by an error code, never followed.
 *
 * Few tokens: a row is decoded in registers (sixteen levels times the group's scale are a table, in which one
 * permutation looks sixteen codes up), and every weight is used for up to MOST_TOKENS tokens at once. Many
 * tokens: a panel of rows is decoded into cache first. Sums are float32, in an order that does not depend on
 * the number of threads.
 *
 * Paths: AVX-512; AVX2; whatever the compiler makes of vectors of sixteen floats (NEON, SSE).
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma")))
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))
#define EXPORT __attribute__((visibility("default")))

enum {
    ABI = 3,
    BLOCK = 64,
    HALF = 32,
    PAIR = 2 * BLOCK,
    HALVES = PAIR / HALF,
    LANES = 16,
    MOST_TOKENS = 8,
    MOST_ROWS = 4,
    FEW_TOKENS = 12,
    FEWEST_TOKENS = 4
};
enum { FEW_PRODUCTS = 1 << 20 }; /* below, about 40 microseconds, a second thread costs what it brings */
enum { OK = 0, NO_MEMORY = 1, BAD_POSITION = 2, MISALIGNED = 3, FOREIGN = 4 };
enum { PLAIN = 0, WITH_AVX2 = 1, WITH_AVX512 = 2, WITH_VNNI = 3 }; /* the last is not exact: see `Digits` */
enum { SCALE_FLOAT32 = 0, SCALE_BFLOAT16 = 1, SCALE_INT8 = 2 };

/* A stored weight: the parts of the format, all contiguous; NULL where the grid has no such part. */
typedef struct {
    int64_t out, in, group; /* group: columns that share a scale, a multiple of 32, or >= in */
    int64_t bits;           /* of a code: 3, 4 or 8 */
    const uint8_t *codes;   /* [out, ceil(in / 64), 8 * bits] */
    const void *scale;      /* [out or 1, groups] */
    int64_t scale_kind, scale_rows, groups;
    const uint16_t *row_scale;    /* [out], bfloat16 */
    const uint16_t *column_scale; /* [in], bfloat16 */
    const int8_t *levels;         /* [2^bits], of the codes from the lowest on; not of 8 bits */
    const float *values;          /* [k]: the salient weights, sorted by row */
    const int32_t *rows, *columns;
    int64_t k;
    const float *bias; /* [out] */
} Layer;

/* Whether every pointer is a multiple of its type's size: of a mapped file it need not be. */
static int aligned(const Layer *layer) {
    uintptr_t fours = (uintptr_t)layer->values | (uintptr_t)layer->rows | (uintptr_t)layer->columns |
                      (uintptr_t)layer->bias;
    uintptr_t twos = (uintptr_t)layer->row_scale | (uintptr_t)layer->column_scale;
    if (layer->scale_kind == 0) fours |= (uintptr_t)layer->scale;
    if (layer->scale_kind == 1) twos |= (uintptr_t)layer->scale;
    return fours % 4 == 0 && twos % 2 == 0;
}

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#include "threads.h"

/* ------------------------------------------------------------------------------------- scales and levels */

INLINE float widen(uint16_t bfloat16) {
    uint32_t bits = (uint32_t)bfloat16 << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* Rounded to the nearest, ties to even; NaN stays NaN. */
INLINE uint16_t narrowed(float wide) {
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

INLINE int64_t blocks_of(const Layer *layer) {
    return (layer->in + BLOCK - 1) / BLOCK;
}

/* Bytes of a row of codes. */
INLINE int64_t width_of(const Layer *layer) {
    return 8 * layer->bits * blocks_of(layer);
}

INLINE int64_t pairs_of(const Layer *layer) {
    return (layer->in + PAIR - 1) / PAIR;
}

/* The level of each stored code of 3 or 4 bits: [16]. */
INLINE void table_of(const Layer *layer, float *table) {
    int codes = layer->bits == 3 ? 8 : 16;
    for (int i = 0; i < 16; i++) table[i] = layer->levels ? layer->levels[i % codes] : i % codes - codes / 2;
}

/* The scales of a row for its half blocks of 32 codes from `start` on, float32: [count]. */
INLINE void scales_of_row(const Layer *layer, int64_t row, int64_t start, int64_t count, float *found) {
    int64_t groups = layer->groups, each = layer->group / HALF;
    int64_t first = layer->scale_rows == 1 ? 0 : row * groups;
    float unit = layer->row_scale ? widen(layer->row_scale[row]) : 1.0f;
    const int8_t *bytes = (const int8_t *)layer->scale + first;
    const uint16_t *words = (const uint16_t *)layer->scale + first;
    const float *floats = (const float *)layer->scale + first;
#define SCALE(g)                                                                                             \
    (layer->scale_kind == SCALE_INT8       ? bytes[g] * unit                                                 \
     : layer->scale_kind == SCALE_BFLOAT16 ? widen(words[g])                                                 \
                                           : floats[g])
    if (groups == 1 || each == 0) {
        for (int64_t i = 0; i < count; i++) found[i] = SCALE(0);
        return;
    }
    int64_t whole = groups * each - start < count ? groups * each - start : count;
    if (each == 1 && layer->scale_kind == SCALE_INT8) /* the default: a loop that vectorises */
        for (int64_t i = 0; i < whole; i++) found[i] = bytes[start + i] * unit;
    else
        for (int64_t i = 0, g = start / each, end; i < whole; g++)
            for (end = (g + 1) * each - start < whole ? (g + 1) * each - start : whole; i < end; i++)
                found[i] = SCALE(g);
#undef SCALE
    for (int64_t i = whole < 0 ? 0 : whole; i < count; i++) found[i] = 0.0f; /* padding: its codes are zero */
}

#if defined(__x86_64__)
/* The same by itself: inlined for each number of bits and of tokens, it takes a compiler half a minute. */
AVX2 APART void scales_of_row_avx2(const Layer *layer, int64_t row, int64_t start, int64_t count,
                                   float *found) {
    scales_of_row(layer, row, start, count, found);
}
#endif

/* ------------------------------------------------- decoding 64 codes: [64] floats, in units of nothing */

INLINE void nibbles_plain(const uint8_t *codes, const float *table, float *levels) {
#if defined(__aarch64__)
    int8_t bytes[16], found[BLOCK];
    for (int i = 0; i < 16; i++) bytes[i] = (int8_t)table[i];
    int8x16_t sixteen = vld1q_s8(bytes);
    for (int half = 0; half < 2; half++) {
        uint8x16_t code = vld1q_u8(codes + 16 * half);
        vst1q_s8(found + 16 * half, vqtbl1q_s8(sixteen, vandq_u8(code, vdupq_n_u8(15))));
        vst1q_s8(found + HALF + 16 * half, vqtbl1q_s8(sixteen, vshrq_n_u8(code, 4)));
    }
    for (int i = 0; i < BLOCK; i++) levels[i] = found[i];
#else
    for (int i = 0; i < HALF; i++) levels[i] = table[codes[i] & 15];
    for (int i = 0; i < HALF; i++) levels[HALF + i] = table[codes[i] >> 4];
#endif
}

INLINE void decode_plain(const uint8_t *codes, const float *table, int64_t bits, float low, float high,
                         float *weights) {
    if (bits == 4)
        nibbles_plain(codes, table, weights);
    else if (bits == 8)
        for (int i = 0; i < BLOCK; i++) weights[i] = (int8_t)codes[i];
    else
        for (int i = 0; i < BLOCK; i++) /* two bits of byte i % 16, the top one of byte 16 + i % 8 */
            weights[i] = table[(codes[i % 16] >> i / 16 * 2 & 3) | (codes[16 + i % 8] >> i / 8 & 1) << 2];
    for (int i = 0; i < HALF; i++) weights[i] *= low;
    for (int i = HALF; i < BLOCK; i++) weights[i] *= high;
}

#if defined(__x86_64__)
/* Sixteen weights of a block: part 0 and 1 are its low nibbles, 2 and 3 its high ones. */
AVX512 INLINE void decode_avx512(const uint8_t *codes, __m512 table, float low, float high, __m512 *weights) {
    __m512i first = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    __m512i second = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + 16)));
    __m512 lows = _mm512_mul_ps(table, _mm512_set1_ps(low)),
           highs = _mm512_mul_ps(table, _mm512_set1_ps(high));
    weights[0] = _mm512_permutexvar_ps(first, lows); /* looks at the lowest four bits alone */
    weights[1] = _mm512_permutexvar_ps(second, lows);
    weights[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(first, 4), highs);
    weights[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(second, 4), highs);
}
#endif

/* ----------------------------------- a tile: some rows times some tokens, without the salient weights
 *
 * x: [tokens, padded], the activations times their columns' scales; scales: room for the rows' own, [rows,
 * HALVES * pairs]; sums: [MOST_TOKENS][MOST_ROWS].
 */

#define TILE_ARGUMENTS                                                                                       \
    const Layer *layer, int64_t row, const float *table, float *scales, const float *x,                      \
        float sums[MOST_TOKENS][MOST_ROWS]

INLINE float sum_of(Vector v) {
    float part[LANES];
    memcpy(part, &v, sizeof part);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) part[i] += part[i + step];
    return part[0];
}

INLINE void plain_tile(TILE_ARGUMENTS, const int tokens) {
    int64_t blocks = blocks_of(layer), padded = BLOCK * blocks;
    Vector acc[MOST_TOKENS] = {0};
    const uint8_t *codes = layer->codes + row * width_of(layer);
    for (int64_t b = 0; b < blocks; b++) {
        float weights[BLOCK];
        decode_plain(codes + 8 * layer->bits * b, table, layer->bits, scales[2 * b], scales[2 * b + 1],
                     weights);
        for (int t = 0; t < tokens; t++)
            for (int part = 0; part < BLOCK; part += LANES)
                acc[t] +=
                    *(const Vector *)(weights + part) * *(const Vector *)(x + t * padded + BLOCK * b + part);
    }
    for (int t = 0; t < tokens; t++) sums[t][0] = sum_of(acc[t]);
}

#if defined(__x86_64__)
/* The scales of some rows; the default grid's, sixteen at a time. */
AVX512 INLINE void scales_avx512(const Layer *layer, int64_t row, int64_t rows, float *found) {
    int64_t groups = layer->groups, halves = HALVES * pairs_of(layer);
    if (layer->scale_kind != SCALE_INT8 || layer->group != HALF || groups == 1 || layer->scale_rows == 1) {
        for (int64_t r = 0; r < rows; r++) scales_of_row_avx2(layer, row + r, 0, halves, found + r * halves);
        return;
    }
    for (int64_t r = 0; r < rows; r++, found += halves) {
        const int8_t *bytes = (const int8_t *)layer->scale + (row + r) * groups;
        __m512 unit = _mm512_set1_ps(layer->row_scale ? widen(layer->row_scale[row + r]) : 1.0f);
        for (int64_t i = 0; i < halves; i += LANES) {
            __mmask16 room = halves - i >= LANES ? 0xFFFF : (__mmask16)((1u << (halves - i)) - 1);
            __mmask16 there = groups - i >= LANES ? 0xFFFF
                              : i < groups        ? (__mmask16)((1u << (groups - i)) - 1)
                                                  : 0;
            __m512i scale = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, bytes + i));
            _mm512_mask_storeu_ps(found + i, room, _mm512_mul_ps(_mm512_cvtepi32_ps(scale), unit));
        }
    }
}

/* The sum of each row's lanes: four rows in half the instructions of one after another, in the same order. */
AVX512 INLINE void sums_of_rows(const __m512 *acc, float *sums, const int rows) {
    if (rows < 4) {
        for (int r = 0; r < rows; r++) sums[r] = _mm512_reduce_add_ps(acc[r]);
        return;
    }
    __m128 four[4];
    for (int r = 0; r < 4; r++) {
        __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(acc[r]), _mm512_extractf32x8_ps(acc[r], 1));
        four[r] = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    }
    __m128 first = _mm_add_ps(_mm_unpacklo_ps(four[0], four[1]), _mm_unpackhi_ps(four[0], four[1]));
    __m128 second = _mm_add_ps(_mm_unpacklo_ps(four[2], four[3]), _mm_unpackhi_ps(four[2], four[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_movelh_ps(first, second), _mm_movehl_ps(second, first)));
}

AVX512 INLINE void avx512_tile(TILE_ARGUMENTS, const int tokens, const int rows) {
    int64_t blocks = blocks_of(layer), padded = BLOCK * blocks, width = HALF * blocks,
            halves = HALVES * pairs_of(layer);
    __m512 levels = _mm512_loadu_ps(table), acc[MOST_TOKENS][MOST_ROWS];
    const uint8_t *codes = layer->codes + row * width;
    int64_t ahead = row + 2 * rows <= layer->out ? rows * width : 0; /* the next tile's, from memory */
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) acc[t][r] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        __m512 weights[MOST_ROWS][4];
        for (int r = 0; r < rows; r++) {
            const uint8_t *here = codes + r * width + HALF * b;
            _mm_prefetch((const char *)(here + ahead), _MM_HINT_T0);
            decode_avx512(here, levels, scales[r * halves + 2 * b], scales[r * halves + 2 * b + 1],
                          weights[r]);
        }
        for (int part = 0; part < 4; part++)
            for (int t = 0; t < tokens; t++) {
                __m512 activation = _mm512_loadu_ps(x + t * padded + BLOCK * b + LANES * part);
                for (int r = 0; r < rows; r++)
                    acc[t][r] = _mm512_fmadd_ps(weights[r][part], activation, acc[t][r]);
            }
    }
    for (int t = 0; t < tokens; t++) sums_of_rows(acc[t], sums[t], rows);
}
#endif

/* Activations as integers of 16 bits, a unit for each half block: x = unit * (256 * high + low), so that byte
 * products sum them exactly; what is rounded is at most unit / 2, 1 / 65278 of the half block's largest.
 *
 * A pair of blocks is 64 bytes of codes: its low nibbles are the first half of both blocks, its high ones the
 * second. Digits stand in that order. A level is looked up as level + 128, which a byte product takes as
 * unsigned; what that adds is taken off again by the sums of the digits.
 */
typedef struct {
    int8_t *digits; /* [tokens, pairs, 2 halves, 2 digits, BLOCK] */
    float *units;   /* [tokens, pairs, 2 blocks, 2 halves] */
    float *sums;    /* the same, -128 times the sum of the half block's integers */
} Digits;

#if defined(__x86_64__)
/* For a row and a token: unit * scale of each half block, [halves]; returns sixteen parts of what is to be
 * added. */
VNNI INLINE __m512 vnni_units(const Digits *digits, const float *scales, int64_t token, int64_t halves,
                              float *units) {
    __m512 sum = _mm512_setzero_ps();
    const float *unit = digits->units + token * halves, *sums = digits->sums + token * halves;
    for (int64_t i = 0; i < halves; i += LANES) {
        __mmask16 there = halves - i >= LANES ? 0xFFFF : (__mmask16)((1u << (halves - i)) - 1);
        __m512 each =
            _mm512_mul_ps(_mm512_maskz_loadu_ps(there, unit + i), _mm512_maskz_loadu_ps(there, scales + i));
        _mm512_mask_storeu_ps(units + i, there, each);
        sum = _mm512_fmadd_ps(each, _mm512_maskz_loadu_ps(there, sums + i), sum);
    }
    return sum;
}

/* scales: [rows, 4 * pairs]; units: room for [rows, tokens, 4 * pairs]. */
VNNI INLINE void vnni_tile(const Layer *layer, int64_t row, __m512i table, const float *scales, float *units,
                           const Digits *digits, int64_t first, float sums[MOST_TOKENS][MOST_ROWS],
                           const int tokens, const int rows) {
    int64_t pairs = pairs_of(layer), halves = HALVES * pairs, width = HALF * blocks_of(layer);
    const uint8_t *codes = layer->codes + row * width;
    const int8_t *numbers = digits->digits + first * pairs * 2 * PAIR;
    int64_t ahead = row + 2 * rows <= layer->out ? rows * width : 0; /* the next tile's, from memory */
    __m512 acc[MOST_TOKENS][MOST_ROWS];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            acc[t][r] =
                vnni_units(digits, scales + r * halves, first + t, halves, units + (r * tokens + t) * halves);
    for (int64_t p = 0; p < pairs; p++) {
        __mmask64 there = BLOCK * p + BLOCK <= width ? ~0ull : 0xFFFFFFFFull;
        for (int r = 0; r < rows; r++) {
            const uint8_t *here = codes + r * width + BLOCK * p;
            _mm_prefetch((const char *)(here + ahead), _MM_HINT_T0);
            __m512i code = _mm512_maskz_loadu_epi8(there, here);
            for (int half = 0; half < 2; half++) {
                __m512i weights = _mm512_permutexvar_epi8(half ? _mm512_srli_epi16(code, 4) : code, table);
                for (int t = 0; t < tokens; t++) {
                    const int8_t *number = numbers + (t * pairs + p) * 2 * PAIR + half * PAIR;
                    const float *unit = units + (r * tokens + t) * halves + HALVES * p + half;
                    __m512i sum =
                        _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, _mm512_loadu_si512(number));
                    sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), weights,
                                              _mm512_loadu_si512(number + BLOCK));
                    __m512 scale =
                        _mm512_mask_broadcastss_ps(_mm512_set1_ps(unit[0]), 0xFF00, _mm_set_ss(unit[2]));
                    acc[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[t][r]);
                }
            }
        }
    }
    for (int t = 0; t < tokens; t++) sums_of_rows(acc[t], sums[t], rows);
}
#endif

/* Each number of tokens is compiled on its own, so that the sums stay in registers. */
#define EACH_TOKENS(CALL)                                                                                    \
    switch (tokens) {                                                                                        \
    case 1: CALL(1); break;                                                                                  \
    case 2: CALL(2); break;                                                                                  \
    case 3: CALL(3); break;                                                                                  \
    case 4: CALL(4); break;                                                                                  \
    case 5: CALL(5); break;                                                                                  \
    case 6: CALL(6); break;                                                                                  \
    case 7: CALL(7); break;                                                                                  \
    default: CALL(8);                                                                                        \
    }

#if defined(__x86_64__)
/* Sixteen activations from column `at` on, times their columns' scales; beyond the last, zeros. */
VNNI INLINE __m512 scaled_lanes(const Layer *layer, const float *x, int64_t at) {
    int64_t left = layer->in - at;
    __mmask16 there = left >= LANES ? 0xFFFF : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
    __m512 found = _mm512_maskz_loadu_ps(there, x + at);
    if (!layer->column_scale) return found;
    __m512i scale = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, layer->column_scale + at));
    return _mm512_mul_ps(found, _mm512_castsi512_ps(_mm512_slli_epi32(scale, 16)));
}

/* The activations [tokens, in] as `Digits`. */
VNNI static void digits_of(const Layer *layer, const float *x, int64_t tokens, Digits *digits) {
    enum { ODD = 0x99 };                                      /* NaNs and infinities */
    const float largest = 127 * 256 + 127, smallest = 1e-33f; /* below it, a unit is no normal number */
    int64_t halves = HALVES * pairs_of(layer);
    for (int64_t i = 0; i < tokens * halves; i++) {
        int64_t h = i % halves;
        const float *from = x + i / halves * layer->in;
        int8_t *to = digits->digits + i / HALVES * 2 * PAIR + h % 2 * PAIR + h % HALVES / 2 * HALF;
        __m512 parts[2] = {scaled_lanes(layer, from, h * HALF), scaled_lanes(layer, from, h * HALF + LANES)};
        float size = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(parts[0]), _mm512_abs_ps(parts[1])));
        int odd = _mm512_fpclass_ps_mask(parts[0], ODD) | _mm512_fpclass_ps_mask(parts[1], ODD);
        __m512 each = _mm512_set1_ps(size < smallest ? 0 : largest / size);
        __m512i sum = _mm512_setzero_si512();
        for (int part = 0; part < 2; part++) {
            __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(parts[part], each));
            __m512i high = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(128)), 8);
            __m512i low = _mm512_sub_epi32(number, _mm512_slli_epi32(high, 8));
            _mm_storeu_si128((__m128i *)(to + LANES * part), _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128((__m128i *)(to + BLOCK + LANES * part), _mm512_cvtepi32_epi8(low));
            sum = _mm512_add_epi32(sum, number);
        }
        digits->units[i] = odd ? __builtin_nanf("") : size < smallest ? 0 : size / largest;
        digits->sums[i] = -128.0f * (float)_mm512_reduce_add_epi32(sum);
    }
}

VNNI static void tile_vnni(const Layer *layer, int64_t row, const float *table, float *scales, float *units,
                           const Digits *digits, int64_t first, float sums[MOST_TOKENS][MOST_ROWS],
                           int64_t tokens, int64_t rows) {
    uint8_t bytes[BLOCK];
    for (int i = 0; i < BLOCK; i++) bytes[i] = (uint8_t)(table[i % 16] + 128);
    __m512i levels = _mm512_loadu_si512(bytes);
    scales_avx512(layer, row, rows, scales);
#define CALL(n) vnni_tile(layer, row, levels, scales, units, digits, first, sums, n, 4)
    if (rows == 4) {
        if (tokens == 1)
            CALL(1);
        else
            CALL(2);
        return;
    }
#undef CALL
#define CALL(n) vnni_tile(layer, row, levels, scales, units, digits, first, sums, n, 2)
    if (rows == 2) {
        EACH_TOKENS(CALL)
        return;
    }
#undef CALL
#define CALL(n) vnni_tile(layer, row, levels, scales, units, digits, first, sums, n, 1)
    EACH_TOKENS(CALL)
#undef CALL
}
#endif

typedef void Tile(TILE_ARGUMENTS, int64_t tokens, int64_t rows);

static void tile_plain(TILE_ARGUMENTS, int64_t tokens, int64_t rows) {
    (void)rows;
    scales_of_row(layer, row, 0, HALVES * pairs_of(layer), scales);
#define CALL(n) plain_tile(layer, row, table, scales, x, sums, n)
    EACH_TOKENS(CALL)
#undef CALL
}

#if defined(__x86_64__)
AVX512 static void tile_avx512(TILE_ARGUMENTS, int64_t tokens, int64_t rows) {
    scales_avx512(layer, row, rows, scales);
#define CALL(n) avx512_tile(layer, row, table, scales, x, sums, n, 4)
    if (rows == 4) {
        if (tokens == 1)
            CALL(1);
        else
            CALL(2);
        return;
    }
#undef CALL
#define CALL(n) avx512_tile(layer, row, table, scales, x, sums, n, 2)
    if (rows == 2) {
        EACH_TOKENS(CALL)
        return;
    }
#undef CALL
#define CALL(n) avx512_tile(layer, row, table, scales, x, sums, n, 1)
    EACH_TOKENS(CALL)
#undef CALL
}
#endif

/* Rows of a tile: as many as leave its sums in registers. */
INLINE int64_t rows_of_tile(int64_t cpu, int64_t tokens, int64_t left) {
    int64_t most = cpu < WITH_AVX512 ? 1 : tokens <= 2 ? 4 : 2;
    return left >= most ? most : left >= 2 && most > 2 ? 2 : 1;
}

/* ----------------------------------------------------------------------------------------- the product */

static void fail(int64_t *error, int64_t why) {
    __atomic_store_n(error, why, __ATOMIC_RELAXED);
}

/* Every salient entry is met by one thread, once; where they are out of order or range, fewer are. */
static void count(int64_t *met, int64_t more) {
    __atomic_fetch_add(met, more, __ATOMIC_RELAXED);
}

typedef struct {
    const Layer *layer;
    const float *x;       /* [tokens, in] */
    const float *scaled;  /* [tokens, padded]: x times the columns' scales, then zeros */
    const Digits *digits; /* the same as integers, where sums are of bytes; else NULL */
    float *y;             /* [tokens, out] */
    int64_t tokens, cpu, chunk;
    int64_t next, error, salient; /* shared by the threads; salient: entries met so far */
} Product;

/* The next rows that nobody has taken; 0 where there are no more. */
INLINE int next_rows(Product *p, int64_t *first, int64_t *last) {
    int64_t out = p->layer->out;
    *first = __atomic_fetch_add(&p->next, p->chunk, __ATOMIC_RELAXED);
    *last = *first + p->chunk < out ? *first + p->chunk : out;
    return *first < out;
}

/* The first salient entry of a row or of a later one. */
INLINE int64_t first_of_row(const Layer *layer, int64_t row) {
    int64_t low = 0, high = layer->k;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (layer->rows[middle] < row)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* y += salient x for the rows [first, last); how many entries that were. */
INLINE int64_t add_salient(const Product *p, int64_t first, int64_t last) {
    const Layer *layer = p->layer;
    int64_t start = first_of_row(layer, first), e = start;
    for (; e < layer->k && layer->rows[e] < last; e++) {
        int64_t row = layer->rows[e], column = layer->columns[e];
        if (row < first || column < 0 || column >= layer->in) break;
        float value = layer->values[e];
        for (int64_t t = 0; t < p->tokens; t++)
            p->y[t * layer->out + row] += value * p->x[t * layer->in + column];
    }
    return e - start;
}

static void work_on_rows(void *given) {
    Product *p = given;
    const Layer *layer = p->layer;
    int64_t padded = BLOCK * blocks_of(layer), halves = HALVES * pairs_of(layer);
    Tile *tile = tile_plain;
#if defined(__x86_64__)
    if (p->cpu >= WITH_AVX512) tile = tile_avx512;
#endif
    float table[16], sums[MOST_TOKENS][MOST_ROWS];
    float *scales = malloc((size_t)((MOST_ROWS + 2 * MOST_TOKENS) * halves) * sizeof *scales);
    if (!scales) fail(&p->error, NO_MEMORY);
    table_of(layer, table);
    for (int64_t first, last; scales && next_rows(p, &first, &last);) {
        for (int64_t row = first, rows; row < last; row += rows) {
            rows = rows_of_tile(p->cpu, p->tokens < MOST_TOKENS ? p->tokens : MOST_TOKENS, last - row);
            for (int64_t t = 0; t < p->tokens; t += MOST_TOKENS) {
                int64_t tokens = p->tokens - t < MOST_TOKENS ? p->tokens - t : MOST_TOKENS;
#if defined(__x86_64__)
                if (p->digits)
                    tile_vnni(layer, row, table, scales, scales + MOST_ROWS * halves, p->digits, t, sums,
                              tokens, rows);
                else
#endif
                    tile(layer, row, table, scales, p->scaled + t * padded, sums, tokens, rows);
                for (int64_t i = 0; i < tokens; i++)
                    for (int64_t r = 0; r < rows; r++)
                        p->y[(t + i) * layer->out + row + r] =
                            sums[i][r] + (layer->bias ? layer->bias[row + r] : 0);
            }
        }
        count(&p->salient, add_salient(p, first, last));
    }
    free(scales);
}

/* x [tokens, in] times the columns' scales, then zeros: [tokens, padded]; x itself where that is the same. */
static const float *scaled_by_columns(const Layer *layer, const float *x, int64_t tokens) {
    int64_t padded = BLOCK * blocks_of(layer), in = layer->in;
    if (!layer->column_scale && padded == in) return x;
    float *scaled = malloc((size_t)(tokens * padded) * sizeof *scaled);
    for (int64_t t = 0; scaled && t < tokens; t++) {
        const float *from = x + t * in;
        float *to = scaled + t * padded;
        if (layer->column_scale)
            for (int64_t i = 0; i < in; i++) to[i] = from[i] * widen(layer->column_scale[i]);
        else
            memcpy(to, from, (size_t)in * sizeof *to);
        memset(to + in, 0, (size_t)(padded - in) * sizeof *to);
    }
    return scaled;
}

/* ---------------------------------------------------------------------------------- the weight itself */

typedef struct {
    const Layer *layer;
    float *dense; /* [last - first, in] */
    int64_t first, last, cpu, next, error, salient;
} Dense;

/* 64 weights of a row from a column on, times the columns' scales, as many as there are. */
INLINE void store_block(const Layer *layer, int64_t column, const float *weights, float *dense) {
    int64_t left = layer->in - column, here = left < BLOCK ? left : BLOCK;
    const uint16_t *scale = layer->column_scale ? layer->column_scale + column : NULL;
    for (int64_t i = 0; i < here; i++) dense[column + i] = scale ? weights[i] * widen(scale[i]) : weights[i];
}

#define ROWS_ARGUMENTS                                                                                       \
    const Layer *layer, int64_t first, int64_t last, const float *table, float *scales, float *dense

static void rows_plain(ROWS_ARGUMENTS) {
    int64_t blocks = blocks_of(layer);
    for (int64_t row = first; row < last; row++, dense += layer->in) {
        const uint8_t *codes = layer->codes + row * width_of(layer);
        scales_of_row(layer, row, 0, 2 * blocks, scales);
        for (int64_t b = 0; b < blocks; b++, codes += 8 * layer->bits) {
            float weights[BLOCK];
            decode_plain(codes, table, layer->bits, scales[2 * b], scales[2 * b + 1], weights);
            store_block(layer, BLOCK * b, weights, dense);
        }
    }
}

#if defined(__x86_64__)
#include "avx2.h"
#endif

static void dequantize_rows(void *given) {
    enum { CHUNK = 16 };
    Dense *d = given;
    const Layer *layer = d->layer;
    float table[16], *scales = malloc((size_t)(2 * blocks_of(layer)) * sizeof *scales);
    if (!scales) fail(&d->error, NO_MEMORY);
    table_of(layer, table);
    while (scales) {
        int64_t first = d->first + __atomic_fetch_add(&d->next, CHUNK, __ATOMIC_RELAXED);
        if (first >= d->last) break;
        int64_t last = first + CHUNK < d->last ? first + CHUNK : d->last;
        float *dense = d->dense + (first - d->first) * layer->in;
#if defined(__x86_64__)
        if (d->cpu >= WITH_AVX2)
            rows_avx2(layer, first, last, table, scales, dense);
        else
#endif
            rows_plain(layer, first, last, table, scales, dense);
        int64_t start = first_of_row(layer, first), e = start;
        for (; e < layer->k && layer->rows[e] < last; e++) {
            int64_t row = layer->rows[e], column = layer->columns[e];
            if (row < first || column < 0 || column >= layer->in) break;
            dense[(row - first) * layer->in + column] += layer->values[e];
        }
        count(&d->salient, e - start);
    }
    free(scales);
}

/* dense [last - first, in] = rows of W, float32. */
EXPORT int64_t svdq_dequantize(const Layer *layer, float *dense, int64_t first, int64_t last, int64_t threads,
                               int64_t cpu) {
    Dense d = {layer, dense, first, last, cpu, 0, OK, 0};
    if (!aligned(layer)) return MISALIGNED;
    in_parallel(dequantize_rows, &d, threads);
    int64_t due = (last == layer->out ? layer->k : first_of_row(layer, last)) -
                  (first ? first_of_row(layer, first) : 0);
    return d.error ? d.error : d.salient == due ? OK : BAD_POSITION;
}

/* ------------------------------------------------------------- many tokens: a panel of dense rows in cache
 *
 * Each thread dequantizes a panel of its own rows, salient weights and all, into its own cache and
 * multiplies it there: dense weights never cross from one core to another, and nobody waits for anybody.
 * A panel is [columns][32 rows], so that a sum is a lane and is never taken across a register; it is cheap
 * to turn the matrix on its side while four bits still stand for a weight.
 */

#if defined(__x86_64__)
enum { PANEL_ROWS = 2 * LANES, PANEL_COLUMNS = 512, PANELS = 2, PANEL_TOKENS = 12 };

/* Sixteen rows' scales for the half blocks of a panel's columns: [halves][16 rows]. */
INLINE void scales_of_panel(const Layer *layer, int64_t row, int64_t rows, int64_t start, float *found) {
    enum { HALVES = PANEL_COLUMNS / HALF };
    float scales[HALVES];
    for (int64_t r = 0; r < LANES; r++) {
        if (r < rows) scales_of_row(layer, row + r, start / HALF, HALVES, scales);
        for (int64_t i = 0; i < HALVES; i++) found[i * LANES + r] = r < rows ? scales[i] : 0;
    }
}

/* Columns [start, stop) of up to sixteen rows into sixteen lanes of panel [columns][PANEL_ROWS].
 * columns: the scale of each column, or NULL. What lies beyond `stop`, up to a whole block, is zero. */
AVX512 static void fill_lanes(const Layer *layer, int64_t row, int64_t rows, int64_t start, int64_t stop,
                              const float *table, const float *columns, float *panel) {
    float scales[PANEL_COLUMNS / HALF * LANES], *scale = scales;
    int64_t width = HALF * blocks_of(layer);
    __m512 levels = _mm512_loadu_ps(table);
    __mmask16 there = rows >= LANES ? 0xFFFF : (__mmask16)((1u << rows) - 1);
    __m512i of_row =
        _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                           _mm512_set1_epi32((int)width));
    scales_of_panel(layer, row, rows, start, scales);
    for (int64_t block = start; block < stop; block += BLOCK, scale += 2 * LANES) {
        const uint8_t *codes = layer->codes + row * width + block / 2;
        __m512 low = _mm512_loadu_ps(scale), high = _mm512_loadu_ps(scale + LANES);
        for (int four = 0; four < HALF; four += 4) { /* four bytes of each row: eight weights of it */
            __m512i bytes =
                _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, of_row, codes + four, 1);
            for (int i = 0; i < 4; i++) {
                int64_t at = block - start + four + i;
                __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 8 * i), levels);
                __m512 second = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 8 * i + 4), levels);
                first = _mm512_mul_ps(first, low);
                second = _mm512_mul_ps(second, high);
                if (columns) {
                    first = _mm512_mul_ps(first, _mm512_set1_ps(columns[at]));
                    second = _mm512_mul_ps(second, _mm512_set1_ps(columns[at + HALF]));
                }
                _mm512_storeu_ps(panel + at * PANEL_ROWS, first);
                _mm512_storeu_ps(panel + (at + HALF) * PANEL_ROWS, second);
            }
        }
    }
}

/* The rows [first, last) and columns [start, stop) as panels [PANELS][columns][rows], salient weights among
 * them; returns how many of those the rows have. */
AVX512 static int64_t fill_panels(const Layer *layer, int64_t first, int64_t last, int64_t start,
                                  int64_t stop, const float *table, float *panels) {
    float columns[PANEL_COLUMNS];
    for (int64_t i = 0; layer->column_scale && i < PANEL_COLUMNS; i++)
        columns[i] = start + i < stop ? widen(layer->column_scale[start + i]) : 0;
    for (int64_t row = first; row < last; row += LANES)
        fill_lanes(layer, row, last - row, start, stop, table, layer->column_scale ? columns : NULL,
                   panels + (row - first) / PANEL_ROWS * PANEL_ROWS * PANEL_COLUMNS +
                       (row - first) % PANEL_ROWS);
    int64_t first_entry = first_of_row(layer, first), e = first_entry;
    for (; e < layer->k && layer->rows[e] < last; e++) {
        int64_t row = layer->rows[e] - first, column = layer->columns[e];
        if (row < 0 || column < 0 || column >= layer->in) break;
        if (column >= start && column < stop)
            panels[(row / PANEL_ROWS * PANEL_COLUMNS + column - start) * PANEL_ROWS + row % PANEL_ROWS] +=
                layer->values[e];
    }
    return e - first_entry;
}

/* y [tokens, up to 32 rows] (+)= x [tokens, width] panel [width, 32 rows]. */
AVX512 INLINE void panel_tile(const float *x, int64_t x_stride, const float *panel, int64_t width, float *y,
                              int64_t y_stride, int64_t rows, int add, const float *bias, const int tokens,
                              const int halves) {
    __m512 acc[PANEL_TOKENS][2];
    __mmask16 there[2];
    for (int half = 0; half < halves; half++) {
        int64_t left = rows - half * LANES;
        there[half] = left >= LANES ? 0xFFFF : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
    }
    for (int t = 0; t < tokens; t++)
        for (int half = 0; half < halves; half++) acc[t][half] = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i++, panel += PANEL_ROWS) {
        __m512 weights[2];
        for (int half = 0; half < halves; half++) weights[half] = _mm512_load_ps(panel + half * LANES);
        for (int t = 0; t < tokens; t++) {
            __m512 activation = _mm512_set1_ps(x[t * x_stride + i]);
            for (int half = 0; half < halves; half++)
                acc[t][half] = _mm512_fmadd_ps(weights[half], activation, acc[t][half]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int half = 0; half < halves; half++) {
            float *to = y + t * y_stride + half * LANES;
            __m512 before = _mm512_setzero_ps();
            if (add)
                before = _mm512_maskz_loadu_ps(there[half], to);
            else if (bias)
                before = _mm512_maskz_loadu_ps(there[half], bias + half * LANES);
            _mm512_mask_storeu_ps(to, there[half], _mm512_add_ps(acc[t][half], before));
        }
}

AVX512 static void multiply_panels(const Product *p, int64_t first, int64_t last, int64_t start, int64_t stop,
                                   const float *panels) {
    const Layer *layer = p->layer;
    int64_t width = stop - start;
    for (int64_t t = 0; t < p->tokens; t += PANEL_TOKENS) {
        const float *x = p->x + t * layer->in + start, *panel = panels;
        for (int64_t row = first; row < last; row += PANEL_ROWS, panel += PANEL_ROWS * PANEL_COLUMNS) {
            const float *bias = layer->bias ? layer->bias + row : NULL;
            float *y = p->y + t * layer->out + row;
#define CALL(n)                                                                                              \
    (last - row > LANES                                                                                      \
         ? panel_tile(x, layer->in, panel, width, y, layer->out, last - row, start > 0, bias, n, 2)          \
         : panel_tile(x, layer->in, panel, width, y, layer->out, last - row, start > 0, bias, n, 1))
            switch (p->tokens - t) {
            case 1: CALL(1); break;
            case 2: CALL(2); break;
            case 3: CALL(3); break;
            case 4: CALL(4); break;
            case 5: CALL(5); break;
            case 6: CALL(6); break;
            case 7: CALL(7); break;
            case 8: CALL(8); break;
            case 9: CALL(9); break;
            case 10: CALL(10); break;
            case 11: CALL(11); break;
            default: CALL(12);
            }
#undef CALL
        }
    }
}

AVX512 static void work_on_panels(void *given) {
    Product *p = given;
    const Layer *layer = p->layer;
    float table[16], *panels = aligned_alloc(64, sizeof *panels * PANELS * PANEL_ROWS * PANEL_COLUMNS);
    if (!panels) fail(&p->error, NO_MEMORY);
    table_of(layer, table);
    for (int64_t first, last; panels && next_rows(p, &first, &last);) {
        for (int64_t start = 0; start < layer->in; start += PANEL_COLUMNS) {
            int64_t stop = start + PANEL_COLUMNS < layer->in ? start + PANEL_COLUMNS : layer->in;
            int64_t met = fill_panels(layer, first, last, start, stop, table, panels);
            if (start == 0) count(&p->salient, met);
            multiply_panels(p, first, last, start, stop, panels);
        }
    }
    free(panels);
}
#endif

static int64_t multiply(const Layer *layer, const float *x, float *y, int64_t tokens, int64_t threads,
                        int64_t cpu) {
    Product p = {layer, x, x, NULL, y, tokens, cpu, 0, 0, OK, 0};
    if (!aligned(layer)) return MISALIGNED;
    if (tokens == 0) return OK;
    if (layer->out * layer->in < FEW_PRODUCTS / tokens) threads = 1; /* a quotient: no overflow */
#if defined(__x86_64__)
    if (cpu >= WITH_AVX512 && layer->bits == 4 && tokens > FEW_TOKENS) {
        /* many small pieces: whoever is held up leaves little to wait for */
        p.chunk = layer->out >= 16 * threads * PANELS * PANEL_ROWS ? PANELS * PANEL_ROWS
                  : layer->out >= 4 * threads * PANEL_ROWS         ? PANEL_ROWS
                                                                   : LANES;
        in_parallel(work_on_panels, &p, threads);
        return p.error ? p.error : p.salient == layer->k ? OK : BAD_POSITION;
    }
#endif
#if defined(__x86_64__)
    if (cpu == WITH_AVX2 || (cpu >= WITH_AVX512 && layer->bits != 4)) {
        multiply_avx2(&p, threads);
        return p.error ? p.error : p.salient == layer->k ? OK : BAD_POSITION;
    }
#endif
    p.chunk = layer->out / (8 * threads) / MOST_ROWS * MOST_ROWS;
    p.chunk = p.chunk < 2 * MOST_ROWS ? 2 * MOST_ROWS : p.chunk > 64 ? 64 : p.chunk;
#if defined(__x86_64__)
    if (cpu == WITH_VNNI && tokens <= FEWEST_TOKENS) {
        int64_t pairs = tokens * pairs_of(layer);
        Digits digits = {malloc((size_t)pairs * (2 * PAIR + 2 * HALVES * sizeof(float))), NULL, NULL};
        if (!digits.digits) return NO_MEMORY;
        digits.units = (float *)(digits.digits + pairs * 2 * PAIR);
        digits.sums = digits.units + pairs * HALVES;
        digits_of(layer, x, tokens, &digits);
        p.digits = &digits;
        in_parallel(work_on_rows, &p, threads);
        free(digits.digits);
        return p.error ? p.error : p.salient == layer->k ? OK : BAD_POSITION;
    }
#endif
    p.scaled = scaled_by_columns(layer, x, tokens);
    if (!p.scaled) return NO_MEMORY;
    in_parallel(work_on_rows, &p, threads);
    if (p.scaled != x) free((float *)p.scaled);
    return p.error ? p.error : p.salient == layer->k ? OK : BAD_POSITION;
}

/* y [tokens, out] = x [tokens, in] W^T + bias, both float32 or, where `narrow`, both bfloat16: sums are
 * float32, and rounded once. */
EXPORT int64_t svdq_linear(const Layer *layer, const void *x, void *y, int64_t narrow, int64_t tokens,
                           int64_t threads, int64_t cpu) {
    int64_t given = tokens * layer->in, found = tokens * layer->out;
    if (!narrow) return multiply(layer, x, y, tokens, threads, cpu);
    if (((uintptr_t)x | (uintptr_t)y) % sizeof(uint16_t)) return MISALIGNED;
    float *wide = malloc((size_t)(given + found) * sizeof *wide + 1); /* of no token: not NULL */
    if (!wide) return NO_MEMORY;
    for (int64_t i = 0; i < given; i++) wide[i] = widen(((const uint16_t *)x)[i]);
    int64_t code = multiply(layer, wide, wide + given, tokens, threads, cpu);
    for (int64_t i = 0; i < found && code == OK; i++) ((uint16_t *)y)[i] = narrowed(wide[given + i]);
    free(wide);
    return code;
}

/* ------------------------------------------------------- a call from Python: tensors as torch shows them
 *
 * Looking at nine tensors one attribute after another takes Python as long as a small product. DLPack's C
 * interface, which torch offers with its tensors, tells all of one in a few nanoseconds, so that every call
 * can look again, and no pointer is kept from one call to the next. Declared here as DLPack 1 has it.
 */

typedef struct {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t dimensions;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} Tensor;

enum { ON_CPU = 1, INTEGER = 0, FLOAT = 2, BFLOAT = 4 }; /* of DLPack */

/* What is needed of the interpreter and of torch, by address: no header, no link. */
static struct {
    void *none;
    int (*look)(void *object, Tensor *tensor); /* dltensor_from_py_object_no_sync; -1: an exception is set */
    void *(*item)(void *tuple, int64_t at);    /* PyTuple_GetItem */
    void *(*release)(void);                    /* PyEval_SaveThread */
    void (*acquire)(void *);                   /* PyEval_RestoreThread */
} python;

EXPORT void svdq_use_python(void *const *addresses) {
    memcpy(&python, addresses, sizeof python);
}

static int64_t size_of(const Tensor *tensor) {
    int64_t size = 1;
    for (int32_t i = 0; i < tensor->dimensions; i++) size *= tensor->shape[i];
    return size;
}

/* Whether a tensor lies on the CPU in one piece, with numbers of such a kind. */
static int plain(const Tensor *tensor, int code, int bits) {
    int64_t step = 1, empty = size_of(tensor) == 0;
    for (int32_t i = tensor->dimensions - 1; i >= 0 && !empty; i--) {
        if (tensor->shape[i] != 1 && tensor->strides[i] != step) return 0;
        step *= tensor->shape[i];
    }
    return tensor->device.type == ON_CPU && tensor->dtype.code == code && tensor->dtype.bits == bits &&
           tensor->dtype.lanes == 1 && (empty || tensor->data);
}

static const void *start_of(const Tensor *tensor) {
    return (const char *)tensor->data + tensor->byte_offset;
}

/* A part that is there and right: 1; absent: 0; wrong, or what torch does not show: -1. */
static int look_at(void *parts, int at, int code, int bits, int64_t size, const void **found) {
    Tensor tensor;
    void *object = python.item(parts, at);
    *found = NULL;
    if (!object || object == python.none) return object ? 0 : -1;
    if (python.look(object, &tensor) || !plain(&tensor, code, bits) || size_of(&tensor) != size) return -1;
    *found = start_of(&tensor);
    return 1;
}

static int scale_of_parts(void *parts, Layer *layer) {
    static const int kinds[][2] = {{FLOAT, 32}, {BFLOAT, 16}, {INTEGER, 8}};
    Tensor scale;
    if (python.look(python.item(parts, 1), &scale) || scale.dimensions != 2) return 0;
    layer->scale_rows = scale.shape[0], layer->groups = scale.shape[1], layer->scale = start_of(&scale);
    for (layer->scale_kind = 0; layer->scale_kind < 3; layer->scale_kind++)
        if (plain(&scale, kinds[layer->scale_kind][0], kinds[layer->scale_kind][1])) break;
    return layer->scale_kind < 3 && (layer->scale_rows == 1 || layer->scale_rows == layer->out) &&
           layer->groups == (layer->in + layer->group - 1) / layer->group;
}

/* Bits of a code, read off the shape of packed rows: [out, 32 * blocks] of 4, [out, blocks, 8 * bits] of
 * others. */
static int bits_of_shape(const Tensor *codes, Layer *layer) {
    layer->bits = codes->dimensions == 3 ? codes->shape[2] / 8 : 4;
    if (codes->dimensions == 2) return codes->shape[1] == width_of(layer);
    return codes->dimensions == 3 && codes->shape[1] == blocks_of(layer) &&
           (codes->shape[2] == 24 || codes->shape[2] == 64);
}

/* The bias, float32; where it is bfloat16, as float32 in memory of its own, which the caller frees. */
static int bias_of_parts(void *parts, Layer *layer, float **own) {
    const uint16_t *narrow;
    if (look_at(parts, 8, FLOAT, 32, layer->out, (const void **)&layer->bias) >= 0) return 1;
    if (look_at(parts, 8, BFLOAT, 16, layer->out, (const void **)&narrow) != 1) return 0;
    layer->bias = *own = malloc((size_t)layer->out * sizeof **own);
    for (int64_t i = 0; *own && i < layer->out; i++) (*own)[i] = widen(narrow[i]);
    return *own != NULL;
}

/* The eight parts of a layer, in the op's order. */
static int layer_of(void *parts, Layer *layer) {
    Tensor codes, values;
    if (python.look(python.item(parts, 0), &codes) || python.look(python.item(parts, 2), &values)) return 0;
    if (!plain(&codes, INTEGER, 8) || !plain(&values, FLOAT, 32) || !bits_of_shape(&codes, layer)) return 0;
    layer->out = codes.shape[0], layer->codes = start_of(&codes);
    layer->k = size_of(&values), layer->values = start_of(&values);
    int64_t levels = layer->bits == 8 ? -1 : 1 << layer->bits; /* of 8 bits there are none */
    return scale_of_parts(parts, layer) &&
           look_at(parts, 3, INTEGER, 32, layer->k, (const void **)&layer->rows) == 1 &&
           look_at(parts, 4, INTEGER, 32, layer->k, (const void **)&layer->columns) == 1 &&
           look_at(parts, 5, BFLOAT, 16, layer->out, (const void **)&layer->row_scale) >= 0 &&
           (layer->row_scale != NULL) == (layer->scale_kind == SCALE_INT8) &&
           look_at(parts, 6, BFLOAT, 16, layer->in, (const void **)&layer->column_scale) >= 0 &&
           look_at(parts, 7, INTEGER, 8, levels, (const void **)&layer->levels) >= 0;
}

/* `svdq_linear` of Python's own tensors; FOREIGN: one of them is not what it takes, and nothing was done.
 * parts: a tuple, which holds its tensors while the interpreter's lock is let go. */
EXPORT int64_t svdq_call(void *parts, void *x, void *y, int64_t in, int64_t group, int64_t threads,
                         int64_t cpu) {
    Layer layer = {.in = in, .group = group};
    Tensor from, to;
    float *bias = NULL;
    if (in < 1 || group < 1 || (group % HALF && group < in)) return FOREIGN;
    if (!layer_of(parts, &layer) || python.look(x, &from) || python.look(y, &to)) return FOREIGN;
    int64_t tokens = size_of(&from) / in;
    int narrow = from.dtype.code == BFLOAT, bits = narrow ? 16 : 32;
    if (!plain(&from, narrow ? BFLOAT : FLOAT, bits) || !plain(&to, from.dtype.code, bits) ||
        from.dimensions < 1 || from.shape[from.dimensions - 1] != in || size_of(&to) != tokens * layer.out ||
        !bias_of_parts(parts, &layer, &bias))
        return FOREIGN;
    void *state = python.release();
    int64_t code =
        svdq_linear(&layer, start_of(&from), (void *)(uintptr_t)start_of(&to), narrow, tokens, threads, cpu);
    free(bias);
    python.acquire(state);
    return code;
}

EXPORT int64_t svdq_abi(void) {
    return ABI;
}

/* The best path that this processor can run. */
EXPORT int64_t svdq_cpu(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return WITH_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return WITH_AVX2;
#endif
    return PLAIN;
}

/* The path that sums bytes, where this processor can; else the best. */
EXPORT int64_t svdq_fast(void) {
#if defined(__x86_64__)
    if (svdq_cpu() == WITH_AVX512 && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni"))
        return WITH_VNNI;
#endif
    return svdq_cpu();
}
