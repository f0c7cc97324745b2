// Linear + activation and linear + maxout on CUDA: torch's product, and one elementwise kernel for everything
// around it. bias + relu, and in 16 bits bias + gelu_tanh, are torch's own fused product instead, whose
// epilogue (cuBLASLt's RELU_BIAS or GELU_BIAS) applies them to z while it is in registers.
#include <ATen/ops/_addmm_activation_cuda_dispatch.h>
#include <ATen/ops/addmm_cuda_dispatch.h>
#include <ATen/ops/mm_cuda_dispatch.h>
#include <ATen/ops/sum_cuda_dispatch.h>
#include <torch/library.h>

#include "cuda/tensors.h"
#include "ops/checks.h"

namespace mlpext::cuda {
namespace {

// x W' + b for rows of x: (rows, out_features).
Tensor product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return bias ? at::cuda::addmm(*bias, x, weight.t()) : at::cuda::mm(x, weight.t());
}

// Whether the bias is added by the activation's pass instead. In 16 bits the product would be rounded once
// more.
bool bias_in_pass(const Tensor& x) { return x.element_size() > 2; }

// Whether at::_addmm_activation computes this activation. Its gelu is tanh's approximation by the hardware's
// tanh, whose error float32 would show and 16 bits do not.
bool torch_fuses(std::size_t activation, const Tensor& x) {
  return (activation == index_of<ReLU> && x.element_size() <= 4) ||
         (activation == index_of<GELUTanh> && x.element_size() == 2);
}

// dz, whose columns are `pieces` times those of dy, and its column sums, in one pass.
std::tuple<Tensor, Tensor> dz_and_sums(LaunchRows launcher, Params params, const Tensor& dy,
                                       const Tensor& saved, int64_t pieces) {
  const int64_t rows = dy.size(0), columns = dy.size(1), width = pieces * columns;
  const int size = static_cast<int>(dy.element_size());
  const int64_t chunks = width == 0 ? 0 : RowTiles(size, rows, columns).chunks;
  const DeviceStreamGuard on(dy);
  const Tensor dz = empty({rows, width}, dy.scalar_type()), db = empty({width}, dy.scalar_type());
  const Tensor partial = empty({chunks > 1 ? chunks * width * sum_size(size) : 0}, at::kByte);
  C10_CUDA_CHECK(launcher(params.data(),
                          {rows, columns, pieces, matrix(dy), matrix(saved), dz.mutable_data_ptr(),
                           db.mutable_data_ptr(), partial.mutable_data_ptr()},
                          on.stream));
  return {dz, db};
}

}  // namespace

std::tuple<Tensor, Tensor> linear_activation_forward(const Tensor& input, const Tensor& weight,
                                                     const OptionalTensor& bias, std::string_view name,
                                                     Params params, bool keep_preactivation) {
  const std::size_t index = activation_index(name, params);
  if (!is_supported_linear(input, weight, bias) || !has_kernel(input, index, params))
    return composite::linear_activation_forward(input, weight, bias, name, params, keep_preactivation);
  check_linear(input, weight, bias);
  const Tensor x = rows_of(input);
  const bool identity = index == index_of<Identity>;
  // With nothing to multiply torch returns the bias alone.
  if (bias && !keep_preactivation && x.size(1) > 0 && torch_fuses(index, x)) {
    const Tensor y = at::cuda::_addmm_activation(*bias, x, weight.t(), /*beta=*/1, /*alpha=*/1,
                                                 /*use_gelu=*/index == index_of<GELUTanh>);
    return {shaped(y, input), Tensor()};
  }
  if (bias && !identity && !keep_preactivation && bias_in_pass(x)) {
    const Tensor y = product(x, weight, std::nullopt);
    run_forward(y, bias->contiguous(), y, index, params);
    return {shaped(y, input), Tensor()};
  }
  const Tensor z = product(x, weight, bias);
  if (identity && !keep_preactivation) return {shaped(z, input), Tensor()};
  const DeviceStreamGuard on(z);
  const Tensor y = keep_preactivation ? empty_like(z) : z;
  run_forward(z, std::nullopt, y, index, params);
  return {shaped(y, input), keep_preactivation ? shaped(z, input) : Tensor()};
}

namespace {

// The parts of linear_activation_backward, on matrices. From dy dz and, if one kernel makes both, db; of
// identity dz is dy.
std::tuple<Tensor, Tensor> activation_backward_rows(const Tensor& grad_output, const OptionalTensor& saved,
                                                    std::string_view name, Params params, bool from_output,
                                                    bool with_sums) {
  if (name == Identity::name) return {rows_of(grad_output), Tensor()};
  if (!with_sums)
    return {rows_of(activation_backward(grad_output, *saved, name, params, from_output)), Tensor()};
  const ActivationKernels& table = kernels(dtype_of(grad_output)).activations[activation_index(name, params)];
  return dz_and_sums(from_output ? table.backward_rows_from_output : table.backward_rows, params,
                     rows_of(grad_output), rows_of(*saved), /*pieces=*/1);
}

// From dz those gradients of input, weight and bias that are asked for.
std::tuple<Tensor, Tensor, Tensor> product_backward(const Tensor& dz, const OptionalTensor& x,
                                                    const OptionalTensor& weight, Mask mask) {
  Tensor dx, dw, db;
  if (mask[0]) dx = at::cuda::mm(dz, *weight);
  if (mask[1]) {
    dw = at::cuda::mm(dz.t(), rows_of(*x));
  }
  if (mask[2]) db = at::cuda::sum(dz, at::OptionalIntArrayRef(0));
  return {dx, dw, db};
}

}  // namespace

Tensor linear_activation(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                         std::string_view name, Params params) {
  return std::get<0>(
      linear_activation_forward(input, weight, bias, name, params, /*keep_preactivation=*/false));
}

std::tuple<Tensor, Tensor, Tensor> linear_activation_backward(
    const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& saved, std::string_view name, Params params, bool from_output, Mask output_mask) {
  const std::size_t index = activation_index(name, params);
  const ActivationInfo& info = activation_infos[index];
  const bool identity = index == index_of<Identity>;
  if (!is_supported(grad_output) ||
      (!identity && (!is_supported(*saved) || saved->scalar_type() != grad_output.scalar_type() ||
                     saved->device() != grad_output.device() || !has_kernel(grad_output, index, params) ||
                     (from_output && !info.output_suffices(params.data())))))
    return composite::linear_activation_backward(grad_output, input, weight, saved, name, params, from_output,
                                                 output_mask);
  const auto [dz, sums] =
      activation_backward_rows(grad_output, saved, name, params, from_output, output_mask[2]);
  if (sums.defined()) output_mask[2] = false;
  auto [dx, dw, db] = product_backward(dz, input, weight, output_mask);
  return {shaped(dx, grad_output), dw, sums.defined() ? sums : db};
}

namespace {

std::tuple<Tensor, Tensor> run_linear_maxout(const Tensor& input, const Tensor& weight,
                                             const OptionalTensor& bias, bool with_index) {
  check_linear_maxout(input, weight, bias);
  const OptionalTensor b = bias ? OptionalTensor(bias->flatten(0, 1)) : bias;
  const Tensor z = product(rows_of(input), weight.flatten(0, 1), b);
  if (!with_index) return {shaped(maxout(z, weight.size(0), 1), input), Tensor()};
  const auto [output, index] = maxout_forward(z, weight.size(0), 1);
  return {shaped(output, input), shaped(index, input)};
}

}  // namespace

std::tuple<Tensor, Tensor> linear_maxout_forward(const Tensor& input, const Tensor& weight,
                                                 const OptionalTensor& bias) {
  if (!is_supported_linear_maxout(input, weight, bias))
    return composite::linear_maxout_forward(input, weight, bias);
  return run_linear_maxout(input, weight, bias, /*with_index=*/true);
}

Tensor linear_maxout(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  if (!is_supported_linear_maxout(input, weight, bias)) return composite::linear_maxout(input, weight, bias);
  return std::get<0>(run_linear_maxout(input, weight, bias, /*with_index=*/false));
}

std::tuple<Tensor, Tensor, Tensor> linear_maxout_backward(const Tensor& grad_output,
                                                          const OptionalTensor& input,
                                                          const OptionalTensor& weight, const Tensor& index,
                                                          int64_t pieces, Mask output_mask) {
  if (!is_supported(grad_output) || index.device() != grad_output.device())
    return composite::linear_maxout_backward(grad_output, input, weight, index, pieces, output_mask);
  const OptionalTensor w = weight ? OptionalTensor(weight->flatten(0, 1)) : weight;
  const Tensor dy = rows_of(grad_output), winners = rows_of(index);
  Tensor dz, db;
  if (output_mask[2]) {
    const bool wide_index = maxout_index_dtype(pieces) == at::kInt;
    std::tie(dz, db) = dz_and_sums(kernels(dtype_of(dy)).maxout_rows[wide_index], {}, dy, winners, pieces);
    db = db.unflatten(0, {pieces, -1});
  } else {
    dz = maxout_backward(dy, winners, pieces, 1);
  }
  output_mask[2] = false;
  auto [dx, dw, none] = product_backward(dz, input, w, output_mask);
  if (dw.defined()) dw = dw.unflatten(0, {pieces, -1});
  return {shaped(dx, grad_output), dw, db};
}

TORCH_LIBRARY_IMPL(mlpext, CUDA, m) {
  m.impl("linear_activation", linear_activation);
  m.impl("linear_activation_forward", linear_activation_forward);
  m.impl("linear_activation_backward", linear_activation_backward);
  m.impl("linear_maxout", linear_maxout);
  m.impl("linear_maxout_forward", linear_maxout_forward);
  m.impl("linear_maxout_backward", linear_maxout_backward);
}

}  // namespace mlpext::cuda
