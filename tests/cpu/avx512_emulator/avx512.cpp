// csrc/cpu/avx512.cpp for machines without AVX-512: the same lanes, loops and epochs, on intrinsics.h.
#include "cpu/prelude.h"

#pragma GCC target("avx2,fma,f16c,bmi2")
// 64 bytes are passed from function to function within this file alone.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "intrinsics.h"

#define MLPEXT_EMULATED_AVX512
#define MLPEXT_ISA avx512
#define MLPEXT_ISA_NAME "avx512"
#define MLPEXT_VECTOR_BYTES 64
#include "cpu/isa_kernels.h"
