/* The loops of estimate_relative_pose, compiled: of two_view_profile.py.
 *
 * As of geometry.c, the NumPy code of these names describes the algorithms: a change of one is a change of the other,
 * and test/test_compiled_two_view.py compares them. Nothing is kept from call to call, and no memory is taken: sums run
 * over blocks of matches, always in the same order.
 */
#include "geometry.h"

#define TINY 1e-30 /* as in robust.py */

enum {
    BLOCK = 128 /* matches that are looked at together: what is found of them stays in the nearest cache */
};

/* Unlike fmax and fmin, these give NaN for NaN. */
INLINE double at_least(double value, double bound) { return value < bound ? bound : value; }

/* As in two_view_errors.py: rays and noise (3, n) of each image, one after the other. */
typedef struct {
    ptrdiff_t count;
    const double *rays0, *rays1, *noise0, *noise1;
} Matches;

INLINE Matches matches_at(int64_t count, const double *columns)
{
    const ptrdiff_t n = (ptrdiff_t)count;
    return (Matches){n, columns, columns + 3 * n, columns + 6 * n, columns + 9 * n};
}

/* How many matches are in the block that begins there. */
INLINE ptrdiff_t block_size(const Matches *matches, ptrdiff_t from)
{
    return matches->count - from < BLOCK ? matches->count - from : BLOCK;
}

/* Small linear algebra, as NumPy, LAPACK and OpenCV do it. */

/* Solve a system (size, size) in place. Returns 0 where it is singular: np.linalg.solve raises LinAlgError. */
INLINE int solve(int size, double *matrix, double *vector)
{
    for (int i = 0; i < size; i++) {
        int pivot = i;
        for (int row = i + 1; row < size; row++)
            if (!(fabs(matrix[size * row + i]) <= fabs(matrix[size * pivot + i]))) /* NaN is chosen: it is not zero */
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

/* The other motions that explain the matches: two_view_profile.py. */

/* What _evaluate gives for a block of matches: distances, and their jacobian by the rotation. */
typedef struct {
    double residuals[BLOCK], jacobian[3][BLOCK];
} Turning;

/* _evaluate, for one rotation and direction and a block of matches. */
INLINE void evaluate_turn(const Matches *matches, ptrdiff_t from, ptrdiff_t size, const double *turn,
                          const double *shift, Turning *found)
{
    const ptrdiff_t n = matches->count;
    const double *x0 = matches->rays0 + from, *y0 = x0 + n, *z0 = y0 + n;
    const double *x1 = matches->rays1 + from, *y1 = x1 + n, *z1 = y1 + n;
    const double *noise0 = matches->noise0 + from, *noise1 = matches->noise1 + from;
#pragma omp simd
    for (ptrdiff_t i = 0; i < size; i++) {
        const double x = turn[0] * x1[i] + turn[1] * y1[i] + turn[2] * z1[i];
        const double y = turn[3] * x1[i] + turn[4] * y1[i] + turn[5] * z1[i];
        const double z = turn[6] * x1[i] + turn[7] * y1[i] + turn[8] * z1[i];
        const double normal_x = y0[i] * shift[2] - z0[i] * shift[1];
        const double normal_y = z0[i] * shift[0] - x0[i] * shift[2];
        const double normal_z = x0[i] * shift[1] - y0[i] * shift[0];
        const double line0_x = shift[1] * z - shift[2] * y, line0_y = shift[2] * x - shift[0] * z;
        const double line1_x = turn[0] * normal_x + turn[3] * normal_y + turn[6] * normal_z;
        const double line1_y = turn[1] * normal_x + turn[4] * normal_y + turn[7] * normal_z;
        const double variance = (noise0[i] + noise0[2 * n + i]) / 2 * (line0_x * line0_x + line0_y * line0_y) +
                                (noise1[i] + noise1[2 * n + i]) / 2 * (line1_x * line1_x + line1_y * line1_y);
        const double precision = 1 / sqrt(at_least(variance, TINY));
        found->residuals[i] = (x * normal_x + y * normal_y + z * normal_z) * precision;
        found->jacobian[0][i] = (y * normal_z - z * normal_y) * precision;
        found->jacobian[1][i] = (z * normal_x - x * normal_z) * precision;
        found->jacobian[2][i] = (x * normal_y - y * normal_x) * precision;
    }
}

/* _turned, of one rotation: after a step of angles about the axes (Rodrigues). */
INLINE void turn_by(double *turn, const double *step)
{
    const double angle = at_least(sqrt(step[0] * step[0] + step[1] * step[1] + step[2] * step[2]), 1e-12);
    const double x = step[0] / angle, y = step[1] / angle, z = step[2] / angle;
    const double cross[9] = {0, -z, y, z, 0, -x, -y, x, 0};
    double change[9], turned[9];
    multiply(cross, cross, change);
    for (int i = 0; i < 9; i++)
        change[i] = (i % 4 == 0) + sin(angle) * cross[i] + (1 - cos(angle)) * change[i];
    multiply(change, turn, turned);
    for (int i = 0; i < 9; i++)
        turn[i] = turned[i];
}

/* A step of Gauss-Newton for one rotation, as in refine_turns. Returns 0 where its equations are singular. */
INLINE int refine_turn(const Matches *matches, double *turn, const double *shift, double cutoff, double trust)
{
    double xx = 0, xy = 0, xz = 0, yy = 0, yz = 0, zz = 0, gx = 0, gy = 0, gz = 0;
    for (ptrdiff_t from = 0; from < matches->count; from += BLOCK) {
        const ptrdiff_t size = block_size(matches, from);
        Turning found;
        evaluate_turn(matches, from, size, turn, shift, &found);
        const double *x = found.jacobian[0], *y = found.jacobian[1], *z = found.jacobian[2];
#pragma omp simd reduction(+ : xx, xy, xz, yy, yz, zz, gx, gy, gz)
        for (ptrdiff_t i = 0; i < size; i++) {
            const double share = found.residuals[i] / cutoff, rest = at_least(1 - share * share, 0);
            const double weight = rest * rest, pull = weight * found.residuals[i];
            xx += weight * x[i] * x[i];
            xy += weight * x[i] * y[i];
            xz += weight * x[i] * z[i];
            yy += weight * y[i] * y[i];
            yz += weight * y[i] * z[i];
            zz += weight * z[i] * z[i];
            gx += pull * x[i];
            gy += pull * y[i];
            gz += pull * z[i];
        }
    }
    const double least = 1e-14 * (xx + yy + zz), diagonal = at_least(trust, least); /* _NOT_LOST */
    double hessian[9] = {xx + diagonal, xy, xz, xy, yy + diagonal, yz, xz, yz, zz + diagonal}, step[3] = {-gx, -gy, -gz};
    if (!solve(3, hessian, step))
        return 0;
    turn_by(turn, step);
    return 1;
}

/* refine_turns: rotations (k, 3, 3) in place, and residuals (k, n). Returns 0 where equations are singular. */
FOR_EACH_PROCESSOR
int32_t kpmatch_refine_turns(int64_t count, const double *columns, int64_t steps, const double *cutoffs, double trust,
                             int64_t motions, double *turns, const double *shifts, double *residuals)
{
    const Matches matches = matches_at(count, columns);
    for (int64_t k = 0; k < motions; k++) {
        double *turn = turns + 9 * k;
        const double *shift = shifts + 3 * k;
        for (int64_t i = 0; i < steps; i++)
            if (!refine_turn(&matches, turn, shift, cutoffs[i], trust))
                return 0;
        for (ptrdiff_t from = 0; from < matches.count; from += BLOCK) {
            const ptrdiff_t size = block_size(&matches, from);
            Turning found;
            evaluate_turn(&matches, from, size, turn, shift, &found);
            for (ptrdiff_t i = 0; i < size; i++)
                residuals[k * matches.count + from + i] = found.residuals[i];
        }
    }
    return 1;
}
