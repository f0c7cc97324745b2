#define MLPEXT_ISA cutlass_bfloat16_input_gradient
#define MLPEXT_APPROXIMATE
#define MLPEXT_ELEMENT ::cutlass::bfloat16_t
#define MLPEXT_FORWARD 0
#define MLPEXT_LAUNCH bfloat16_input_gradient
#include "product.cuh"
