// Whole networks on CUDA: layer by layer, or as one kernel where experimental/narrow is switched on
// and serves.
#include <torch/library.h>

#include "cuda/experimental/narrow/network.h"
#include "cuda/tensors.h"
#include "ops/network.h"

namespace mlpext::cuda {
namespace {

// A gated layer takes torch's operators, as linear_gated itself does here.
using Layers = ByLayers<linear_maxout, linear_maxout_forward, linear_activation_forward,
                        composite::linear_gated, composite::linear_gated_forward, composite::gate_forward>;

// A narrow network as one kernel where that serves, else its layers one by one.
template <auto narrow, auto layers> struct Either;
template <class Result, class... Arguments, std::optional<Result> (*narrow)(Arguments...),
          Result (*layers)(Arguments...)>
struct Either<narrow, layers> {
  static Result run(Arguments... arguments) {
    if (auto result = narrow(arguments...)) return *std::move(result);
    return layers(arguments...);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(mlpext, CUDA, m) {
  m.impl("mlp", Either<narrow_mlp, Layers::mlp>::run);
  m.impl("mlp_forward", Either<narrow_mlp_forward, Layers::mlp_forward>::run);
  m.impl("mlp_backward", Either<narrow_mlp_backward, composite::mlp_backward>::run);
}

}  // namespace mlpext::cuda
