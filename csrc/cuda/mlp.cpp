// Whole networks on CUDA.
#include "../mlp.h"

#include <torch/library.h>

#include "tensors.h"

namespace mlpext::cuda {

using Layers = Mlp<linear_maxout, linear_maxout_forward, linear_activation_forward>;

TORCH_LIBRARY_IMPL(mlpext, CUDA, m) {
  m.impl("mlp", Layers::mlp);
  m.impl("mlp_forward", Layers::mlp_forward);
  m.impl("mlp_backward", Layers::mlp_backward);
}

}  // namespace mlpext::cuda
