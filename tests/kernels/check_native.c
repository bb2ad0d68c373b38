/* The native library against a plain double loop, on buffers of the exact size that touch a page which nobody
 * may read or write, once at their end and once at their beginning; the rest of their own page is poisoned.
 * Built by test_native.py with sanitizers. They do not see what masked and gathering instructions touch: the
 * processor does, and ends the program. Prints the number of products checked. */

#include "svdq.c"

#include <math.h>
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
static uint16_t narrow(float wide) {
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* ------------------------------------------------------------------------ buffers between forbidden pages */

enum { ROOM = 1 << 18, MOST_BUFFERS = 20 };
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

/* The next buffer; all are given back at once, by `taken = 0`. */
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

/* How far a row's sum may be off because activations are integers of 16 bits: half a unit for each. */
static double rounded(const Layer *layer, const float *x, int64_t row, int64_t tokens, int64_t cpu) {
    double unit = layer->row_scale ? fabs((double)widen(layer->row_scale[row])) : 1;
    double scale = layer->scale_kind == SCALE_INT8 ? 128 * unit : 1;
    double total = 0;
    for (int64_t start = 0; start < layer->in; start += HALF) {
        double most = 0;
        for (int64_t i = start; i < layer->in && i < start + HALF; i++)
            most = fmax(most, fabs(x[i] * (layer->column_scale ? (double)widen(layer->column_scale[i]) : 1)));
        total += HALF * 128 * scale * most / 65278 * 1.001;
    }
    return cpu > WITH_AVX512 && tokens <= FEWEST_TOKENS ? total : 0;
}

/* Tensors as an interpreter that is not here would show them: `svdq_call` gives what `svdq_linear` gave. */
static int look(void *object, Tensor *tensor) {
    *tensor = *(Tensor *)object;
    return 0;
}
static void *item(void *tuple, int64_t at) {
    return ((void **)tuple)[at];
}
static void *release(void) {
    return NULL;
}
static void acquire(void *state) {
    (void)state;
}
static int none;
static Tensor shown(const void *data, uint8_t code, uint8_t bits, int64_t *shape, int32_t dimensions) {
    static int64_t contiguous[16][3];
    static int next;
    int64_t *strides = contiguous[next = (next + 1) % 16];
    strides[dimensions - 1] = 1;
    for (int32_t i = dimensions - 1; i > 0; i--) strides[i - 1] = strides[i] * shape[i];
    return (Tensor){(void *)(uintptr_t)data, {ON_CPU, 0}, dimensions, {code, bits, 1}, shape, strides, 0};
}

/* bfloat16 in and out: the float32 product of the same numbers, rounded. */
static int64_t narrow_too(const Layer *layer, int64_t tokens, int64_t cpu) {
    int before = taken;
    int64_t given = tokens * layer->in, found = tokens * layer->out, failed = 0;
    uint16_t *x = buffer(2 * given), *y = buffer(2 * found);
    float *wide = buffer(4 * given), *expected = buffer(4 * found);
    for (int64_t i = 0; i < given; i++) x[i] = narrow(number()), wide[i] = widen(x[i]);
    failed |= svdq_linear(layer, wide, expected, 0, tokens, 1, cpu);
    failed |= svdq_linear(layer, x, y, 1, tokens, 1, cpu);
    for (int64_t i = 0; i < found; i++) {
        double off = fabs((double)widen(y[i]) - expected[i]);
        failed |= !(off <= fabs(expected[i]) / 256 + 1e-38);
    }
    taken = before;
    return failed;
}

static int64_t called(const Layer *l, const float *x, const float *expected, int64_t tokens, int64_t cpu) {
    static const uint8_t kinds[][2] = {{FLOAT, 32}, {BFLOAT, 16}, {INTEGER, 8}};
    void *addresses[] = {&none, (void *)(uintptr_t)look, (void *)(uintptr_t)item, (void *)(uintptr_t)release,
                         (void *)(uintptr_t)acquire};
    int64_t packed[] = {l->out, l->bits == 4 ? width_of(l) : blocks_of(l), 8 * l->bits},
            groups[] = {l->scale_rows, l->groups}, k[] = {l->k};
    int64_t out[] = {l->out}, in[] = {l->in}, each_code[] = {1 << l->bits}, from[] = {tokens, l->in},
            to[] = {tokens, l->out};
    const uint8_t *kind = kinds[l->scale_kind];
    float *y = buffer(4 * tokens * l->out);
    Tensor each[] = {
        shown(l->codes, INTEGER, 8, packed, l->bits == 4 ? 2 : 3),
        shown(l->scale, kind[0], kind[1], groups, 2),
        shown(l->values, FLOAT, 32, k, 1),
        shown(l->rows, INTEGER, 32, k, 1),
        shown(l->columns, INTEGER, 32, k, 1),
        shown(l->row_scale, BFLOAT, 16, out, 1),
        shown(l->column_scale, BFLOAT, 16, in, 1),
        shown(l->levels, INTEGER, 8, each_code, 1),
        shown(l->bias, FLOAT, 32, out, 1),
        shown(x, FLOAT, 32, from, 2),
        shown(y, FLOAT, 32, to, 2),
    };
    void *parts[9];
    for (int i = 0; i < 9; i++) parts[i] = i > 4 && !each[i].data ? (void *)&none : &each[i];
    svdq_use_python(addresses);
    int64_t failed = svdq_call(parts, &each[9], &each[10], l->in, l->group, 1, cpu);
    failed |= memcmp(y, expected, (size_t)(4 * tokens * l->out)) != 0;
    for (int i = 0; i < 11; i++) { /* one tensor of another size, dtype or device, and nothing is read */
        if (i < 9 && parts[i] == &none) continue;
        Tensor kept = each[i];
        int64_t shorter[] = {kept.shape[0] - 1, kept.dimensions > 1 ? kept.shape[1] : 1,
                             kept.dimensions > 2 ? kept.shape[2] : 1};
        int shared = tokens == 0 && (i == 9 || i == 0); /* no token fewer than none, of any rows */
        if (kept.shape[0] > 0 && !shared) {
            each[i].shape = shorter;
            failed |= (i != 1 || l->out > 2) &&
                      svdq_call(parts, &each[9], &each[10], l->in, l->group, 1, cpu) != FOREIGN;
        }
        each[i] = kept, each[i].dtype.bits = 64;
        failed |= svdq_call(parts, &each[9], &each[10], l->in, l->group, 1, cpu) != FOREIGN;
        each[i] = kept, each[i].device.type = 2;
        failed |= svdq_call(parts, &each[9], &each[10], l->in, l->group, 1, cpu) != FOREIGN;
        each[i] = kept;
    }
    if (l->row_scale) { /* scales of 8 bits are nothing without their rows' */
        parts[5] = &none;
        failed |= svdq_call(parts, &each[9], &each[10], l->in, l->group, 1, cpu) != FOREIGN;
    }
    return failed;
}

/* Rows of a weight that was dequantized as a whole: the same in parts. */
static int64_t in_parts(const Layer *layer, const float *dense, int64_t threads, int64_t cpu) {
    int64_t failed = 0, cuts[] = {0, layer->out / 3, layer->out - layer->out / 4, layer->out};
    for (int i = 0; i < 3; i++) {
        int64_t bytes = 4 * (cuts[i + 1] - cuts[i]) * layer->in;
        int before = taken;
        float *some = buffer(bytes);
        failed |= svdq_dequantize(layer, some, cuts[i], cuts[i + 1], threads, cpu);
        failed |= memcmp(some, dense + cuts[i] * layer->in, (size_t)bytes) != 0;
        taken = before;
    }
    return failed;
}

/* Positions that are not there, out of order, or at an odd byte are told and not followed. */
static int64_t refused(Layer layer, const float *x, float *y, float *dense, int64_t tokens, int64_t cpu) {
    int32_t *rows = (int32_t *)(uintptr_t)layer.rows, *columns = (int32_t *)(uintptr_t)layer.columns;
    int32_t last = rows[layer.k - 1], column = columns[layer.k - 1];
    int32_t bad[][2] = {
        {last, (int32_t)layer.in}, {last, -1},     {last, INT32_MIN}, {last, INT32_MAX}, {-(layer.k > 1), 0},
        {(int32_t)layer.out, 0},   {INT32_MAX, 0}, {INT32_MIN, 0}};
    int64_t failed = 0;
    for (size_t i = (size_t)place; i < sizeof bad / sizeof *bad; i += PLACES) { /* half at each end */
        if (bad[i][0] == 0 && bad[i][1] == 0) continue; /* of a single one, no row is out of order */
        rows[layer.k - 1] = bad[i][0], columns[layer.k - 1] = bad[i][1];
        failed |= svdq_linear(&layer, x, y, 0, tokens, 1, cpu) != BAD_POSITION;
        failed |= svdq_dequantize(&layer, dense, 0, layer.out, 1, cpu) != BAD_POSITION;
    }
    rows[layer.k - 1] = last, columns[layer.k - 1] = column;
    layer.values = (const float *)((uintptr_t)layer.values + 1);
    failed |= svdq_linear(&layer, x, y, 0, tokens, 1, cpu) != MISALIGNED;
    failed |= svdq_dequantize(&layer, dense, 0, layer.out, 1, cpu) != MISALIGNED;
    return failed;
}

/* parts: whether the parts that a grid need not have are there. */
static int check(int64_t bits, int64_t out, int64_t in, int64_t group, int64_t kind, int64_t k,
                 int64_t tokens, int64_t cpu, int parts) {
    taken = 0;
    int64_t threads = parts ? 3 : 1, scale_rows = parts || kind == SCALE_INT8 ? out : 1;
    int64_t width = (in + 63) / 64 * 8 * bits, groups = (in + group - 1) / group;
    uint8_t *codes = buffer(out * width);
    void *scale = buffer(scale_rows * groups * (kind == 0 ? 4 : kind == 1 ? 2 : 1));
    uint16_t *row_scale = buffer(2 * out), *column_scale = buffer(2 * in);
    int8_t *levels = buffer(1 << bits);
    float *values = buffer(4 * k), *bias = buffer(4 * out);
    int32_t *rows = buffer(4 * k), *columns = buffer(4 * k);
    float *x = buffer(4 * tokens * in), *y = buffer(4 * tokens * out), *dense = buffer(4 * out * in);
    for (int64_t i = 0; i < out * width; i++) codes[i] = (uint8_t)(next_random() >> 24);
    for (int64_t i = 0; i < scale_rows * groups; i++) {
        if (kind == 0) ((float *)scale)[i] = number();
        if (kind == 1) ((uint16_t *)scale)[i] = narrow(number());
        if (kind == 2) ((int8_t *)scale)[i] = (int8_t)(next_random() >> 24);
    }
    for (int64_t i = 0; i < out; i++) row_scale[i] = narrow(number()), bias[i] = number();
    for (int64_t i = 0; i < in; i++) column_scale[i] = narrow(number());
    for (int i = 0; i < 1 << bits; i++) levels[i] = (int8_t)(i * 15 - 120);
    for (int64_t i = 0; i < k; i++) /* one in each row, from the first on */
        rows[i] = (int32_t)(i % out), columns[i] = (int32_t)(next_random() % in), values[i] = number();
    for (int64_t i = 0; i < tokens * in; i++) x[i] = number();
    Layer layer = {out,       in,           group,  bits,   codes, scale,   kind, scale_rows, groups,
                   row_scale, column_scale, levels, values, rows,  columns, k,    bias};
    if (kind != SCALE_INT8) layer.row_scale = NULL; /* as the format has it */
    if (bits == 8) layer.levels = NULL;
    if (!parts) layer.column_scale = NULL, layer.levels = NULL, layer.bias = NULL;
    int64_t failed = svdq_dequantize(&layer, dense, 0, out, threads, cpu) ||
                     svdq_linear(&layer, x, y, 0, tokens, threads, cpu) ||
                     in_parts(&layer, dense, threads, cpu);
    for (int64_t t = 0; t < tokens && !failed; t++)
        for (int64_t o = 0; o < out; o++) {
            double sum = parts ? bias[o] : 0, size = fabs(sum);
            for (int64_t i = 0; i < in; i++)
                sum += (double)x[t * in + i] * dense[o * in + i],
                    size += fabs((double)x[t * in + i] * dense[o * in + i]);
            for (int64_t e = 0; e < k;
                 e++) /* here codes are not zero at salient entries, and may cancel them */
                size += rows[e] == o ? fabs((double)x[t * in + columns[e]] * values[e]) : 0;
            failed |=
                !(fabs(sum - y[t * out + o]) <= 1e-6 * size + rounded(&layer, x + t * in, o, tokens, cpu));
        }
    failed |= called(&layer, x, y, tokens, cpu) | narrow_too(&layer, tokens, cpu);
    if (k && tokens && !failed) failed |= refused(layer, x, y, dense, tokens, cpu);
    if (failed)
        printf("wrong: bits %ld out %ld in %ld group %ld kind %ld tokens %ld path %ld parts %d\n", bits, out,
               in, group, kind, tokens, cpu, parts);
    return (int)failed;
}

static int check_everywhere(int64_t bits, int64_t out, int64_t in, int64_t group, int64_t kind,
                            int64_t tokens, int64_t cpu) {
    int64_t failed = 0, k = out < 5 ? out : 5;
    for (int parts = 0; parts < 2; parts++)
        for (place = AT_END; place < PLACES; place++)
            failed |= check(bits, out, in, group, kind, parts ? k : k * (tokens != 1), tokens, cpu, parts);
    return (int)failed;
}

int main(void) {
    static const int64_t shapes[][2] = {{1, 1}, {3, 70}, {17, 64}, {33, 129}, {70, 600}},
                         bits[] = {4, 4, 4, 4, 3, 8}, tokens[] = {0, 1, 2, 5, 9, 13, 26};
    int checked = 0;
    if (!make_rooms() || svdq_abi() != ABI) return 2;
    svdq_use_openmp((void *)(uintptr_t)one_after_another);
    for (int64_t cpu = PLAIN; cpu <= svdq_fast(); cpu++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            for (int64_t kind = 0; kind < 3; kind++)
                for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++) {
                    int64_t out = shapes[s][0], in = shapes[s][1];
                    int64_t groups[] = {32, 64, 128, in};
                    for (size_t g = 0; g < 6;
                         g++, checked++) { /* of 4 bits each group, of others one in turn */
                        int64_t group = groups[g < 4 ? g : (s + t + g) % 4];
                        if (check_everywhere(bits[g], out, in, group < in ? group : in, kind, tokens[t], cpu))
                            return 1;
                    }
                }
    printf("%d\n", checked);
    return 0;
}
