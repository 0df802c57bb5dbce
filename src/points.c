/* Neighbour searches, compiled: loops of flow.py, track_set.py and lost_tracks.py, which use trees and NumPy instead.
 * With some hundred points, checking all of them takes less time than building a tree.
 *
 * test/test_compiled_tracks.py compares both. Points (2, N) are all x followed by all y, in float32. Their differences
 * in float32 are precise enough to skip a block of points. Points that may be close are compared in float64.
 */
#include "geometry.h"

enum {
    BLOCK = 32,      /* points that are skipped together */
    NEIGHBOURS = 7,  /* as in flow.py */
    MIDDLE = NEIGHBOURS / 2
};
#define WITH_ROUNDING 1.00001

typedef struct {
    int64_t count;
    const float *x, *y;
} Points;

INLINE double square_of_distance(const Points *points, int64_t i, float x, float y)
{
    const double across = (double)points->x[i] - (double)x, down = (double)points->y[i] - (double)y;
    return across * across + down * down;
}

/* Whether any of up to BLOCK points, from index `from` on, may be closer than sqrt(square). False for NaN. */
INLINE int any_within(const Points *points, int64_t from, float x, float y, double square)
{
    const float *restrict xs = points->x + from, *restrict ys = points->y + from;
    const int64_t count = points->count - from < BLOCK ? points->count - from : BLOCK;
    float least = INFINITY;
#pragma omp simd reduction(min : least)
    for (int64_t i = 0; i < count; i++) {
        const float across = xs[i] - x, down = ys[i] - y, here = across * across + down * down;
        least = here < least ? here : least;
    }
    return least <= square * WITH_ROUNDING;
}

INLINE int64_t block_end(const Points *points, int64_t from)
{
    return points->count - from < BLOCK ? points->count : from + BLOCK;
}

/* The nearest of M others (2, M) to each of N points (2, N), if closer than `furthest`; otherwise M and infinity. */
FOR_EACH_PROCESSOR
void kpmatch_nearest(int64_t count, const float *points, int64_t others, const float *places, double furthest,
                     double *distances, int64_t *nearest)
{
    const Points all = {others, places, places + others};
    for (int64_t i = 0; i < count; i++) {
        const float x = points[i], y = points[count + i];
        double least = furthest * furthest;
        nearest[i] = others;
        for (int64_t from = 0; from < others; from += BLOCK) {
            if (!any_within(&all, from, x, y, least))
                continue;
            for (int64_t j = from; j < block_end(&all, from); j++) {
                const double square = square_of_distance(&all, j, x, y);
                if (square < least) {
                    least = square;
                    nearest[i] = j;
                }
            }
        }
        distances[i] = nearest[i] < others ? sqrt(least) : INFINITY;
    }
}

/* Mask (N,) of points (2, N) that stay: of two within the distance, the one with the lower age, then higher score. */
FOR_EACH_PROCESSOR
void kpmatch_first_of_each_place(int64_t count, const float *points, double distance, const uint64_t *ages,
                                 const float *scores, uint8_t *stay)
{
    const Points all = {count, points, points + count};
    const double square = distance * distance;
    for (int64_t i = 0; i < count; i++)
        stay[i] = 1;
    for (int64_t i = 0; i < count; i++)
        for (int64_t from = i + 1; from < count; from += BLOCK) {
            if (!any_within(&all, from, all.x[i], all.y[i], square))
                continue;
            for (int64_t j = from; j < block_end(&all, from); j++)
                if (square_of_distance(&all, j, all.x[i], all.y[i]) <= square) {
                    const int first = ages[i] != ages[j] ? ages[i] < ages[j] : !(scores[i] < scores[j]);
                    stay[first ? j : i] = 0;
                }
        }
}

/* The median of NEIGHBOURS values, which are sorted in place. */
INLINE float median(float *values)
{
    for (int i = 1; i < NEIGHBOURS; i++)
        for (int j = i; j > 0 && values[j] < values[j - 1]; j--) {
            const float lower = values[j];
            values[j] = values[j - 1];
            values[j - 1] = lower;
        }
    return values[MIDDLE];
}

/* Median motion of the neighbours of points (2, N), and their disagreement.
 *
 * The neighbours are M others (2, M) with their moves (2, M). `own` (N,) marks points that are among the others, and
 * are not their own neighbours.
 */
FOR_EACH_PROCESSOR
void kpmatch_neighbours(int64_t count, const float *points, const uint8_t *own, int64_t others, const float *places,
                        const float *moves, float *middles, float *spreads)
{
    const Points all = {others, places, places + others};
    for (int64_t i = 0; i < count; i++) {
        const float x = points[i], y = points[count + i];
        double squares[NEIGHBOURS + 1]; /* squared distances of the nearest ones, in order */
        int64_t near[NEIGHBOURS + 1];
        for (int k = 0; k <= NEIGHBOURS; k++) {
            squares[k] = INFINITY;
            near[k] = 0;
        }
        for (int64_t from = 0; from < others; from += BLOCK) {
            if (!any_within(&all, from, x, y, squares[NEIGHBOURS]))
                continue;
            for (int64_t j = from; j < block_end(&all, from); j++) {
                const double square = square_of_distance(&all, j, x, y);
                if (!(square < squares[NEIGHBOURS]))
                    continue;
                int k = NEIGHBOURS;
                for (; k > 0 && square < squares[k - 1]; k--) {
                    squares[k] = squares[k - 1];
                    near[k] = near[k - 1];
                }
                squares[k] = square;
                near[k] = j;
            }
        }
        float across[NEIGHBOURS], down[NEIGHBOURS], apart[NEIGHBOURS];
        const int64_t *first = near + (own[i] ? 1 : 0);
        for (int k = 0; k < NEIGHBOURS; k++) {
            across[k] = moves[first[k]];
            down[k] = moves[others + first[k]];
        }
        const float middle_x = median(across), middle_y = median(down);
        for (int k = 0; k < NEIGHBOURS; k++) {
            const float dx = moves[first[k]] - middle_x, dy = moves[others + first[k]] - middle_y;
            apart[k] = sqrtf(dx * dx + dy * dy);
        }
        middles[2 * i] = middle_x;
        middles[2 * i + 1] = middle_y;
        spreads[i] = median(apart);
    }
}

/* Largest number in each row (R, N), without points (2, N) closer than `distance` to the row's place (2, R). */
FOR_EACH_PROCESSOR
void kpmatch_largest_elsewhere(int64_t rows, int64_t count, const float *numbers, const float *points,
                               const float *places, float distance, float *largest)
{
    for (int64_t r = 0; r < rows; r++) {
        const float *restrict row = numbers + r * count, *restrict xs = points, *restrict ys = points + count;
        const float x = places[r], y = places[rows + r], square = distance * distance;
        float most = -1;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < count; i++) {
            const float across = xs[i] - x, down = ys[i] - y;
            const float here = across * across + down * down < square ? -1 : row[i];
            most = here > most ? here : most;
        }
        largest[r] = most;
    }
}
