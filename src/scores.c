/* The last steps of the networks, compiled for x86-64 with AVX2: SuperPoint's scores, and LightGlue's assignment.
 *
 * They use float32 for any precision of the networks, because half precision cannot distinguish the best two scores.
 * test/test_compiled_scores.py compares the results with PyTorch.
 */
#include "avx2.h"

#ifdef KPMATCH_COMPILES

#include <math.h>

enum { WIDTH = 8 }; /* numbers of a vector */

/* e^x, with a relative error of 1e-7 in addition to the rounding of x; e^-86.6 for all lower x. */
INLINE __m256 exponential(__m256 x) { return power_of_two(_mm256_mul_ps(x, _mm256_set1_ps(1.4426950408889634f))); }

enum { CELL = 8, PIXELS = CELL * CELL, LOGITS = PIXELS + 1 };

/* Scores (8 height, 8 width) of pixels: softmax of the logits (height, width, 65) of cells, the last one for none. */
void kpmatch_scores(int64_t height, int64_t width, const float *logits, float *scores)
{
    for (int64_t y = 0; y < height; y++)
        for (int64_t x = 0; x < width; x++) {
            const float *cell = logits + (y * width + x) * LOGITS;
            float *pixels = scores + (y * width * CELL + x) * CELL;
            __m256 most = _mm256_set1_ps(cell[PIXELS]), total = _mm256_setzero_ps(), rows[CELL];
            for (int i = 0; i < CELL; i++)
                most = _mm256_max_ps(most, _mm256_loadu_ps(cell + i * CELL));
            most = _mm256_set1_ps(largest_of(most));
            for (int i = 0; i < CELL; i++) {
                const __m256 below = _mm256_sub_ps(_mm256_loadu_ps(cell + i * CELL), most);
                rows[i] = exponential(below);
                total = _mm256_add_ps(total, rows[i]);
            }
            const __m256 last = _mm256_sub_ps(_mm256_set1_ps(cell[PIXELS]), most);
            const __m256 none = exponential(last);
            const __m256 share = _mm256_set1_ps(1 / (sum_of(total) + _mm256_cvtss_f32(none)));
            for (int i = 0; i < CELL; i++)
                _mm256_storeu_ps(pixels + i * width * CELL, _mm256_mul_ps(rows[i], share));
        }
}

/* The assignment (eqs. 7 to 9 of the LightGlue paper). */

/* Mask of the 8 columns from `first` on: all bits set for columns below `count`. */
INLINE __m256i there(int64_t first, int64_t count)
{
    const __m256i steps = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)least(count - first, WIDTH)), steps);
}

/* Masked stores are slow on AMD's processors, so they are used only at the end of a row. */
INLINE void store(float *place, __m256i some, int64_t first, int64_t count, __m256 values)
{
    if (first + WIDTH <= count)
        _mm256_storeu_ps(place + first, values);
    else
        _mm256_maskstore_ps(place + first, some, values);
}

/* The best partner of each point, by the log probability that two points match.
 *
 * similarities (count0, count1); certain0 (count0,), certain1 (count1,): log probabilities that a point has a match;
 * best0 (count0,), best1 (count1,): the partners; most0 (count0,): the log probability for best0; work (4, count1).
 */
void kpmatch_best(int64_t count0, int64_t count1, const float *similarities, const float *certain0,
                  const float *certain1, int64_t *best0, int64_t *best1, float *most0, float *work)
{
    const __m256 lowest = _mm256_set1_ps(-__builtin_inff());
    const __m256i steps = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    float *largest1 = work, *total1 = work + count1, *most1 = work + 2 * count1, *place1 = work + 3 * count1;
    for (int64_t c = 0; c < count1; c++) {
        largest1[c] = most1[c] = -__builtin_inff();
        total1[c] = place1[c] = 0;
    }
    for (int64_t r = 0; r < count0; r++) {
        const float *row = similarities + r * count1;
        __m256 most = lowest;
        for (int64_t c = 0; c < count1; c += WIDTH) {
            const __m256i some = there(c, count1);
            const __m256 real = _mm256_castsi256_ps(some);
            const __m256 values = _mm256_blendv_ps(lowest, _mm256_maskload_ps(row + c, some), real);
            most = _mm256_max_ps(most, values);
            store(largest1, some, c, count1, _mm256_max_ps(values, _mm256_maskload_ps(largest1 + c, some)));
        }
        most0[r] = largest_of(most);
    }
    for (int64_t r = 0; r < count0; r++) {
        const float *row = similarities + r * count1;
        const __m256 most = _mm256_set1_ps(most0[r]);
        __m256 total = _mm256_setzero_ps();
        for (int64_t c = 0; c < count1; c += WIDTH) {
            const __m256i some = there(c, count1);
            const __m256 real = _mm256_castsi256_ps(some), values = _mm256_maskload_ps(row + c, some);
            const __m256 of_column = exponential(_mm256_sub_ps(values, _mm256_maskload_ps(largest1 + c, some)));
            total = _mm256_add_ps(total, _mm256_and_ps(exponential(_mm256_sub_ps(values, most)), real));
            store(total1, some, c, count1, _mm256_add_ps(_mm256_maskload_ps(total1 + c, some), of_column));
        }
        most0[r] += logf(sum_of(total));
    }
    for (int64_t c = 0; c < count1; c++)
        largest1[c] += logf(total1[c]);
    for (int64_t r = 0; r < count0; r++) {
        const float *row = similarities + r * count1;
        const __m256 whole_row = _mm256_set1_ps(most0[r]), certain = _mm256_set1_ps(certain0[r]);
        const __m256 number = _mm256_castsi256_ps(_mm256_set1_epi32((int32_t)r));
        __m256 most = lowest, place = _mm256_castsi256_ps(steps);
        for (int64_t c = 0; c < count1; c += WIDTH) {
            const __m256i some = there(c, count1), columns = _mm256_add_epi32(steps, _mm256_set1_epi32((int32_t)c));
            const __m256 values = _mm256_maskload_ps(row + c, some);
            const __m256 of_row = _mm256_sub_ps(values, whole_row);
            const __m256 of_column = _mm256_sub_ps(values, _mm256_maskload_ps(largest1 + c, some));
            __m256 score = _mm256_add_ps(_mm256_add_ps(of_row, of_column), certain);
            score = _mm256_add_ps(score, _mm256_maskload_ps(certain1 + c, some));
            score = _mm256_blendv_ps(lowest, score, _mm256_castsi256_ps(some));
            const __m256 better = _mm256_cmp_ps(score, most, _CMP_GT_OQ);
            most = _mm256_blendv_ps(most, score, better);
            place = _mm256_blendv_ps(place, _mm256_castsi256_ps(columns), better);
            const __m256 most_of_column = _mm256_maskload_ps(most1 + c, some);
            const __m256 best = _mm256_cmp_ps(score, most_of_column, _CMP_GT_OQ);
            if (_mm256_testz_ps(best, best))
                continue;
            store(most1, some, c, count1, _mm256_blendv_ps(most_of_column, score, best));
            store(place1, some, c, count1, _mm256_blendv_ps(_mm256_maskload_ps(place1 + c, some), number, best));
        }
        const float highest = largest_of(most);
        const int equal = _mm256_movemask_ps(_mm256_cmp_ps(most, _mm256_set1_ps(highest), _CMP_EQ_OQ));
        int32_t columns[WIDTH], first = INT32_MAX;
        _mm256_storeu_ps((float *)columns, place);
        for (int i = 0; i < WIDTH; i++)
            if (equal >> i & 1 && columns[i] < first)
                first = columns[i];
        most0[r] = isnan(most0[r]) ? most0[r] : highest;
        best0[r] = first;
    }
    for (int64_t c = 0; c < count1; c++) {
        int32_t number;
        memcpy(&number, place1 + c, sizeof number);
        best1[c] = number;
    }
}

#else

void kpmatch_scores(void) {}
void kpmatch_best(void) {}

#endif
