#define MLPEXT_ISA cuda_float32
#define MLPEXT_MEMORY float
#define MLPEXT_TABLE narrow_float32_kernels
#include "narrow.cuh"
