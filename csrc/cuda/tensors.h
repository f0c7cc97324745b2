// What the tensor side of the CUDA kernels shares.
#pragma once
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "ops/tensors.h"
#include "cuda/kernels.h"

namespace mlpext::cuda {

// The device of a tensor made current, and the stream that is current there.
struct On {
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;

  explicit On(const Tensor& tensor)
      : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream(tensor.device().index())) {}
};

// Fresh memory on the current device, without a trip through the dispatcher.
inline Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_cuda(sizes, dtype, /*device=*/std::nullopt, /*memory_format=*/std::nullopt);
}
inline Tensor fresh_like(const Tensor& dense) {
  return at::detail::empty_strided_cuda(dense.sizes(), dense.strides(), dense.scalar_type(),
                                        /*device=*/std::nullopt);
}

inline Matrix matrix(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

Tensor activation_backward(const Tensor& grad_output, const Tensor& saved, std::string_view name,
                           Params params, bool from_output);
std::tuple<Tensor, Tensor> maxout_forward(const Tensor& input, int64_t pieces, int64_t dim);
Tensor maxout(const Tensor& input, int64_t pieces, int64_t dim);
Tensor maxout_backward(const Tensor& grad_output, const Tensor& index, int64_t pieces, int64_t dim);

std::tuple<Tensor, Tensor> linear_activation_forward(const Tensor& input, const Tensor& weight,
                                                     const OptionalTensor& bias, std::string_view name,
                                                     Params params, bool keep_preactivation);
std::tuple<Tensor, Tensor> linear_maxout_forward(const Tensor& input, const Tensor& weight,
                                                 const OptionalTensor& bias);
Tensor linear_maxout(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

// y = f(x + bias) on a dense pair; y may be x. A bias wants x contiguous, with as many columns.
void run_forward(const Tensor& x, const OptionalTensor& bias, const Tensor& y, std::size_t index,
                 Params params);

// Those of a whole network by narrow.cuh's kernels, where they are switched on and serve it.
OptionalTensor narrow_mlp(const Tensor& input, at::TensorList weights, at::TensorList biases,
                          std::string_view names, Params params);
std::optional<std::tuple<Tensor, Tensor, std::vector<Tensor>>> narrow_mlp_forward(const Tensor& input,
                                                                                  at::TensorList weights,
                                                                                  at::TensorList biases,
                                                                                  std::string_view names,
                                                                                  Params params);
std::optional<std::vector<Tensor>> narrow_mlp_backward(const Tensor& grad_output, const Tensor& input,
                                                       at::TensorList weights, at::TensorList biases,
                                                       at::TensorList kept, const OptionalTensor& last,
                                                       bool last_is_output, std::string_view names,
                                                       Params params, at::IntArrayRef output_mask);

}  // namespace mlpext::cuda
