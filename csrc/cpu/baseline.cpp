// The loops for any machine: SSE2 on x86-64, NEON on ARM, by the compiler's generic vectors.
#include "cpu/prelude.h"
#define MLPEXT_ISA baseline
#define MLPEXT_ISA_NAME "baseline"
#define MLPEXT_VECTOR_BYTES 16
#include "cpu/isa_kernels.h"
