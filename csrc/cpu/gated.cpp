// f(gate) value on CPU: tensors to pointers. Tensors that lie dense and alike, or in rows as the two halves
// of one tensor do, are read where they lie; every other layout goes through torch's TensorIterator.
#include <ATen/Parallel.h>
#include <ATen/TensorUtils.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/gate.h"
#include "cpu/strided.h"
#include "ops/checks.h"

namespace mlpext::cpu {
namespace {

// Shorter rows cost more in calls than the strided loop does.
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

// Calls run(operands, outputs, count), cut for the threads, with pointers to what is taken and made.
// `outputs` are dense; what a null one would hold is thrown away. Those that no cache will hold are made in
// one, block by block, and written around it (activation.cpp says why).
template <std::size_t inputs, std::size_t outputs, class Run>
void run_over(const Rows<inputs>& rows, int64_t n, int64_t size, std::array<const void*, inputs> from,
              std::array<void*, outputs> to, Run run) {
  const bool streams = n * size >= static_cast<int64_t>(streamed_bytes);
  const bool buffered = streams || std::ranges::find(to, nullptr) != to.end();
  const int64_t room = buffered ? static_cast<int64_t>(sizeof(Buffer)) / size : n;
  at::parallel_for(0, n, grain_size, [&](int64_t begin, int64_t end) {
    alignas(64) std::array<Buffer, outputs> buffers;
    while (begin < end) {
      const int64_t row = begin / rows.columns, first = begin % rows.columns;
      const int64_t count = std::min({room, rows.columns - first, end - begin});
      std::array<const char*, inputs> in;
      std::array<char*, outputs> out;
      for (std::size_t i = 0; i < inputs; ++i)
        in[i] = static_cast<const char*>(from[i]) + (row * rows.strides[i] + first) * size;
      const auto place = [&](std::size_t i) { return static_cast<char*>(to[i]) + begin * size; };
      for (std::size_t i = 0; i < outputs; ++i)
        out[i] = streams || !to[i] ? reinterpret_cast<char*>(buffers[i].data()) : place(i);
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

// An output with the strides that torch gives to that of an operator on these.
Tensor output_of(const Tensor& a, const Tensor& b) {
  return at::TensorIteratorConfig()
      .add_owned_output(Tensor())
      .add_const_input(a)
      .add_const_input(b)
      .build()
      .output();
}

// Whether all elements are one, as those of the gradient of a sum are.
bool is_one_number(const Tensor& t) {
  return t.numel() > 0 && std::ranges::all_of(t.strides(), [](int64_t stride) { return stride == 0; });
}

// f(gate) factor; in a layout of its own as torch's product of `leading` and f(gate) has it.
Tensor product(const Gate& kernel, const Tensor& gate, const Tensor& factor, const Tensor& leading) {
  const auto rows = rows_in(gate, factor);
  if (!rows) {
    at::TensorIterator all = at::TensorIteratorConfig()
                                 .add_owned_output(output_of(leading, output_of(gate, gate)))
                                 .add_const_input(gate)
                                 .add_const_input(factor)
                                 .build();
    iterate<1, 2>(all, [&](char** data, int64_t n) { kernel.forward(data[1], data[2], data[0], n); });
    return all.output();
  }
  const Tensor output = output_like(gate);
  run_over<2, 1>(*rows, gate.numel(), gate.element_size(), {gate.const_data_ptr(), factor.const_data_ptr()},
                 {output.mutable_data_ptr()}, [&](const auto& in, const auto& out, int64_t count) {
                   kernel.forward(in[0], in[1], out[0], count);
                 });
  return output;
}

}  // namespace

Tensor gated(const Tensor& gate, const Tensor& value, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  if (!has_gate_kernel(gate, value, index, params)) return composite::gated(gate, value, name, params);
  return product({dtype_of(gate), kernels().activations[index], params.data()}, gate, value, gate);
}

std::tuple<Tensor, Tensor> gated_backward(const Tensor& grad_output, const Tensor& gate,
                                          const OptionalTensor& value, std::string_view name, Params params,
                                          GateMask output_mask) {
  const std::size_t index = activation_index(name, params);
  if (!has_gate_kernel(gate, grad_output, index, params) ||
      (output_mask[0] && !(value && has_gate_kernel(gate, *value, index, params))))
    return composite::gated_backward(grad_output, gate, value, name, params, output_mask);
  const Gate kernel{dtype_of(gate), kernels().activations[index], params.data()};
  Tensor of_gate, of_value;
  if (!output_mask[0]) {
    if (output_mask[1]) of_value = product(kernel, gate, grad_output, grad_output);
    return {of_gate, of_value};
  }
  // The one number of a sum's gradient is laid out, to be read like the others.
  const Tensor g = is_one_number(grad_output) ? output_of(gate, gate).copy_(grad_output) : grad_output;
  if (const auto rows = rows_in(gate, *value, g)) {
    of_gate = output_like(gate);
    if (output_mask[1]) of_value = output_like(gate);
    run_over<3, 2>(*rows, gate.numel(), gate.element_size(),
                   {gate.const_data_ptr(), value->const_data_ptr(), g.const_data_ptr()},
                   {of_gate.mutable_data_ptr(), output_mask[1] ? of_value.mutable_data_ptr() : nullptr},
                   [&](const auto& in, const auto& out, int64_t count) {
                     kernel.backward(in[2], in[0], in[1], out[0], out[1], count);
                   });
  } else {
    of_gate = output_of(grad_output, *value), of_value = output_of(grad_output, output_of(gate, gate));
    at::TensorIterator all = at::TensorIteratorConfig()
                                 .add_output(of_gate)
                                 .add_output(of_value)
                                 .add_const_input(g)
                                 .add_const_input(gate)
                                 .add_const_input(*value)
                                 .build();
    iterate<2, 3>(all, [&](char** data, int64_t n) {
      kernel.backward(data[2], data[3], data[4], data[0], data[1], n);
    });
    if (!output_mask[1]) of_value.reset();
  }
  return {of_gate, of_value};
}

TORCH_LIBRARY_IMPL(mlpext, CPU, m) {
  m.impl("gated", gated);
  m.impl("gated_backward", gated_backward);
}

}  // namespace mlpext::cpu
