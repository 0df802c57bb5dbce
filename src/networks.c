/* Whether the compiled networks are for this package and can run on this processor. */
#include <stdint.h>

#include "target.h"

/* Changes with the arguments or the meaning of a function. compiled.py loads no library with another number. */
#define VERSION 5

/* What of them this processor and system can run: what is for AVX2, for AVX-512 with bfloat16, and for tiles. */
enum { NOTHING, FLOATS, VECTORS, TILES };

int kpmatch_version(void) { return VERSION; }

#ifdef KPMATCH_COMPILES

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

int kpmatch_support(void)
{
    const long ask_permission = 0x1023, tile_data = 18; /* Linux lets a process use tiles that asks for them */
    const unsigned int tiles = 1u << 24 | 1u << 22;     /* and that they multiply bfloat16 */
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
