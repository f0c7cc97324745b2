// Maxout on CPU. A tensor split along one dimension is (outer, pieces, inner): piece k of an output lies k *
// inner elements after piece 0, so one pass over the input makes the values and the index of the winner, and
// one pass makes the gradient.
#include <ATen/Parallel.h>
#include <ATen/WrapDimUtils.h>
#include <torch/library.h>

#include "cpu/tensors.h"
#include "ops/checks.h"

namespace mlpext::cpu {
namespace {

struct Split {
  int64_t outer, inner;  // inner counts every output that follows another at distance one
  at::DimVector output_sizes;

  Split(const Tensor& input, int64_t pieces, int64_t dim) : outer(1), inner(1), output_sizes(input.sizes()) {
    output_sizes[dim] /= pieces;
    for (int64_t d = 0; d < input.dim(); ++d) (d < dim ? outer : inner) *= output_sizes[d];
  }

  // Calls run(outer index, first inner, count) for all outputs, cut for the threads.
  template <class Run> void parallel(Run run) const {
    const int64_t n = outer * inner;
    auto range = [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t row = begin / inner, first = begin % inner,
                      count = std::min(inner - first, end - begin);
        run(row, first, count);
        begin += count;
      }
    };
    if (n <= grain_size) range(0, n);
    else at::parallel_for(0, n, grain_size, range);
  }
};

void run_forward(const Tensor& input, const Split& split, int64_t pieces, const Tensor& output,
                 const Tensor& index) {
  const MaxoutForward kernel =
      kernels().maxout_forward[maxout_index_dtype(pieces) == at::kInt][dtype_of(input)];
  const int64_t size = input.element_size(), index_size = index.defined() ? index.element_size() : 0;
  const auto* x = static_cast<const char*>(input.const_data_ptr());
  auto* y = static_cast<char*>(output.mutable_data_ptr());
  auto* winners = index.defined() ? static_cast<char*>(index.mutable_data_ptr()) : nullptr;
  split.parallel([&](int64_t row, int64_t first, int64_t count) {
    const int64_t at = row * split.inner + first;
    kernel(x + (row * pieces * split.inner + first) * size, y + at * size,
           winners ? winners + at * index_size : nullptr, pieces, split.inner, count);
  });
}

}  // namespace

Tensor maxout(const Tensor& input, int64_t pieces, int64_t dim) {
  if (!is_supported(input)) return composite::maxout(input, pieces, dim);
  const Split split(input, pieces, check_maxout(input, pieces, dim));
  Tensor output = empty(split.output_sizes, input.scalar_type());
  run_forward(input.contiguous(), split, pieces, output, Tensor());
  return output;
}

std::tuple<Tensor, Tensor> maxout_forward(const Tensor& input, int64_t pieces, int64_t dim) {
  if (!is_supported(input)) return composite::maxout_forward(input, pieces, dim);
  const Split split(input, pieces, check_maxout(input, pieces, dim));
  Tensor output = empty(split.output_sizes, input.scalar_type());
  Tensor index = empty(split.output_sizes, maxout_index_dtype(pieces));
  run_forward(input.contiguous(), split, pieces, output, index);
  return {output, index};
}

Tensor maxout_backward(const Tensor& grad_output, const Tensor& index, int64_t pieces, int64_t dim) {
  if (!is_supported(grad_output)) return composite::maxout_backward(grad_output, index, pieces, dim);
  dim = at::maybe_wrap_dim(dim, grad_output.dim());
  at::DimVector sizes(grad_output.sizes());
  sizes[dim] *= pieces;
  Tensor grad_input = empty(sizes, grad_output.scalar_type());
  const Split split(grad_input, pieces, dim);
  const Tensor g = grad_output.contiguous(), winners = index.contiguous();
  const MaxoutBackward kernel =
      kernels().maxout_backward[maxout_index_dtype(pieces) == at::kInt][dtype_of(g)];
  const int64_t size = g.element_size(), index_size = winners.element_size();
  const auto* dy = static_cast<const char*>(g.const_data_ptr());
  const auto* winner = static_cast<const char*>(winners.const_data_ptr());
  auto* dx = static_cast<char*>(grad_input.mutable_data_ptr());
  split.parallel([&](int64_t row, int64_t first, int64_t count) {
    const int64_t at = row * split.inner + first;
    kernel(dy + at * size, winner + at * index_size, dx + (row * pieces * split.inner + first) * size, pieces,
           split.inner, count);
  });
  return grad_input;
}

TORCH_LIBRARY_IMPL(mlpext, CPU, m) {
  m.impl("maxout", maxout);
  m.impl("maxout_forward", maxout_forward);
  m.impl("maxout_backward", maxout_backward);
}

}  // namespace mlpext::cpu
