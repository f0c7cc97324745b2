#define MLPEXT_ISA cuda_float64
#define MLPEXT_MEMORY double
#define MLPEXT_TABLE float64_kernels
#include "cuda/loops.cuh"
