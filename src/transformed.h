/* The body of transformed.c, for vectors of WIDTH numbers. The registers hold the sums of ROWS rows of a product.
 * NAME(x) is a different name for each width. */

typedef float NAME(Vector) __attribute__((vector_size(4 * WIDTH)));
typedef float NAME(Unaligned) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t NAME(Bits) __attribute__((vector_size(4 * WIDTH)));
#define Vector NAME(Vector)

enum {
    NAME(VECTORS) = BLOCK / WIDTH,      /* in a block of columns */
    NAME(TOGETHER) = WIDTH > 8 ? 2 : 1, /* blocks of columns that are multiplied at a time */
    NAME(PIXELS) = WIDTH > 8 ? 8 : 4    /* pixels at a time in the first convolution */
};

INLINE Vector NAME(load)(const float *place) { return *(const NAME(Unaligned) *)place; }
INLINE void NAME(store)(float *place, Vector values) { *(NAME(Unaligned) *)place = values; }
/* NaN remains NaN. */
INLINE Vector NAME(positive)(Vector values) { return (Vector)((NAME(Bits))values & ~(values < 0)); }
INLINE Vector NAME(larger)(Vector a, Vector b)
{
    const NAME(Bits) second = ~(a >= b);
    return (Vector)(((NAME(Bits))a & ~second) | ((NAME(Bits))b & second));
}

/* One pass of the forward transform of six numbers, in place. */
INLINE void NAME(transform)(Vector *d, int step)
{
    const Vector d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    const Vector even = d4 - 4 * d2, odd = d3 - 4 * d1, even2 = d4 - d2, odd2 = 2 * (d3 - d1);
    d[0] = 4 * d0 - 5 * d2 + d4;
    d[step] = even + odd;
    d[2 * step] = even - odd;
    d[3 * step] = even2 + odd2;
    d[4 * step] = even2 - odd2;
    d[5 * step] = 4 * d1 - 5 * d3 + d5;
}

/* One pass of the inverse transform: six numbers to four. */
INLINE void NAME(restore)(const Vector *m, int step, Vector *y, int y_step)
{
    const Vector sum = m[step] + m[2 * step], difference = m[step] - m[2 * step];
    const Vector sum2 = m[3 * step] + m[4 * step], difference2 = m[3 * step] - m[4 * step];
    y[0] = m[0] + sum + sum2;
    y[y_step] = difference + 2 * difference2;
    y[2 * y_step] = sum + 4 * sum2;
    y[3 * y_step] = difference + 8 * difference2 + m[5 * step];
}

/* The transform of a tile, from pointers to the first pixel of each row. */
INLINE void NAME(transform_tile)(const float *const *rows, int64_t inputs, int64_t plane, float *seen)
{
    for (int64_t c = 0; c < inputs; c += WIDTH) {
        Vector d[TILE * TILE];
        for (int y = 0; y < TILE; y++)
            for (int x = 0; x < TILE; x++)
                d[y * TILE + x] = NAME(load)(rows[y] + x * inputs + c);
        for (int i = 0; i < TILE; i++)
            NAME(transform)(d + i, TILE);
        for (int i = 0; i < TILE; i++) {
            NAME(transform)(d + i * TILE, 1);
            for (int j = 0; j < TILE; j++)
                NAME(store)(seen + (i * TILE + j) * plane + c, d[i * TILE + j]);
        }
    }
}

/* Products of ROWS packed rows (ROWS, depth) and `together` packed blocks of columns (depth, BLOCK). */
INLINE void NAME(multiply)(const float *rows, int64_t depth, const float *columns, int together, float *sums,
                           int64_t stride)
{
    /* With all inner loops unrolled, the sums stay in registers. */
    Vector total[ROWS][NAME(TOGETHER) * NAME(VECTORS)];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < together * NAME(VECTORS); v++)
            total[r][v] = (Vector){0};
    for (int64_t i = 0; i < depth; i++) {
        Vector right[NAME(TOGETHER) * NAME(VECTORS)];
#pragma GCC unroll 2
        for (int j = 0; j < together; j++)
#pragma GCC unroll 4
            for (int v = 0; v < NAME(VECTORS); v++)
                right[j * NAME(VECTORS) + v] = NAME(load)(columns + (j * depth + i) * BLOCK + v * WIDTH);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < together * NAME(VECTORS); v++)
                total[r][v] += rows[r * depth + i] * right[v];
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < together * NAME(VECTORS); v++)
            NAME(store)(sums + r * stride + v * WIDTH, total[r][v]);
}

static __attribute__((noinline)) void NAME(multiply_one)(const float *rows, int64_t depth, const float *columns,
                                                         float *sums, int64_t stride)
{
    NAME(multiply)(rows, depth, columns, 1, sums, stride);
}

static __attribute__((noinline)) void NAME(multiply_more)(const float *rows, int64_t depth, const float *columns,
                                                          float *sums, int64_t stride)
{
    NAME(multiply)(rows, depth, columns, NAME(TOGETHER), sums, stride);
}

/* The results (4, 4) of a tile, after ReLU, from its sums in the transform. */
INLINE void NAME(finish)(const float *sums, int64_t plane, Vector bias, Vector *results)
{
    Vector m[TILE * TILE], half[RESULTS * TILE];
    for (int i = 0; i < TILE * TILE; i++)
        m[i] = NAME(load)(sums + i * plane);
    for (int i = 0; i < TILE; i++)
        NAME(restore)(m + i, TILE, half + i, TILE);
    for (int i = 0; i < RESULTS; i++)
        NAME(restore)(half + i * TILE, 1, results + i * RESULTS, 1);
    for (int i = 0; i < RESULTS * RESULTS; i++)
        results[i] = NAME(positive)(results[i] + bias);
}

/* Store the results of a tile at a column of their rows. */
INLINE void NAME(put)(const Vector *results, int64_t rows, int64_t columns, float *const *out, int64_t outputs)
{
    for (int64_t j = 0; j < least(RESULTS, rows); j++)
        for (int64_t k = 0; k < least(RESULTS, columns); k++)
            NAME(store)(out[j] + k * outputs, results[j * RESULTS + k]);
}

/* The same with pooling. */
INLINE void NAME(put_pooled)(const Vector *results, int64_t rows, int64_t columns, float *const *out, int64_t outputs)
{
    for (int64_t j = 0; j < least(RESULTS, rows) / 2; j++)
        for (int64_t k = 0; k < least(RESULTS, columns) / 2; k++) {
            const Vector *each = results + 2 * j * RESULTS + 2 * k;
            const Vector above = NAME(larger)(each[0], each[1]);
            const Vector below = NAME(larger)(each[RESULTS], each[RESULTS + 1]);
            NAME(store)(out[j] + k * outputs, NAME(larger)(above, below));
        }
}

/* Rows of a convolution's results, from `first` on. The lines have a column of 0 before the image's first column. */
static void NAME(convolve)(const Convolution *convolution, const Lines *lines, int64_t first, int64_t rows,
                           int64_t width, int64_t pooling, const Lines *out, float *work)
{
    const int64_t inputs = convolution->inputs, outputs = convolution->outputs;
    const int64_t across = whole(width) / RESULTS, tiles = across * (whole(rows) / RESULTS);
    const int64_t plane = CHUNK * inputs + APART, sum_plane = CHUNK * outputs + APART;
    const int64_t more = NAME(TOGETHER) * BLOCK;
    float *seen = work, *sums = work + TILE * TILE * plane;
    for (int64_t begin = 0; begin < tiles; begin += CHUNK) {
        const int64_t count = least(CHUNK, tiles - begin);
        for (int64_t i = 0; i < count; i++) {
            const int64_t y = (begin + i) / across * RESULTS, x = (begin + i) % across * RESULTS;
            const float *pixels[TILE];
            for (int j = 0; j < TILE; j++)
                pixels[j] = line(lines, first + y - 1 + j) + x * inputs;
            NAME(transform_tile)(pixels, inputs, plane, seen + i * inputs);
        }
        for (int p = 0; p < TILE * TILE; p++)
            for (int64_t n = 0; n < outputs;) {
                const float *columns = convolution->weights + (p * outputs + n) * inputs;
                const int64_t step = n + more <= outputs ? more : BLOCK;
                for (int64_t i = 0; i < count; i += ROWS) {
                    const float *left = seen + p * plane + i * inputs;
                    float *place = sums + p * sum_plane + i * outputs + n;
                    if (step == more)
                        NAME(multiply_more)(left, inputs, columns, place, outputs);
                    else
                        NAME(multiply_one)(left, inputs, columns, place, outputs);
                }
                n += step;
            }
        for (int64_t i = 0; i < count; i++) {
            const int64_t y = (begin + i) / across * RESULTS, x = (begin + i) % across * RESULTS;
            const int64_t halving = pooling ? 2 : 1;
            float *place[RESULTS];
            for (int j = 0; j < RESULTS; j++)
                place[j] = line(out, (first + y) / halving + j) + x / halving * outputs;
            for (int64_t c = 0; c < outputs; c += WIDTH) {
                Vector results[RESULTS * RESULTS];
                NAME(finish)(sums + i * outputs + c, sum_plane, NAME(load)(convolution->bias + c), results);
                if (pooling)
                    NAME(put_pooled)(results, rows - y, width - x, place, outputs);
                else
                    NAME(put)(results, rows - y, width - x, place, outputs);
                for (int j = 0; j < RESULTS; j++)
                    place[j] += WIDTH;
            }
        }
    }
}

/* The same for a convolution with one input channel, without a transform and without pooling. */
static void NAME(convolve_first)(const Convolution *convolution, const Lines *lines, int64_t first, int64_t rows,
                                 int64_t width, const Lines *out)
{
    const int64_t outputs = convolution->outputs;
    for (int64_t y = first; y < first + rows; y++) {
        const float *const seen[3] = {line(lines, y - 1), line(lines, y), line(lines, y + 1)};
        float *place = line(out, y);
        for (int64_t x = 0; x < width; x += NAME(PIXELS))
            for (int64_t c = 0; c < outputs; c += BLOCK) {
                Vector total[NAME(PIXELS)][NAME(VECTORS)];
                for (int v = 0; v < NAME(VECTORS); v++)
                    for (int i = 0; i < NAME(PIXELS); i++)
                        total[i][v] = NAME(load)(convolution->bias + c + v * WIDTH);
                for (int j = 0; j < 3; j++)
                    for (int k = 0; k < 3; k++) {
                        const float *pixels = seen[j] + x + k;
                        const float *weights = convolution->weights + (j * 3 + k) * outputs + c;
                        for (int v = 0; v < NAME(VECTORS); v++) {
                            const Vector weight = NAME(load)(weights + v * WIDTH);
                            for (int i = 0; i < NAME(PIXELS); i++)
                                total[i][v] += pixels[i] * weight;
                        }
                    }
                for (int i = 0; i < least(NAME(PIXELS), width - x); i++)
                    for (int v = 0; v < NAME(VECTORS); v++)
                        NAME(store)(place + (x + i) * outputs + c + v * WIDTH, NAME(positive)(total[i][v]));
            }
    }
}

#undef Vector
#undef WIDTH
#undef ROWS
#undef NAME
