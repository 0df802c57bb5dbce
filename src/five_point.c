/* Essential matrices from samples of five matches: functions of five_point.py, compiled. See two_view.c. */
#include "two_view.h"

enum {
    POINTS = 5, /* matches in a sample */
    PAIRS = 10, /* of the unknowns x, y, z and 1 */
    DEGREE = 10, /* of the polynomial */
    CELLS = 64, /* of the grid for roots from -1 to 1 */
    ITERATIONS = 8, /* of Newton's method */
    PART = 64 /* matches whose costs are computed at once */
};

/* Indices of _PAIRS, and the monomial in _MONOMIALS for each pair and unknown. */
static const int FIRST[PAIRS] = {0, 0, 0, 0, 1, 1, 1, 2, 2, 3}, SECOND[PAIRS] = {0, 1, 2, 3, 1, 2, 3, 2, 3, 3};
static const int MONOMIAL[PAIRS][4] = {{0, 2, 4, 5},     {2, 3, 8, 9},     {4, 8, 10, 11},   {5, 9, 11, 12},
                                       {3, 1, 6, 7},     {8, 6, 13, 14},   {9, 7, 14, 15},   {10, 13, 16, 17},
                                       {11, 14, 17, 18}, {12, 15, 18, 19}};

INLINE double product_of(const double *one, const double *other, int size)
{
    double sum = 0;
    for (int i = 0; i < size; i++)
        sum += one[i] * other[i];
    return sum;
}

/* _reflect, for one vector (9,) */
INLINE void reflect(double *vector, const double *normal)
{
    const double along = product_of(vector, normal, 9);
    for (int i = 0; i < 9; i++)
        vector[i] -= along * normal[i];
}

/* _null_space, for one sample: (4, 9) */
INLINE void null_space(const Matches *matches, const int32_t *sample, double (*basis)[9])
{
    const ptrdiff_t n = matches->count;
    double conditions[POINTS][9], normals[POINTS][9];
    for (int k = 0; k < POINTS; k++)
        for (int i = 0; i < 9; i++)
            conditions[k][i] = matches->rays0[i / 3 * n + sample[k]] * matches->rays1[i % 3 * n + sample[k]];
    for (int k = 0; k < POINTS; k++) {
        double *normal = normals[k];
        for (int i = 0; i < 9; i++)
            normal[i] = i < k ? 0 : conditions[k][i];
        normal[k] += copysign(sqrt(product_of(normal, normal, 9)), normal[k]);
        const double scale = sqrt(2 / at_least(product_of(normal, normal, 9), TINY));
        for (int i = 0; i < 9; i++)
            normal[i] *= scale;
        for (int other = k + 1; other < POINTS; other++)
            reflect(conditions[other], normal);
    }
    for (int j = 0; j < 4; j++) {
        for (int i = 0; i < 9; i++)
            basis[j][i] = i == POINTS + j;
        for (int k = POINTS - 1; k >= 0; k--)
            reflect(basis[j], normals[k]);
    }
}

INLINE void add_cross(const double *a, const double *b, double *sum)
{
    sum[0] += a[1] * b[2] - a[2] * b[1];
    sum[1] += a[2] * b[0] - a[0] * b[2];
    sum[2] += a[0] * b[1] - a[1] * b[0];
}

/* _equations, for one sample: (10, 20) */
INLINE void equations_of(double (*basis)[9], double (*equations)[20])
{
    for (int i = 0; i < 10; i++)
        for (int j = 0; j < 20; j++)
            equations[i][j] = 0;
    for (int pair = 0; pair < PAIRS; pair++) {
        const double *one = basis[FIRST[pair]], *other = basis[SECOND[pair]];
        double square[9], minors[3] = {0, 0, 0};
        for (int row = 0; row < 3; row++)
            for (int column = 0; column < 3; column++)
                square[3 * row + column] = product_of(one + 3 * row, other + 3 * column, 3);
        add_cross(one + 3, other + 6, minors);
        if (one != other) {
            double both[9];
            for (int i = 0; i < 9; i++)
                both[i] = square[i] + square[i % 3 * 3 + i / 3];
            for (int i = 0; i < 9; i++)
                square[i] = both[i];
            add_cross(other + 3, one + 6, minors);
        }
        const double half = 0.5 * (square[0] + square[4] + square[8]);
        for (int i = 0; i < 9; i += 4)
            square[i] -= half;
        for (int unknown = 0; unknown < 4; unknown++) {
            double cube[9];
            multiply(square, basis[unknown], cube);
            const int monomial = MONOMIAL[pair][unknown];
            for (int i = 0; i < 9; i++)
                equations[i][monomial] += cube[i];
            equations[9][monomial] += product_of(minors, basis[unknown], 3);
        }
    }
}

/* Eliminate the first ten monomials. Of the last ten, the equations from the fourth on are those of np.linalg.solve.
 * Returns 0 if the system is singular. */
INLINE int reduce(double (*equations)[20])
{
    for (int i = 0; i < 10; i++) {
        int pivot = i;
        for (int row = i + 1; row < 10; row++)
            if (!(fabs(equations[row][i]) <= fabs(equations[pivot][i]))) /* true for NaN */
                pivot = row;
        if (equations[pivot][i] == 0)
            return 0;
        const double inverse = 1 / equations[pivot][i];
        for (int column = i; column < 20; column++) {
            const double kept = equations[i][column];
            equations[i][column] = equations[pivot][column] * inverse;
            equations[pivot][column] = pivot == i ? equations[i][column] : kept;
        }
        for (int row = i < 4 ? i + 1 : 4; row < 10; row++) { /* the first four are not used once they are reduced */
            if (row == i)
                continue;
            const double factor = equations[row][i];
            for (int column = i; column < 20; column++)
                equations[row][column] -= factor * equations[i][column];
        }
    }
    return 1;
}

/* _eliminate, for one sample: (3, 3, 5) */
INLINE void eliminate(double (*equations)[20], double (*rows)[3][5])
{
    static const int START[3] = {10, 13, 16}, HIGHEST[3] = {2, 2, 3};
    for (int row = 0; row < 3; row++)
        for (int column = 0; column < 3; column++) {
            const double *first = equations[4 + 2 * row] + START[column], *second = first + 20;
            const int degree = HIGHEST[column];
            for (int power = 0; power < 5; power++)
                rows[row][column][power] = 0;
            for (int power = 0; power <= degree; power++) {
                rows[row][column][power] += first[degree - power];
                rows[row][column][power + 1] -= second[degree - power];
            }
        }
}

/* _determinant, for one sample: (11,) */
INLINE void determinant(double (*rows)[3][5], double *whole)
{
    for (int power = 0; power <= DEGREE; power++)
        whole[power] = 0;
    for (int i = 0; i < 3; i++) {
        const int j = (i + 1) % 3, k = (i + 2) % 3;
        double minor[7] = {0};
        for (int a = 0; a < 4; a++)
            for (int b = 0; b < 4; b++)
                minor[a + b] += rows[j][0][a] * rows[k][1][b] - rows[k][0][a] * rows[j][1][b];
        for (int a = 0; a < 5; a++)
            for (int b = 0; b < 7; b++)
                whole[a + b] += rows[i][2][a] * minor[b];
    }
}

/* Value and derivative of an ascending polynomial. */
INLINE double value_of(int degree, const double *polynomial, double place, double *slope)
{
    double value = polynomial[degree], derivative = 0;
    for (int power = degree - 1; power >= 0; power--) {
        derivative = derivative * place + value;
        value = value * place + polynomial[power];
    }
    *slope = derivative;
    return value;
}

/* _root, for one polynomial */
INLINE double root_of(int degree, const double *polynomial, double low, double high, int rises)
{
    double root = 0.5 * (low + high), slope;
    for (int i = 0; i < ITERATIONS; i++) {
        const double value = value_of(degree, polynomial, root, &slope);
        if ((value >= 0) == rises)
            high = root;
        else
            low = root;
        root -= value / slope;
        if (!(root >= low && root <= high)) /* true for NaN */
            root = 0.5 * (low + high);
    }
    return root;
}

/* _roots, for one polynomial. Returns their number, at most 2 DEGREE: rounding may find more than there are. */
INLINE int roots_of(const double *polynomial, double *roots)
{
    double values[CELLS + 1], slopes[CELLS + 1], derivative[DEGREE];
    int count = 0;
    for (int power = 1; power <= DEGREE; power++)
        derivative[power - 1] = power * polynomial[power];
#pragma omp simd
    for (int i = 0; i <= CELLS; i++)
        values[i] = value_of(DEGREE, polynomial, 2.0 * i / CELLS - 1, slopes + i);
    for (int i = 0; i < CELLS && count + 2 <= 2 * DEGREE; i++) {
        const double low = 2.0 * i / CELLS - 1, high = 2.0 * (i + 1) / CELLS - 1;
        const int left = values[i] >= 0, right = values[i + 1] >= 0;
        if (left != right)
            roots[count++] = root_of(DEGREE, polynomial, low, high, right);
        else if (left != (slopes[i] >= 0) && right == (slopes[i + 1] >= 0)) {
            double slope;
            const double turning = root_of(DEGREE - 1, derivative, low, high, left);
            if ((value_of(DEGREE, polynomial, turning, &slope) >= 0) != left) {
                roots[count++] = root_of(DEGREE, polynomial, low, turning, !left);
                roots[count++] = root_of(DEGREE, polynomial, turning, high, left);
            }
        }
    }
    return count;
}

/* _mix, for the root s / c: an essential matrix (9,) of norm 1 */
INLINE void mix(double (*basis)[9], double (*rows)[3][5], double s, double c, double *essential)
{
    double system[3][3], powers[5], best = -1, solution[3] = {0, 0, 0};
    for (int power = 0; power < 5; power++) {
        powers[power] = 1;
        for (int i = 0; i < 4; i++)
            powers[power] *= i < power ? s : c;
    }
    for (int row = 0; row < 3; row++)
        for (int column = 0; column < 3; column++)
            system[row][column] = product_of(rows[row][column], powers, 5);
    for (int k = 0; k < 3; k++) {
        double cross[3] = {0, 0, 0};
        add_cross(system[k == 2], system[k == 0 ? 1 : 2], cross);
        const double size = product_of(cross, cross, 3);
        if (size > best) {
            best = size;
            for (int i = 0; i < 3; i++)
                solution[i] = cross[i];
        }
    }
    for (int i = 0; i < 9; i++)
        essential[i] = c * (solution[0] * basis[0][i] + solution[1] * basis[1][i]) +
                       solution[2] * (s * basis[2][i] + c * basis[3][i]);
    const double norm = sqrt(product_of(essential, essential, 9));
    for (int i = 0; i < 9; i++)
        essential[i] /= norm;
}

/* Cost of an essential matrix; a larger number than `cost`, or NaN, if it does not cost less. */
INLINE double cost_of(const Matches *matches, const double *essential, double limit, double cost)
{
    double sum = 0, costs[PART];
    for (ptrdiff_t from = 0; from < matches->count && !(sum >= cost); from += PART) {
        const ptrdiff_t rest = matches->count - from, size = rest < PART ? rest : PART;
#pragma omp simd
        for (ptrdiff_t i = 0; i < size; i++)
            costs[i] = at_most(squared_distance(matches, from + i, essential), limit);
        for (ptrdiff_t i = 0; i < size; i++)
            sum += costs[i];
    }
    return sum;
}

/* best_essential: replaces the essential matrix (9,) and its cost if a matrix of the samples (samples, 5) costs less.
 * Returns whether one does. */
FOR_EACH_PROCESSOR
int32_t kpmatch_best_essential(int64_t count, const double *columns, int64_t samples, const int32_t *indices,
                               double inlier_threshold, double *essential, double *cost)
{
    const Matches matches = matches_at(count, columns);
    const double limit = inlier_threshold * inlier_threshold;
    int32_t found = 0;
    for (int64_t k = 0; k < samples; k++) {
        double basis[4][9], equations[10][20], rows[3][3][5], polynomial[2][DEGREE + 1], roots[2 * DEGREE];
        null_space(&matches, indices + POINTS * k, basis);
        equations_of(basis, equations);
        if (!reduce(equations))
            continue;
        eliminate(equations, rows);
        determinant(rows, polynomial[0]);
        for (int power = 0; power <= DEGREE; power++)
            polynomial[1][power] = polynomial[0][DEGREE - power];
        for (int reversed = 0; reversed < 2; reversed++) {
            const int number = roots_of(polynomial[reversed], roots);
            for (int i = 0; i < number; i++) {
                double candidate[9];
                mix(basis, rows, reversed ? 1 : roots[i], reversed ? roots[i] : 1, candidate);
                const double value = cost_of(&matches, candidate, limit, *cost);
                if (value < *cost) {
                    *cost = value;
                    found = 1;
                    for (int j = 0; j < 9; j++)
                        essential[j] = candidate[j];
                }
            }
        }
    }
    return found;
}
