/* Defines KPMATCH_COMPILES if the compiler and the system support the compiled networks.
 *
 * This is separate from networks.h, which allows the compiler to use instructions that the processor may not have.
 */
#ifndef KPMATCH_TARGET_H
#define KPMATCH_TARGET_H

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define KPMATCH_COMPILES
#endif

#endif
