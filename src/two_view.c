/* The loops of estimate_relative_pose, compiled: functions of two_view_errors.py and two_view_fit.py.
 *
 * The NumPy code with the same names describes the algorithms, and runs if the library is not built. Change both
 * together; test/test_compiled_two_view.py compares them. Functions keep no state between calls and allocate no memory.
 * Sums run over blocks of matches, always in the same order.
 */
#include "two_view.h"

enum {
    LARGEST = 5, /* parameters of Motion.moved */
    EPIPOLAR = 0 /* the Model with a translation; the other one is the rotation */
};

/* Residuals: two_view_errors.py. */

/* epipolar_residuals: (n,) */
FOR_EACH_PROCESSOR
void kpmatch_epipolar_residuals(int64_t count, const double *columns, const double *motion, double *residuals)
{
    const Matches matches = matches_at(count, columns);
    double essential[9];
    essential_matrix((const Motion *)motion, essential);
#pragma omp simd
    for (ptrdiff_t i = 0; i < matches.count; i++)
        residuals[i] = by_essential(&matches, i, essential).residual;
}

/* rotation_residuals, for one match */
INLINE void rotation_residual(const Matches *matches, ptrdiff_t i, const double *rotation, double *first,
                              double *second)
{
    const Projected to = project_turned(matches, i, rotation);
    whiten(to, matches->rays0[i] - to.x, matches->rays0[matches->count + i] - to.y, BEHIND, first, second);
}

/* rotation_residuals: (2, n) */
FOR_EACH_PROCESSOR
void kpmatch_rotation_residuals(int64_t count, const double *columns, const double *rotation, double *residuals)
{
    const Matches matches = matches_at(count, columns);
#pragma omp simd
    for (ptrdiff_t i = 0; i < matches.count; i++)
        rotation_residual(&matches, i, rotation, residuals + i, residuals + matches.count + i);
}

/* depths, for one match */
typedef struct {
    double depth0, depth1, squared_sine;
} Depths;

INLINE Depths depths(const Matches *matches, ptrdiff_t i, const Motion *motion)
{
    const ptrdiff_t n = matches->count;
    const double *turn = motion->rotation, *shift = motion->translation;
    const double x0 = matches->rays0[i], y0 = matches->rays0[n + i], z0 = matches->rays0[2 * n + i];
    const double x = matches->rays1[i], y = matches->rays1[n + i], z = matches->rays1[2 * n + i];
    const double x1 = turn[0] * x + turn[1] * y + turn[2] * z, y1 = turn[3] * x + turn[4] * y + turn[5] * z;
    const double z1 = turn[6] * x + turn[7] * y + turn[8] * z;
    const double along0 = shift[0] * x0 + shift[1] * y0 + shift[2] * z0;
    const double along1 = shift[0] * x1 + shift[1] * y1 + shift[2] * z1;
    const double between = x0 * x1 + y0 * y1 + z0 * z1;
    const double square0 = x0 * x0 + y0 * y0 + z0 * z0, square1 = x1 * x1 + y1 * y1 + z1 * z1;
    return (Depths){along0 * square1 - along1 * between, along0 * between - along1 * square0,
                    1 - between * between / (square0 * square1)};
}

/* depths: (3, n) */
FOR_EACH_PROCESSOR
void kpmatch_depths(int64_t count, const double *columns, const double *motion, double *found)
{
    const Matches matches = matches_at(count, columns);
    const Motion given = *(const Motion *)motion;
#pragma omp simd
    for (ptrdiff_t i = 0; i < matches.count; i++) {
        const Depths each = depths(&matches, i, &given);
        found[i] = each.depth0;
        found[matches.count + i] = each.depth1;
        found[2 * matches.count + i] = each.squared_sine;
    }
}

/* _is_ahead, for one match */
INLINE int is_ahead(const Matches *matches, ptrdiff_t i, const Motion *motion)
{
    const Depths found = depths(matches, i, motion);
    return (found.depth0 > 0) & (found.depth1 > 0);
}

/* displacements: (n,) each */
FOR_EACH_PROCESSOR
void kpmatch_displacements(int64_t count, const double *columns, const double *rotation, uint8_t *ahead,
                           double *distances)
{
    const Matches matches = matches_at(count, columns);
    const ptrdiff_t n = matches.count;
#pragma omp simd
    for (ptrdiff_t i = 0; i < n; i++) {
        const Projected to = project_turned(&matches, i, rotation);
        const double x = matches.rays0[i] - to.x, y = matches.rays0[n + i] - to.y;
        const double xx = matches.noise0[i], xy = matches.noise0[n + i], yy = matches.noise0[2 * n + i];
        distances[i] = sqrt((yy * x * x - 2 * xy * x * y + xx * y * y) / (xx * yy - xy * xy));
        ahead[i] = (uint8_t)to.ahead;
    }
}

/* Length of the residual under a pure rotation. */
INLINE double distance(const Matches *matches, ptrdiff_t i, const double *rotation)
{
    double first, second;
    rotation_residual(matches, i, rotation, &first, &second);
    return sqrt(first * first + second * second);
}

/* is_in_front, or with `near`, agrees: (n,) */
FOR_EACH_PROCESSOR
void kpmatch_in_front(int64_t count, const double *columns, const double *motion, double inlier_threshold,
                      int32_t near, uint8_t *front)
{
    const Matches matches = matches_at(count, columns);
    const Motion given = *(const Motion *)motion;
    double essential[9];
    essential_matrix(&given, essential);
#pragma omp simd
    for (ptrdiff_t i = 0; i < matches.count; i++) {
        const int there = !near | (fabs(by_essential(&matches, i, essential).residual) < inlier_threshold);
        const int ahead = is_ahead(&matches, i, &given) | (distance(&matches, i, given.rotation) < inlier_threshold);
        front[i] = (uint8_t)(there & ahead);
    }
}

/* residual_sizes: (n,) */
FOR_EACH_PROCESSOR
void kpmatch_residual_sizes(int64_t count, const double *columns, const double *motion, double inlier_threshold,
                            double *sizes)
{
    const Matches matches = matches_at(count, columns);
    const Motion given = *(const Motion *)motion;
    double essential[9];
    essential_matrix(&given, essential);
#pragma omp simd
    for (ptrdiff_t i = 0; i < matches.count; i++) {
        const double far = distance(&matches, i, given.rotation);
        const double near = fabs(by_essential(&matches, i, essential).residual);
        const int seen = is_ahead(&matches, i, &given) | (far < inlier_threshold);
        sizes[i] = seen ? near : far;
    }
}

/* The jacobian of a model for a block of matches: residuals, and their derivatives by the parameters of move. */
typedef struct {
    double residuals[2][BLOCK], jacobian[LARGEST][2][BLOCK];
} Derivatives;

INLINE int conditions_of(int model) { return model == EPIPOLAR ? 1 : 2; }
INLINE int numbers_of(int model) { return model == EPIPOLAR ? 5 : 3; }

/* _epipolar_jacobian, for a block of matches */
INLINE void epipolar_jacobian(const Matches *matches, ptrdiff_t from, ptrdiff_t size, const double *essential,
                              const double (*changes)[9], Derivatives *found)
{
    const ptrdiff_t n = matches->count;
    const double *x0 = matches->rays0 + from, *x1 = matches->rays1 + from;
    double by[9][BLOCK];
#pragma omp simd
    for (ptrdiff_t i = 0; i < size; i++) {
        const ByEssential each = by_essential(matches, from + i, essential);
        found->residuals[0][i] = each.residual;
        by[0][i] = each.first_x * x1[i] - x0[i] * each.second_x;
        by[1][i] = each.first_x * x1[n + i] - x0[i] * each.second_y;
        by[2][i] = each.first_x * x1[2 * n + i];
        by[3][i] = each.first_y * x1[i] - x0[n + i] * each.second_x;
        by[4][i] = each.first_y * x1[n + i] - x0[n + i] * each.second_y;
        by[5][i] = each.first_y * x1[2 * n + i];
        by[6][i] = each.first_z * x1[i] - x0[2 * n + i] * each.second_x;
        by[7][i] = each.first_z * x1[n + i] - x0[2 * n + i] * each.second_y;
        by[8][i] = each.first_z * x1[2 * n + i];
    }
    for (int k = 0; k < 5; k++) {
        const double *change = changes[k];
#pragma omp simd
        for (ptrdiff_t i = 0; i < size; i++)
            found->jacobian[k][0][i] = change[0] * by[0][i] + change[1] * by[1][i] + change[2] * by[2][i] +
                                       change[3] * by[3][i] + change[4] * by[4][i] + change[5] * by[5][i] +
                                       change[6] * by[6][i] + change[7] * by[7][i] + change[8] * by[8][i];
    }
}

/* _rotation_jacobian, for a block of matches */
INLINE void rotation_jacobian(const Matches *matches, ptrdiff_t from, ptrdiff_t size, const double *rotation,
                              Derivatives *found)
{
    const double *x0 = matches->rays0 + from, *y0 = x0 + matches->count;
#pragma omp simd
    for (ptrdiff_t i = 0; i < size; i++) {
        const Projected to = project_turned(matches, from + i, rotation);
        const double x = to.x, y = to.y;
        whiten(to, x0[i] - x, y0[i] - y, BEHIND, &found->residuals[0][i], &found->residuals[1][i]);
        whiten(to, x * y, 1 + y * y, 0, &found->jacobian[0][0][i], &found->jacobian[0][1][i]);
        whiten(to, -1 - x * x, -x * y, 0, &found->jacobian[1][0][i], &found->jacobian[1][1][i]);
        whiten(to, y, -x, 0, &found->jacobian[2][0][i], &found->jacobian[2][1][i]);
    }
}

/* A motion, and the matrices that a model derives from it. */
typedef struct {
    Motion motion;
    double essential[9], changes[LARGEST][9];
} Frame;

INLINE Frame frame_of(int model, const Motion *motion)
{
    Frame frame = {.motion = *motion};
    if (model == EPIPOLAR) {
        essential_matrix(motion, frame.essential);
        essential_changes(motion, frame.changes);
    }
    return frame;
}

/* differentiate, for a block of matches */
INLINE void differentiate_block(int model, const Matches *matches, ptrdiff_t from, ptrdiff_t size, const Frame *frame,
                          Derivatives *found)
{
    if (model == EPIPOLAR)
        epipolar_jacobian(matches, from, size, frame->essential, frame->changes, found);
    else
        rotation_jacobian(matches, from, size, frame->motion.rotation, found);
}

/* differentiate: residuals (d, n) and their derivatives (p, d, n). */
FOR_EACH_PROCESSOR
void kpmatch_differentiate(int32_t model, int64_t count, const double *columns, const double *motion, double *residuals,
                      double *jacobian)
{
    const Matches matches = matches_at(count, columns);
    const Frame frame = frame_of(model, (const Motion *)motion);
    for (ptrdiff_t from = 0; from < matches.count; from += BLOCK) {
        const ptrdiff_t size = block_size(&matches, from);
        Derivatives found;
        differentiate_block(model, &matches, from, size, &frame, &found);
        for (int d = 0; d < conditions_of(model); d++) {
            for (ptrdiff_t i = 0; i < size; i++)
                residuals[d * matches.count + from + i] = found.residuals[d][i];
            for (int k = 0; k < numbers_of(model); k++)
                for (ptrdiff_t i = 0; i < size; i++)
                    jacobian[(k * conditions_of(model) + d) * matches.count + from + i] = found.jacobian[k][d][i];
        }
    }
}

/* Estimates: two_view_fit.py. */

/* Tukey's loss of the residuals' lengths, tukey in robust.py. Gradient and Hessian are those of half the loss. */
typedef struct {
    double cost, gradient[LARGEST], hessian[LARGEST][LARGEST];
} Loss;

/* The loss of the matches in `used`, or of all matches if it is NULL. */
INLINE void evaluate(int model, const Matches *matches, const Motion *motion, const uint8_t *used, double cutoff,
                     Loss *loss)
{
    const int conditions = conditions_of(model), numbers = numbers_of(model);
    const Frame frame = frame_of(model, motion);
    *loss = (Loss){0};
    for (ptrdiff_t from = 0; from < matches->count; from += BLOCK) {
        const ptrdiff_t size = block_size(matches, from);
        Derivatives found;
        double weights[BLOCK], cost = 0;
        differentiate_block(model, matches, from, size, &frame, &found);
        for (ptrdiff_t i = 0; i < size; i++)
            weights[i] = used ? used[from + i] : 1;
#pragma omp simd reduction(+ : cost)
        for (ptrdiff_t i = 0; i < size; i++) {
            const double x = found.residuals[0][i], y = conditions == 2 ? found.residuals[1][i] : 0;
            const double length = sqrt(x * x + y * y) * weights[i] / cutoff, share = at_most(length * length, 1);
            weights[i] *= (1 - share) * (1 - share);
            cost += share * (3 - 3 * share + share * share);
        }
        loss->cost += cost * cutoff * cutoff / 3;
        for (int d = 0; d < conditions; d++)
            for (int k = 0; k < numbers; k++) {
                double weighted[BLOCK], slope = 0;
#pragma omp simd reduction(+ : slope)
                for (ptrdiff_t i = 0; i < size; i++) {
                    weighted[i] = weights[i] * found.jacobian[k][d][i];
                    slope += weighted[i] * found.residuals[d][i];
                }
                loss->gradient[k] += slope;
                for (int l = 0; l <= k; l++) {
                    double curvature = 0;
#pragma omp simd reduction(+ : curvature)
                    for (ptrdiff_t i = 0; i < size; i++)
                        curvature += weighted[i] * found.jacobian[l][d][i];
                    loss->hessian[k][l] += curvature;
                }
            }
    }
    for (int k = 0; k < numbers; k++)
        for (int l = 0; l < k; l++)
            loss->hessian[l][k] = loss->hessian[k][l];
}

/* The step of minimise with this damping. Returns 0 if the system is singular. */
INLINE int damped_step(int size, const Loss *loss, double damping, double *step)
{
    double system[LARGEST * LARGEST], trace = 0;
    for (int k = 0; k < size; k++)
        trace += loss->hessian[k][k];
    for (int k = 0; k < size; k++) {
        for (int l = 0; l < size; l++)
            system[size * k + l] = loss->hessian[k][l];
        system[size * k + k] += damping * (loss->hessian[k][k] + 1e-9 * trace + TINY);
        step[k] = -loss->gradient[k];
    }
    return solve(size, system, step);
}

/* minimise: refines a motion in place. `used` is (n,) or NULL. Returns 0 if a system is singular. */
FOR_EACH_PROCESSOR
int32_t kpmatch_minimise(int32_t model, int64_t count, const double *columns, double *motion, double cutoff,
                         int64_t iterations, double settled, const uint8_t *used)
{
    const Matches matches = matches_at(count, columns);
    const int size = numbers_of(model);
    Motion *found = (Motion *)motion;
    Loss loss;
    evaluate(model, &matches, found, used, cutoff, &loss);
    double damping = 1e-4;
    for (int64_t i = 0; i < iterations; i++) {
        Motion trial = *found;
        Loss tried = loss;
        int attempts = 0, better = 0;
        while (!better && attempts++ < 6) {
            double step[LARGEST], promised = 0;
            if (!damped_step(size, &loss, damping, step))
                return 0;
            for (int k = 0; k < size; k++)
                promised -= loss.gradient[k] * step[k];
            if (promised < settled * loss.cost)
                return 1;
            trial = *found;
            move(&trial, size, step);
            evaluate(model, &matches, &trial, used, cutoff, &tried);
            better = tried.cost < loss.cost;
            if (!better)
                damping *= 10;
        }
        if (!better)
            return 1;
        *found = trial;
        loss = tried;
        damping = at_least(damping / 10, 1e-9);
    }
    return 1;
}

/* _hessian: (p, p), from differences of the gradient over steps of `length` radians. */
FOR_EACH_PROCESSOR
void kpmatch_hessian(int32_t model, int64_t count, const double *columns, const double *motion, double cutoff,
                     double length, double *hessian)
{
    const Matches matches = matches_at(count, columns);
    const int size = numbers_of(model);
    Loss start, moved;
    evaluate(model, &matches, (const Motion *)motion, NULL, cutoff, &start);
    double differences[LARGEST][LARGEST];
    for (int k = 0; k < size; k++) {
        Motion trial = *(const Motion *)motion;
        double step[LARGEST] = {0};
        step[k] = length;
        move(&trial, size, step);
        evaluate(model, &matches, &trial, NULL, cutoff, &moved);
        for (int l = 0; l < size; l++)
            differences[k][l] = (moved.gradient[l] - start.gradient[l]) / length;
    }
    for (int k = 0; k < size; k++)
        for (int l = 0; l < size; l++)
            hessian[size * k + l] = (differences[k][l] + differences[l][k]) / 2;
}
