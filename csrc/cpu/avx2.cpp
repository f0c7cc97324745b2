// The loops for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include "cpu/prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define MLPEXT_ISA avx2
#define MLPEXT_ISA_NAME "avx2"
#define MLPEXT_VECTOR_BYTES 32
#include "cpu/isa_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // x86-64
