#define MLPEXT_ISA cuda_bfloat16
#define MLPEXT_APPROXIMATE
#define MLPEXT_MEMORY BFloat16
#define MLPEXT_TABLE narrow_bfloat16_kernels
#include "cuda/experimental/narrow/narrow.cuh"
