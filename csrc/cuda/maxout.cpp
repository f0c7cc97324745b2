// Maxout on CUDA: tensors to pointers. A tensor split along one dimension is (outer, pieces, inner).
#include <ATen/WrapDimUtils.h>
#include <torch/library.h>

#include "cuda/tensors.h"
#include "ops/checks.h"

namespace mlpext::cuda {
namespace {

// outer and inner of a tensor of these sizes that is split along `dim`.
std::pair<int64_t, int64_t> around(at::IntArrayRef sizes, int64_t dim) {
  return {c10::multiply_integers(sizes.slice(0, dim)), c10::multiply_integers(sizes.slice(dim))};
}

// y, and the index of the winner if it is asked for.
std::tuple<Tensor, Tensor> run(const Tensor& input, int64_t pieces, int64_t dim, bool with_index) {
  dim = check_maxout(input, pieces, dim);
  at::DimVector sizes(input.sizes());
  sizes[dim] /= pieces;
  const DeviceStreamGuard on(input);
  const Tensor x = input.contiguous(), y = empty(sizes, input.scalar_type());
  const at::ScalarType index_dtype = maxout_index_dtype(pieces);
  const Tensor index = with_index ? empty(sizes, index_dtype) : Tensor();
  const auto [outer, inner] = around(sizes, dim);
  C10_CUDA_CHECK(kernels(dtype_of(x))
                     .maxout_forward[index_dtype == at::kInt](
                         {outer, pieces, inner, x.const_data_ptr(), y.mutable_data_ptr(),
                          with_index ? index.mutable_data_ptr() : nullptr},
                         on.stream));
  return {y, index};
}

}  // namespace

Tensor maxout(const Tensor& input, int64_t pieces, int64_t dim) {
  if (!is_supported(input)) return composite::maxout(input, pieces, dim);
  return std::get<0>(run(input, pieces, dim, /*with_index=*/false));
}

std::tuple<Tensor, Tensor> maxout_forward(const Tensor& input, int64_t pieces, int64_t dim) {
  if (!is_supported(input)) return composite::maxout_forward(input, pieces, dim);
  return run(input, pieces, dim, /*with_index=*/true);
}

Tensor maxout_backward(const Tensor& grad_output, const Tensor& index, int64_t pieces, int64_t dim) {
  if (!is_supported(grad_output)) return composite::maxout_backward(grad_output, index, pieces, dim);
  dim = at::maybe_wrap_dim(dim, grad_output.dim());
  at::DimVector sizes(grad_output.sizes());
  const auto [outer, inner] = around(sizes, dim);
  sizes[dim] *= pieces;
  const DeviceStreamGuard on(grad_output);
  const Tensor g = grad_output.contiguous(), winners = index.contiguous();
  const Tensor dx = empty(sizes, g.scalar_type());
  C10_CUDA_CHECK(
      kernels(dtype_of(g))
          .maxout_backward[winners.scalar_type() == at::kInt](
              {outer, pieces, inner, g.const_data_ptr(), winners.const_data_ptr(), dx.mutable_data_ptr()},
              on.stream));
  return dx;
}

TORCH_LIBRARY_IMPL(mlpext, CUDA, m) {
  m.impl("maxout", maxout);
  m.impl("maxout_forward", maxout_forward);
  m.impl("maxout_backward", maxout_backward);
}

}  // namespace mlpext::cuda
