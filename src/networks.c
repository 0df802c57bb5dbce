/* Version of the compiled networks, and their support by this processor. */
#include <stdint.h>

#include "target.h"

/* Increase this with each change of a function's arguments or meaning. compiled.py loads no other version. */
#define VERSION 5

/* Support by this processor and system: for AVX2, for AVX-512 with bfloat16, and for tiles. */
enum { NOTHING, FLOATS, VECTORS, TILES };

int kpmatch_version(void) { return VERSION; }

#ifdef KPMATCH_COMPILES

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

int kpmatch_support(void)
{
    const long ask_permission = 0x1023, tile_data = 18; /* on Linux, a process must request permission to use tiles */
    const unsigned int tiles = 1u << 24 | 1u << 22;     /* tiles, and their bfloat16 products */
    unsigned int eax, ebx, ecx, edx;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return NOTHING;
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl"))
        return FLOATS;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & tiles) != tiles)
        return VECTORS;
    return syscall(SYS_arch_prctl, ask_permission, tile_data) == 0 ? TILES : VECTORS;
}

#else

int kpmatch_support(void) { return NOTHING; }

#endif
