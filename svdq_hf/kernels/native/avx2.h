/* Products on AVX2, for codes of 3, 4 and 8 bits; part of svdq.c, which includes it once.
 *
 * Few tokens: weights are decoded in registers, half a block at a time; its sum over the codes alone is
 * multiplied by the scale, once. Every number of few tokens sums in the same order, so a token's result does
 * not depend on who is beside it. Many tokens: a band of dense rows is decoded into cache, once for all.
 * Activations lie eight columns of one token beside the same eight of the next, [columns / 8][tokens][8]:
 * what is read one after the other lies so. Not here: AVX-512's own kernels of 4 bits, which svdq.c prefers.
 */

enum {
    EIGHT = 8,
    FEW_ROWS = 64,
    FEW_COLUMNS = 8192, /* of all tokens together: their activations stay in the first cache, 32 KiB */
    BAND_ROWS = 64,
    BAND_COLUMNS = 512, /* a band is 128 KiB, a quarter of the second cache */
    TILE_ROWS = 4,
    TILE_TOKENS = 3 /* twelve sums, and the sixteen registers are full */
};

/* --------------------------------------------------------------------------------------------- decoding */

/* Levels as bfloat16, the upper half of a float32, which holds them exactly: by byte, so that one shuffle
 * looks 32 up. */
typedef struct {
    __m256i upper, lower;
} LevelBytes;

AVX2 INLINE LevelBytes level_bytes(const float *table) {
    uint8_t upper[LANES], lower[LANES];
    for (int i = 0; i < LANES; i++) {
        uint32_t bits;
        memcpy(&bits, table + i, sizeof bits);
        upper[i] = (uint8_t)(bits >> 24), lower[i] = (uint8_t)(bits >> 16);
    }
    return (LevelBytes){_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)upper)),
                        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)lower))};
}

/* 32 codes in the order in which `unpacked` makes them float32 in their own order. */
AVX2 INLINE __m256i in_order(__m256i codes) {
    const __m256i fours = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const __m128i bytes = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    return _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(codes, fours), _mm256_broadcastsi128_si256(bytes));
}

/* A block of stored codes in registers: of 4 bits its bytes, of 3 its lower bits twice and its top bits four
 * times; of 8 bits memory is as good. */
typedef struct {
    __m256i bytes, tops;
} Codes;

AVX2 INLINE Codes codes_of_block(const uint8_t *block, const int bits) {
    Codes codes = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    int64_t tops;
    if (bits == 4) codes.bytes = in_order(_mm256_loadu_si256((const __m256i *)block));
    if (bits == 3) {
        memcpy(&tops, block + 16, sizeof tops);
        codes.bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)block));
        codes.tops = _mm256_set1_epi64x(tops);
    }
    return codes;
}

/* The unsigned codes of one half of a block of 3 or 4 bits, a byte each. */
AVX2 INLINE __m256i half_of(Codes codes, const int half, const int bits) {
    if (bits == 4) {
        __m256i bytes = half ? _mm256_srli_epi16(codes.bytes, 4) : codes.bytes;
        return _mm256_and_si256(bytes, _mm256_set1_epi8(15));
    }
    const int two = 4 * half, one = 4 * half; /* the first shift of a plane of two bits, and of one */
    __m256i low = _mm256_srlv_epi32(
        codes.bytes, _mm256_setr_epi32(two, two, two, two, two + 2, two + 2, two + 2, two + 2));
    __m256i top = _mm256_srlv_epi64(codes.tops, _mm256_setr_epi64x(one, one + 1, one + 2, one + 3));
    low = _mm256_and_si256(low, _mm256_set1_epi8(3));
    top = _mm256_slli_epi16(_mm256_and_si256(top, _mm256_set1_epi8(1)), 2);
    return in_order(_mm256_or_si256(low, top));
}

/* The levels of half a block, [32] float32. */
AVX2 INLINE void decode_avx2(const uint8_t *block, Codes codes, LevelBytes levels, __m256 weights[4],
                             const int half, const int bits) {
    if (bits == 8) {
        for (int i = 0; i < 4; i++) {
            __m128i eight = _mm_loadl_epi64((const __m128i *)(block + HALF * half + EIGHT * i));
            weights[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
        }
        return;
    }
    __m256i code = half_of(codes, half, bits), odd = _mm256_set1_epi32((int)0xFFFF0000);
    __m256i lower = _mm256_shuffle_epi8(levels.lower, code), upper = _mm256_shuffle_epi8(levels.upper, code);
    __m256i words[2] = {_mm256_unpacklo_epi8(lower, upper), _mm256_unpackhi_epi8(lower, upper)};
    for (int i = 0; i < 2; i++) {
        weights[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(words[i], 16));
        weights[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(words[i], odd));
    }
}

/* Each number of bits is compiled on its own. */
#define EACH_BITS(CALL)                                                                                      \
    switch (layer->bits) {                                                                                   \
    case 3: CALL(3); break;                                                                                  \
    case 4: CALL(4); break;                                                                                  \
    default: CALL(8);                                                                                        \
    }

/* ------------------------------------------------------------------------------------------ activations */

/* Eight activations from a column on, times the columns' scales where asked for; beyond the last, zeros. */
AVX2 INLINE __m256 eight_of(const Layer *layer, const float *x, int64_t column, const int scaled) {
    float values[EIGHT] = {0}, scales[EIGHT] = {0};
    int64_t left = layer->in - column;
    if (left >= EIGHT) {
        __m256 found = _mm256_loadu_ps(x + column);
        if (!scaled) return found;
        __m128i narrow = _mm_loadu_si128((const __m128i *)(layer->column_scale + column));
        __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
        return _mm256_mul_ps(found, _mm256_castsi256_ps(wide));
    }
    for (int64_t i = 0; i < left; i++) {
        values[i] = x[column + i];
        scales[i] = scaled ? widen(layer->column_scale[column + i]) : 1;
    }
    return _mm256_mul_ps(_mm256_loadu_ps(values), _mm256_loadu_ps(scales));
}

/* Some tokens' activations [tokens, in], side by side: [padded / 8][tokens][8]. */
AVX2 INLINE void lay_side_by_side(const Layer *layer, const float *x, int64_t tokens, int scaled, float *to) {
    int64_t padded = BLOCK * blocks_of(layer);
    for (int64_t column = 0; column < padded; column += EIGHT)
        for (int64_t t = 0; t < tokens; t++, to += EIGHT) {
            const float *from = x + t * layer->in;
            _mm256_storeu_ps(to,
                             scaled ? eight_of(layer, from, column, 1) : eight_of(layer, from, column, 0));
        }
}

/* ------------------------------------------------------------------------------------------- few tokens */

/* sums [tokens][8] += a row's `blocks` blocks of codes times x [columns / 8][tokens][8]. */
AVX2 INLINE void few_tile(const uint8_t *codes, int64_t blocks, int64_t ahead, const float *scales,
                          LevelBytes levels, const float *x, float *sums, const int tokens, const int bits) {
    __m256 acc[MOST_TOKENS];
    for (int t = 0; t < tokens; t++) acc[t] = _mm256_loadu_ps(sums + EIGHT * t);
    for (int64_t b = 0; b < blocks; b++, codes += 8 * bits, scales += 2) {
        _mm_prefetch((const char *)(codes + ahead), _MM_HINT_T0);
        Codes block = codes_of_block(codes, bits);
        for (int half = 0; half < 2; half++, x += tokens * HALF) {
            __m256 weights[4], scale = _mm256_set1_ps(scales[half]);
            decode_avx2(codes, block, levels, weights, half, bits);
            for (int t = 0; t < tokens; t++) {
                __m256 sum = _mm256_mul_ps(weights[0], _mm256_loadu_ps(x + EIGHT * t));
                for (int i = 1; i < 4; i++)
                    sum = _mm256_fmadd_ps(weights[i], _mm256_loadu_ps(x + EIGHT * (tokens * i + t)), sum);
                acc[t] = _mm256_fmadd_ps(sum, scale, acc[t]);
            }
        }
    }
    for (int t = 0; t < tokens; t++) _mm256_storeu_ps(sums + EIGHT * t, acc[t]);
}

/* The same for columns from `start` on of rows [first, last): sums [rows][tokens][8]. */
AVX2 INLINE void few_rows(const Layer *layer, int64_t first, int64_t last, int64_t start, int64_t blocks,
                          LevelBytes levels, const float *x, float *sums, const int tokens, const int bits) {
    int64_t width = width_of(layer);
    float scales[FEW_COLUMNS / HALF];
    for (int64_t row = first; row < last; row++, sums += EIGHT * tokens) {
        const uint8_t *codes = layer->codes + row * width + start / 8 * bits;
        scales_of_row_avx2(layer, row, start / HALF, 2 * blocks, scales);
        few_tile(codes, blocks, row + 1 < layer->out ? width : 0, scales, levels, x, sums, tokens, bits);
    }
}

#define FEW_ARGUMENTS                                                                                        \
    const Layer *layer, int64_t first, int64_t last, int64_t start, int64_t blocks, LevelBytes levels,       \
        const float *x, float *sums, int64_t tokens
#define CALL(n) few_rows(layer, first, last, start, blocks, levels, x, sums, n, BITS)
#define BITS 3
AVX2 static void few_rows_of_3_bits(FEW_ARGUMENTS){EACH_TOKENS(CALL)}
#undef BITS
#define BITS 4
AVX2 static void few_rows_of_4_bits(FEW_ARGUMENTS){EACH_TOKENS(CALL)}
#undef BITS
#define BITS 8
AVX2 static void few_rows_of_8_bits(FEW_ARGUMENTS){EACH_TOKENS(CALL)}
#undef BITS
#undef CALL

/* Rows [first, last) times up to eight tokens: y = sums + bias. */
AVX2 static void multiply_few(const Product *p, int64_t first, int64_t last, int64_t t, int64_t tokens,
                              LevelBytes levels) {
    const Layer *layer = p->layer;
    int64_t padded = BLOCK * blocks_of(layer), step = FEW_COLUMNS / tokens / BLOCK * BLOCK;
    _Alignas(64) float sums[FEW_ROWS * MOST_TOKENS * EIGHT];
    const float *sum = sums;
    memset(sums, 0, (size_t)((last - first) * tokens * EIGHT) * sizeof *sums);
    for (int64_t start = 0; start < padded; start += step) {
        int64_t blocks = (padded - start < step ? padded - start : step) / BLOCK;
        const float *x = p->scaled + t * padded + tokens * start;
#define CALL(bits) few_rows_of_##bits##_bits(layer, first, last, start, blocks, levels, x, sums, tokens)
        EACH_BITS(CALL)
#undef CALL
    }
    for (int64_t row = first; row < last; row++)
        for (int64_t i = 0; i < tokens; i++, sum += EIGHT)
            p->y[(t + i) * layer->out + row] = ((sum[0] + sum[4]) + (sum[1] + sum[5])) +
                                               ((sum[2] + sum[6]) + (sum[3] + sum[7])) +
                                               (layer->bias ? layer->bias[row] : 0);
}

AVX2 static void work_on_few(void *given) {
    Product *p = given;
    float table[LANES];
    table_of(p->layer, table);
    LevelBytes levels = level_bytes(table);
    for (int64_t first, last; next_rows(p, &first, &last);) {
        for (int64_t t = 0; t < p->tokens; t += MOST_TOKENS)
            multiply_few(p, first, last, t, p->tokens - t < MOST_TOKENS ? p->tokens - t : MOST_TOKENS,
                         levels);
        count(&p->salient, add_salient(p, first, last));
    }
}

/* ------------------------------------------------------------------------------------------ many tokens */

/* Where a weight of a band lies: [rows / 4][width / 8][4][8]. */
INLINE int64_t place_in_band(int64_t row, int64_t column, int64_t width) {
    return row / TILE_ROWS * TILE_ROWS * width + column / EIGHT * TILE_ROWS * EIGHT +
           row % TILE_ROWS * EIGHT + column % EIGHT;
}

/* `width` columns from `start` on of a row, into a band; columns: their scales [width], or NULL. */
AVX2 INLINE void fill_row(const Layer *layer, int64_t row, int64_t start, int64_t width, LevelBytes levels,
                          const float *columns, float *to, const int bits) {
    const uint8_t *codes = layer->codes + row * width_of(layer) + start / 8 * bits;
    float scales[BAND_COLUMNS / HALF];
    scales_of_row_avx2(layer, row, start / HALF, width / HALF, scales);
    for (int64_t column = 0; column < width; column += BLOCK, codes += 8 * bits) {
        Codes block = codes_of_block(codes, bits);
        for (int half = 0; half < 2; half++) {
            __m256 weights[4], scale = _mm256_set1_ps(scales[column / HALF + half]);
            decode_avx2(codes, block, levels, weights, half, bits);
            for (int i = 0; i < 4; i++, to += TILE_ROWS * EIGHT) {
                __m256 each = _mm256_mul_ps(weights[i], scale);
                const float *times = columns + column + HALF * half + EIGHT * i;
                _mm256_storeu_ps(to, columns ? _mm256_mul_ps(each, _mm256_loadu_ps(times)) : each);
            }
        }
    }
}

/* Rows [first, last) of a band, salient weights among them; returns how many of those the rows have. */
AVX2 static int64_t fill_band(const Layer *layer, int64_t first, int64_t last, int64_t start, int64_t width,
                              LevelBytes levels, float *band) {
    float columns[BAND_COLUMNS];
    for (int64_t i = 0; layer->column_scale && i < width; i++)
        columns[i] = start + i < layer->in ? widen(layer->column_scale[start + i]) : 0;
    for (int64_t row = first; row < last; row++) {
        float *to = band + place_in_band(row - first, 0, width);
#define CALL(bits) fill_row(layer, row, start, width, levels, layer->column_scale ? columns : NULL, to, bits)
        EACH_BITS(CALL)
#undef CALL
    }
    int64_t first_entry = first_of_row(layer, first), e = first_entry;
    for (; e < layer->k && layer->rows[e] < last; e++) {
        int64_t row = layer->rows[e] - first, column = layer->columns[e];
        if (row < 0 || column < 0 || column >= layer->in) break;
        if (column >= start && column < start + width)
            band[place_in_band(row, column - start, width)] += layer->values[e];
    }
    return e - first_entry;
}

/* The sums of four registers' lanes. */
AVX2 INLINE __m128 sums_of_four(const __m256 acc[TILE_ROWS]) {
    __m256 pairs = _mm256_hadd_ps(acc[0], acc[1]), others = _mm256_hadd_ps(acc[2], acc[3]);
    __m256 fours = _mm256_hadd_ps(pairs, others);
    return _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1));
}

/* y [tokens, up to four rows] = before + x [width / 8][tokens][8] times a band's four rows. */
AVX2 INLINE void band_tile(const float *x, const float *band, int64_t width, float *y, int64_t y_stride,
                           int64_t rows, int add, const float *bias, const int tokens) {
    __m256 acc[TILE_TOKENS][TILE_ROWS];
    int before = add || bias;
    for (int t = 0; t < tokens; t++) {
        _mm_prefetch((const char *)(y + t * y_stride), _MM_HINT_T0);
        for (int r = 0; r < TILE_ROWS; r++) acc[t][r] = _mm256_setzero_ps();
    }
    for (int64_t i = 0; i < width; i += EIGHT, x += tokens * EIGHT, band += TILE_ROWS * EIGHT)
        for (int t = 0; t < tokens; t++) {
            __m256 activation = _mm256_loadu_ps(x + EIGHT * t);
            for (int r = 0; r < TILE_ROWS; r++)
                acc[t][r] = _mm256_fmadd_ps(_mm256_loadu_ps(band + EIGHT * r), activation, acc[t][r]);
        }
    for (int t = 0; t < tokens; t++, y += y_stride) {
        __m128 found = sums_of_four(acc[t]);
        float sums[TILE_ROWS];
        if (rows == TILE_ROWS) {
            _mm_storeu_ps(y, before ? _mm_add_ps(found, _mm_loadu_ps(add ? y : bias)) : found);
            continue;
        }
        _mm_storeu_ps(sums, found);
        for (int64_t r = 0; r < rows; r++) y[r] = sums[r] + (add ? y[r] : bias ? bias[r] : 0);
    }
}

/* A band times all tokens. While three tokens meet it, the next three come into cache. */
AVX2 static void multiply_band(const Product *p, int64_t first, int64_t last, int64_t start, int64_t width,
                               const float *band) {
    const Layer *layer = p->layer;
    int64_t padded = BLOCK * blocks_of(layer), tiles = (last - first + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t t = 0; t < p->tokens; t += TILE_TOKENS) {
        int64_t tokens = p->tokens - t < TILE_TOKENS ? p->tokens - t : TILE_TOKENS;
        int64_t share = p->tokens - t < 2 * TILE_TOKENS ? 0 : TILE_TOKENS * width / tiles;
        const float *x = p->scaled + t * padded + tokens * start, *next = x + TILE_TOKENS * padded;
        for (int64_t row = first; row < last; row += TILE_ROWS) {
            const float *rows = band + place_in_band(row - first, 0, width);
            const float *bias = layer->bias ? layer->bias + row : NULL;
            int64_t left = last - row < TILE_ROWS ? last - row : TILE_ROWS;
            float *y = p->y + t * layer->out + row;
            for (int64_t i = 0; i < share; i += LANES, next += LANES)
                _mm_prefetch((const char *)next, _MM_HINT_T1);
#define CALL(n) band_tile(x, rows, width, y, layer->out, left, start > 0, bias, n)
            if (tokens == 1)
                CALL(1);
            else if (tokens == 2)
                CALL(2);
            else
                CALL(3);
#undef CALL
        }
    }
}

AVX2 static void work_on_bands(void *given) {
    Product *p = given;
    const Layer *layer = p->layer;
    int64_t padded = BLOCK * blocks_of(layer);
    float table[LANES], *band = aligned_alloc(64, sizeof *band * BAND_ROWS * BAND_COLUMNS);
    if (!band) fail(&p->error, NO_MEMORY);
    table_of(layer, table);
    LevelBytes levels = level_bytes(table);
    for (int64_t first, last; band && next_rows(p, &first, &last);)
        for (int64_t start = 0; start < padded; start += BAND_COLUMNS) {
            int64_t width = padded - start < BAND_COLUMNS ? padded - start : BAND_COLUMNS;
            if ((last - first) % TILE_ROWS) /* rows that are not there */
                memset(band + (last - first) / TILE_ROWS * TILE_ROWS * width, 0,
                       (size_t)(TILE_ROWS * width) * sizeof *band);
            int64_t met = fill_band(layer, first, last, start, width, levels, band);
            if (start == 0) count(&p->salient, met);
            multiply_band(p, first, last, start, width, band);
        }
    free(band);
}

/* ---------------------------------------------------------------------------------- the weight itself */

/* Half a block of decoded weights times their scale and their columns' scales, where they belong. */
AVX2 INLINE void store_half(const Layer *layer, int64_t column, const __m256 weights[4], float scale,
                            float *dense) {
    const uint16_t *columns = layer->column_scale ? layer->column_scale + column : NULL;
    for (int i = 0; i < 4; i++) {
        __m256 each = _mm256_mul_ps(weights[i], _mm256_set1_ps(scale));
        if (columns) {
            __m128i narrow = _mm_loadu_si128((const __m128i *)(columns + EIGHT * i));
            __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
            each = _mm256_mul_ps(each, _mm256_castsi256_ps(wide));
        }
        _mm256_storeu_ps(dense + column + EIGHT * i, each);
    }
}

AVX2 INLINE void dense_rows(const Layer *layer, int64_t first, int64_t last, LevelBytes levels, float *scales,
                            float *dense, const int bits) {
    int64_t blocks = blocks_of(layer);
    for (int64_t row = first; row < last; row++, dense += layer->in) {
        const uint8_t *codes = layer->codes + row * width_of(layer);
        scales_of_row_avx2(layer, row, 0, 2 * blocks, scales);
        for (int64_t b = 0; b < blocks; b++, codes += 8 * bits) {
            Codes block = codes_of_block(codes, bits);
            int whole = BLOCK * (b + 1) <= layer->in;
            float found[BLOCK];
            for (int half = 0; half < 2; half++) {
                __m256 weights[4], scale = _mm256_set1_ps(scales[2 * b + half]);
                decode_avx2(codes, block, levels, weights, half, bits);
                if (whole)
                    store_half(layer, BLOCK * b + HALF * half, weights, scales[2 * b + half], dense);
                else
                    for (int i = 0; i < 4; i++)
                        _mm256_storeu_ps(found + HALF * half + EIGHT * i, _mm256_mul_ps(weights[i], scale));
            }
            if (!whole) store_block(layer, BLOCK * b, found, dense);
        }
    }
}

AVX2 static void rows_avx2(ROWS_ARGUMENTS) {
    LevelBytes levels = level_bytes(table);
#define CALL(bits) dense_rows(layer, first, last, levels, scales, dense, bits)
    EACH_BITS(CALL)
#undef CALL
}

/* ------------------------------------------------------------------------------------------- the product */

AVX2 static void work_on_activations(void *given) {
    Product *p = given;
    int64_t padded = BLOCK * blocks_of(p->layer);
    for (int64_t t; (t = __atomic_fetch_add(&p->next, p->chunk, __ATOMIC_RELAXED)) < p->tokens;) {
        int64_t tokens = p->tokens - t < p->chunk ? p->tokens - t : p->chunk;
        int scaled = p->chunk == MOST_TOKENS && p->layer->column_scale;
        lay_side_by_side(p->layer, p->x + t * p->layer->in, tokens, scaled, (float *)p->scaled + t * padded);
    }
}

AVX2 static void multiply_avx2(Product *p, int64_t threads) {
    const Layer *layer = p->layer;
    int few = p->tokens <= MOST_TOKENS;
    int64_t most = few ? FEW_ROWS : BAND_ROWS, rows = layer->out / (4 * threads) / TILE_ROWS * TILE_ROWS;
    float *scaled = aligned_alloc(64, (size_t)(p->tokens * BLOCK * blocks_of(layer)) * sizeof *scaled);
    if (!scaled) {
        fail(&p->error, NO_MEMORY);
        return;
    }
    p->scaled = scaled, p->chunk = few ? MOST_TOKENS : TILE_TOKENS;
    in_parallel(work_on_activations, p, few ? 1 : threads);
    p->next = 0, p->chunk = rows > most ? most : rows < 2 * TILE_ROWS ? 2 * TILE_ROWS : rows;
    in_parallel(few ? work_on_few : work_on_bands, p, threads);
    free(scaled);
}
