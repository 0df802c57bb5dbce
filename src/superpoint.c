/* Convolutions of SuperPoint (kpmatch_ros/models/superpoint.py) in bfloat16, compiled for x86-64 with tiles (AMX).
 *
 * The channels of each pixel are contiguous, pixel after pixel. The three pixels of a window's row are therefore
 * contiguous numbers, and the next window begins one pixel later. The left side of a product is thus ready in memory,
 * and 32 windows in a row are one block of it. Rows pass through both convolutions of an encoder block, and its
 * pooling, in the processor's cache. Products are of bfloat16 numbers with sums in float32, as in PyTorch.
 * test/test_compiled_convolutions.py compares both.
 */
#include "networks.h"

#ifdef KPMATCH_COMPILES
#include "team.h"

/* The arguments: structures of compiled.py, with the same names. */

typedef struct {
    const uint16_t *weights; /* packed: three times a depth of 3 x inputs, each padded with 0 to a multiple of 32 */
    const float *bias;       /* (outputs,) */
    int64_t inputs, outputs;
} Convolution;

typedef struct {
    int64_t height, width, threads;
    int64_t count;   /* of convolutions, 1 or 2; each is followed by ReLU */
    int64_t pooling; /* 2 x 2, after the convolutions */
    Convolution convolutions[2];
    const uint16_t *image; /* (height, width, inputs) */
    uint16_t *out;         /* (height, width, outputs), or half the height and width */
    void *work;            /* kpmatch_convolve_work bytes, aligned to 64 bytes */
} Block;

enum { KEPT = 4 }; /* rows that are kept: three of windows, and the next one */

/* The latest rows of the input of a convolution, between borders of 0. */
typedef struct {
    uint16_t *numbers;
    int64_t stride; /* numbers from one row to the next */
    int64_t next;   /* index of the next row to be stored */
} Lines;

typedef struct {
    const Block *block;
    Lines lines[2]; /* the input of each convolution */
    float *sums[2]; /* (32, outputs) of a row, and of the next row with pooling */
} Band;

INLINE int64_t depth_of(int64_t inputs) { return whole(3 * inputs, PAIRS); }

/* Windows begin at whole blocks of pixels, and end at the padded depth. */
INLINE int64_t stride_of(int64_t width, int64_t inputs)
{
    return whole((whole(width, ROWS) + 2) * inputs + PAIRS, PAIRS);
}

INLINE uint16_t *line(const Lines *lines, int64_t row) { return lines->numbers + (row & (KEPT - 1)) * lines->stride; }

/* Sums of 32 windows around the pixels from (first, row) on. */
INLINE void convolve(const Lines *lines, const Convolution *convolution, int64_t first, int64_t row, float *sums)
{
    const int64_t inputs = convolution->inputs, depth = depth_of(inputs);
    Side sides[3];
    for (int i = 0; i < 3; i++)
        sides[i] = (Side){line(lines, row - 1 + i) + first * inputs, inputs, depth};
    multiply_by_tiles(sides, 3, convolution->weights, whole(convolution->outputs, PAIRS), sums);
}

INLINE __m512 finished(__m512 sum, const Convolution *convolution, int64_t channel)
{
    return _mm512_max_ps(_mm512_add_ps(sum, _mm512_loadu_ps(convolution->bias + channel)), _mm512_setzero_ps());
}

static void store_pixels(const Convolution *convolution, const float *sums, int64_t count, uint16_t *pixels)
{
    const int64_t outputs = convolution->outputs, columns = whole(outputs, PAIRS);
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < outputs; c += TILE)
            store_rounded(pixels + i * outputs + c, finished(_mm512_loadu_ps(sums + i * columns + c), convolution, c));
}

static void store_pooled(const Convolution *convolution, float *const *sums, int64_t count, uint16_t *pixels)
{
    const int64_t outputs = convolution->outputs, columns = whole(outputs, PAIRS);
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < outputs; c += TILE) {
            const int64_t left = 2 * i * columns + c, right = left + columns;
            const __m512 above = _mm512_max_ps(_mm512_loadu_ps(sums[0] + left), _mm512_loadu_ps(sums[0] + right));
            const __m512 below = _mm512_max_ps(_mm512_loadu_ps(sums[1] + left), _mm512_loadu_ps(sums[1] + right));
            store_rounded(pixels + i * outputs + c, finished(_mm512_max_ps(above, below), convolution, c));
        }
}

/* A row of a convolution's results, after ReLU. */
static void convolve_row(const Lines *lines, const Convolution *convolution, int64_t width, int64_t row, float *sums,
                         uint16_t *pixels)
{
    for (int64_t x = 0; x < width; x += ROWS) {
        convolve(lines, convolution, x, row, sums);
        store_pixels(convolution, sums, least(ROWS, width - x), pixels + x * convolution->outputs);
    }
}

/* Read the image's rows up to `row` as input of the first convolution. */
static void read_rows(Band *band, int64_t row)
{
    const Block *block = band->block;
    Lines *lines = &band->lines[0];
    const int64_t inputs = block->convolutions[0].inputs, numbers = block->width * inputs;
    for (; lines->next <= row; lines->next++) {
        uint16_t *pixels = line(lines, lines->next) + inputs;
        if (lines->next >= 0 && lines->next < block->height)
            memcpy(pixels, block->image + lines->next * numbers, (size_t)numbers * sizeof *pixels);
        else
            memset(pixels, 0, (size_t)numbers * sizeof *pixels);
    }
}

/* Compute the input rows of the last convolution up to `row`. */
static void make_rows(Band *band, int64_t row)
{
    const Block *block = band->block;
    if (block->count == 1) {
        read_rows(band, row);
        return;
    }
    Lines *lines = &band->lines[1];
    const Convolution *convolution = &block->convolutions[0];
    for (; lines->next <= row; lines->next++) {
        uint16_t *pixels = line(lines, lines->next) + convolution->outputs;
        if (lines->next < 0 || lines->next >= block->height) {
            memset(pixels, 0, (size_t)(block->width * convolution->outputs) * sizeof *pixels);
            continue;
        }
        read_rows(band, lines->next + 1);
        convolve_row(&band->lines[0], convolution, block->width, lines->next, band->sums[0], pixels);
    }
}

static int64_t band_work(const Block *block)
{
    int64_t numbers = 0;
    for (int i = 0; i < block->count; i++)
        numbers += KEPT * stride_of(block->width, block->convolutions[i].inputs) +
                   4 * ROWS * whole(block->convolutions[i].outputs, PAIRS);
    return 2 * whole(numbers, PAIRS);
}

/* Size of the working memory, bytes. */
int64_t kpmatch_convolve_work(const Block *block) { return block->threads * band_work(block); }

/* Each thread computes a band of rows, and the rows around it that it needs. */
static void convolve_band(const void *job, Team *team, int64_t number)
{
    const Block *block = job;
    const int64_t step = block->pooling ? 2 : 1, steps = block->height / step;
    const int64_t first = steps * number / team->count, end = steps * (number + 1) / team->count;
    char *work = (char *)block->work + number * band_work(block);
    Band band = {.block = block};
    int64_t widest = 0;
    for (int i = 0; i < block->count; i++) {
        const Convolution *convolution = &block->convolutions[i];
        Lines *lines = &band.lines[i];
        lines->stride = stride_of(block->width, convolution->inputs);
        lines->numbers = taken(&work, KEPT * lines->stride);
        /* The first row that its windows need. */
        lines->next = first * step - block->count + i;
        memset(lines->numbers, 0, (size_t)(KEPT * lines->stride) * sizeof *lines->numbers);
        widest = largest(widest, whole(convolution->outputs, PAIRS));
    }
    for (int i = 0; i < 2; i++)
        band.sums[i] = (float *)taken(&work, 2 * ROWS * widest);
    const Lines *lines = &band.lines[block->count - 1];
    const Convolution *convolution = &block->convolutions[block->count - 1];
    for (int64_t i = first; i < end; i++) {
        const int64_t row = i * step;
        if (!block->pooling) {
            make_rows(&band, row + 1);
            convolve_row(lines, convolution, block->width, row, band.sums[0],
                         block->out + row * block->width * convolution->outputs);
            continue;
        }
        make_rows(&band, row + 2);
        for (int64_t x = 0; x < block->width; x += ROWS) {
            for (int r = 0; r < 2; r++)
                convolve(lines, convolution, x, row + r, band.sums[r]);
            store_pooled(convolution, band.sums, least(ROWS, block->width - x) / 2,
                         block->out + (i * (block->width / 2) + x / 2) * convolution->outputs);
        }
    }
}

void kpmatch_convolve(const Block *block) { work_together(block->threads, 1, block, convolve_band); }

/* Input of the first convolution, from an image's pixels: parts (count, 4), as in_parts in superpoint.py. */
void kpmatch_parts(int64_t count, const float *image, uint16_t *parts)
{
    const __m512i one = _mm512_set1_epi32(0x3F80 << 16); /* 1 in the upper half of each pair */
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t i = 0; i < count; i += TILE) {
        const uint32_t some = count - i < TILE ? (1u << (count - i)) - 1 : 0xFFFF;
        const __m512 values = _mm512_maskz_loadu_ps((__mmask16)some, image + i);
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
        const __m512 rest = _mm512_sub_ps(values, (__m512)_mm512_slli_epi32(high, 16));
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rest));
        const __m512i lower = _mm512_or_si512(high, _mm512_slli_epi32(low, 16)), upper = _mm512_or_si512(high, one);
        const uint32_t stored = _pdep_u32(some, 0x55555555) * 3; /* two pairs per pixel */
        _mm512_mask_storeu_epi32(parts + 4 * i, (__mmask16)stored, _mm512_permutex2var_epi32(lower, first, upper));
        _mm512_mask_storeu_epi32(parts + 4 * i + 2 * TILE, (__mmask16)(stored >> TILE),
                                 _mm512_permutex2var_epi32(lower, second, upper));
    }
}

#else

int64_t kpmatch_convolve_work(const void *block) { return (void)block, 0; }
void kpmatch_convolve(const void *block) { (void)block; }
void kpmatch_parts(void) {}

#endif
