// Whole networks on CPU.
#include "ops/mlp.h"

#include <torch/library.h>

#include "cpu/tensors.h"

namespace mlpext::cpu {

using Layers = Mlp<linear_maxout, linear_maxout_forward, linear_activation_forward>;

TORCH_LIBRARY_IMPL(mlpext, CPU, m) {
  m.impl("mlp", Layers::mlp);
  m.impl("mlp_forward", Layers::mlp_forward);
  m.impl("mlp_backward", composite::mlp_backward);
}

// The vmap behind is_grads_batched: its fallback takes no lists of tensors, but the layers' operators.
TORCH_LIBRARY_IMPL(mlpext, Batched, m) { m.impl("mlp_backward", composite::mlp_backward); }

}  // namespace mlpext::cpu
