// Activations on CUDA: tensors to pointers. Dense tensors are one run of memory; for every other layout
// torch's TensorIterator decides the order, the output's strides and which dimensions are one.
#include <ATen/TensorIterator.h>
#include <torch/library.h>

#include "cuda/tensors.h"
#include "ops/checks.h"

namespace mlpext::cuda {
namespace {

// Runs launcher over the iterator's output (operand 0) and inputs. False: it has more dimensions than a
// kernel takes.
bool iterate(at::TensorIterator& iterator, LaunchElementwise launcher, Params params) {
  Elementwise job{};
  job.n = iterator.numel();
  job.layout.dims = iterator.ndim();
  if (iterator.ndim() > Layout::max_dims) return false;
  job.output = iterator.data_ptr(0);
  for (int k = 1; k < iterator.ntensors(); ++k) job.inputs[k - 1] = iterator.data_ptr(k);
  for (int d = 0; d < iterator.ndim(); ++d) {
    job.layout.sizes[d] = iterator.shape()[d];
    for (int k = 0; k < iterator.ntensors(); ++k)
      job.layout.strides[k][d] = iterator.strides(k)[d] / iterator.element_size(k);
  }
  const DeviceStreamGuard on(iterator.tensor(0));
  C10_CUDA_CHECK(launcher(params.data(), job, on.stream));
  return true;
}

bool strided_forward(const Tensor& input, Tensor& output, std::size_t index, Params params) {
  at::TensorIterator iterator = at::TensorIteratorConfig().add_output(output).add_const_input(input).build();
  output = iterator.output();
  return iterate(iterator, kernels(dtype_of(input)).activations[index].forward, params);
}

}  // namespace

Tensor activation(const Tensor& input, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  if (!has_kernel(input, index, params)) return composite::activation(input, name, params);
  Tensor output;
  if (input.is_non_overlapping_and_dense()) {
    const DeviceStreamGuard on(input);
    output = empty_like(input);
    run_forward(input, std::nullopt, output, index, params);
  } else if (!strided_forward(input, output, index, params)) {
    return composite::activation(input, name, params);
  }
  return output;
}

Tensor& activation_(Tensor& input, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  if (!has_kernel(input, index, params)) return composite::activation_(input, name, params);
  if (input.is_non_overlapping_and_dense()) run_forward(input, std::nullopt, input, index, params);
  else if (!strided_forward(input, input, index, params)) return composite::activation_(input, name, params);
  return input;
}

void run_forward(const Tensor& x, const OptionalTensor& bias, const Tensor& y, std::size_t index,
                 Params params) {
  const DeviceStreamGuard on(x);
  Elementwise job{};
  job.n = x.numel(), job.output = y.mutable_data_ptr(), job.inputs[0] = x.const_data_ptr();
  if (bias) job.bias = bias->const_data_ptr(), job.columns = bias->numel();
  C10_CUDA_CHECK(kernels(dtype_of(x)).activations[index].forward(params.data(), job, on.stream));
}

Tensor activation_backward(const Tensor& grad_output, const Tensor& saved, std::string_view name,
                           Params params, bool from_output) {
  const std::size_t index = activation_index(name, params);
  const ActivationInfo& info = activation_infos[index];
  if (!has_kernel(grad_output, index, params) || !is_supported(saved) ||
      grad_output.device() != saved.device() || grad_output.scalar_type() != saved.scalar_type() ||
      (from_output && !info.output_suffices(params.data())))
    return composite::activation_backward(grad_output, saved, name, params, from_output);

  const ActivationKernels& table = kernels(dtype_of(saved)).activations[index];
  const LaunchElementwise launcher = from_output ? table.backward_from_output : table.backward;
  if (saved.is_non_overlapping_and_dense() && saved.sizes() == grad_output.sizes() &&
      saved.strides() == grad_output.strides()) {
    const DeviceStreamGuard on(saved);
    const Tensor grad_input = empty_like(saved);
    Elementwise job{};
    job.n = saved.numel(), job.output = grad_input.mutable_data_ptr();
    job.inputs[0] = grad_output.const_data_ptr(), job.inputs[1] = saved.const_data_ptr();
    C10_CUDA_CHECK(launcher(params.data(), job, on.stream));
    return grad_input;
  }
  Tensor grad_input;
  at::TensorIterator iterator = at::TensorIteratorConfig()
                                    .add_output(grad_input)
                                    .add_const_input(grad_output)
                                    .add_const_input(saved)
                                    .build();
  if (!iterate(iterator, launcher, params))
    return composite::activation_backward(grad_output, saved, name, params, from_output);
  return iterator.output();
}

TORCH_LIBRARY_IMPL(mlpext, CUDA, m) {
  m.impl("activation", activation);
  m.impl("activation_", activation_);
  m.impl("activation_backward", activation_backward);
}

}  // namespace mlpext::cuda
