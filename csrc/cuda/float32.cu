#define MLPEXT_ISA cuda_float32
#define MLPEXT_MEMORY float
#define MLPEXT_TABLE float32_kernels
#include "cuda/loops.cuh"
