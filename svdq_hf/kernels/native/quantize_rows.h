/* Rounding of rows, for quantize.c: included once for each path, with TARGET and PATH(name) set by it.
 *
 * Eight rows stand side by side, one in each lane, so that every sum runs along a lane, from the first column
 * to the last: each path computes the same bytes, however wide its registers are. */

/* ---------------------------------------------------------------------------- levels, eight at a time */

TARGET INLINE Lanes PATH(at_least)(Lanes x, Lanes least) {
    return SELECT(x > least, x, least);
}

TARGET INLINE Lanes PATH(at_most)(Lanes x, Lanes most) {
    return SELECT(x < most, x, most);
}

/* Rounded to a whole number, ties to even: what is below a float's last bit is lost by adding a large one. */
TARGET INLINE Lanes PATH(whole)(Lanes x) {
    const float large = 12582912.0f; /* 1.5 * 2^23 */
    return (x + large) - large;
}

/* The nearest level to each number; `places`, where it is asked for: minus its place from the lowest on. */
TARGET INLINE Lanes PATH(nearest)(Lanes x, const Levels *levels, const int linear, Ints *places) {
    if (linear) {
        Lanes lowest = ALL(levels->level[0]), highest = ALL(levels->highest);
        Lanes level = PATH(whole)(PATH(at_most)(PATH(at_least)(x, lowest), highest));
        if (places) *places = CONVERT(lowest - level, Ints);
        return level;
    }
#if BY_PERMUTATION /* a search in four steps: a mask is -1 where a step goes up, so places count down from 0 \
                    */
    __m256 first = _mm256_cmp_ps(x, _mm256_set1_ps(levels->middle[7]), _CMP_GE_OQ);
    __m256 middle =
        _mm256_blendv_ps(_mm256_set1_ps(levels->middle[3]), _mm256_set1_ps(levels->middle[11]), first);
    Ints place = 2 * (Ints)first + (Ints)_mm256_cmp_ps(x, middle, _CMP_GE_OQ);
    middle = _mm256_permutevar_ps(_mm256_loadu_ps(levels->fourths), (__m256i)place);
    place = 2 * place + (Ints)_mm256_cmp_ps(x, middle, _CMP_GE_OQ);
    middle = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels->eighths), (__m256i)place);
    __m256 last = _mm256_cmp_ps(x, middle, _CMP_GE_OQ);
    if (places) *places = 2 * place + (Ints)last;
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(levels->even), (__m256i)place),
                            _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels->odd), (__m256i)place), last);
#else
    Lanes level = ALL(levels->level[0]);
    Ints place = {0};
    for (int i = 0; i < MOST_LEVELS - 1; i++) {
        Ints above = x >= ALL(levels->middle[i]);
        level += (Lanes)(above & (Ints)ALL(levels->level[i + 1] - levels->level[i]));
        place += above;
    }
    if (places) *places = place;
    return level;
#endif
}

/* ------------------------------------------------------------------------------- the scale of each group */

/* Adds eight numbers to sums in double, four and four. */
TARGET INLINE void PATH(add)(Lanes x, Doubles sums[2]) {
#if BY_PERMUTATION
    sums[0] += (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
    sums[1] += (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
#else
    Four four[2];
    memcpy(four, &x, sizeof x);
    for (int half = 0; half < 2; half++) sums[half] += CONVERT(four[half], Doubles);
#endif
}

/* The best scale so far, and what it takes off the error. */
typedef struct {
    Doubles scale[2], gain[2];
} PATH(Best);

TARGET INLINE Lanes PATH(scale_of)(const PATH(Best) * best) {
    Four four[2] = {CONVERT(best->scale[0], Four), CONVERT(best->scale[1], Four)};
    Lanes found;
    memcpy(&found, four, sizeof found);
    return found;
}

/* Judge a size of the scale: what its levels, with the scale that suits them best, take off the error. In
 * double, since that is a small difference of large sums, and sizes are many. */
TARGET INLINE void PATH(judge_here)(const Lanes *unit, int64_t columns, Lanes inverse, const Levels *levels,
                                    const int linear, PATH(Best) * best) {
    Doubles along[2] = {0}, square[2] = {0};
    for (int64_t start = 0; start < columns; start += SUMMED) {
        int64_t stop = start + SUMMED < columns ? start + SUMMED : columns;
        Lanes squares = {0}; /* whole numbers, below 2^24 */
        for (int64_t c = start; c < stop; c++) {
            Lanes level = PATH(nearest)(unit[c] * inverse, levels, linear, NULL);
            PATH(add)(unit[c] * level, along);
            squares += level * level;
        }
        PATH(add)(squares, square);
    }
    for (int half = 0; half < 2; half++) {
        Doubles least = {1, 1, 1, 1};
        Doubles scale = along[half] / SELECT_DOUBLES(square[half] > least, square[half], least);
        Doubles gain = along[half] * scale;
        Longs better = gain > best->gain[half];
        best->scale[half] = SELECT_DOUBLES(better, scale, best->scale[half]);
        best->gain[half] = SELECT_DOUBLES(better, gain, best->gain[half]);
    }
}

/* The same, compiled once for each kind of levels and not wherever it is called: that halves the time that a
 * compiler takes. Vectors go by address, since how they are passed depends on the path. */
TARGET APART void PATH(judge_linear)(const Lanes *unit, int64_t columns, const Lanes *inverse,
                                     const Levels *levels, PATH(Best) * best) {
    PATH(judge_here)(unit, columns, *inverse, levels, 1, best);
}

TARGET APART void PATH(judge_levels)(const Lanes *unit, int64_t columns, const Lanes *inverse,
                                     const Levels *levels, PATH(Best) * best) {
    PATH(judge_here)(unit, columns, *inverse, levels, 0, best);
}

TARGET INLINE void PATH(judge)(const Lanes *unit, int64_t columns, Lanes inverse, const Levels *levels,
                               const int linear, PATH(Best) * best) {
    (linear ? PATH(judge_linear) : PATH(judge_levels))(unit, columns, &inverse, levels, best);
}

/* lowest ^ (-1 / roots), by Newton's steps from a guess made of the bits: the factor from each size to the
 * next. */
TARGET INLINE Lanes PATH(step_up)(Lanes lowest, int roots) {
    const int32_t one = 0x3F800000;
    Lanes share = CONVERT(one - (Ints)lowest, Lanes) / (float)roots;
    Lanes found = (Lanes)(one + CONVERT(share, Ints));
    for (int i = 0; i < 4; i++) {
        Lanes power = found;
        for (int n = 1; n < roots; n++) power = power * found;
        found = found + found * (1.0f - lowest * power) / (float)roots;
    }
    return found;
}

TARGET INLINE Lanes PATH(root)(Lanes x) {
    Lanes found = {0};
    for (int r = 0; r < ROWS; r++) found[r] = __builtin_sqrtf(x[r]);
    return found;
}

/* Least squared error over the scale's size and sign, of groups whose largest weight is 1. */
TARGET INLINE Lanes PATH(least_squares)(const Lanes *unit, int64_t columns, Lanes deviation,
                                        const Rounding *job, const Levels *levels, const int linear) {
    float top = levels->highest, bottom = levels->level[0], beyond = linear ? 0.5f : 0.0f;
    Lanes clip = PATH(at_most)(PATH(at_least)((float)job->least_clip * deviation, ALL(1e-6f)), ALL(0.85f));
    Lanes up = PATH(step_up)(clip, (int)job->sizes - 1);
    PATH(Best) best = {{{0}, {0}}, {{0}, {0}}};
    for (int64_t size = 1; size <= job->sizes; size++, clip = clip * up) {
        if (size == job->sizes) clip = ALL(1.0f);
        PATH(judge)(unit, columns, (top + beyond) / clip, levels, linear, &best);
        if (bottom != -top) PATH(judge)(unit, columns, (bottom + beyond) / clip, levels, linear, &best);
    }
    if (beyond > 0) PATH(judge)(unit, columns, ALL(top), levels, linear, &best); /* absmax's codes */
    Lanes found = PATH(scale_of)(&best), anew = SELECT(found == 0.0f, ALL(0.0f), 1.0f / found);
    PATH(judge)(unit, columns, anew, levels, linear, &best);
    return PATH(scale_of)(&best);
}

/* The scale of one group of each row. `salient`: how many of each row were taken out; `unit`: room. */
TARGET INLINE Lanes PATH(fit)(const Lanes *weights, int64_t columns, const int32_t *salient,
                              const Rounding *job, const Levels *levels, const int linear, Lanes *unit) {
    Lanes top = {0}, squares = {0}, rest = {0};
    for (int64_t c = 0; c < columns; c++) top = PATH(at_least)(SIZE(weights[c]), top);
    if (job->rule == ABSMAX) return top * (1.0f / levels->highest);
    Lanes divisor = SELECT(top > 0.0f, top, ALL(1.0f));
    for (int64_t start = 0; start < columns; start += SUMMED) {
        Lanes some = {0};
        for (int64_t c = start; c < columns && c < start + SUMMED; c++) {
            unit[c] = weights[c] / divisor;
            some += unit[c] * unit[c];
        }
        squares += some;
    }
    if (job->rule == LEAST_SQUARES) {
        Lanes deviation = PATH(root)(squares / (float)job->group);
        return top * PATH(least_squares)(unit, columns, deviation, job, levels, linear);
    }
    for (int r = 0; r < ROWS; r++) rest[r] = (float)(columns - salient[r] > 1 ? columns - salient[r] : 1);
    Lanes clipped = PATH(at_most)((float)job->clip_sigma * PATH(root)(squares / rest), ALL(1.0f));
    return top * (clipped / levels->highest);
}

/* ------------------------------------------------------------------------------------------ eight rows */

/* One group's weights, a column of eight rows after the other: divided by the columns' scales, the salient
 * ones taken out. `at`: the next salient entry of each row; `salient`: how many were met; returns the sum of
 * all squares, in units of the largest weight. */
TARGET INLINE Lanes PATH(take_group)(const Rounding *job, int64_t row, int64_t start, int64_t columns,
                                     int64_t *at, int32_t *salient, Lanes *weights) {
    int64_t rows = job->source.out - row < ROWS ? job->source.out - row : ROWS;
    float *entries = (float *)weights;
    if (rows < ROWS) memset(weights, 0, (size_t)columns * sizeof *weights);
    for (int64_t r = 0; r < rows; r++)
        read_row(&job->source, (row + r) * job->source.in + start, columns, entries + r, ROWS);
    Lanes squares = {0};
    float unit = 1.0f / (float)job->top;
    for (int64_t c = 0; c < columns; c++) {
        Lanes size = weights[c] * unit;
        squares += size * size;
        if (job->column_scale) weights[c] = weights[c] / widen(job->column_scale[start + c]);
    }
    for (int64_t r = 0; r < ROWS; r++)
        for (salient[r] = 0; r < rows && is_in(job, at[r], row + r, start + columns); salient[r]++)
            entries[ROWS * (job->columns[at[r]++] - start) + r] = 0;
    return squares;
}

/* The codes of one group, as stored numbers [columns][8 rows], and the sum of the squares of what is lost. */
TARGET INLINE Lanes PATH(round_group)(const Rounding *job, int64_t start, int64_t columns,
                                      const Lanes *weights, Lanes step, const Levels *levels,
                                      const int linear, uint8_t *codes) {
    Lanes lost = {0};
    float unit = 1.0f / (float)job->top;
    Ints none = step == 0.0f;
    for (int64_t c = 0; c < columns; c++) {
        Ints places;
        Lanes times = SELECT(none, ALL(0.0f), weights[c] / step);
        Lanes level = PATH(nearest)(times, levels, linear, &places);
        Lanes off = weights[c] - level * step;
        if (job->column_scale) off = off * widen(job->column_scale[start + c]);
        off = off * unit;
        lost += off * off;
        Bytes stored = CONVERT(levels->stored - places, Bytes);
        memcpy(codes + ROWS * c, &stored, sizeof stored);
    }
    return lost;
}

/* Packs one field of the codes of a block, [64][8 rows], into `bytes` [8 * field][8 rows]. */
TARGET INLINE void PATH(pack_field)(const uint8_t *codes, const int field, int done, uint8_t *bytes) {
    const int width = ROWS * 8 * field, mask = (1 << field) - 1;
    for (int i = 0; i < width; i++) {
        int byte = 0;
        for (int plane = 0; plane < 8 / field; plane++)
            byte |= (codes[plane * width + i] >> done & mask) << (field * plane);
        bytes[i] = (uint8_t)byte;
    }
}

/* Packs the codes of eight rows, [padded][8 rows], into their rows of bytes. */
TARGET APART void PATH(pack_rows)(const Rounding *job, int64_t row, const uint8_t *codes) {
    int64_t rows = job->source.out - row < ROWS ? job->source.out - row : ROWS,
            blocks = (job->source.in + BLOCK - 1) / BLOCK;
    int64_t each = 8 * job->bits, width = each * blocks;
    uint8_t bytes[BLOCK * ROWS];
    for (int64_t b = 0; b < blocks; b++, codes += BLOCK * ROWS) {
        if (job->bits == 4) PATH(pack_field)(codes, 4, 0, bytes);
        if (job->bits == 8) PATH(pack_field)(codes, 8, 0, bytes);
        if (job->bits == 3) {
            PATH(pack_field)(codes, 2, 0, bytes);
            PATH(pack_field)(codes, 1, 2, bytes + ROWS * 16);
        }
        for (int64_t r = 0; r < rows; r++) {
            uint8_t *to = job->codes + (row + r) * width + each * b;
            for (int64_t i = 0; i < each; i++) to[i] = bytes[ROWS * i + r];
        }
    }
}

/* Scales as they are stored, and the steps [groups] that these stand for. */
TARGET APART void PATH(store_scales)(const Rounding *job, int64_t row, int64_t groups, Lanes *scales) {
    int64_t rows = job->source.out - row < ROWS ? job->source.out - row : ROWS;
    Lanes top = {0}, unit = {0};
    if (job->scale_kind == INT8) {
        for (int64_t g = 0; g < groups; g++) top = PATH(at_least)(SIZE(scales[g]), top);
        top = top / (float)LARGEST;
        for (int64_t r = 0; r < rows; r++) job->row_scale[row + r] = narrow(top[r]);
        for (int r = 0; r < ROWS; r++) unit[r] = widen(narrow(top[r]));
    }
    for (int64_t g = 0; g < groups; g++) {
        if (job->scale_kind == INT8) { /* in units of the row's; of a row of zeros, zero */
            Lanes times = SELECT(unit > 0.0f, scales[g] / unit, ALL(0.0f));
            times = PATH(whole)(PATH(at_most)(PATH(at_least)(times, ALL(-LARGEST)), ALL(LARGEST)));
            scales[g] = times * unit;
            for (int64_t r = 0; r < rows; r++)
                ((int8_t *)job->scale)[(row + r) * groups + g] = (int8_t)times[r];
        } else if (job->scale_kind == BFLOAT16) {
            for (int64_t r = 0; r < rows; r++)
                ((uint16_t *)job->scale)[(row + r) * groups + g] = narrow(scales[g][r]);
            for (int r = 0; r < ROWS; r++) scales[g][r] = widen(narrow(scales[g][r]));
        } else if (job->rule != GIVEN) {
            for (int64_t r = 0; r < rows; r++) ((float *)job->scale)[(row + r) * groups + g] = scales[g][r];
        }
    }
}

/* Eight rows from the first look to the stored bytes. */
TARGET INLINE void PATH(round_rows)(const Rounding *job, int64_t row, const Levels *levels, const int linear,
                                    Scratch *room, double sums[2]) {
    int64_t groups = (job->source.in + job->group - 1) / job->group, at[ROWS];
    int32_t salient[ROWS];
    Lanes lost = {0}, all = {0};
    for (int r = 0; r < ROWS; r++) at[r] = first_of_row(job, row + r);
    for (int64_t g = 0, start = 0; g < groups; g++, start += job->group) {
        int64_t columns = job->source.in - start < job->group ? job->source.in - start : job->group;
        Lanes *weights = room->weights + start;
        all += PATH(take_group)(job, row, start, columns, at, salient, weights);
        if (job->rule == GIVEN)
            room->scales[g] = ALL(*(const float *)job->scale);
        else
            room->scales[g] = PATH(fit)(weights, columns, salient, job, levels, linear, room->unit);
    }
    PATH(store_scales)(job, row, groups, room->scales);
    for (int64_t g = 0, start = 0; g < groups; g++, start += job->group) {
        int64_t columns = job->source.in - start < job->group ? job->source.in - start : job->group;
        lost += PATH(round_group)(job, start, columns, room->weights + start, room->scales[g], levels, linear,
                                  room->codes + ROWS * start);
    }
    PATH(pack_rows)(job, row, room->codes);
    for (int r = 0; r < ROWS; r++) sums[0] += lost[r], sums[1] += all[r];
}

/* A thread's part of the work: blocks of rows, while there are any. */
TARGET static void PATH(work)(Shared *shared, Scratch *room) {
    const Rounding *job = shared->job;
    const Levels *levels = &shared->levels;
    for (int64_t block; (block = next_of(&shared->next)) < shared->blocks;) {
        double *sums = shared->sums + 2 * block;
        if (job->levels)
            PATH(round_rows)(job, block * ROWS, levels, 0, room, sums);
        else
            PATH(round_rows)(job, block * ROWS, levels, 1, room, sums);
    }
}
