/* Convolutions of SuperPoint (kpmatch_ros/models/superpoint.py) in float32, through a transform.
 *
 * 4 x 4 results of a 3 x 3 convolution come from 6 x 6 pixels, by 36 products in place of 144 (Winograd's algorithm:
 * Lavin, Gray: Fast Algorithms for Convolutional Neural Networks, CVPR 2016, whose matrices these are). An image's
 * channels lie one after the other, pixel by pixel. Rows pass through both convolutions of a block of the encoder, and
 * its pooling, in the processor's own cache. test/test_compiled_convolutions.py compares with PyTorch.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "team.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    TILE = 6,      /* pixels, high and wide */
    RESULTS = 4,   /* of a tile, high and wide */
    BLOCK = 16,    /* columns of a product that are packed together */
    CHUNK = 24,    /* tiles that are multiplied at a time: 6 and 12 divide it */
    APART = 16,    /* numbers between planes, which would else begin at the same lines of the cache */
    MOST_TILES = 96, /* tiles that rows are gathered for */
    BORDER = 5,    /* columns beside a line's own: one before, and four behind */
    SPARE = 16     /* numbers behind a line that are read and not used */
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t whole(int64_t count) { return (count + RESULTS - 1) / RESULTS * RESULTS; }

/* The arguments: structures of compiled.py, with their names there. */

typedef struct {
    const float *weights; /* (36, outputs / 16, inputs, 16) in the transform; (9, outputs) of a single input */
    const float *bias;    /* (outputs,) */
    int64_t inputs, outputs; /* multiples of 16, but for a single input */
} Convolution;

typedef struct {
    int64_t height, width, threads;
    int64_t count;   /* of convolutions, 1 or 2; ReLU follows each */
    int64_t pooling; /* 2 x 2 behind them; not behind a convolution of a single input */
    Convolution convolutions[2];
    const float *image; /* (height, width, inputs) */
    float *out;         /* (height, width, outputs), or half as high and wide */
    void *work;         /* kpmatch_transformed_work bytes */
} Block;

/* Rows of pixels, the newest ones of which are kept. */
typedef struct {
    float *numbers;
    int64_t stride; /* numbers from a row to the next */
    int64_t count;  /* of rows that are kept */
} Lines;

INLINE float *line(const Lines *lines, int64_t row)
{
    return lines->numbers + (row + lines->count) % lines->count * lines->stride;
}

typedef struct {
    const Block *block;
    Lines lines[2]; /* what each convolution looks at, between columns of 0 */
    int64_t end[2]; /* the row that comes next there */
    Lines out;      /* of the image */
    float *work;
} Band;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CHOOSES
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,fma,prefer-vector-width=512")
#define WIDTH 16
#define ROWS 12
#define NAME(x) x##_of_16
#include "transformed.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define WIDTH 8
#define ROWS 6
#define NAME(x) x##_of_8
#include "transformed.h"
#pragma GCC pop_options
#endif
/* For any processor: the compiler makes of them what it has. */
#define WIDTH 4
#ifdef __SSE__
#define ROWS 3 /* 16 registers */
#else
#define ROWS 6 /* 32, as of NEON */
#endif
#define NAME(x) x##_plain
#include "transformed.h"

typedef void Convolve(const Convolution *, const Lines *, int64_t, int64_t, int64_t, int64_t, const Lines *, float *);
typedef void ConvolveFirst(const Convolution *, const Lines *, int64_t, int64_t, int64_t, const Lines *);

static Convolve *convolve = convolve_plain;
static ConvolveFirst *convolve_first = convolve_first_plain;

/* Compute with vectors of so many numbers at most, as the processor has them; what is used is returned. */
int kpmatch_vectors(int most)
{
#ifdef CHOOSES
    __builtin_cpu_init();
    if (most >= 16 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
        convolve = convolve_of_16;
        convolve_first = convolve_first_of_16;
        return 16;
    }
    if (most >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        convolve = convolve_of_8;
        convolve_first = convolve_first_of_8;
        return 8;
    }
#else
    (void)most;
#endif
    convolve = convolve_plain;
    convolve_first = convolve_first_plain;
    return 4;
}

static int64_t stride_of(int64_t width, int64_t inputs)
{
    return (whole(width) + BORDER) * inputs + SPARE;
}

/* Rows of results that are computed at a time. */
static int64_t step_of(const Block *block)
{
    return RESULTS * largest(1, MOST_TILES * RESULTS / whole(block->width));
}

/* Rows that are kept before a convolution. */
static int64_t kept_of(const Block *block, int index)
{
    /* Before the second one those of the next tiles are there already. */
    return step_of(block) + (index == 0 ? 2 : RESULTS + 1);
}

static int64_t lines_of(const Block *block, int index)
{
    return kept_of(block, index) * stride_of(block->width, block->convolutions[index].inputs);
}

static int64_t band_work(const Block *block)
{
    int64_t numbers = 0, most = 0;
    for (int i = 0; i < block->count; i++) {
        numbers += lines_of(block, i);
        most = largest(most, CHUNK * (block->convolutions[i].inputs + block->convolutions[i].outputs) + 2 * APART);
    }
    return (numbers + TILE * TILE * most + 63) / 64 * 64;
}

int64_t kpmatch_transformed_work(const Block *block)
{
    return block->threads * band_work(block) * (int64_t)sizeof(float);
}

/* Rows of a convolution's results, from `first` on. */
static void convolve_rows(const Band *band, int index, int64_t first, int64_t rows, int64_t pooling, const Lines *out)
{
    const Convolution *convolution = &band->block->convolutions[index];
    const Lines *seen = &band->lines[index];
    if (convolution->inputs == 1)
        convolve_first(convolution, seen, first, rows, band->block->width, out);
    else
        convolve(convolution, seen, first, rows, band->block->width, pooling, out, band->work);
}

/* Have the image's rows up to `end` before the first convolution. */
static void read_rows(Band *band, int64_t end)
{
    const Block *block = band->block;
    const int64_t inputs = block->convolutions[0].inputs, numbers = block->width * inputs;
    for (; band->end[0] < end; band->end[0]++) {
        float *pixels = line(&band->lines[0], band->end[0]) + inputs;
        if (band->end[0] >= 0 && band->end[0] < block->height)
            memcpy(pixels, block->image + band->end[0] * numbers, (size_t)numbers * sizeof *pixels);
        else
            memset(pixels, 0, (size_t)numbers * sizeof *pixels);
    }
}

/* Have the rows up to `end` before the second convolution, by whole tiles of the first one, which begin at multiples of
 * 4: what they round does not depend on where bands begin. */
static void make_rows(Band *band, int64_t end)
{
    const Block *block = band->block;
    Lines out = band->lines[1];
    out.numbers += block->convolutions[1].inputs; /* behind the border */
    while (band->end[1] < end) {
        const int64_t first = band->end[1], rows = least(step_of(block), whole(end - first)), stop = first + rows;
        if (first < block->height) {
            read_rows(band, stop + 1);
            convolve_rows(band, 0, first, rows, 0, &out);
        }
        for (int64_t row = largest(first, block->height); row < stop; row++)
            memset(line(&out, row), 0, (size_t)(block->width * block->convolutions[1].inputs) * sizeof(float));
        band->end[1] = stop;
    }
}

/* A thread computes a band of rows, and those around it that it needs. */
static void convolve_band(const void *job, Team *team, int64_t number)
{
    const Block *block = job;
    const int64_t steps = whole(block->height) / RESULTS, last = block->count - 1, step = step_of(block);
    const int64_t first = steps * number / team->count * RESULTS, end = steps * (number + 1) / team->count * RESULTS;
    const int64_t outputs = block->convolutions[last].outputs;
    float *work = (float *)block->work + number * band_work(block);
    Band band = {.block = block};
    for (int i = 0; i < block->count; i++) {
        memset(work, 0, (size_t)lines_of(block, i) * sizeof *work);
        band.lines[i] = (Lines){work, stride_of(block->width, block->convolutions[i].inputs), kept_of(block, i)};
        work += lines_of(block, i);
    }
    /* The first rows that are seen, but for the one above the image, which is 0 already. */
    band.end[1] = largest(first - RESULTS, 0);
    band.end[0] = (last == 0 ? first : band.end[1]) - 1;
    band.work = work;
    band.out = (Lines){block->out, (block->pooling ? block->width / 2 : block->width) * outputs, block->height};
    for (int64_t row = first; row < end; row += step) {
        const int64_t rows = least(step, end - row);
        if (last == 0)
            read_rows(&band, row + rows + 1);
        else
            make_rows(&band, row + rows + 1);
        convolve_rows(&band, (int)last, row, least(rows, block->height - row), block->pooling, &band.out);
    }
}

void kpmatch_transformed(const Block *block) { work_together(block->threads, 0, block, convolve_band); }
