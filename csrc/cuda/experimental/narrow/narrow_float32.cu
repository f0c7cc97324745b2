#define MLPEXT_ISA cuda_float32
#define MLPEXT_MEMORY float
#define MLPEXT_TABLE narrow_float32_kernels
#include "cuda/experimental/narrow/narrow.cuh"
