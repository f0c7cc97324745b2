// The loops for AVX-512 (F, BW, VL, DQ) with BMI2.
#if defined(__x86_64__)
#include "cpu/prelude.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2")
#endif

#define MLPEXT_ISA avx512
#define MLPEXT_ISA_NAME "avx512"
#define MLPEXT_VECTOR_BYTES 64
#include "cpu/isa_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // x86-64
