/* Pyramidal optical flow by Lucas and Kanade (Bouguet, Pyramidal Implementation of the Lucas Kanade Feature Tracker,
 * 2001), compiled. It replaces OpenCV's calcOpticalFlowPyrLK in flow.py, with the same results within rounding.
 *
 * OpenCV computes the pyramids, and the gradients of a whole image, in each call. This code takes the pyramids as
 * arguments, and computes gradients only around the points. Interpolated pixels and gradients are integers, as in
 * OpenCV. test/test_compiled_tracks.py compares both.
 */
#include "geometry.h"

enum {
    WIDEST = 21,       /* pixels, the largest side of a window */
    ROW = 24,          /* numbers in a row of a window: 24 or 16 are computed, which are whole vectors */
    GRID = ROW + 8,    /* numbers in a row of the pixels for interpolation, with a border for gradients */
    WEIGHT_BITS = 14,
    PIXEL_BITS = 5     /* fraction bits of a pixel */
};
#define ITERATIONS 10
#define SHORTEST_STEP 0.03f
#define BACK_AND_FORTH 0.01f /* pixels: if the step is the previous one reversed within this, the search oscillates */
#define LEAST_EIGENVALUE 1e-4f
#define LEAST_DETERMINANT 1.1920929e-7f

typedef struct {
    const uint8_t *pixels;
    ptrdiff_t height, width;
} Level;

/* A position mirrored at the centres of the first and the last pixel. */
INLINE ptrdiff_t mirrored(ptrdiff_t place, ptrdiff_t count)
{
    if (count == 1)
        return 0;
    while (place < 0 || place >= count)
        place = place < 0 ? -place : 2 * (count - 1) - place;
    return place;
}

/* Copy `width` x `height` pixels of an image, from a column and a row on, into rows of GRID. */
INLINE void copy(const Level *image, ptrdiff_t column, ptrdiff_t row, int width, int height, int16_t *restrict pixels)
{
    const int inside = column >= 0 && row >= 0 && column + width <= image->width && row + height <= image->height;
    for (int y = 0; y < height; y++) {
        const uint8_t *from = image->pixels + (inside ? row + y : mirrored(row + y, image->height)) * image->width;
        if (inside)
            for (int x = 0; x < width; x++)
                pixels[y * GRID + x] = from[column + x];
        else
            for (int x = 0; x < width; x++)
                pixels[y * GRID + x] = from[mirrored(column + x, image->width)];
    }
}

/* Where a window begins: the first pixel, and the interpolation weights of four neighbouring pixels. */
typedef struct {
    ptrdiff_t column, row;
    int32_t weights[4];
} Place;

/* Returns 0 if no pixel of the window is in the image, or for NaN. */
INLINE int place_at(float x, float y, int side, const Level *image, Place *place)
{
    if (!(x >= (float)-side && y >= (float)-side && x < (float)image->width && y < (float)image->height))
        return 0;
    const float left = floorf(x), top = floorf(y), a = x - left, b = y - top;
    place->column = (ptrdiff_t)left;
    place->row = (ptrdiff_t)top;
    place->weights[0] = (int32_t)lrintf((1 - a) * (1 - b) * (1 << WEIGHT_BITS));
    place->weights[1] = (int32_t)lrintf(a * (1 - b) * (1 << WEIGHT_BITS));
    place->weights[2] = (int32_t)lrintf((1 - a) * b * (1 << WEIGHT_BITS));
    place->weights[3] = (1 << WEIGHT_BITS) - place->weights[0] - place->weights[1] - place->weights[2];
    return 1;
}

/* Interpolation in the grid, shifted right by `bits` and rounded. */
INLINE int32_t between(const int16_t *above, const int32_t *weights, int bits)
{
    const int16_t *below = above + GRID;
    return (above[0] * weights[0] + above[1] * weights[1] + below[0] * weights[2] + below[1] * weights[3] +
            (1 << (bits - 1))) >> bits;
}

/* Scharr gradients of pixels in a grid that begins one column and one row earlier. Outside the image, they are 0. */
INLINE void gradients(const int16_t *restrict pixels, const Place *place, const Level *image, int width, int height,
                      int16_t *restrict across, int16_t *restrict down)
{
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++) {
            const int16_t *above = pixels + y * GRID + x, *here = above + GRID, *below = here + GRID;
            const int right = above[2] + below[2], left = above[0] + below[0];
            across[y * GRID + x] = (int16_t)(3 * (right - left) + 10 * (here[2] - here[0]));
            const int lower = below[0] + below[2], upper = above[0] + above[2];
            down[y * GRID + x] = (int16_t)(3 * (lower - upper) + 10 * (below[1] - above[1]));
        }
    if (place->column >= 0 && place->row >= 0 && place->column + width <= image->width &&
        place->row + height <= image->height)
        return;
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++)
            if (place->column + x < 0 || place->row + y < 0 || place->column + x >= image->width ||
                place->row + y >= image->height)
                across[y * GRID + x] = down[y * GRID + x] = 0;
}

/* A window of the first image: pixels and gradients, with gradients 0 beyond the window's side. */
typedef struct {
    int16_t pixels[WIDEST * ROW], across[WIDEST * ROW], down[WIDEST * ROW];
} Window;

/* Interpolate `width` columns and `height` rows of the grid, and fill each row with zeros up to `wide`. */
INLINE void interpolate(const int16_t *restrict grid, const int32_t *weights, int bits, int width, int height, int wide,
                        int16_t *restrict values)
{
    for (int y = 0; y < height; y++) {
        for (int x = 0; x < wide; x++)
            values[y * ROW + x] = (int16_t)between(grid + y * GRID + x, weights, bits);
        for (int x = width; x < wide; x++)
            values[y * ROW + x] = 0;
    }
}

INLINE float sum(const int32_t *columns, int wide)
{
    float all = 0; /* the total may exceed 32 bits */
    for (int x = 0; x < wide; x++)
        all += (float)columns[x];
    return all * (1.0f / (1 << 20));
}

/* Sums of the products of a window's gradients. */
INLINE void squares(const Window *window, int side, int wide, float *xx, float *xy, float *yy)
{
    int32_t sums[3][ROW] = {{0}}; /* the sum of one column fits into 32 bits */
    for (int y = 0; y < side; y++)
        for (int x = 0; x < wide; x++) {
            const int32_t dx = window->across[y * ROW + x], dy = window->down[y * ROW + x];
            sums[0][x] += dx * dx;
            sums[1][x] += dx * dy;
            sums[2][x] += dy * dy;
        }
    *xx = sum(sums[0], wide);
    *xy = sum(sums[1], wide);
    *yy = sum(sums[2], wide);
}

/* Sums of a window's gradients times the difference in brightness to the other image. */
INLINE void slopes(const Window *window, const int16_t *grid, const int32_t *weights, int side, int wide, float *slope)
{
    int32_t sums[2][ROW] = {{0}};
    for (int y = 0; y < side; y++)
        for (int x = 0; x < wide; x++) {
            const int at = y * ROW + x;
            const int32_t brighter =
                between(grid + y * GRID + x, weights, WEIGHT_BITS - PIXEL_BITS) - window->pixels[at];
            sums[0][x] += brighter * window->across[at];
            sums[1][x] += brighter * window->down[at];
        }
    slope[0] = sum(sums[0], wide);
    slope[1] = sum(sums[1], wide);
}

/* Follow a point of one image into another, in one level. Returns 0 if it is not found; `next` may have changed. */
INLINE int follow(const Level *image0, const Level *image1, float x, float y, int side, int wide, float *next)
{
    int16_t pixels[ROW * GRID], columns[ROW * GRID], rows[ROW * GRID];
    Window window;
    const float middle = (float)(side - 1) * 0.5f;
    Place place;
    if (!place_at(x - middle, y - middle, side, image0, &place))
        return 0;
    copy(image0, place.column - 1, place.row - 1, wide + 3, side + 3, pixels);
    gradients(pixels, &place, image0, wide + 1, side + 1, columns, rows);
    interpolate(pixels + GRID + 1, place.weights, WEIGHT_BITS - PIXEL_BITS, wide, side, wide, window.pixels);
    interpolate(columns, place.weights, WEIGHT_BITS, side, side, wide, window.across);
    interpolate(rows, place.weights, WEIGHT_BITS, side, side, wide, window.down);
    float xx, xy, yy, last_x = 0, last_y = 0;
    squares(&window, side, wide, &xx, &xy, &yy);
    const float determinant = xx * yy - xy * xy;
    const float eigenvalue = (yy + xx - sqrtf((xx - yy) * (xx - yy) + 4 * xy * xy)) / (float)(2 * side * side);
    if (eigenvalue < LEAST_EIGENVALUE || determinant < LEAST_DETERMINANT)
        return 0;
    for (int i = 0; i < ITERATIONS; i++) {
        float slope[2];
        if (!place_at(next[0] - middle, next[1] - middle, side, image1, &place))
            return 0;
        copy(image1, place.column, place.row, wide + 1, side + 1, pixels);
        slopes(&window, pixels, place.weights, side, wide, slope);
        const float step_x = (xy * slope[1] - yy * slope[0]) / determinant;
        const float step_y = (xy * slope[0] - xx * slope[1]) / determinant;
        next[0] += step_x;
        next[1] += step_y;
        if (step_x * step_x + step_y * step_y <= SHORTEST_STEP * SHORTEST_STEP)
            break;
        if (i > 0 && fabsf(step_x + last_x) < BACK_AND_FORTH && fabsf(step_y + last_y) < BACK_AND_FORTH) {
            next[0] -= step_x * 0.5f;
            next[1] -= step_y * 0.5f;
            break;
        }
        last_x = step_x;
        last_y = step_y;
    }
    return 1;
}

/* Follow points (T, 2) of one image into another, from a start (T, 2), which is replaced by the positions found.
 *
 * Each image is a pyramid: the addresses of its levels, the largest first. The sides (L, 2) of the levels are the same
 * for both images. Windows have a side of 13 or 21. `found` (T,) is whether a point was found.
 */
FOR_EACH_PROCESSOR
void kpmatch_follow(int64_t levels, const int64_t *sides, const uint8_t *const *pyramid0,
                    const uint8_t *const *pyramid1, int32_t window, int64_t count, const float *points, float *moved,
                    uint8_t *found)
{
    for (int64_t i = 0; i < count; i++) {
        float *next = moved + 2 * i;
        found[i] = 1;
        for (int64_t level = levels - 1; level >= 0; level--) {
            const float part = 1.0f / (float)(1 << level), before = level == levels - 1 ? part : 2;
            const Level image0 = {pyramid0[level], (ptrdiff_t)sides[2 * level], (ptrdiff_t)sides[2 * level + 1]};
            const Level image1 = {pyramid1[level], image0.height, image0.width};
            next[0] *= before;
            next[1] *= before;
            const float x = points[2 * i] * part, y = points[2 * i + 1] * part;
            const int there = window == 13   ? follow(&image0, &image1, x, y, 13, 16, next)
                              : window == 21 ? follow(&image0, &image1, x, y, 21, 24, next)
                                             : 0;
            if (level == 0)
                found[i] = (uint8_t)there;
        }
        const Level last = {pyramid1[0], (ptrdiff_t)sides[0], (ptrdiff_t)sides[1]};
        const float middle = (float)(window - 1) * 0.5f;
        Place place;
        found[i] = found[i] && place_at(next[0] - middle, next[1] - middle, window, &last, &place);
    }
}
