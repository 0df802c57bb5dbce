/* What the C files of the library kpmatch_geometry share. */
#ifndef KPMATCH_GEOMETRY_H
#define KPMATCH_GEOMETRY_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* Binary packages are for any x86-64 processor. Those with AVX2 get code of their own, chosen at loading. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#if __GNUC__ >= 12
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#endif
#else
#define FOR_EACH_PROCESSOR
#endif
/* Into each of these versions. */
#define INLINE static inline __attribute__((always_inline))

#endif
