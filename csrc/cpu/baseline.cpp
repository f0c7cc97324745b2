// The loops for any machine, by the compiler's generic vectors: SSE2 on x86-64. On 64-bit ARM neon.cpp is as
// general, and better.
#if !defined(__aarch64__)
#include "cpu/prelude.h"
#define MLPEXT_ISA baseline
#define MLPEXT_ISA_NAME "baseline"
#define MLPEXT_VECTOR_BYTES 16
#include "cpu/isa_kernels.h"
#endif
