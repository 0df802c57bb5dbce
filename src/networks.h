/* Definitions shared by the compiled networks, for x86-64 with AVX-512 and bfloat16: matrix products.
 *
 * KPMATCH_COMPILES is defined if the compiled networks are supported.
 */
#ifndef KPMATCH_NETWORKS_H
#define KPMATCH_NETWORKS_H

#include <stdint.h>

#include "target.h"

#ifdef KPMATCH_COMPILES

#include <math.h>
#include <stddef.h>
#include <string.h>

/* The code below is for these processors only. Functions for tiles are called only on processors with tiles. */
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma,bmi2")
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define SHARED static __attribute__((unused))

enum {
    ROWS = 32,             /* of a block: two tiles */
    TILE = 16,             /* rows of a tile, and its columns of float32 */
    PAIRS = 2 * TILE,      /* bfloat16 numbers in a row of a tile */
    PACKED = TILE * PAIRS /* bfloat16 numbers in a tile */
};

INLINE int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
INLINE int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The compiler does not know which memory the tile instructions read. This forces earlier writes to memory. */
INLINE void finish_writing(const void *place) { __asm__ volatile("" : : "r"(place) : "memory"); }

INLINE void store_rounded(uint16_t *place, __m512 values)
{
    _mm256_storeu_si256((__m256i *)place, (__m256i)_mm512_cvtneps_pbh(values));
}

/* Take memory for `numbers` numbers from the working memory. */
INLINE uint16_t *taken(char **work, int64_t numbers)
{
    uint16_t *place = (uint16_t *)*work;
    *work += numbers * (int64_t)sizeof(uint16_t);
    return place;
}

/* e^x, with a relative error of 1e-7 in addition to the rounding of x. */
INLINE __m512 exponential(__m512 x)
{
    x = _mm512_mul_ps(x, _mm512_set1_ps(1.4426950408889634f));
    const __m512 part = _mm512_reduce_ps(x, 0x01);
    __m512 power = _mm512_set1_ps(0.0018775759963318706f);
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.008989342488348484f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.05582631379365921f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.24015362560749054f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.6931530833244324f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.9999999403953552f));
    return _mm512_scalef_ps(power, x);
}

/* Matrix products. The left side is rows in memory. The right side is packed: for each 16 columns and each depth of 32,
 * 16 rows of 16 pairs of numbers. */

typedef struct {
    const uint16_t *numbers;
    int64_t stride; /* numbers from one row to the next */
    int64_t depth;  /* a multiple of 32 */
} Side;

SHARED void multiply_by_tiles(const Side *sides, int count, const uint16_t *packed, int64_t columns, float *sums)
{
    int64_t depth = 0;
    for (int i = 0; i < count; i++)
        depth += sides[i].depth;
    finish_writing(sides);
    for (int64_t n = 0; n < columns; n += 2 * TILE) {
        const uint16_t *right0 = packed + n * depth, *right1 = right0 + TILE * depth;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int i = 0; i < count; i++) {
            const int64_t stride = sides[i].stride;
            for (int64_t k = 0; k < sides[i].depth; k += PAIRS, right0 += PACKED, right1 += PACKED) {
                const uint16_t *left = sides[i].numbers + k;
                _tile_loadd(4, left, 2 * stride);
                _tile_loadd(6, right0, 64);
                _tile_loadd(7, right1, 64);
                _tile_loadd(5, left + TILE * stride, 2 * stride);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, sums + n, 4 * columns);
        _tile_stored(1, sums + n + TILE, 4 * columns);
        _tile_stored(2, sums + TILE * columns + n, 4 * columns);
        _tile_stored(3, sums + TILE * columns + n + TILE, 4 * columns);
    }
}

SHARED void multiply_by_vectors(const Side *sides, int count, const uint16_t *packed, int64_t columns, float *sums)
{
    enum { AT_ONCE = 8 };
    int64_t depth = 0;
    for (int i = 0; i < count; i++)
        depth += sides[i].depth;
    for (int64_t n = 0; n < columns; n += 2 * TILE)
        for (int64_t row = 0; row < ROWS; row += AT_ONCE) {
            const uint16_t *right0 = packed + n * depth, *right1 = right0 + TILE * depth;
            __m512 sum0[AT_ONCE], sum1[AT_ONCE];
            for (int r = 0; r < AT_ONCE; r++)
                sum0[r] = sum1[r] = _mm512_setzero_ps();
            for (int i = 0; i < count; i++) {
                const int64_t stride = sides[i].stride;
                const uint16_t *left = sides[i].numbers + row * stride;
                for (int64_t k = 0; k < sides[i].depth; k += 2, right0 += PAIRS, right1 += PAIRS) {
                    const __m512bh pairs0 = (__m512bh)_mm512_loadu_si512(right0);
                    const __m512bh pairs1 = (__m512bh)_mm512_loadu_si512(right1);
#pragma GCC unroll 8
                    for (int r = 0; r < AT_ONCE; r++) {
                        int32_t pair;
                        memcpy(&pair, left + r * stride + k, sizeof pair);
                        const __m512bh same = (__m512bh)_mm512_set1_epi32(pair);
                        sum0[r] = _mm512_dpbf16_ps(sum0[r], same, pairs0);
                        sum1[r] = _mm512_dpbf16_ps(sum1[r], same, pairs1);
                    }
                }
            }
            for (int r = 0; r < AT_ONCE; r++) {
                _mm512_storeu_ps(sums + (row + r) * columns + n, sum0[r]);
                _mm512_storeu_ps(sums + (row + r) * columns + n + TILE, sum1[r]);
            }
        }
}

/* Sums (32, columns) of 32 rows, whose numbers may be in several parts, times a packed matrix. */
INLINE void multiply(int64_t tiles, const Side *sides, int count, const uint16_t *packed, int64_t columns, float *sums)
{
    if (tiles)
        multiply_by_tiles(sides, count, packed, columns, sums);
    else
        multiply_by_vectors(sides, count, packed, columns, sums);
}

#endif
#endif
