/* Functions of vectors of 8 numbers, for x86-64 with AVX2. KPMATCH_COMPILES is defined if the compiled networks are
 * supported. */
#ifndef KPMATCH_AVX2_H
#define KPMATCH_AVX2_H

#include <stdint.h>

#include "target.h"

#ifdef KPMATCH_COMPILES

#include <stddef.h>
#include <string.h>

/* The code below is for these processors only. */
#pragma GCC target("avx2,fma")
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
INLINE int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float largest_of(__m256 x)
{
    x = _mm256_max_ps(x, _mm256_permute2f128_ps(x, x, 1));
    x = _mm256_max_ps(x, _mm256_permute_ps(x, 0x4E));
    x = _mm256_max_ps(x, _mm256_permute_ps(x, 0xB1));
    return _mm256_cvtss_f32(x);
}

INLINE float sum_of(__m256 x)
{
    x = _mm256_add_ps(x, _mm256_permute2f128_ps(x, x, 1));
    x = _mm256_add_ps(x, _mm256_permute_ps(x, 0x4E));
    x = _mm256_add_ps(x, _mm256_permute_ps(x, 0xB1));
    return _mm256_cvtss_f32(x);
}

/* Functions. Both polynomials were fitted by reweighted least squares. */

/* 2^x for x up to 127, with a relative error of 1e-7; 2^-125 for all x below -125. */
INLINE __m256 power_of_two(__m256 x)
{
    x = _mm256_max_ps(_mm256_set1_ps(-125), x); /* as the second operand, NaN remains NaN */
    const __m256 floor = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 part = _mm256_sub_ps(x, floor);
    __m256 power = _mm256_set1_ps(0.0013276466634124517f);
    power = _mm256_fmadd_ps(power, part, _mm256_set1_ps(0.009675540961325169f));
    power = _mm256_fmadd_ps(power, part, _mm256_set1_ps(0.05550713464617729f));
    power = _mm256_fmadd_ps(power, part, _mm256_set1_ps(0.24022120237350464f));
    power = _mm256_fmadd_ps(power, part, _mm256_set1_ps(0.6931469440460205f));
    power = _mm256_fmadd_ps(power, part, _mm256_set1_ps(1.0000001192092896f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(floor), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), exponent));
}

/* GELU: x times the cumulative normal distribution at x, with an error of 1e-9 in addition to rounding. */
INLINE __m256 gelu(__m256 x)
{
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), one = _mm256_set1_ps(1);
    const __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(_mm256_set1_ps(0.24f), size, one));
    __m256 beyond = _mm256_set1_ps(-0.12438305f); /* probability beyond |x|, over e^(-x^2 / 2) */
    beyond = _mm256_fmadd_ps(beyond, t, _mm256_set1_ps(0.55118001f));
    beyond = _mm256_fmadd_ps(beyond, t, _mm256_set1_ps(-0.6392811f));
    beyond = _mm256_fmadd_ps(beyond, t, _mm256_set1_ps(0.61839065f));
    beyond = _mm256_fmadd_ps(beyond, t, _mm256_set1_ps(-0.14978153f));
    beyond = _mm256_fmadd_ps(beyond, t, _mm256_set1_ps(0.15417337f));
    beyond = _mm256_fmadd_ps(beyond, t, _mm256_set1_ps(0.08970165f));
    const __m256 fall = power_of_two(_mm256_mul_ps(_mm256_mul_ps(size, size), _mm256_set1_ps(-0.72134752f)));
    const __m256 share = _mm256_mul_ps(_mm256_mul_ps(beyond, t), fall);
    return _mm256_fnmadd_ps(size, share, _mm256_max_ps(_mm256_setzero_ps(), x));
}

#endif
#endif
