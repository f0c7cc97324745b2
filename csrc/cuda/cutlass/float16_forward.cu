#define MLPEXT_ISA cutlass_float16_forward
#define MLPEXT_APPROXIMATE
#define MLPEXT_ELEMENT ::cutlass::half_t
#define MLPEXT_FORWARD 1
#define MLPEXT_LAUNCH float16_forward
#include "product.cuh"
