// Linear + activation and linear + maxout on CUDA: native's product, and one pass for everything around it;
// or, where the switches are on (ops.h), a product of cuBLASLt's or CUTLASS's with what its epilogue can do,
// and linear + maxout in Triton.
#include <ATen/ops/addmm_cuda_dispatch.h>
#include <ATen/ops/mm_cuda_dispatch.h>
#include <ATen/ops/sum_cuda_dispatch.h>
#include <torch/library.h>

#include "../composites.h"
#include "tensors.h"

namespace mlpext::cuda {
namespace {

// x W' + b for rows of x: (rows, out_features).
Tensor product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return bias ? at::cuda::addmm(*bias, x, weight.t()) : at::cuda::mm(x, weight.t());
}

// Whether the bias is added by the activation's pass instead. In 16 bits the product would be rounded once
// more.
bool bias_in_pass(const Tensor& x) { return x.element_size() > 2; }

// dz, whose columns are `pieces` times those of dy, and its column sums, in one pass.
std::tuple<Tensor, Tensor> dz_and_sums(LaunchRows launcher, Params params, const Tensor& dy,
                                       const Tensor& saved, int64_t pieces) {
  const int64_t rows = dy.size(0), columns = dy.size(1), width = pieces * columns;
  const int size = static_cast<int>(dy.element_size());
  const int64_t chunks = RowTiles(size, rows, columns).chunks;
  const On on(dy);
  const Tensor dz = fresh({rows, width}, dy.scalar_type()), db = fresh({width}, dy.scalar_type());
  const Tensor partial = fresh({chunks > 1 ? chunks * width * sum_size(size) : 0}, at::kByte);
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
  if (!linear_served(input, weight, bias) || !usual(index, params, input.scalar_type()))
    return composite::linear_activation_forward(input, weight, bias, name, params, keep_preactivation);
  check_linear(input, weight, bias);
  const Tensor x = rows_of(input);
  const bool identity = name == Identity::name;
  if (const auto [y, z] = epilogue_forward(x, weight, bias, index, params, /*keep=*/keep_preactivation);
      y.defined())
    return {shaped(y, input), shaped(z, input)};
  if (bias && !identity && !keep_preactivation && bias_in_pass(x)) {
    const Tensor y = product(x, weight, std::nullopt);
    run_forward(y, bias->contiguous(), y, index, params);
    return {shaped(y, input), Tensor()};
  }
  const Tensor z = product(x, weight, bias);
  if (identity && !keep_preactivation) return {shaped(z, input), Tensor()};
  const On on(z);
  const Tensor y = keep_preactivation ? fresh_like(z) : z;
  run_forward(z, std::nullopt, y, index, params);
  return {shaped(y, input), keep_preactivation ? shaped(z, input) : Tensor()};
}

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

std::tuple<Tensor, Tensor, Tensor> product_backward(const Tensor& dz, const OptionalTensor& x,
                                                    const OptionalTensor& weight, Mask mask) {
  Tensor dx, dw, db;
  if (mask[0]) dx = at::cuda::mm(dz, *weight);
  if (mask[1]) {
    const Tensor rows = rows_of(*x);
    if (mask[2]) std::tie(dw, db) = epilogue_weight_gradient(dz, rows);
    if (!dw.defined()) dw = at::cuda::mm(dz.t(), rows);
  }
  if (mask[2] && !db.defined()) db = at::cuda::sum(dz, at::OptionalIntArrayRef(0));
  return {dx, dw, db};
}

namespace {

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
  const bool identity = name == Identity::name;
  if (!served(grad_output) ||
      (!identity &&
       (!served(*saved) || saved->scalar_type() != grad_output.scalar_type() ||
        saved->device() != grad_output.device() || !usual(index, params, grad_output.scalar_type()) ||
        (from_output && !info.output_suffices(params.data())))))
    return composite::linear_activation_backward(grad_output, input, weight, saved, name, params, from_output,
                                                 output_mask);
  const auto [dz, sums] =
      activation_backward_rows(grad_output, saved, name, params, from_output, output_mask[2]);
  if (sums.defined()) output_mask[2] = false;
  auto [dx, dw, db] = product_backward(dz, input, weight, output_mask);
  return {shaped(dx, grad_output), dw, sums.defined() ? sums : db};
}

std::tuple<Tensor, Tensor> run_linear_maxout(const Tensor& input, const Tensor& weight,
                                             const OptionalTensor& bias, bool with_index) {
  check_linear_maxout(input, weight, bias);
  const Tensor x = rows_of(input);
  auto [output, index] = triton_linear_maxout(x, weight, bias, with_index);
  if (!output.defined()) {
    const OptionalTensor b = bias ? OptionalTensor(bias->flatten(0, 1)) : bias;
    const Tensor z = product(x, weight.flatten(0, 1), b);
    if (with_index) std::tie(output, index) = maxout_forward(z, weight.size(0), 1);
    else output = maxout(z, weight.size(0), 1);
  }
  return {shaped(output, input), shaped(index, input)};
}

}  // namespace

std::tuple<Tensor, Tensor> linear_maxout_forward(const Tensor& input, const Tensor& weight,
                                                 const OptionalTensor& bias) {
  if (!linear_maxout_served(input, weight, bias))
    return composite::linear_maxout_forward(input, weight, bias);
  return run_linear_maxout(input, weight, bias, /*with_index=*/true);
}

Tensor linear_maxout(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  if (!linear_maxout_served(input, weight, bias)) return composite::linear_maxout(input, weight, bias);
  return std::get<0>(run_linear_maxout(input, weight, bias, /*with_index=*/false));
}

namespace {

std::tuple<Tensor, Tensor, Tensor> linear_maxout_backward(const Tensor& grad_output,
                                                          const OptionalTensor& input,
                                                          const OptionalTensor& weight, const Tensor& index,
                                                          int64_t pieces, Mask output_mask) {
  if (!served(grad_output) || index.device() != grad_output.device())
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

}  // namespace

TORCH_LIBRARY_IMPL(mlpext, CUDA, m) {
  m.impl("linear_activation", linear_activation);
  m.impl("linear_activation_forward", linear_activation_forward);
  m.impl("linear_activation_backward", linear_activation_backward);
  m.impl("linear_maxout", linear_maxout);
  m.impl("linear_maxout_forward", linear_maxout_forward);
  m.impl("linear_maxout_backward", linear_maxout_backward);
}

}  // namespace mlpext::cuda
