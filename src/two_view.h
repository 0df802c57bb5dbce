/* Matches and motions of two views, as in two_view_errors.py, and small linear algebra. */
#ifndef KPMATCH_TWO_VIEW_H
#define KPMATCH_TWO_VIEW_H

#include "geometry.h"

/* Constants of robust.py and camera.py. */
#define TINY 1e-30
#define AHEAD 0.02
#define BEHIND 1e6

enum { BLOCK = 128 }; /* matches processed at a time, so that their results stay in the nearest cache */

/* Unlike fmax and fmin, these return NaN for NaN. */
INLINE double at_least(double value, double bound) { return value < bound ? bound : value; }
INLINE double at_most(double value, double bound) { return value > bound ? bound : value; }

/* As in two_view_errors.py: rays and noise (3, n) of each image, in this order in memory. */
typedef struct {
    ptrdiff_t count;
    const double *rays0, *rays1, *noise0, *noise1;
} Matches;

INLINE Matches matches_at(int64_t count, const double *columns)
{
    const ptrdiff_t n = (ptrdiff_t)count;
    return (Matches){n, columns, columns + 3 * n, columns + 6 * n, columns + 9 * n};
}

/* Number of matches in the block that begins at `from`. */
INLINE ptrdiff_t block_size(const Matches *matches, ptrdiff_t from)
{
    return matches->count - from < BLOCK ? matches->count - from : BLOCK;
}

/* Small linear algebra, with the results of NumPy, LAPACK and OpenCV. */

/* Solve a system (size, size) in place. Returns 0 if it is singular, where np.linalg.solve raises LinAlgError. */
INLINE int solve(int size, double *matrix, double *vector)
{
    for (int i = 0; i < size; i++) {
        int pivot = i;
        for (int row = i + 1; row < size; row++)
            if (!(fabs(matrix[size * row + i]) <= fabs(matrix[size * pivot + i]))) /* true for NaN, which is not zero */
                pivot = row;
        if (matrix[size * pivot + i] == 0)
            return 0;
        for (int column = i; column < size; column++) {
            const double kept = matrix[size * i + column];
            matrix[size * i + column] = matrix[size * pivot + column];
            matrix[size * pivot + column] = kept;
        }
        const double kept = vector[i];
        vector[i] = vector[pivot];
        vector[pivot] = kept;
        for (int row = i + 1; row < size; row++) {
            const double factor = matrix[size * row + i] / matrix[size * i + i];
            for (int column = i + 1; column < size; column++)
                matrix[size * row + column] -= factor * matrix[size * i + column];
            vector[row] -= factor * vector[i];
        }
    }
    for (int i = size - 1; i >= 0; i--) {
        for (int column = i + 1; column < size; column++)
            vector[i] -= matrix[size * i + column] * vector[column];
        vector[i] /= matrix[size * i + i];
    }
    return 1;
}

/* Product of two matrices (3, 3). */
INLINE void multiply(const double *a, const double *b, double *product)
{
    for (int row = 0; row < 3; row++)
        for (int column = 0; column < 3; column++)
            product[3 * row + column] =
                a[3 * row] * b[column] + a[3 * row + 1] * b[3 + column] + a[3 * row + 2] * b[6 + column];
}

/* A rotation after a rotation step about the axes (Rodrigues): _turned in two_view_profile.py, and cv2.Rodrigues. */
INLINE void turn(double *rotation, const double *step)
{
    const double angle = at_least(sqrt(step[0] * step[0] + step[1] * step[1] + step[2] * step[2]), 1e-12);
    const double x = step[0] / angle, y = step[1] / angle, z = step[2] / angle;
    const double cross[9] = {0, -z, y, z, 0, -x, -y, x, 0};
    double change[9], turned[9];
    multiply(cross, cross, change);
    for (int i = 0; i < 9; i++)
        change[i] = (i % 4 == 0) + sin(angle) * cross[i] + (1 - cos(angle)) * change[i];
    multiply(change, rotation, turned);
    for (int i = 0; i < 9; i++)
        rotation[i] = turned[i];
}

/* Matrix (3, 3) of the cross product with a vector as the left factor, as in pose.py. */
INLINE void cross_matrix(const double *vector, double *matrix)
{
    const double x = vector[0], y = vector[1], z = vector[2], found[9] = {0, -z, y, z, 0, -x, -y, x, 0};
    for (int i = 0; i < 9; i++)
        matrix[i] = found[i];
}

/* Motions and residuals. */

typedef struct {
    double rotation[9], translation[3];
} Motion;

/* Columns (3, 2) orthogonal to a unit vector. */
INLINE void tangents(const double *direction, double *found)
{
    const double x = direction[0], y = direction[1], z = direction[2], sign = copysign(1, z), a = -1 / (sign + z);
    found[0] = 1 + sign * a * x * x;
    found[1] = a * x * y;
    found[2] = sign * a * x * y;
    found[3] = sign + a * y * y;
    found[4] = -sign * x;
    found[5] = -y;
}

/* Motion.moved, with a step of `size` parameters. */
INLINE void move(Motion *motion, int size, const double *step)
{
    turn(motion->rotation, step);
    if (size == 3)
        return;
    double columns[6], length = 0;
    tangents(motion->translation, columns);
    for (int i = 0; i < 3; i++) {
        motion->translation[i] += columns[2 * i] * step[3] + columns[2 * i + 1] * step[4];
        length += motion->translation[i] * motion->translation[i];
    }
    length = sqrt(length);
    for (int i = 0; i < 3; i++)
        motion->translation[i] /= length;
}

INLINE void essential_matrix(const Motion *motion, double *essential)
{
    double cross[9];
    cross_matrix(motion->translation, cross);
    multiply(cross, motion->rotation, essential);
}

/* _essential_changes: derivatives (5, 9) of the essential matrix by the parameters of move. */
INLINE void essential_changes(const Motion *motion, double (*changes)[9])
{
    double across[9], columns[6], cross[9], product[9];
    cross_matrix(motion->translation, across);
    tangents(motion->translation, columns);
    for (int k = 0; k < 3; k++) {
        const double axis[3] = {k == 0, k == 1, k == 2};
        cross_matrix(axis, cross);
        multiply(across, cross, product);
        multiply(product, motion->rotation, changes[k]);
    }
    for (int k = 0; k < 2; k++) {
        const double column[3] = {columns[k], columns[2 + k], columns[4 + k]};
        cross_matrix(column, cross);
        multiply(cross, motion->rotation, changes[3 + k]);
    }
}

/* Epipolar lines of one match, and its algebraic distance from them. */
typedef struct {
    double line0_x, line0_y, line1_x, line1_y, distance;
} Lines;

INLINE Lines lines_of(const Matches *matches, ptrdiff_t i, const double *essential)
{
    const ptrdiff_t n = matches->count;
    const double x0 = matches->rays0[i], y0 = matches->rays0[n + i], z0 = matches->rays0[2 * n + i];
    const double x1 = matches->rays1[i], y1 = matches->rays1[n + i], z1 = matches->rays1[2 * n + i];
    const double line0_x = essential[0] * x1 + essential[1] * y1 + essential[2] * z1;
    const double line0_y = essential[3] * x1 + essential[4] * y1 + essential[5] * z1;
    const double line0_z = essential[6] * x1 + essential[7] * y1 + essential[8] * z1;
    const double line1_x = essential[0] * x0 + essential[3] * y0 + essential[6] * z0;
    const double line1_y = essential[1] * x0 + essential[4] * y0 + essential[7] * z0;
    return (Lines){line0_x, line0_y, line1_x, line1_y, x0 * line0_x + y0 * line0_y + z0 * line0_z};
}

/* _by_essential, for one match: its Sampson distance, and the vectors of its derivatives by the essential matrix. */
typedef struct {
    double residual, first_x, first_y, first_z, second_x, second_y;
} ByEssential;

INLINE ByEssential by_essential(const Matches *matches, ptrdiff_t i, const double *essential)
{
    const ptrdiff_t n = matches->count;
    const Lines at = lines_of(matches, i, essential);
    const double *rays0 = matches->rays0 + i, *noise0 = matches->noise0 + i, *noise1 = matches->noise1 + i;
    const double moved0_x = noise0[0] * at.line0_x + noise0[n] * at.line0_y;
    const double moved0_y = noise0[n] * at.line0_x + noise0[2 * n] * at.line0_y;
    const double moved1_x = noise1[0] * at.line1_x + noise1[n] * at.line1_y;
    const double moved1_y = noise1[n] * at.line1_x + noise1[2 * n] * at.line1_y;
    const double variance = at_least(
        at.line0_x * moved0_x + at.line0_y * moved0_y + (at.line1_x * moved1_x + at.line1_y * moved1_y), TINY);
    const double precision = 1 / sqrt(variance), residual = at.distance * precision, weight = residual / variance;
    return (ByEssential){
        residual, rays0[0] * precision - moved0_x * weight, rays0[n] * precision - moved0_y * weight,
        rays0[2 * n] * precision, moved1_x * weight, moved1_y * weight};
}

/* Squared Sampson distance of one match. */
INLINE double squared_distance(const Matches *matches, ptrdiff_t i, const double *essential)
{
    const ptrdiff_t n = matches->count;
    const Lines at = lines_of(matches, i, essential);
    const double *noise0 = matches->noise0 + i, *noise1 = matches->noise1 + i;
    const double variance0 = (noise0[0] * at.line0_x + 2 * noise0[n] * at.line0_y) * at.line0_x;
    const double variance1 = (noise1[0] * at.line1_x + 2 * noise1[n] * at.line1_y) * at.line1_x;
    const double variance = variance0 + noise0[2 * n] * at.line0_y * at.line0_y +
                            (variance1 + noise1[2 * n] * at.line1_y * at.line1_y);
    return at.distance * at.distance / at_least(variance, TINY);
}

/* project_turned, for one match. */
typedef struct {
    double x, y, l00, l10, l11;
    int ahead;
} Projected;

INLINE Projected project_turned(const Matches *matches, ptrdiff_t i, const double *rotation)
{
    const ptrdiff_t n = matches->count;
    const double x1 = matches->rays1[i], y1 = matches->rays1[n + i], z1 = matches->rays1[2 * n + i];
    const double *noise0 = matches->noise0 + i, *noise1 = matches->noise1 + i;
    const double turned_z = rotation[6] * x1 + rotation[7] * y1 + rotation[8] * z1;
    const int ahead = turned_z > AHEAD * sqrt(x1 * x1 + y1 * y1 + z1 * z1);
    const double depth = ahead ? turned_z : 1;
    const double x = (rotation[0] * x1 + rotation[1] * y1 + rotation[2] * z1) / depth;
    const double y = (rotation[3] * x1 + rotation[4] * y1 + rotation[5] * z1) / depth;
    const double xx = (rotation[0] - x * rotation[6]) / depth, xy = (rotation[1] - x * rotation[7]) / depth;
    const double yx = (rotation[3] - y * rotation[6]) / depth, yy = (rotation[4] - y * rotation[7]) / depth;
    const double a = noise1[0], b = noise1[n], c = noise1[2 * n];
    const double ax = xx * a + xy * b, ay = xx * b + xy * c;
    const double noise11 = noise0[2 * n] + (yx * a + yy * b) * yx + (yx * b + yy * c) * yy;
    const double l00 = sqrt(noise0[0] + ax * xx + ay * xy), l10 = (noise0[n] + ax * yx + ay * yy) / l00;
    return (Projected){x, y, l00, l10, sqrt(at_least(noise11 - l10 * l10, TINY)), ahead};
}

/* whiten, for one vector; the value `behind` if the match is behind the camera. */
INLINE void whiten(Projected to, double x, double y, double behind, double *first, double *second)
{
    const double whitened = x / to.l00;
    *first = to.ahead ? whitened : behind;
    *second = to.ahead ? (y - to.l10 * whitened) / to.l11 : behind;
}

#endif
