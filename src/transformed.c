/* Convolutions of SuperPoint (kpmatch_ros/models/superpoint.py) in float32, with Winograd's algorithm.
 *
 * 4 x 4 results of a 3 x 3 convolution are computed from 6 x 6 pixels with 36 products instead of 144. The matrices are
 * those of Lavin, Gray: Fast Algorithms for Convolutional Neural Networks, CVPR 2016. The channels of each pixel are
 * contiguous, pixel after pixel. Rows pass through both convolutions of an encoder block, and its pooling, in the
 * processor's cache. test/test_compiled_convolutions.py compares the results with PyTorch.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "team.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    TILE = 6,      /* pixels, height and width */
    RESULTS = 4,   /* of a tile, height and width */
    BLOCK = 16,    /* columns of a product that are packed together */
    CHUNK = 24,    /* tiles that are multiplied at a time, a multiple of 6 and 12 */
    APART = 16,    /* numbers between planes, so that they do not begin at the same cache lines */
    MOST_TILES = 96, /* tiles for which rows are collected */
    BORDER = 5,    /* additional columns of a line: one before, and four after */
    SPARE = 16     /* numbers after a line that are read but not used */
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t whole(int64_t count) { return (count + RESULTS - 1) / RESULTS * RESULTS; }

/* The arguments: structures of compiled.py, with the same names. */

typedef struct {
    const float *weights; /* (36, outputs / 16, inputs, 16) in the transform; (9, outputs) for a single input */
    const float *bias;    /* (outputs,) */
    int64_t inputs, outputs; /* multiples of 16, except for a single input */
} Convolution;

typedef struct {
    int64_t height, width, threads;
    int64_t count;   /* of convolutions, 1 or 2; each is followed by ReLU */
    int64_t pooling; /* 2 x 2, after the convolutions; not after a convolution with a single input */
    Convolution convolutions[2];
    const float *image; /* (height, width, inputs) */
    float *out;         /* (height, width, outputs), or half the height and width */
    void *work;         /* kpmatch_transformed_work bytes */
} Block;

/* The latest rows of pixels. */
typedef struct {
    float *numbers;
    int64_t stride; /* numbers from one row to the next */
    int64_t count;  /* number of rows that are kept */
} Lines;

INLINE float *line(const Lines *lines, int64_t row)
{
    return lines->numbers + (row + lines->count) % lines->count * lines->stride;
}

typedef struct {
    const Block *block;
    Lines lines[2]; /* the input of each convolution, between columns of 0 */
    int64_t end[2]; /* index of the next row to be stored there */
    Lines out;      /* the result of the image */
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
/* For any processor. The compiler uses the instructions that are available. */
#define WIDTH 4
#ifdef __SSE__
#define ROWS 3 /* 16 registers */
#else
#define ROWS 6 /* 32 registers, as with NEON */
#endif
#define NAME(x) x##_plain
#include "transformed.h"

typedef void Convolve(const Convolution *, const Lines *, int64_t, int64_t, int64_t, int64_t, const Lines *, float *);
typedef void ConvolveFirst(const Convolution *, const Lines *, int64_t, int64_t, int64_t, const Lines *);

static Convolve *convolve = convolve_plain;
static ConvolveFirst *convolve_first = convolve_first_plain;

/* Select vectors of at most `most` numbers that the processor supports. Returns the number selected. */
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

/* Input rows of a convolution that are kept. */
static int64_t kept_of(const Block *block, int index)
{
    /* The rows of the next tiles are already there before the second convolution. */
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

/* Read the image's rows up to `end` as input of the first convolution. */
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

/* Compute the input rows of the second convolution up to `end`, in whole tiles of the first one. These begin at
 * multiples of 4, so that rounding does not depend on where a band begins. */
static void make_rows(Band *band, int64_t end)
{
    const Block *block = band->block;
    Lines out = band->lines[1];
    out.numbers += block->convolutions[1].inputs; /* after the border */
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

/* Each thread computes a band of rows, and the rows around it that it needs. */
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
    /* The first rows that are needed. The row above the image is 0 already. */
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
