/* What is to be known of a whole weight before its rows are rounded: its largest size, which a NaN exceeds,
 * and the scale of each column (core/column_scale.py). Both read the weight as the files have it.
 *
 * Not here: rounding (quantize.c). */

#include "dense.h"

enum {
    SLICES = 64,
    LANES = 16
}; /* parts of the rows whose sums are added up in the end; parts of a row's sum */
#define SMALLEST 1e-30f /* in place of a mean square of zero; its reciprocal is a float */

/* ------------------------------------------------------------------------------------ the check of values */

typedef struct {
    Source source;
    int64_t next;
    int32_t top;
} Largest;

INLINE int32_t largest_bits(const Source *source, int64_t first, int64_t last) {
    const int32_t *words = source->weight;
    const int16_t *halves = source->weight;
    int32_t top = 0;
    int16_t half = 0;
    if (source->kind == FLOAT32) {
        for (int64_t i = first; i < last; i++)
            top = (words[i] & INT32_MAX) > top ? words[i] & INT32_MAX : top;
        return top;
    }
    for (int64_t i = first; i < last; i++) {
        int16_t size = halves[i] & INT16_MAX;
        half = size > half ? size : half;
    }
    return half;
}

#if defined(__x86_64__)
AVX2 static int32_t largest_avx2(const Source *source, int64_t first, int64_t last) {
    return largest_bits(source, first, last);
}
#endif

static void work_on_largest(void *what) {
    Largest *all = what;
    int64_t count = all->source.out * all->source.in;
    int32_t top = 0;
    for (int64_t first; (first = FEW * next_of(&all->next)) < count;) {
        int64_t last = first + FEW < count ? first + FEW : count;
#if defined(__x86_64__)
        int32_t found = all->source.path >= WITH_AVX2 ? largest_avx2(&all->source, first, last)
                                                      : largest_bits(&all->source, first, last);
#else
        int32_t found = largest_bits(&all->source, first, last);
#endif
        top = found > top ? found : top;
    }
    int32_t before = __atomic_load_n(&all->top, __ATOMIC_RELAXED);
    while (top > before &&
           !__atomic_compare_exchange_n(&all->top, &before, top, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

/* The bits of the largest size of a weight, in the weight's dtype; those of NaN and infinity are larger. */
EXPORT int64_t svdq_largest(const Source *source) {
    Largest all = {.source = *source};
    in_parallel(source, work_on_largest, &all);
    return all.top;
}

/* -------------------------------------------------------------------------------------- scales of columns */

/* A weight whose columns are evened out, in rounds, each a sum over slices of the rows. */
typedef struct {
    Source source;
    double top;
    const float *inverse; /* [in]: of the columns' mean squares, as far as they are known */
    float *sums;          /* [slices, in]: room for what each slice adds */
    int64_t slices, next, error;
} Columns;

/* The sum of some numbers, which are lost: the second half is added to the first until one is left. */
INLINE float sum_of(float *numbers, int64_t count) {
    for (int64_t half; count > 1; count = half) {
        half = (count + 1) / 2;
        for (int64_t i = 0; i < count - half; i++) numbers[i] += numbers[i + half];
    }
    return numbers[0];
}

/* Adds, for some rows, the squares of each column in units of the row's mean. `room`: [2, in]. */
INLINE void add_rows(const Columns *all, int64_t first, int64_t last, float *restrict room,
                     float *restrict sums) {
    int64_t in = all->source.in;
    const float *inverse = all->inverse, unit = 1.0f / (float)all->top;
    float *restrict size = room, *restrict share = room + in;
    for (int64_t row = first; row < last; row++) {
        read_row(&all->source, row * in, in, size, 1);
        for (int64_t c = 0; c < in; c++) {
            float part = size[c] * unit;
            size[c] = part * part;
            share[c] = size[c] * inverse[c];
        }
        float mean = sum_of(share, in), times = 1.0f / (mean > SMALLEST ? mean : SMALLEST);
        for (int64_t c = 0; c < in; c++) sums[c] += times * size[c];
    }
}

#if defined(__x86_64__)
AVX2 static void add_rows_avx2(const Columns *all, int64_t first, int64_t last, float *room, float *sums) {
    add_rows(all, first, last, room, sums);
}
#endif

static void work_on_columns(void *what) {
    Columns *all = what;
    int64_t in = all->source.in, out = all->source.out, each = (out + all->slices - 1) / all->slices;
    float *room = malloc((size_t)(2 * in) * sizeof *room);
    if (!room) __atomic_store_n(&all->error, NO_MEMORY, __ATOMIC_RELAXED);
    for (int64_t slice; room && (slice = next_of(&all->next)) < all->slices;) {
        int64_t first = slice * each < out ? slice * each : out,
                last = first + each < out ? first + each : out;
        float *sums = all->sums + slice * in;
        memset(sums, 0, (size_t)in * sizeof *sums);
#if defined(__x86_64__)
        if (all->source.path >= WITH_AVX2)
            add_rows_avx2(all, first, last, room, sums);
        else
#endif
            add_rows(all, first, last, room, sums);
    }
    free(room);
}

/* One round: `scale` [in] becomes the columns' mean squares in a matrix whose rows are equally large. */
static int64_t round_of_columns(Columns *all, double *scale, double *sums, float *inverse) {
    int64_t in = all->source.in;
    double mean = 0;
    for (int64_t c = 0; c < in; c++) inverse[c] = 1.0f / (float)scale[c], sums[c] = 0;
    all->next = 0, all->inverse = inverse;
    in_parallel(&all->source, work_on_columns, all);
    for (int64_t slice = 0; slice < all->slices; slice++)
        for (int64_t c = 0; c < in; c++) sums[c] += all->sums[slice * in + c];
    for (int64_t c = 0; c < in; c++) {
        scale[c] = fmax(sums[c] > 0 ? sums[c] : scale[c], SMALLEST);
        mean += log(scale[c]) / (double)in;
    }
    mean = exp(mean); /* the geometric one becomes 1 */
    for (int64_t c = 0; c < in; c++) scale[c] /= mean;
    return all->error;
}

/* The scale of each column, `found` [in], bfloat16; `top`: the largest size of a weight. */
EXPORT int64_t svdq_column_scale(const Source *source, double top, int64_t rounds, uint16_t *found) {
    int64_t in = source->in, error = OK;
    Columns all = {.source = *source, .top = top, .slices = source->out < SLICES ? source->out : SLICES};
    double *scale = malloc((size_t)(2 * in) * sizeof *scale);
    float *inverse = malloc((size_t)in * sizeof *inverse);
    all.sums = malloc((size_t)(all.slices * in) * sizeof *all.sums);
    if (!scale || !inverse || !all.sums) error = NO_MEMORY;
    for (int64_t c = 0; c < in && !error; c++) scale[c] = 1;
    for (int64_t i = 0; i < rounds && !error; i++) error = round_of_columns(&all, scale, scale + in, inverse);
    for (int64_t c = 0; c < in && !error; c++) found[c] = narrow((float)sqrt(scale[c]));
    free(scale), free(inverse), free(all.sums);
    return error;
}
