// Whole networks on CPU: layer by layer, with nothing in between.
#include <torch/library.h>

#include "cpu/tensors.h"
#include "ops/network.h"

namespace mlpext::cpu {

using Layers = ByLayers<linear_maxout, linear_maxout_forward, linear_activation_forward, linear_gated,
                        linear_gated_forward, gate_forward>;

TORCH_LIBRARY_IMPL(mlpext, CPU, m) {
  m.impl("mlp", Layers::mlp);
  m.impl("mlp_forward", Layers::mlp_forward);
  m.impl("mlp_backward", Layers::mlp_backward);
}

}  // namespace mlpext::cpu
