/* The slowest function of kpmatch_ros/geometry/lens.py, compiled: `undistort`.
 *
 * As with geometry.c, the NumPy code with these names describes the algorithm. Change both together.
 */
#include "geometry.h"

/* Constants of lens.py, with the same names. */

enum { NEWTON_ITERATIONS = 50 };
#define NEWTON_TOLERANCE 1e-10
#define LARGEST_TANGENT 50.0

INLINE double larger(double a, double b) { return a > b ? a : b; }

/* Distort a point with OpenCV's polynomial model; also the jacobian (2, 2), see _distort_polynomially in lens.py. */
INLINE void distort_one(const double *point, const double *coefficients, double *image, double *jacobian)
{
    const double k1 = coefficients[0], k2 = coefficients[1], p1 = coefficients[2], p2 = coefficients[3];
    const double k3 = coefficients[4], k4 = coefficients[5], k5 = coefficients[6], k6 = coefficients[7];
    const double x = point[0], y = point[1], square = x * x + y * y, product = x * y;
    const double above = 1 + square * (k1 + square * (k2 + square * k3));
    const double below = 1 + square * (k4 + square * (k5 + square * k6));
    const double radial = above / below;
    /* Derivative by the squared radius, times two. */
    const double growth = 2 * (k1 + square * (2 * k2 + 3 * k3 * square)) / below -
                          2 * radial * (k4 + square * (2 * k5 + 3 * k6 * square)) / below;
    const double mixed = product * growth + 2 * (p1 * x + p2 * y);
    image[0] = x * radial + 2 * p1 * product + p2 * (square + 2 * x * x);
    image[1] = y * radial + p1 * (square + 2 * y * y) + 2 * p2 * product;
    jacobian[0] = radial + x * x * growth + 2 * p1 * y + 6 * p2 * x;
    jacobian[1] = jacobian[2] = mixed;
    jacobian[3] = radial + y * y * growth + 6 * p1 * y + 2 * p2 * x;
}

/* Newton's method on the distortion. Returns whether the point (2,) has a solution. */
INLINE int undistort_one(const double *target, const double *coefficients, double furthest, double *point,
                         double *inverse)
{
    const double radius = sqrt(target[0] * target[0] + target[1] * target[1]);
    const double nearer = radius > furthest ? furthest / radius : 1;
    point[0] = nearer * target[0];
    point[1] = nearer * target[1];
    for (int i = 0; i < NEWTON_ITERATIONS; i++) {
        double image[2], jacobian[4];
        distort_one(point, coefficients, image, jacobian);
        const double determinant = jacobian[0] * jacobian[3] - jacobian[1] * jacobian[2];
        /* If the determinant is not positive, the lens model folds over, which no real lens does. Also for NaN. */
        if (!(determinant > 0 && fabs(point[0]) < LARGEST_TANGENT && fabs(point[1]) < LARGEST_TANGENT))
            return 0;
        inverse[0] = jacobian[3] / determinant;
        inverse[1] = -jacobian[1] / determinant;
        inverse[2] = -jacobian[2] / determinant;
        inverse[3] = jacobian[0] / determinant;
        const double x = image[0] - target[0], y = image[1] - target[1];
        /* If it folds over twice, it rotates the scene by 180 degrees: positive determinant, but negative trace. */
        if (fabs(x) < NEWTON_TOLERANCE && fabs(y) < NEWTON_TOLERANCE)
            return inverse[0] + inverse[3] > 0;
        const double along = inverse[0] * x + inverse[1] * y, down = inverse[2] * x + inverse[3] * y;
        /* Steps of at most half the distance to the axis, plus a half, do not jump over a fold unnoticed. */
        const double longest = 0.5 * (1 + sqrt(point[0] * point[0] + point[1] * point[1]));
        const double length = larger(sqrt(along * along + down * down), 1e-300);
        const double part = longest < length ? longest / length : 1;
        point[0] -= part * along;
        point[1] -= part * down;
    }
    return 0;
}

/* Undistort N points (N, 2), with the inverse (N, 2, 2) of the distortion's jacobian; NaN without a solution.
 *
 * No search starts further from the axis than `furthest`.
 */
void kpmatch_undistort(int64_t count, const double *distorted, const double *coefficients, double furthest,
                       double *points, double *inverses)
{
    for (int64_t i = 0; i < count; i++) {
        double *point = points + 2 * i, *inverse = inverses + 4 * i;
        if (!undistort_one(distorted + 2 * i, coefficients, furthest, point, inverse))
            point[0] = point[1] = inverse[0] = inverse[1] = inverse[2] = inverse[3] = NAN;
    }
}
