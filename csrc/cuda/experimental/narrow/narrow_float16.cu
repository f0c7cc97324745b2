#define MLPEXT_ISA cuda_float16
#define MLPEXT_APPROXIMATE
#define MLPEXT_MEMORY Half
#define MLPEXT_TABLE narrow_float16_kernels
#include "cuda/experimental/narrow/narrow.cuh"
