// f(gate) value on CPU: tensors to pointers. Tensors that lie dense and alike, or in rows as the two halves
// of one tensor do, are cut into pieces that stay in the L1 cache between the passes of gate.h, so that memory
// is read and written once. Every other layout takes the activation, then torch's product.
#include <ATen/Parallel.h>
#include <ATen/TensorUtils.h>
#include <ATen/ops/mul_cpu_dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/gate.h"
#include "cpu/tensors.h"
#include "ops/checks.h"

namespace mlpext::cpu {
namespace {

// 4 KiB for each operand: five of them, of a backward, share the 32 KiB of an L1 cache.
constexpr int64_t piece_bytes = 4096;
// Shorter rows cost more in calls than they save in passes.
constexpr int64_t least_columns = 64;

// Operands that are gone over together: rows of `columns` elements side by side, those of operand i
// strides[i] elements apart. What is dense is one row.
template <std::size_t operands> struct Rows {
  int64_t columns;
  std::array<int64_t, operands> strides;
};

template <class... Others> auto rows_in(const Tensor& first, const Others&... others) {
  using Result = Rows<1 + sizeof...(Others)>;
  if (first.is_non_overlapping_and_dense() && ((others.strides() == first.strides()) && ...))
    return std::optional(Result{first.numel(), {}});
  if (first.dim() < 2 || first.numel() == 0 || first.size(-1) < least_columns) return std::optional<Result>();
  const int64_t columns = first.size(-1);
  const at::DimVector matrix{first.numel() / columns, columns};
  const auto row_stride = [&](const Tensor& t) -> int64_t {  // -1: these are no such rows
    const auto strides = at::detail::computeStride(t.sizes(), t.strides(), matrix);
    if (!strides || (*strides)[1] != 1) return -1;
    const int64_t stride = (*strides)[0];
    return stride == 0 || stride >= columns ? stride : -1;
  };
  const Result rows{columns, {row_stride(first), row_stride(others)...}};
  const bool all = std::ranges::find(rows.strides, -1) == rows.strides.end();
  return all ? std::optional(rows) : std::nullopt;
}

// Calls run(operands, outputs, count) piece by piece, cut for the threads, with pointers to what a piece takes
// and makes. `outputs` are dense; null where one is not asked for. Those that no cache will hold are made in
// the cache and written around it (activation.cpp says why).
template <std::size_t inputs, std::size_t outputs, class Run>
void in_pieces(const Rows<inputs>& rows, int64_t n, int64_t size, std::array<const void*, inputs> from,
               std::array<void*, outputs> to, Run run) {
  const bool streams = n * size >= static_cast<int64_t>(streamed_bytes);
  at::parallel_for(0, n, grain_size, [&](int64_t begin, int64_t end) {
    alignas(64) std::array<std::array<char, piece_bytes>, outputs> buffers;
    while (begin < end) {
      const int64_t row = begin / rows.columns, first = begin % rows.columns;
      const int64_t count = std::min({piece_bytes / size, rows.columns - first, end - begin});
      std::array<const char*, inputs> in;
      std::array<char*, outputs> out;
      for (std::size_t i = 0; i < inputs; ++i)
        in[i] = static_cast<const char*>(from[i]) + (row * rows.strides[i] + first) * size;
      const auto place = [&](std::size_t i) { return static_cast<char*>(to[i]) + begin * size; };
      for (std::size_t i = 0; i < outputs; ++i)
        out[i] = !to[i] ? nullptr : streams ? buffers[i].data() : place(i);
      run(in, out, count);
      for (std::size_t i = 0; i < outputs; ++i)
        if (streams && to[i]) copy_non_temporal(out[i], place(i), count * size);
      begin += count;
    }
  });
}

// An output for rows_in(like, ...).
Tensor output_like(const Tensor& like) {
  return like.is_non_overlapping_and_dense() ? empty_like(like) : empty(like.sizes(), like.scalar_type());
}

// Whether all elements are one, as those of the gradient of a sum are.
bool is_one_number(const Tensor& t) {
  return t.numel() > 0 && std::ranges::all_of(t.strides(), [](int64_t stride) { return stride == 0; });
}

}  // namespace

Tensor gated(const Tensor& gate, const Tensor& value, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  if (!has_gate_kernel(gate, value, index, params)) return composite::gated(gate, value, name, params);
  const auto rows = rows_in(gate, value);
  if (!rows) return at::cpu::mul(activation(gate, name, params), value);
  const Dtype dtype = dtype_of(gate);
  const Gate passes{dtype, kernels().activations[index], params.data()};
  const Tensor output = output_like(gate);
  in_pieces<2, 1>(*rows, gate.numel(), gate.element_size(), {gate.const_data_ptr(), value.const_data_ptr()},
                  {output.mutable_data_ptr()}, [&](const auto& in, const auto& out, int64_t count) {
                    passes.forward(in[0], in[1], out[0], count);
                  });
  return output;
}

std::tuple<Tensor, Tensor> gated_backward(const Tensor& grad_output, const Tensor& gate,
                                          const OptionalTensor& value, std::string_view name, Params params,
                                          GateMask output_mask) {
  const std::size_t index = activation_index(name, params);
  const Tensor& other = value ? *value : gate;  // without a value, its gradient alone is asked for
  if (!has_gate_kernel(gate, grad_output, index, params) || !has_gate_kernel(gate, other, index, params) ||
      (output_mask[0] && !value))
    return composite::gated_backward(grad_output, gate, value, name, params, output_mask);
  const bool one_number = is_one_number(grad_output);
  const Tensor& g = one_number ? gate : grad_output;
  std::tuple<Tensor, Tensor> gradients;
  auto& [of_gate, of_value] = gradients;
  const auto rows = rows_in(gate, other, g);
  if (!rows) {
    if (output_mask[0])
      of_gate = activation_backward(at::cpu::mul(grad_output, other), gate, name, params, false);
    if (output_mask[1]) of_value = at::cpu::mul(grad_output, activation(gate, name, params));
    return gradients;
  }
  const int64_t size = gate.element_size();
  alignas(64) std::array<char, piece_bytes> repeated;
  for (int64_t i = 0; one_number && i < piece_bytes; i += size)
    std::memcpy(repeated.data() + i, grad_output.const_data_ptr(), size);
  const Dtype dtype = dtype_of(gate);
  const Gate passes{dtype, kernels().activations[index], params.data()};
  if (output_mask[0]) of_gate = output_like(gate);
  if (output_mask[1]) of_value = output_like(gate);
  const auto data = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  in_pieces<3, 2>(
      *rows, gate.numel(), size, {gate.const_data_ptr(), other.const_data_ptr(), g.const_data_ptr()},
      {data(of_gate), data(of_value)}, [&](const auto& in, const auto& out, int64_t count) {
        passes.backward(one_number ? repeated.data() : in[2], in[0], in[1], out[0], out[1], count);
      });
  return gradients;
}

TORCH_LIBRARY_IMPL(mlpext, CPU, m) {
  m.impl("gated", gated);
  m.impl("gated_backward", gated_backward);
}

}  // namespace mlpext::cpu
