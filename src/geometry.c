/* The slowest functions of kpmatch_ros/geometry, compiled: `align` and `cut` of patches.py.
 *
 * The NumPy code there describes the algorithms, and runs if this library is not built. Both give the same results
 * within rounding. Change both together; test/test_compiled.py compares them.
 *
 * lens.c has `undistort` of lens.py. two_view.c has the slowest functions of the two-view pose.
 *
 * The code is C99 without Python's headers: kpmatch_ros/geometry/compiled.py calls it with ctypes. Sums are vectorised
 * where `omp simd` allows it. -ffast-math would allow it everywhere, but comparisons could then ignore NaN.
 */
#include "geometry.h"

/* Increase this with each change of a function's arguments or meaning. compiled.py loads no other version. */
#define VERSION 7

int kpmatch_version(void) { return VERSION; }

/* Unlike fmaxf and fminf, these return NaN for NaN. */
INLINE float at_least(float value, float bound) { return value < bound ? bound : value; }
INLINE float at_most(float value, float bound) { return value > bound ? bound : value; }
INLINE float clip(float value, float least, float most) { return at_most(at_least(value, least), most); }

/* Patches: constants of patches.py, with the same names. */

enum {
    USED = 85,   /* pixels of a patch that are compared */
    FEW = 36,    /* the first pixels, which are enough for a shift */
    AFFINE = 63, /* numbers in the equations of an affine change with blur */
    SHIFT = 9,   /* numbers in the equations of a shift */
    WEIGHTS = 4 * USED,
    EQUATIONS = 5 * USED,
    PATCH = EQUATIONS + AFFINE + SHIFT,
    FEWEST_ITERATIONS = 2,
    ITERATIONS = 10,
    SEARCHES = 2,
    WIDE = 15 /* pixels of a patch's side, with a border for the gradients */
};
#define DEFORMATION_DAMPING 1e4f /* the damping of a shift is 1 */
#define BLUR_DAMPING 1e4f
#define REACH 6.0f /* pixels from the centre of a patch to its sides */
#define LONGEST_STEP 3.0f
#define LAST_STEP 0.3f
#define SETTLED 0.01f
#define FINE 2 /* pixels of the given image, per pixel of points and shapes */
#define BLUR 0.5f
#define WIDEST 2.0f
#define LOWEST_CORRELATION 0.82f
#define LARGEST_SCALE 3.0f
#define LEAST_CONTRAST 0.1f
#define LARGEST_GAIN 2.0f
#define SIGMA_FLOOR 0.0275f
#define SIGMA_GROWTH 27.5f

/* Offsets in the equations of an affine change, see _equations in patches.py. */
enum { INVERSE = 0, COLUMN = 36, ALONG = 42, OWN_BLUR = 48, BLUR_POWER = 49, SUMS = 50, OWN = 56, CONTRAST = 62 };

/* The sides are shorter than 2^16 pixels, and there are fewer than 2^31 pixels, see _image in compiled.py. */
typedef struct {
    const float *pixels;
    ptrdiff_t height, width;
} Image;

/* A pixel, or 0 outside the image. */
INLINE float pixel(const Image *image, ptrdiff_t column, ptrdiff_t row)
{
    if (column < 0 || row < 0 || column >= image->width || row >= image->height)
        return 0;
    return image->pixels[row * image->width + column];
}

INLINE float between(float from, float to, float part) { return from + part * (to - from); }

/* Linear interpolation between the image's pixels. NaN counts as outside. */
INLINE float interpolated(const Image *image, float x, float y)
{
    if (!(x > -1 && y > -1 && x < (float)image->width && y < (float)image->height))
        return 0;
    const ptrdiff_t column = (ptrdiff_t)floorf(x), row = (ptrdiff_t)floorf(y);
    const float across = x - (float)column;
    const float above = between(pixel(image, column, row), pixel(image, column + 1, row), across);
    const float below = between(pixel(image, column, row + 1), pixel(image, column + 1, row + 1), across);
    return between(above, below, y - (float)row);
}

/* Weighted pixels of the image at the first `count` places (2, USED) of a patch at a point, with a shape (2, 2). */
INLINE void sample_patch(const Image *image, const float *point, const float *shape, const float *places,
                         const float *restrict weights, int count, float *seen)
{
    const float x0 = FINE * point[0], xx = FINE * shape[0], xy = FINE * shape[1];
    const float y0 = FINE * point[1], yx = FINE * shape[2], yy = FINE * shape[3];
    const float wide = REACH * (fabsf(xx) + fabsf(xy)) + 1, high = REACH * (fabsf(yx) + fabsf(yy)) + 1;
    const float *restrict along = places, *restrict down = places + USED;
    if (x0 - wide > 0 && x0 + wide < (float)(image->width - 1) && y0 - high > 0 &&
        y0 + high < (float)(image->height - 1)) {
        const float *restrict pixels = image->pixels;
        const int32_t width = (int32_t)image->width;
#pragma omp simd
        for (int i = 0; i < count; i++) {
            const float x = x0 + xx * along[i] + xy * down[i], y = y0 + yx * along[i] + yy * down[i];
            const int32_t column = (int32_t)x, row = (int32_t)y, corner = row * width + column;
            const float across = x - (float)column;
            const float above = between(pixels[corner], pixels[corner + 1], across);
            const float below = between(pixels[corner + width], pixels[corner + width + 1], across);
            seen[i] = weights[i] * between(above, below, y - (float)row);
        }
    } else {
        for (int i = 0; i < count; i++)
            seen[i] = weights[i] * interpolated(image, x0 + xx * along[i] + xy * down[i],
                                                y0 + yx * along[i] + yy * down[i]);
    }
}

INLINE float total(const float *values, int count)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++)
        sum += values[i];
    return sum;
}

/* Number of the first `pixels` pixels of a patch with weight 1; at least 1. */
INLINE float counted(const float *patch, int pixels) { return at_least(total(patch + WEIGHTS, pixels), 1); }

/* Squared norm of `count` pixels minus their mean. */
INLINE float power_of(float sum, float squares, float count)
{
    return at_least(squares - sum * sum / count, LEAST_CONTRAST);
}

/* The gain that gives pixels with this power the contrast. */
INLINE float gain_of(float power, float contrast)
{
    return clip(sqrtf(contrast / power), 1 / LARGEST_GAIN, LARGEST_GAIN);
}

/* One step of a shift. */
INLINE void shift_step(const float *patch, float count, const float *seen, float *step)
{
    const float *across = patch + USED, *down = patch + 2 * USED, *equations = patch + EQUATIONS + AFFINE;
    float sum = 0, squares = 0, slope_x = 0, slope_y = 0;
#pragma omp simd reduction(+ : sum, squares, slope_x, slope_y)
    for (int i = 0; i < FEW; i++) {
        sum += seen[i];
        squares += seen[i] * seen[i];
        slope_x += across[i] * seen[i];
        slope_y += down[i] * seen[i];
    }
    const float gain = gain_of(power_of(sum, squares, count), equations[8]);
    slope_x = gain * (slope_x - sum / count * equations[4]) - equations[6];
    slope_y = gain * (slope_y - sum / count * equations[5]) - equations[7];
    step[0] = equations[0] * slope_x + equations[1] * slope_y;
    step[1] = equations[2] * slope_x + equations[3] * slope_y;
}

/* One step of an affine change and of blur: changes of x by 1, x and y, then those of y. */
INLINE void affine_step(const float *patch, float count, const float *equations, const float *seen,
                        const float *places, const float *deformed, float *step)
{
    const float *across = patch + USED, *down = patch + 2 * USED, *laplacian = patch + 3 * USED;
    const float *x = places, *y = places + USED;
    float sum = 0, squares = 0, blur = 0;
    float ax = 0, axx = 0, axy = 0, dy = 0, dyx = 0, dyy = 0;
#pragma omp simd reduction(+ : sum, squares, blur, ax, axx, axy, dy, dyx, dyy)
    for (int i = 0; i < USED; i++) {
        const float a = across[i] * seen[i], d = down[i] * seen[i];
        sum += seen[i];
        squares += seen[i] * seen[i];
        blur += laplacian[i] * seen[i];
        ax += a;
        axx += a * x[i];
        axy += a * y[i];
        dy += d;
        dyx += d * x[i];
        dyy += d * y[i];
    }
    const float gain = gain_of(power_of(sum, squares, count), equations[CONTRAST]);
    float slope[6] = {ax, axx, axy, dy, dyx, dyy};
    for (int i = 0; i < 6; i++)
        slope[i] = gain * (slope[i] - sum / count * equations[SUMS + i]) - equations[OWN + i] -
                   DEFORMATION_DAMPING * deformed[i];
    blur = gain * blur - equations[OWN_BLUR];
    for (int i = 0; i < 6; i++) {
        step[i] = blur * equations[COLUMN + i];
        for (int j = 0; j < 6; j++)
            step[i] += equations[INVERSE + 6 * i + j] * slope[j];
    }
}

/* Decrease of the blur of the image on a surface seen through a shape. */
INLINE float narrowing(const float *shape)
{
    const float area = shape[0] * shape[3] - shape[1] * shape[2];
    const float squares = shape[0] * shape[0] + shape[1] * shape[1] + shape[2] * shape[2] + shape[3] * shape[3];
    return 1 - at_most(squares / at_least(2 * area * area, 1e-6f), WIDEST);
}

/* Change the equations to those of the patch minus `narrower` times its Laplacian. */
INLINE void sharpen(float *equations, float narrower)
{
    const float own = equations[OWN_BLUR], power = equations[BLUR_POWER];
    equations[OWN_BLUR] -= narrower * power;
    for (int i = 0; i < 6; i++)
        equations[OWN + i] -= narrower * equations[ALONG + i];
    equations[CONTRAST] = at_least(equations[CONTRAST] + narrower * (narrower * power - 2 * own), LEAST_CONTRAST);
}

/* Move a point by a step in the patch. */
INLINE void move(float *point, const float *shape, float along, float down)
{
    along = clip(along, -2, 2);
    down = clip(down, -2, 2);
    point[0] -= shape[0] * along + shape[1] * down;
    point[1] -= shape[2] * along + shape[3] * down;
}

/* Deform a shape by a step: shape - shape @ step. */
INLINE void deform(float *shape, const float *step)
{
    const float a = clip(step[1], -0.3f, 0.3f), b = clip(step[2], -0.3f, 0.3f);
    const float c = clip(step[4], -0.3f, 0.3f), d = clip(step[5], -0.3f, 0.3f);
    for (float *row = shape; row < shape + 4; row += 2) {
        const float first = row[0], second = row[1];
        row[0] -= first * a + second * c;
        row[1] -= first * b + second * d;
    }
}

INLINE void align_one(const float *patch, const Image *image, const float *places, int shifts, float *point,
                      float *shape, float *sigma, float *correlation, uint8_t *good)
{
    const float start[2] = {point[0], point[1]}, *weights = patch + WEIGHTS;
    const float few = counted(patch, FEW), count = counted(patch, USED);
    float seen[USED], equations[AFFINE], step[6], narrower = 0, moved = 0;
    for (int i = 0; i < shifts; i++) {
        sample_patch(image, point, shape, places, weights, FEW, seen);
        shift_step(patch, few, seen, step);
        move(point, shape, step[0], step[1]);
    }
    for (int search = 0; search < SEARCHES && moved < LAST_STEP; search++) {
        float deformed[6] = {0};
        narrower = BLUR / 2 * narrowing(shape);
        for (int i = 0; i < AFFINE; i++)
            equations[i] = patch[EQUATIONS + i];
        sharpen(equations, narrower);
        for (int i = 0; i < ITERATIONS; i++) {
            sample_patch(image, point, shape, places, weights, USED, seen);
            affine_step(patch, count, equations, seen, places, deformed, step);
            for (int k = 0; k < 6; k++)
                deformed[k] += k % 3 ? step[k] : 0;
            move(point, shape, step[0], step[3]);
            deform(shape, step);
            moved = sqrtf(step[0] * step[0] + step[3] * step[3]);
            /* False for NaN. */
            if (i + 1 >= FEWEST_ITERATIONS && !(moved >= SETTLED && moved < LAST_STEP))
                break;
        }
    }
    sample_patch(image, point, shape, places, weights, USED, seen);
    const float *own = patch, *laplacian = patch + 3 * USED;
    float sum = 0, squares = 0, product = 0;
#pragma omp simd reduction(+ : sum, squares, product)
    for (int i = 0; i < USED; i++) {
        sum += seen[i];
        squares += seen[i] * seen[i];
        product += seen[i] * (own[i] - narrower * laplacian[i]);
    }
    const float contrast = equations[CONTRAST], power = power_of(sum, squares, count), gain = gain_of(power, contrast);
    *correlation = clip(product / sqrtf(power * contrast), 0, 1);
    const float residue = at_least(gain * gain * power - 2 * gain * product + contrast, 0);
    *sigma = SIGMA_FLOOR + SIGMA_GROWTH * (residue / count) * (equations[0] + equations[21]) / 2;

    const float x = point[0] - start[0], y = point[1] - start[1];
    const float wide = fabsf(shape[0]) + fabsf(shape[1]), high = fabsf(shape[2]) + fabsf(shape[3]);
    const float area = shape[0] * shape[3] - shape[1] * shape[2];
    /* Each comparison is false for NaN. */
    *good = sqrtf(x * x + y * y) < LONGEST_STEP && *correlation > LOWEST_CORRELATION &&
            moved < LAST_STEP && wide < LARGEST_SCALE && high < LARGEST_SCALE &&
            area > 1 / (LARGEST_SCALE * LARGEST_SCALE) && point[0] >= 1 && point[1] >= 1 &&
            point[0] < (float)image->width / FINE - 2 && point[1] < (float)image->height / FINE - 2;
}

/* Find T patches (T, PATCH) in an image. Points (T, 2) and shapes (T, 2, 2) are the start, and then the result. */
FOR_EACH_PROCESSOR
void kpmatch_align(int64_t count, const float *patches, int64_t height, int64_t width, const float *pixels,
                   const float *places, int32_t shifts, float *points, float *shapes, float *sigmas, float *correlation,
                   uint8_t *good)
{
    const Image image = {pixels, (ptrdiff_t)height, (ptrdiff_t)width};
    for (int64_t i = 0; i < count; i++)
        align_one(patches + i * PATCH, &image, places, shifts, points + 2 * i, shapes + 4 * i, sigmas + i,
                  correlation + i, good + i);
}

INLINE float product(const float *restrict one, const float *restrict other, int count)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++)
        sum += one[i] * other[i];
    return sum;
}

/* Values minus the mean of those with a weight. The others are 0 before and after. */
INLINE void centre(const float *values, const float *weights, int pixels, float count, float *centred)
{
    const float mean = total(values, pixels) / count;
    for (int i = 0; i < pixels; i++)
        centred[i] = weights[i] * (values[i] - mean);
}

/* Invert a symmetric positive matrix (size, size), in place. */
INLINE void inverse(int size, float *matrix)
{
    for (int k = 0; k < size; k++) {
        const float pivot = 1 / matrix[k * size + k];
        float row[7], column[7];
        for (int i = 0; i < size; i++) {
            row[i] = matrix[k * size + i] * pivot;
            column[i] = matrix[i * size + k];
        }
        for (int i = 0; i < size; i++)
            for (int j = 0; j < size; j++)
                matrix[i * size + j] -= column[i] * row[j];
        for (int i = 0; i < size; i++) {
            matrix[k * size + i] = row[i];
            matrix[i * size + k] = -column[i] * pivot;
        }
        matrix[k * size + k] = pivot;
    }
}

/* Equations of a shift, see _equations in patches.py. */
INLINE void shift_equations(const float *patch, float count, const float *template, float *equations)
{
    const float *across = patch + USED, *down = patch + 2 * USED;
    const float x = total(across, FEW), y = total(down, FEW);
    float normal[4];
    normal[0] = product(across, across, FEW) - x * x / count + 1;
    normal[1] = normal[2] = product(across, down, FEW) - x * y / count;
    normal[3] = product(down, down, FEW) - y * y / count + 1;
    inverse(2, normal);
    for (int i = 0; i < 4; i++)
        equations[i] = normal[i];
    equations[4] = x;
    equations[5] = y;
    equations[6] = product(across, template, FEW);
    equations[7] = product(down, template, FEW);
    equations[8] = at_least(product(template, template, FEW), LEAST_CONTRAST);
}

/* Equations of an affine change with blur. */
INLINE void affine_equations(const float *patch, float count, const float *places, float *equations)
{
    const float *template = patch, *laplacian = patch + 3 * USED;
    float jacobian[6][USED], normal[7 * 7];
    for (int k = 0; k < 2; k++) {
        const float *slope = patch + (1 + k) * USED;
        for (int i = 0; i < USED; i++) {
            jacobian[3 * k][i] = slope[i];
            jacobian[3 * k + 1][i] = slope[i] * places[i];
            jacobian[3 * k + 2][i] = slope[i] * places[USED + i];
        }
    }
    for (int i = 0; i < 6; i++)
        equations[SUMS + i] = total(jacobian[i], USED);
    for (int i = 0; i < 6; i++) {
        for (int j = 0; j <= i; j++)
            normal[7 * i + j] = normal[7 * j + i] =
                product(jacobian[i], jacobian[j], USED) - equations[SUMS + i] * equations[SUMS + j] / count;
        normal[8 * i] += i % 3 ? DEFORMATION_DAMPING : 1;
        equations[ALONG + i] = normal[7 * i + 6] = normal[42 + i] = product(jacobian[i], laplacian, USED);
        equations[OWN + i] = product(jacobian[i], template, USED);
    }
    equations[OWN_BLUR] = product(template, laplacian, USED);
    equations[BLUR_POWER] = product(laplacian, laplacian, USED);
    equations[CONTRAST] = at_least(product(template, template, USED), LEAST_CONTRAST);
    normal[48] = equations[BLUR_POWER] + BLUR_DAMPING;
    inverse(7, normal);
    for (int i = 0; i < 6; i++) {
        equations[COLUMN + i] = normal[7 * i + 6];
        for (int j = 0; j < 6; j++)
            equations[INVERSE + 6 * i + j] = normal[7 * i + j];
    }
}

/* Pixels (WIDE, WIDE) around a point. */
INLINE void sample_surroundings(const Image *image, const float *point, float *pixels)
{
    const float x = FINE * (point[0] - WIDE / 2), y = FINE * (point[1] - WIDE / 2);
    if (x >= 0 && y >= 0 && x + FINE * WIDE < (float)image->width && y + FINE * WIDE < (float)image->height) {
        const ptrdiff_t column = (ptrdiff_t)x, row = (ptrdiff_t)y;
        const float across = x - (float)column, down = y - (float)row;
        for (int j = 0; j < WIDE; j++) {
            const float *above = image->pixels + (row + FINE * j) * image->width + column;
            const float *below = above + image->width;
            for (int i = 0; i < WIDE; i++)
                pixels[j * WIDE + i] = between(between(above[FINE * i], above[FINE * i + 1], across),
                                               between(below[FINE * i], below[FINE * i + 1], across), down);
        }
    } else {
        for (int j = 0; j < WIDE; j++)
            for (int i = 0; i < WIDE; i++)
                pixels[j * WIDE + i] = interpolated(image, x + FINE * (float)i, y + FINE * (float)j);
    }
}

INLINE void cut_one(const Image *image, const float *point, const float *places, float *patch)
{
    float pixels[WIDE * WIDE], middle[USED], few[FEW];
    float *template = patch, *across = patch + USED, *down = patch + 2 * USED, *laplacian = patch + 3 * USED;
    float *weights = patch + WEIGHTS;
    const float left = 1 - point[0], right = (float)image->width / FINE - 2 - point[0];
    const float above = 1 - point[1], below = (float)image->height / FINE - 2 - point[1];
    sample_surroundings(image, point, pixels);
    for (int i = 0; i < USED; i++) {
        const float *here = pixels + ((int)places[USED + i] + WIDE / 2) * WIDE + (int)places[i] + WIDE / 2;
        const float x = places[i], y = places[USED + i];
        weights[i] = x >= left && x <= right && y >= above && y <= below; /* has neighbours in the image; 0 for NaN */
        middle[i] = weights[i] * here[0];
        across[i] = weights[i] * (here[1] - here[-1]) / 2;
        down[i] = weights[i] * (here[WIDE] - here[-WIDE]) / 2;
        laplacian[i] = weights[i] * (here[-1] + here[1] + here[-WIDE] + here[WIDE] - 4 * here[0]);
    }
    const float count = counted(patch, USED), few_count = counted(patch, FEW);
    centre(middle, weights, USED, count, template);
    centre(laplacian, weights, USED, count, laplacian);
    affine_equations(patch, count, places, patch + EQUATIONS);
    centre(template, weights, FEW, few_count, few);
    shift_equations(patch, few_count, few, patch + EQUATIONS + AFFINE);
}

/* Cut patches (T, PATCH) from an image around points (T, 2). */
FOR_EACH_PROCESSOR
void kpmatch_cut(int64_t count, int64_t height, int64_t width, const float *pixels, const float *places,
                 const float *points, float *patches)
{
    const Image image = {pixels, (ptrdiff_t)height, (ptrdiff_t)width};
    for (int64_t i = 0; i < count; i++)
        cut_one(&image, points + 2 * i, places, patches + i * PATCH);
}
