#define MLPEXT_ISA cutlass_bfloat16_forward
#define MLPEXT_APPROXIMATE
#define MLPEXT_ELEMENT ::cutlass::bfloat16_t
#define MLPEXT_FORWARD 1
#define MLPEXT_LAUNCH bfloat16_forward
#include "product.cuh"
