/* Other motions that explain the matches: functions of two_view_profile.py, compiled. See two_view.c. */
#include "two_view.h"

/* The result of _evaluate for a block of matches: distances, and their jacobian by the rotation. */
typedef struct {
    double residuals[BLOCK], jacobian[3][BLOCK];
} Turning;

/* _evaluate, for one rotation and direction and a block of matches. */
INLINE void evaluate_turn(const Matches *matches, ptrdiff_t from, ptrdiff_t size, const double *rotation,
                          const double *shift, Turning *found)
{
    const ptrdiff_t n = matches->count;
    const double *x0 = matches->rays0 + from, *y0 = x0 + n, *z0 = y0 + n;
    const double *x1 = matches->rays1 + from, *y1 = x1 + n, *z1 = y1 + n;
    const double *noise0 = matches->noise0 + from, *noise1 = matches->noise1 + from;
#pragma omp simd
    for (ptrdiff_t i = 0; i < size; i++) {
        const double x = rotation[0] * x1[i] + rotation[1] * y1[i] + rotation[2] * z1[i];
        const double y = rotation[3] * x1[i] + rotation[4] * y1[i] + rotation[5] * z1[i];
        const double z = rotation[6] * x1[i] + rotation[7] * y1[i] + rotation[8] * z1[i];
        const double normal_x = y0[i] * shift[2] - z0[i] * shift[1];
        const double normal_y = z0[i] * shift[0] - x0[i] * shift[2];
        const double normal_z = x0[i] * shift[1] - y0[i] * shift[0];
        const double line0_x = shift[1] * z - shift[2] * y, line0_y = shift[2] * x - shift[0] * z;
        const double line1_x = rotation[0] * normal_x + rotation[3] * normal_y + rotation[6] * normal_z;
        const double line1_y = rotation[1] * normal_x + rotation[4] * normal_y + rotation[7] * normal_z;
        const double variance = (noise0[i] + noise0[2 * n + i]) / 2 * (line0_x * line0_x + line0_y * line0_y) +
                                (noise1[i] + noise1[2 * n + i]) / 2 * (line1_x * line1_x + line1_y * line1_y);
        const double precision = 1 / sqrt(at_least(variance, TINY));
        found->residuals[i] = (x * normal_x + y * normal_y + z * normal_z) * precision;
        found->jacobian[0][i] = (y * normal_z - z * normal_y) * precision;
        found->jacobian[1][i] = (z * normal_x - x * normal_z) * precision;
        found->jacobian[2][i] = (x * normal_y - y * normal_x) * precision;
    }
}

/* One Gauss-Newton step of refine_turns for one rotation. Returns 0 if its equations are singular. */
INLINE int refine_turn(const Matches *matches, double *rotation, const double *shift, double cutoff,
                       double prior_information)
{
    double xx = 0, xy = 0, xz = 0, yy = 0, yz = 0, zz = 0, gx = 0, gy = 0, gz = 0;
    for (ptrdiff_t from = 0; from < matches->count; from += BLOCK) {
        const ptrdiff_t size = block_size(matches, from);
        Turning found;
        evaluate_turn(matches, from, size, rotation, shift, &found);
        const double *x = found.jacobian[0], *y = found.jacobian[1], *z = found.jacobian[2];
#pragma omp simd reduction(+ : xx, xy, xz, yy, yz, zz, gx, gy, gz)
        for (ptrdiff_t i = 0; i < size; i++) {
            const double share = found.residuals[i] / cutoff, rest = at_least(1 - share * share, 0);
            const double weight = rest * rest, weighted = weight * found.residuals[i];
            xx += weight * x[i] * x[i];
            xy += weight * x[i] * y[i];
            xz += weight * x[i] * z[i];
            yy += weight * y[i] * y[i];
            yz += weight * y[i] * z[i];
            zz += weight * z[i] * z[i];
            gx += weighted * x[i];
            gy += weighted * y[i];
            gz += weighted * z[i];
        }
    }
    const double least = 1e-14 * (xx + yy + zz), diagonal = at_least(prior_information, least); /* _ABOVE_ROUNDING */
    double hessian[9] = {xx + diagonal, xy, xz, xy, yy + diagonal, yz, xz, yz, zz + diagonal};
    double step[3] = {-gx, -gy, -gz};
    if (!solve(3, hessian, step))
        return 0;
    turn(rotation, step);
    return 1;
}

/* refine_turns: rotations (k, 3, 3) in place, and residuals (k, n). Returns 0 if a system is singular. */
FOR_EACH_PROCESSOR
int32_t kpmatch_refine_turns(int64_t count, const double *columns, int64_t steps, const double *cutoffs,
                             double prior_information, int64_t motions, double *turns, const double *shifts,
                             double *residuals)
{
    const Matches matches = matches_at(count, columns);
    for (int64_t k = 0; k < motions; k++) {
        double *rotation = turns + 9 * k;
        const double *shift = shifts + 3 * k;
        for (int64_t i = 0; i < steps; i++)
            if (!refine_turn(&matches, rotation, shift, cutoffs[i], prior_information))
                return 0;
        for (ptrdiff_t from = 0; from < matches.count; from += BLOCK) {
            const ptrdiff_t size = block_size(&matches, from);
            Turning found;
            evaluate_turn(&matches, from, size, rotation, shift, &found);
            for (ptrdiff_t i = 0; i < size; i++)
                residuals[k * matches.count + from + i] = found.residuals[i];
        }
    }
    return 1;
}
