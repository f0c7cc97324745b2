// The launchers, one a file.
#pragma once
#include "../cutlass.h"

namespace mlpext::cuda::ct {

extern const Launch bfloat16_forward, float16_forward, bfloat16_input_gradient, float16_input_gradient;

}  // namespace mlpext::cuda::ct
