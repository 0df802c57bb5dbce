/* The loops of structure.py, compiled: `triangulate`, `place` and the equations of the last camera's motion.
 *
 * As with geometry.c, the NumPy code with these names describes the algorithms. Change both together;
 * test/test_compiled_tracks.py compares them. Functions keep no state between calls and allocate no memory.
 *
 * Cameras are (F, 12): a rotation (3, 3) and a translation each. Sights are (F, 5, T): a ray, NaN if unknown, and the
 * factors that whiten its residuals.
 */
#include "geometry.h"

#include <float.h>

/* Constants of structure.py, with the same names. */
#define SMALLEST_DEPTH 1e-3f
#define DAMPING 1e-9f
#define ROUNDING 1e-6f
#define TINY 1e-30f

enum {
    BLOCK = 64, /* points at a time, so that their sums stay in the nearest cache */
    SIGHT = 5,  /* numbers in a sight */
    MOTION = 6  /* parameters of a motion */
};

/* Unlike fmaxf, this returns NaN for NaN. */
INLINE float at_least(float value, float bound) { return value < bound ? bound : value; }

INLINE float is_known(float ray) { return fabsf(ray) <= FLT_MAX ? 1.0f : 0.0f; }
INLINE float or_zero(float ray, float known) { return known > 0 ? ray : 0; }

INLINE ptrdiff_t block_size(int64_t count, int64_t from)
{
    return (ptrdiff_t)(count - from < BLOCK ? count - from : BLOCK);
}

/* The whitening of a sight's errors. It makes residuals zero if the sight is unknown. */
typedef struct {
    float known; /* 1 or 0 */
    float xx, yx, yy;
} Whitening;

INLINE Whitening whitening(const float *ray, int64_t count)
{
    const float known = is_known(*ray);
    const Whitening white = {known, or_zero(ray[2 * count], known), or_zero(ray[3 * count], known),
                             or_zero(ray[4 * count], known)};
    return white;
}

INLINE void whiten(const Whitening *white, float *residual)
{
    residual[1] = white->yx * residual[0] + white->yy * residual[1];
    residual[0] *= white->xx;
}

/* 1/z (T,) of points by least squares with a prior (T,) and its information (T,); also the information (T,) of both. */
FOR_EACH_PROCESSOR
void kpmatch_triangulate(int64_t frames, int64_t count, const float *cameras, const float *sights, int64_t reference,
                         const float *prior, const float *prior_information, float *inverse, float *information)
{
    for (int64_t from = 0; from < count; from += BLOCK) {
        const ptrdiff_t n = block_size(count, from);
        const float *restrict x = sights + SIGHT * reference * count + from, *restrict y = x + count;
        float weighted[BLOCK], total[BLOCK];
        for (ptrdiff_t i = 0; i < n; i++) {
            weighted[i] = prior[from + i] * prior_information[from + i];
            total[i] = prior_information[from + i];
        }
        for (int64_t f = 0; f < frames; f++) {
            const float *r = cameras + 12 * f, *t = r + 9;
            const float *restrict u = sights + SIGHT * f * count + from, *restrict v = u + count;
#pragma omp simd
            for (ptrdiff_t i = 0; i < n; i++) {
                const Whitening white = whitening(u + i, count);
                const float seen_x = or_zero(u[i], white.known), seen_y = or_zero(v[i], white.known);
                const float z = r[6] * x[i] + r[7] * y[i] + r[8];
                float along[2] = {t[0] - seen_x * t[2], t[1] - seen_y * t[2]}, apart[2];
                apart[0] = seen_x * z - (r[0] * x[i] + r[1] * y[i] + r[2]);
                apart[1] = seen_y * z - (r[3] * x[i] + r[4] * y[i] + r[5]);
                whiten(&white, along);
                whiten(&white, apart);
                weighted[i] += along[0] * apart[0] + along[1] * apart[1];
                total[i] += along[0] * along[0] + along[1] * along[1];
            }
        }
        for (ptrdiff_t i = 0; i < n; i++) {
            inverse[from + i] = weighted[i] / at_least(total[i], TINY);
            information[from + i] = total[i];
        }
    }
}

/* A point as seen by a camera. */
typedef struct {
    float turned[3];      /* its ray in the camera's axes */
    float where[2];       /* x/z and y/z, predicted */
    Whitening white;
    float nearness;       /* 0 if the sight is unknown */
    float residual[2];    /* whitened */
    float jacobian[3][2]; /* of the residual by x/z, y/z and 1/z in the reference's frame */
} Sight;

INLINE Sight sight(const float *r, float x, float y, float inverse, const float *ray, int64_t count)
{
    const float *t = r + 9;
    Sight s;
    s.white = whitening(ray, count);
    for (int k = 0; k < 3; k++)
        s.turned[k] = r[3 * k] * x + r[3 * k + 1] * y + r[3 * k + 2];
    const float depth = at_least(s.turned[2] + t[2] * inverse, SMALLEST_DEPTH);
    s.nearness = s.white.known / depth;
    s.where[0] = (s.turned[0] + t[0] * inverse) / depth;
    s.where[1] = (s.turned[1] + t[1] * inverse) / depth;
    s.residual[0] = s.where[0] - or_zero(ray[0], s.white.known);
    s.residual[1] = s.where[1] - or_zero(ray[count], s.white.known);
    whiten(&s.white, s.residual);
    for (int k = 0; k < 2; k++) {
        s.jacobian[0][k] = (r[3 * k] - s.where[k] * r[6]) * s.nearness;
        s.jacobian[1][k] = (r[3 * k + 1] - s.where[k] * r[7]) * s.nearness;
        s.jacobian[2][k] = (t[k] - s.where[k] * t[2]) * s.nearness;
    }
    for (int k = 0; k < 3; k++)
        whiten(&s.white, s.jacobian[k]);
    return s;
}

INLINE float product(const float *a, const float *b) { return a[0] * b[0] + a[1] * b[1]; }

/* Sums over the frames for a block of points: squared residuals, number of sights, and normal equations. */
typedef struct {
    float squares[BLOCK], seen[BLOCK];
    float gradient[3][BLOCK];
    float inverse[6][BLOCK]; /* inverse of the normal equations: (0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2) */
} Normal;

/* Inverses of symmetric positive matrices; zero if rounding dominates the determinant. */
INLINE void invert(float (*upper)[BLOCK], ptrdiff_t n)
{
#pragma omp simd
    for (ptrdiff_t i = 0; i < n; i++) {
        const float a = upper[0][i], b = upper[1][i], c = upper[2][i];
        const float d = upper[3][i], e = upper[4][i], f = upper[5][i];
        const float aa = d * f - e * e, ab = c * e - b * f, ac = b * e - c * d;
        const float determinant = a * aa + b * ab + c * ac;
        const float regular = determinant > ROUNDING * a * d * f ? 1.0f : 0.0f, divisor = regular > 0 ? determinant : 1;
        upper[0][i] = regular > 0 ? aa / divisor : 0;
        upper[1][i] = regular > 0 ? ab / divisor : 0;
        upper[2][i] = regular > 0 ? ac / divisor : 0;
        upper[3][i] = regular > 0 ? (a * f - c * c) / divisor : 0;
        upper[4][i] = regular > 0 ? (b * c - a * e) / divisor : 0;
        upper[5][i] = regular > 0 ? (a * d - b * b) / divisor : 0;
    }
}

INLINE void normal_equations(int64_t frames, int64_t count, const float *cameras, const float *sights,
                             const float *landmarks, int64_t from, ptrdiff_t n, Normal *sums)
{
    const float *restrict x = landmarks + from, *restrict y = x + count, *restrict inverse = y + count;
    float *restrict squares = sums->squares, *restrict seen = sums->seen;
    float *restrict g0 = sums->gradient[0], *restrict g1 = sums->gradient[1], *restrict g2 = sums->gradient[2];
    float *restrict n00 = sums->inverse[0], *restrict n01 = sums->inverse[1], *restrict n02 = sums->inverse[2];
    float *restrict n11 = sums->inverse[3], *restrict n12 = sums->inverse[4], *restrict n22 = sums->inverse[5];
    for (ptrdiff_t i = 0; i < n; i++) {
        squares[i] = seen[i] = g0[i] = g1[i] = g2[i] = n00[i] = n01[i] = n02[i] = n11[i] = n12[i] = 0;
        n22[i] = DAMPING;
    }
    for (int64_t f = 0; f < frames; f++) {
        const float *restrict rays = sights + SIGHT * f * count + from;
#pragma omp simd
        for (ptrdiff_t i = 0; i < n; i++) {
            const Sight s = sight(cameras + 12 * f, x[i], y[i], inverse[i], rays + i, count);
            seen[i] += s.white.known;
            squares[i] += product(s.residual, s.residual);
            g0[i] += product(s.jacobian[0], s.residual);
            g1[i] += product(s.jacobian[1], s.residual);
            g2[i] += product(s.jacobian[2], s.residual);
            n00[i] += product(s.jacobian[0], s.jacobian[0]);
            n01[i] += product(s.jacobian[0], s.jacobian[1]);
            n02[i] += product(s.jacobian[0], s.jacobian[2]);
            n11[i] += product(s.jacobian[1], s.jacobian[1]);
            n12[i] += product(s.jacobian[1], s.jacobian[2]);
            n22[i] += product(s.jacobian[2], s.jacobian[2]);
        }
    }
    invert(sums->inverse, n);
}

/* Multiply a vector by the inverse of a point's normal equations. */
INLINE void solve(const Normal *sums, ptrdiff_t i, const float *vector, float *solution)
{
    const float(*upper)[BLOCK] = sums->inverse;
    solution[0] = upper[0][i] * vector[0] + upper[1][i] * vector[1] + upper[2][i] * vector[2];
    solution[1] = upper[1][i] * vector[0] + upper[3][i] * vector[1] + upper[4][i] * vector[2];
    solution[2] = upper[2][i] * vector[0] + upper[4][i] * vector[1] + upper[5][i] * vector[2];
}

/* Move points (3, T) by a Gauss-Newton step. Also gives their squared residuals (T,) and degrees of freedom. */
FOR_EACH_PROCESSOR
void kpmatch_place(int64_t frames, int64_t count, const float *cameras, const float *sights, float *landmarks,
                   float *squares, int64_t *freedom)
{
    Normal sums;
    for (int64_t from = 0; from < count; from += BLOCK) {
        const ptrdiff_t n = block_size(count, from);
        normal_equations(frames, count, cameras, sights, landmarks, from, n, &sums);
        for (ptrdiff_t i = 0; i < n; i++) {
            const float gradient[3] = {sums.gradient[0][i], sums.gradient[1][i], sums.gradient[2][i]};
            float step[3];
            solve(&sums, i, gradient, step);
            const float less = gradient[0] * step[0] + gradient[1] * step[1] + gradient[2] * step[2];
            squares[from + i] = sums.squares[i] - less < 0 ? sums.squares[i] : sums.squares[i] - less;
            freedom[from + i] = 2 * (int64_t)sums.seen[i] - 3;
            for (int k = 0; k < 3; k++)
                landmarks[k * count + from + i] -= step[k];
        }
    }
}

/* Derivatives (2, 6) of a point in the last camera by its motion: rotation about the axes, then translation. */
INLINE void by_motion(const Sight *s, float inverse, float (*moves)[MOTION])
{
    const float x = s->turned[0], y = s->turned[1], z = s->turned[2];
    const float across[MOTION] = {0, z, -y, inverse, 0, 0}, down[MOTION] = {-z, 0, x, 0, inverse, 0};
    const float away[MOTION] = {y, -x, 0, 0, 0, inverse};
    for (int c = 0; c < MOTION; c++) {
        float move[2] = {(across[c] - s->where[0] * away[c]) * s->nearness,
                         (down[c] - s->where[1] * away[c]) * s->nearness};
        whiten(&s->white, move);
        moves[0][c] = move[0];
        moves[1][c] = move[1];
    }
}

/* Normal equations of the last camera's motion (6, 6) and (6,), with the points (3, T) eliminated.
 *
 * Points with a mean square that is large compared to the cutoff have less weight. The joint step of the points is
 * steps (3, T) minus coupling (3, 6, T) times the motion's step.
 */
FOR_EACH_PROCESSOR
void kpmatch_motion_equations(int64_t frames, int64_t count, const float *cameras, const float *sights,
                              const float *landmarks, double cutoff, double *hessian, double *gradient, float *steps,
                              float *coupling)
{
    Normal sums;
    for (int k = 0; k < MOTION * MOTION; k++)
        hessian[k] = 0;
    for (int k = 0; k < MOTION; k++)
        gradient[k] = 0;
    const float *last = cameras + 12 * (frames - 1), *rays = sights + SIGHT * (frames - 1) * count;
    for (int64_t from = 0; from < count; from += BLOCK) {
        const ptrdiff_t n = block_size(count, from);
        normal_equations(frames, count, cameras, sights, landmarks, from, n, &sums);
        for (ptrdiff_t i = 0; i < n; i++) {
            const int64_t t = from + i;
            const float inverse = landmarks[2 * count + t];
            const Sight s = sight(last, landmarks[t], landmarks[count + t], inverse, rays + t, count);
            const float point_gradient[3] = {sums.gradient[0][i], sums.gradient[1][i], sums.gradient[2][i]};
            const double part = 1 + sums.squares[i] / (cutoff * (2 * sums.seen[i] - 3));
            /* A point fitted behind a camera has no inverse matrix, and no weight for the motion. */
            const double weight = sums.inverse[0][i] > 0 ? 1 / (part * part) : 0;
            float moves[2][MOTION], mixed[3][MOTION], own[3];
            double products[3][MOTION]; /* the inverse times mixed */
            by_motion(&s, inverse, moves);
            solve(&sums, i, point_gradient, own);
            for (int c = 0; c < MOTION; c++) {
                float column[3], solution[3];
                for (int a = 0; a < 3; a++)
                    column[a] = mixed[a][c] = s.jacobian[a][0] * moves[0][c] + s.jacobian[a][1] * moves[1][c];
                solve(&sums, i, column, solution);
                for (int a = 0; a < 3; a++) {
                    products[a][c] = solution[a];
                    coupling[(MOTION * a + c) * count + t] = solution[a];
                }
            }
            for (int a = 0; a < 3; a++)
                steps[a * count + t] = -own[a];
            for (int c = 0; c < MOTION; c++) {
                double sum = (double)moves[0][c] * s.residual[0] + (double)moves[1][c] * s.residual[1];
                for (int a = 0; a < 3; a++)
                    sum -= products[a][c] * point_gradient[a];
                gradient[c] += weight * sum;
                for (int d = 0; d < MOTION; d++) {
                    double entry = (double)moves[0][c] * moves[0][d] + (double)moves[1][c] * moves[1][d];
                    for (int a = 0; a < 3; a++)
                        entry -= mixed[a][c] * products[a][d];
                    hessian[MOTION * c + d] += weight * entry;
                }
            }
        }
    }
}
