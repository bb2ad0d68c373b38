/* A dense weight as the native quantizing reads it: its dtypes, the threads that share its rows, the paths.
 *
 * Every file that includes this adds and multiplies as it is written (no fused multiplication, no other order
 * of sums), so that each path and each number of threads gives the same bytes. */

#ifndef SVDQ_DENSE_H
#define SVDQ_DENSE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#pragma GCC diagnostic ignored "-Wpsabi" /* no vector is passed: what takes one is inlined */
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2"))) /* without FMA */
#endif
#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))
#define EXPORT __attribute__((visibility("default")))

#ifndef FEW /* weights for which a second thread costs what it brings */
#define FEW (1 << 16)
#endif
enum { OK = 0, NO_MEMORY = 1, BAD_POSITION = 2 };
enum { PLAIN = 0, WITH_AVX2 = 1 };
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 2 }; /* of weights, and of scales */

/* A dense weight; here and below all is contiguous, and NULL what is not there. */
typedef struct {
    const void *weight; /* [out, in] */
    int64_t kind, out, in;
    int64_t threads, path;
    void *parallel; /* GOMP_parallel of torch's own OpenMP; NULL: one thread */
} Source;

/* ----------------------------------------------------------------------------------- numbers of 16 bits */

INLINE float of_bits(uint32_t bits) {
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

INLINE float widen(uint16_t bfloat16) {
    return of_bits((uint32_t)bfloat16 << 16);
}

/* Of a float16 that is finite: its bits in float32's places are too small by 2^112. */
INLINE float widen_half(uint16_t half) {
    float size = of_bits((uint32_t)(half & 0x7FFF) << 13) * 0x1p112f;
    return half & 0x8000 ? -size : size;
}

/* To bfloat16, ties to even; of a number that is no NaN. */
INLINE uint16_t narrow(float wide) {
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* Some weights of a row from the weight `first` on, each `stride` floats after the one before. */
INLINE void read_row(const Source *source, int64_t first, int64_t count, float *to, const int64_t stride) {
    const float *floats = (const float *)source->weight + first;
    const uint16_t *words = (const uint16_t *)source->weight + first;
    if (source->kind == FLOAT32)
        for (int64_t c = 0; c < count; c++) to[stride * c] = floats[c];
    else if (source->kind == BFLOAT16)
        for (int64_t c = 0; c < count; c++) to[stride * c] = widen(words[c]);
    else
        for (int64_t c = 0; c < count; c++) to[stride * c] = widen_half(words[c]);
}

/* ------------------------------------------------------------------------------------------- the threads */

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);

/* Run by all threads where there is enough to do: `size` numbers. */
static void share(void *parallel, int64_t threads, int64_t size, void (*run)(void *), void *what) {
    if (parallel && threads > 1 && size >= FEW)
        ((Parallel *)(uintptr_t)parallel)(run, what, (unsigned)threads, 0);
    else
        run(what);
}

INLINE void in_parallel(const Source *source, void (*run)(void *), void *what) {
    share(source->parallel, source->threads, source->out * source->in, run, what);
}

/* The next piece of work, for whichever thread asks. */
static int64_t next_of(int64_t *next) {
    return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
}

#endif
