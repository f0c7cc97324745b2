// What the tensor side of the kernels shares: dtypes, fresh outputs, how work is cut for threads.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

#include "../ops.h"
#include "kernels.h"

namespace mlpext::cpu {

inline Dtype dtype_of(const Tensor& served) {
  switch (served.scalar_type()) {
    case at::kDouble: return float64;
    case at::kFloat: return float32;
    case at::kBFloat16: return bfloat16;
    default: return float16;
  }
}

// Elements a thread must have to be worth waking: 32768, as native.
inline constexpr int64_t grain_size = 32768;

// Fresh memory, without a trip through the dispatcher: 0.1 us against 0.5.
inline Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, /*memory_format=*/std::nullopt);
}

inline Tensor fresh_like(const Tensor& dense) {
  if (dense.is_contiguous()) return fresh(dense.sizes(), dense.scalar_type());
  return at::detail::empty_strided_cpu(dense.sizes(), dense.strides(), dense.scalar_type());
}

// (*, features) as (rows, features).
inline Tensor rows_of(const Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  const int64_t features = tensor.size(-1);  // may be 0, where reshape could not infer the rows
  return tensor.reshape({c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1)), features});
}

// The sizes of `like` with another last dimension.
inline at::DimVector with_last(at::IntArrayRef like, int64_t last) {
  at::DimVector sizes(like);
  sizes.back() = last;
  return sizes;
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

// y = f(x) on a dense pair; y may be x.
void run_forward(const Tensor& x, const Tensor& y, std::size_t index, Params params);

}  // namespace mlpext::cpu
