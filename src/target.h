/* Defines KPMATCH_COMPILES where the compiler and the system are such that the networks can be compiled.
 *
 * Apart from networks.h, which lets the compiler use instructions that the processor may not have.
 */
#ifndef KPMATCH_TARGET_H
#define KPMATCH_TARGET_H

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define KPMATCH_COMPILES
#endif

#endif
