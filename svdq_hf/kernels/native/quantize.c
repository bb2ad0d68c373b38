/* A weight rounded to its stored bytes: column scale, salient entries taken out, scales fitted, codes,
 * packing and the error, eight rows at a time in cache.
 *
 * Plain C with a plain C interface, as svdq.c: the caller (kernels/native/rounding.py) has checked shapes,
 * dtypes and contiguity. What it computes is what core/ computes in torch; sums run in another order, so a
 * code in some ten thousand may differ. Each path and each number of threads gives the same bytes: no sum
 * crosses a register or a thread. Not here: products with stored weights (svdq.c), which entries are salient
 * (core/).
 */

#include "dense.h"

enum {
    QUANTIZE_ABI = 1,
    ROWS = 8,
    BLOCK = 64,
    MOST_LEVELS = 16,
    SUMMED = 128, /* columns summed by themselves */
    LARGEST = 127 /* the largest int8 scale */
};
enum { LEAST_SQUARES = 0, ABSMAX = 1, SIGMA = 2, GIVEN = 3 };

/* A weight, how it is rounded, and where the parts go. */
typedef struct {
    Source source;
    int64_t group; /* columns that share a scale, at most `in` */
    int64_t bits;
    const int8_t *levels;               /* [2^bits]; NULL: codes are their own levels */
    int64_t rule, sizes;                /* sizes: of the scale, that the rule tries on each side */
    double least_clip, clip_sigma, top; /* top: the largest size of a weight */
    const uint16_t *column_scale;       /* [in], bfloat16 */
    const int32_t *rows, *columns;      /* [k]: the salient entries, sorted by row, then by column */
    int64_t k, scale_kind;
    uint8_t *codes;
    void *scale;         /* [out, groups]; of the rule GIVEN the one that is given */
    uint16_t *row_scale; /* [out], bfloat16, of scales of 8 bits */
    double *lost;        /* [2]: the sum of the error's squares, and of the weight's, in units of `top` */
} Rounding;

/* ------------------------------------------------------------------------------------------- the levels */

typedef struct {
    float level[MOST_LEVELS], middle[MOST_LEVELS - 1], highest;
    float fourths[8], eighths[8], even[8], odd[8]; /* for the search, where places count down from 0 */
    int32_t stored;                                /* the stored number of the lowest level */
} Levels;

static void prepare_levels(const Rounding *job, Levels *found) {
    int count = job->levels ? 1 << job->bits : 0, most = job->bits == 8 ? 127 : (1 << (job->bits - 1)) - 1;
    *found = (Levels){.highest = (float)most, .level = {job->bits == 8 ? -127.0f : -(float)(most + 1)}};
    found->stored = job->bits == 8 ? -127 : 0;
    if (!job->levels) return;
    for (int i = 0; i < MOST_LEVELS; i++) found->level[i] = (float)job->levels[i < count ? i : count - 1];
    for (int i = 0; i < MOST_LEVELS - 1; i++)
        found->middle[i] = i < count - 1 ? (found->level[i] + found->level[i + 1]) / 2 : INFINITY;
    found->highest = found->level[count - 1];
    for (int i = 0; i < 8; i++) {
        found->fourths[-i & 3] = found->middle[4 * (i & 3) + 1];
        found->eighths[-i & 7] = found->middle[2 * i];
        found->even[-i & 7] = found->level[2 * i], found->odd[-i & 7] = found->level[2 * i + 1];
    }
    memcpy(found->fourths + 4, found->fourths, 4 * sizeof(float));
}

/* --------------------------------------------------------------------------------------- salient entries */

/* Where the entries of a row start; entries are sorted by row. */
static int64_t first_of_row(const Rounding *job, int64_t row) {
    int64_t low = 0, high = job->k;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (job->rows[middle] < row)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Whether an entry is one of a row, left of the column `stop`. */
INLINE int is_in(const Rounding *job, int64_t at, int64_t row, int64_t stop) {
    return at < job->k && job->rows[at] == row && job->columns[at] < stop;
}

/* Whether all entries are there, and in order: then they are found, and nothing beyond the weight is touched.
 */
static int in_order(const Rounding *job) {
    int64_t before = -1;
    for (int64_t i = 0; i < job->k; i++) {
        int64_t row = job->rows[i], column = job->columns[i], now = row * job->source.in + column;
        if (row < 0 || row >= job->source.out || column < 0 || column >= job->source.in || now <= before)
            return 0;
        before = now;
    }
    return 1;
}

/* ------------------------------------------------------------------------------------------- the threads */

typedef float Lanes __attribute__((vector_size(4 * ROWS), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * ROWS), may_alias));
typedef double Doubles __attribute__((vector_size(4 * ROWS), may_alias)); /* of half the lanes */
typedef int64_t Longs __attribute__((vector_size(4 * ROWS), may_alias));
typedef float Four __attribute__((vector_size(2 * ROWS), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(ROWS)));
#define CONVERT(vector, type) __builtin_convertvector(vector, type)
#define ALL(number) ((Lanes){0} + (float)(number))
#define SELECT(mask, yes, no) ((Lanes)(((mask) & (Ints)(yes)) | (~(mask) & (Ints)(no))))
#define SELECT_DOUBLES(mask, yes, no) ((Doubles)(((mask) & (Longs)(yes)) | (~(mask) & (Longs)(no))))
#define SIZE(lanes) ((Lanes)((Ints)(lanes) & 0x7FFFFFFF))

typedef struct {
    const Rounding *job;
    Levels levels;
    double *sums; /* [blocks, 2] */
    int64_t blocks, next, error;
} Shared;

/* One thread's room. */
typedef struct {
    Lanes *weights, *unit, *scales; /* [in], [group], [groups] */
    uint8_t *codes;                 /* [padded][8 rows], as stored numbers */
} Scratch;

#define TARGET
#define PATH(name) name##_plain
#define BY_PERMUTATION 0
#include "quantize_rows.h"
#if defined(__x86_64__)
#undef TARGET
#undef PATH
#undef BY_PERMUTATION
#define TARGET AVX2
#define PATH(name) name##_avx2
#define BY_PERMUTATION 1
#include "quantize_rows.h"
#endif

static void work(void *what) {
    Shared *shared = what;
    const Rounding *job = shared->job;
    int64_t groups = (job->source.in + job->group - 1) / job->group,
            padded = (job->source.in + BLOCK - 1) / BLOCK * BLOCK;
    int64_t lanes = job->source.in + job->group + groups;
    Lanes *room = aligned_alloc(sizeof(Lanes), (size_t)(lanes * (int64_t)sizeof(Lanes) + padded * ROWS));
    if (!room) {
        __atomic_store_n(&shared->error, NO_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    Scratch scratch = {room, room + job->source.in, room + job->source.in + job->group,
                       (uint8_t *)(room + lanes)};
    memset(scratch.codes, job->bits == 8 ? 0 : 1 << (job->bits - 1), (size_t)(padded * ROWS)); /* code zero */
#if defined(__x86_64__)
    if (job->source.path >= WITH_AVX2)
        work_avx2(shared, &scratch);
    else
#endif
        work_plain(shared, &scratch);
    free(room);
}

/* Round a weight; fills the parts and `lost`. */
EXPORT int64_t svdq_quantize(const Rounding *job) {
    int64_t blocks = (job->source.out + ROWS - 1) / ROWS;
    if (!in_order(job)) return BAD_POSITION;
    Shared shared = {.job = job, .blocks = blocks, .sums = calloc((size_t)blocks, 2 * sizeof(double))};
    if (!shared.sums) return NO_MEMORY;
    prepare_levels(job, &shared.levels);
    in_parallel(&job->source, work, &shared);
    job->lost[0] = job->lost[1] = 0;
    for (int64_t i = 0; i < blocks; i++)
        job->lost[0] += shared.sums[2 * i], job->lost[1] += shared.sums[2 * i + 1];
    free(shared.sums);
    return shared.error;
}

EXPORT int64_t svdq_quantize_abi(void) {
    return QUANTIZE_ABI;
}
