// Activations on CPU: tensors to pointers. Dense tensors are one run of memory; every other layout goes
// through torch's TensorIterator, for its order and its output strides, and a buffer that stays in the L1
// cache.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/choice.h"
#include "cpu/strided.h"
#include "ops/checks.h"

namespace mlpext::cpu {
namespace {

// A dense run of n elements, cut for the threads: run(first, count, result), which writes where `result`
// points. What will not be found in a cache again is made in one, block by block, and written around it: the
// lines of the output need not be read first, a third of the traffic.
template <class Run> void parallel(int64_t n, char* result, int64_t size, bool in_place, Run run) {
  const bool streams = !in_place && n * size >= static_cast<int64_t>(streamed_bytes);
  auto part = [&](int64_t begin, int64_t end) {
    if (!streams) return run(begin, end - begin, result + begin * size);
    alignas(64) Buffer block;
    char* data = reinterpret_cast<char*>(block.data());
    const int64_t room = static_cast<int64_t>(sizeof(Buffer)) / size;
    for (; begin < end; begin += room) {
      const int64_t count = std::min(room, end - begin);
      run(begin, count, data);
      copy_non_temporal(data, result + begin * size, count * size);
    }
  };
  if (n <= grain_size) part(0, n);
  else at::parallel_for(0, n, grain_size, part);
}

// y = f(x) on a dense pair; y may be x.
void run_forward(const Tensor& x, const Tensor& y, std::size_t index, Params params) {
  const Forward kernel = kernels().activations[index].forward[dtype_of(x)];
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t size = x.element_size();
  parallel(x.numel(), to, size, from == to, [&](int64_t first, int64_t count, char* result) {
    kernel(params.data(), from + first * size, result, count);
  });
}

// Whether a call is torch's: there is no kernel for it, or torch's is the faster one.
bool is_torchs(Pass pass, const Tensor& tensor, std::size_t index, Params params) {
  return !has_kernel(tensor, index, params) || torch_serves(pass, index, dtype_of(tensor), tensor.numel());
}

void strided_forward(const Tensor& input, Tensor& output, std::size_t index, Params params) {
  const Forward kernel = kernels().activations[index].forward[dtype_of(input)];
  at::TensorIterator iterator = at::TensorIteratorConfig().add_output(output).add_const_input(input).build();
  iterate<1, 1>(iterator, [&](char** data, int64_t n) { kernel(params.data(), data[1], data[0], n); });
  output = iterator.output();
}

}  // namespace

Tensor activation(const Tensor& input, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  if (is_torchs(Pass::forward, input, index, params)) return composite::activation(input, name, params);
  Tensor output;
  if (input.is_non_overlapping_and_dense()) {
    output = empty_like(input);
    run_forward(input, output, index, params);
  } else {
    strided_forward(input, output, index, params);
  }
  return output;
}

Tensor& activation_(Tensor& input, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  if (is_torchs(Pass::forward, input, index, params)) return composite::activation_(input, name, params);
  if (input.is_non_overlapping_and_dense()) run_forward(input, input, index, params);
  else strided_forward(input, input, index, params);
  return input;
}

Tensor activation_backward(const Tensor& grad_output, const Tensor& saved, std::string_view name,
                           Params params, bool from_output) {
  const std::size_t index = activation_index(name, params);
  const ActivationInfo& info = activation_infos[index];
  const ActivationKernels& table = kernels().activations[index];
  if (is_torchs(Pass::backward, grad_output, index, params) || !is_supported(saved) ||
      grad_output.scalar_type() != saved.scalar_type() ||
      (from_output && !info.output_suffices(params.data())))
    return composite::activation_backward(grad_output, saved, name, params, from_output);

  const Backward kernel = (from_output ? table.backward_from_output : table.backward)[dtype_of(saved)];
  if (saved.is_non_overlapping_and_dense() && saved.sizes() == grad_output.sizes() &&
      saved.strides() == grad_output.strides()) {
    Tensor grad_input = empty_like(saved);
    const auto* g = static_cast<const char*>(grad_output.const_data_ptr());
    const auto* s = static_cast<const char*>(saved.const_data_ptr());
    auto* dx = static_cast<char*>(grad_input.mutable_data_ptr());
    const int64_t size = saved.element_size();
    parallel(saved.numel(), dx, size, false, [&](int64_t first, int64_t count, char* result) {
      kernel(params.data(), g + first * size, s + first * size, result, count);
    });
    return grad_input;
  }
  Tensor grad_input;
  at::TensorIterator iterator = at::TensorIteratorConfig()
                                    .add_output(grad_input)
                                    .add_const_input(grad_output)
                                    .add_const_input(saved)
                                    .build();
  iterate<1, 2>(iterator,
                [&](char** data, int64_t n) { kernel(params.data(), data[1], data[2], data[0], n); });
  return iterator.output();
}

TORCH_LIBRARY_IMPL(mlpext, CPU, m) {
  m.impl("activation", activation);
  m.impl("activation_", activation_);
  m.impl("activation_backward", activation_backward);
}

}  // namespace mlpext::cpu
