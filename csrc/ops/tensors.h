// What the tensor side of the kernels shares on every device.
#pragma once
#include "formulas/dtype.h"
#include "ops/checks.h"

namespace mlpext {

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return float64;
    case at::kFloat: return float32;
    case at::kBFloat16: return bfloat16;
    default: return float16;
  }
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

// (rows, features) in the leading dimensions of `like`.
inline Tensor shaped(const Tensor& rows, const Tensor& like) {
  if (like.dim() == 2 || !rows.defined()) return rows;
  return rows.view(with_last(like.sizes(), rows.size(1)));
}

}  // namespace mlpext
