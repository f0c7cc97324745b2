// The loops for 64-bit ARM: NEON with fused multiply-add and 32 registers, which every such processor has.
#if defined(__aarch64__)
#include "cpu/prelude.h"
#pragma GCC diagnostic ignored "-Wpsabi"  // a note on each call about a C++14 that nothing here is
#define MLPEXT_ISA neon
#define MLPEXT_ISA_NAME "neon"
#define MLPEXT_VECTOR_BYTES 16
#include "cpu/isa_kernels.h"
#endif
