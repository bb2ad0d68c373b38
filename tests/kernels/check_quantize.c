/* The native quantizing on buffers of the exact size that touch a page which nobody may read or write, once
 * at their end and once at their beginning; what it stores is decoded again by a plain double loop, whose
 * error must be the one that it tells. Built by test_rounding.py with sanitizers. Prints the number of
 * weights checked. */

#define FEW 1024 /* so that small weights have threads */
#include "column_scale.c"
#include "quantize.c"

#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

static uint32_t state = 1;
static uint32_t next_random(void) {
    return state = state * 1664525u + 1013904223u;
}
static float number(void) {
    return (float)(int32_t)next_random() / 2147483648.0f;
}

/* ------------------------------------------------------------------------ buffers between forbidden pages */

enum { ROOM = 1 << 18, MOST_BUFFERS = 12 };
enum { AT_END, AT_START, PLACES };
static unsigned char *rooms[MOST_BUFFERS];
static int taken, place; /* place: which end of a buffer touches a forbidden page */

static int make_rooms(void) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < MOST_BUFFERS; i++) {
        unsigned char *all = mmap(NULL, ROOM + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (all == MAP_FAILED || mprotect(all + page, ROOM, PROT_READ | PROT_WRITE)) return 0;
        rooms[i] = all + page;
    }
    return 1;
}

static void *buffer(int64_t bytes) {
    unsigned char *room = taken < MOST_BUFFERS && bytes <= ROOM ? rooms[taken++] : NULL;
    if (!room) abort();
    unsigned char *found = place == AT_END ? room + ROOM - bytes : room;
    ASAN_POISON_MEMORY_REGION(room, ROOM);
    ASAN_UNPOISON_MEMORY_REGION(found, (size_t)bytes);
    return found;
}

/* Torch's runtime as it would be with threads that run one after the other. */
static void one_after_another(void (*work)(void *), void *what, unsigned threads, unsigned flags) {
    (void)flags;
    while (threads--) work(what);
}

/* ------------------------------------------------------------------------------------------- the checks */

static float weight_at(const Source *source, int64_t at) {
    const uint16_t *words = source->weight;
    return source->kind == FLOAT32    ? ((const float *)source->weight)[at]
           : source->kind == BFLOAT16 ? widen(words[at])
                                      : widen_half(words[at]);
}

/* The level of a code, read as docs/format.md says it is stored. */
static double level_at(const Rounding *job, int64_t row, int64_t column) {
    int64_t blocks = (job->source.in + BLOCK - 1) / BLOCK, place = column % BLOCK;
    const uint8_t *block = job->codes + (row * blocks + column / BLOCK) * 8 * job->bits;
    int code = job->bits == 4   ? block[place % 32] >> (4 * (place / 32)) & 15
               : job->bits == 8 ? block[place]
                                : (block[place % 16] >> (2 * (place / 16)) & 3) |
                                      (block[16 + place % 8] >> (place / 8) & 1) << 2;
    if (job->levels) return job->levels[code];
    return job->bits == 8 ? (int8_t)code : code - (1 << (job->bits - 1));
}

static double scale_at(const Rounding *job, int64_t row, int64_t column) {
    int64_t groups = (job->source.in + job->group - 1) / job->group, at = row * groups + column / job->group;
    if (job->scale_kind == INT8) return ((int8_t *)job->scale)[at] * (double)widen(job->row_scale[row]);
    return job->scale_kind == BFLOAT16 ? widen(((uint16_t *)job->scale)[at]) : ((float *)job->scale)[at];
}

/* Whether the bytes stand for the weight up to the error that was told. */
static int told_truly(const Rounding *job) {
    double lost = 0, all = 0;
    int64_t next = 0, padded = (job->source.in + BLOCK - 1) / BLOCK * BLOCK;
    for (int64_t row = 0; row < job->source.out; row++)
        for (int64_t column = 0; column < padded; column++) {
            int salient = next < job->k && job->rows[next] == row && job->columns[next] == column;
            double level = level_at(job, row, column);
            next += salient;
            if ((salient || column >= job->source.in) && level != 0) return 0;
            if (column >= job->source.in) continue;
            double size = weight_at(&job->source, row * job->source.in + column) / job->top;
            double each = job->column_scale ? widen(job->column_scale[column]) : 1;
            double off = size - level * scale_at(job, row, column) * each / job->top;
            all += size * size, lost += salient ? 0 : off * off;
        }
    return fabs(lost - job->lost[0]) <= 1e-5 * all && fabs(all - job->lost[1]) <= 1e-5 * all;
}

static void fill(Source *source, void *to) {
    for (int64_t i = 0; i < source->out * source->in; i++) {
        if (source->kind == FLOAT32) ((float *)to)[i] = number();
        if (source->kind == BFLOAT16) ((uint16_t *)to)[i] = narrow(number());
        if (source->kind == FLOAT16)
            ((uint16_t *)to)[i] = (uint16_t)(next_random() >> 16 & 0xBBFF); /* below 1 */
    }
    source->weight = to;
}

static int check(Source source, int64_t bits, int linear, int64_t group, int64_t rule) {
    taken = 0;
    int64_t out = source.out, in = source.in, groups = (in + group - 1) / group, k = out < 3 ? out : 3;
    int64_t scale_kind = group == in ? FLOAT32 : rule == SIGMA ? BFLOAT16 : INT8;
    int32_t *rows = buffer(4 * k), *columns = buffer(4 * k);
    uint16_t *column_scale = buffer(2 * in);
    int8_t *levels = buffer(1 << bits);
    fill(&source, buffer(out * in * (source.kind == FLOAT32 ? 4 : 2)));
    for (int64_t i = 0; i < k; i++) rows[i] = (int32_t)i, columns[i] = (int32_t)(next_random() % in);
    for (int i = 0; i < 1 << bits; i++) levels[i] = (int8_t)((i - (1 << (bits - 1))) * (bits == 3 ? 30 : 15));
    int32_t largest = (int32_t)svdq_largest(&source);
    double top = source.kind == FLOAT32    ? of_bits((uint32_t)largest)
                 : source.kind == BFLOAT16 ? widen((uint16_t)largest)
                                           : widen_half((uint16_t)largest);
    top = top ? top : 1;
    if (svdq_column_scale(&source, top, 4, column_scale)) return 1;
    double lost[2];
    Rounding job = {.source = source, .group = group, .bits = bits, .levels = linear ? NULL : levels};
    job.rule = rule, job.sizes = linear ? 10 : 6, job.least_clip = 2.2, job.clip_sigma = 2.5, job.top = top;
    job.column_scale = rule == ABSMAX ? NULL : column_scale, job.rows = rows, job.columns = columns,
    job.k = k;
    job.scale_kind = scale_kind, job.lost = lost;
    job.codes = buffer(out * ((in + BLOCK - 1) / BLOCK) * 8 * bits);
    job.scale = buffer(out * groups * (scale_kind == FLOAT32 ? 4 : scale_kind == BFLOAT16 ? 2 : 1));
    job.row_scale = scale_kind == INT8 ? buffer(2 * out) : NULL;
    int wrong = svdq_quantize(&job) != OK || !told_truly(&job);
    columns[k - 1] = (int32_t)in; /* told, and not followed */
    wrong |= svdq_quantize(&job) != BAD_POSITION;
    if (wrong)
        printf("wrong: out %ld in %ld group %ld kind %ld bits %ld linear %d rule %ld path %ld\n", out, in,
               group, source.kind, bits, linear, rule, source.path);
    return wrong;
}

static int check_levels(const Source *source, int64_t group, int64_t rule) {
    static const int64_t bits[] = {3, 4, 8};
    int wrong = 0;
    for (int i = 0; i < 3; i++)
        for (int linear = bits[i] == 8; linear < 2; linear++)
            for (place = AT_END; place < PLACES; place++)
                wrong |= check(*source, bits[i], linear, group, rule);
    return wrong;
}

int main(void) {
    static const int64_t shapes[][2] = {{1, 1}, {3, 70}, {8, 64}, {17, 129}, {40, 200}};
    int64_t best = PLAIN;
    int checked = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) best = WITH_AVX2;
#endif
    if (!make_rooms() || svdq_quantize_abi() != QUANTIZE_ABI) return 2;
    for (int64_t path = PLAIN; path <= best; path++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            for (int64_t kind = FLOAT32; kind <= FLOAT16; kind++)
                for (int64_t rule = LEAST_SQUARES; rule <= SIGMA; rule++) {
                    Source source = {NULL,
                                     kind,
                                     shapes[s][0],
                                     shapes[s][1],
                                     3,
                                     path,
                                     (void *)(uintptr_t)one_after_another};
                    int64_t groups[] = {8, 32, 128, source.in};
                    for (int g = 0; g < 4; g++, checked++)
                        if (check_levels(&source, groups[g] < source.in ? groups[g] : source.in, rule))
                            return 1;
                }
    printf("%d\n", checked);
    return 0;
}
