// The mlp operators by narrow.cuh's kernels; nothing where they are switched off or do not serve the network.
#pragma once
#include "ops/network.h"

namespace mlpext::cuda {

OptionalTensor narrow_mlp(const Tensor& input, at::TensorList weights, at::TensorList biases,
                          at::IntArrayRef activations, Params params);
std::optional<std::tuple<Tensor, Tensor, std::vector<Tensor>>> narrow_mlp_forward(const Tensor& input,
                                                                                  at::TensorList weights,
                                                                                  at::TensorList biases,
                                                                                  at::IntArrayRef activations,
                                                                                  Params params);
std::optional<std::vector<Tensor>> narrow_mlp_backward(const Tensor& grad_output, const Tensor& input,
                                                       at::TensorList weights, at::TensorList biases,
                                                       at::TensorList kept, const OptionalTensor& last,
                                                       bool last_is_output, at::IntArrayRef activations,
                                                       Params params, at::IntArrayRef output_mask);

}  // namespace mlpext::cuda
