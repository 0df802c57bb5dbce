/* Definitions shared by the C files of the library kpmatch_geometry. */
#ifndef KPMATCH_GEOMETRY_H
#define KPMATCH_GEOMETRY_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* Binary packages must run on any x86-64 processor. Processors with AVX2 get their own code, chosen at load time. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#if __GNUC__ >= 12
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#endif
#else
#define FOR_EACH_PROCESSOR
#endif
/* Inlined into each of these versions. */
#define INLINE static inline __attribute__((always_inline))

#endif
