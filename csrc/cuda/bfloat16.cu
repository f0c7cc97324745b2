#define MLPEXT_ISA cuda_bfloat16
#define MLPEXT_APPROXIMATE
#define MLPEXT_MEMORY BFloat16
#define MLPEXT_TABLE bfloat16_kernels
#include "cuda/loops.cuh"
