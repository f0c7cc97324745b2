// csrc/cpu/avx512.cpp without AVX-512: the same lanes, loops and epochs, on intrinsics.h.
#include "cpu/prelude.h"

#pragma GCC target("avx2,fma,f16c,bmi2")
#pragma GCC diagnostic ignored \
    "-Wpsabi"  // how 64 bytes are passed between functions is this file's own affair

#define MLPEXT_ISA avx512
#define MLPEXT_ISA_NAME "avx512"
#define MLPEXT_VECTOR_BYTES 64
#include "intrinsics.h"
// After what it builds on.
#include "cpu/loops.h"
