#define MLPEXT_ISA cutlass_float16_input_gradient
#define MLPEXT_APPROXIMATE
#define MLPEXT_ELEMENT ::cutlass::half_t
#define MLPEXT_FORWARD 0
#define MLPEXT_LAUNCH float16_input_gradient
#include "product.cuh"
