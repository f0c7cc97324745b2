// Linear + activation and linear + maxout on CPU: native's product, then bias and activation on it in place.
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/sum_cpu_dispatch.h>
#include <torch/library.h>

#include "../composites.h"
#include "tensors.h"

namespace mlpext::cpu {
namespace {

// x W' + b for rows of x: (rows, out_features).
Tensor product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return bias ? at::cpu::addmm(*bias, x, weight.t()) : at::cpu::mm(x, weight.t());
}

// Gradients of the product from dz (rows, out_features); only those asked for.
std::tuple<Tensor, Tensor, Tensor> product_backward(const Tensor& dz, const OptionalTensor& x,
                                                    const OptionalTensor& weight, Mask mask) {
  return {mask[0] ? at::cpu::mm(dz, *weight) : Tensor(),
          mask[1] ? at::cpu::mm(dz.t(), rows_of(*x)) : Tensor(),
          mask[2] ? at::cpu::sum(dz, at::OptionalIntArrayRef(0)) : Tensor()};
}

// (rows, features) in the leading dimensions of `like`.
Tensor shaped(const Tensor& rows, const Tensor& like) {
  if (like.dim() == 2 || !rows.defined()) return rows;
  return rows.view(with_last(like.sizes(), rows.size(1)));
}

std::tuple<Tensor, Tensor> linear_activation_forward(const Tensor& input, const Tensor& weight,
                                                     const OptionalTensor& bias, std::string_view name,
                                                     Params params, bool keep_preactivation) {
  const std::size_t index = activation_index(name, params);
  if (!linear_served(input, weight, bias) || !activation_infos[index].usual(params.data()))
    return composite::linear_activation_forward(input, weight, bias, name, params, keep_preactivation);
  check_linear(input, weight, bias);
  const Tensor z = product(rows_of(input), weight, bias);
  if (name == Identity::name && !keep_preactivation) return {shaped(z, input), Tensor()};
  const Tensor y = keep_preactivation ? fresh_like(z) : z;
  run_forward(z, y, index, params);
  return {shaped(y, input), keep_preactivation ? shaped(z, input) : Tensor()};
}

Tensor linear_activation(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                         std::string_view name, Params params) {
  return std::get<0>(
      linear_activation_forward(input, weight, bias, name, params, /*keep_preactivation=*/false));
}

std::tuple<Tensor, Tensor, Tensor> linear_activation_backward(
    const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& saved, std::string_view name, Params params, bool from_output, Mask output_mask) {
  if (!served(grad_output))
    return composite::linear_activation_backward(grad_output, input, weight, saved, name, params, from_output,
                                                 output_mask);
  const Tensor dz = name == Identity::name
                        ? grad_output
                        : activation_backward(grad_output, *saved, name, params, from_output);
  auto [dx, dw, db] = product_backward(rows_of(dz), input, weight, output_mask);
  return {shaped(dx, grad_output), dw, db};
}

std::tuple<Tensor, Tensor> linear_maxout_forward(const Tensor& input, const Tensor& weight,
                                                 const OptionalTensor& bias) {
  if (!linear_maxout_served(input, weight, bias))
    return composite::linear_maxout_forward(input, weight, bias);
  check_linear_maxout(input, weight, bias);
  const Tensor z =
      product(rows_of(input), weight.flatten(0, 1), bias ? std::optional(bias->flatten(0, 1)) : std::nullopt);
  auto [output, index] = maxout_forward(z, weight.size(0), 1);
  return {shaped(output, input), shaped(index, input)};
}

Tensor linear_maxout(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  if (!linear_maxout_served(input, weight, bias)) return composite::linear_maxout(input, weight, bias);
  check_linear_maxout(input, weight, bias);
  const Tensor z =
      product(rows_of(input), weight.flatten(0, 1), bias ? std::optional(bias->flatten(0, 1)) : std::nullopt);
  return shaped(maxout(z, weight.size(0), 1), input);
}

std::tuple<Tensor, Tensor, Tensor> linear_maxout_backward(const Tensor& grad_output,
                                                          const OptionalTensor& input,
                                                          const OptionalTensor& weight, const Tensor& index,
                                                          int64_t pieces, Mask output_mask) {
  if (!served(grad_output))
    return composite::linear_maxout_backward(grad_output, input, weight, index, pieces, output_mask);
  const Tensor dz = maxout_backward(rows_of(grad_output), rows_of(index), pieces, 1);
  auto [dx, dw, db] =
      product_backward(dz, input, weight ? std::optional(weight->flatten(0, 1)) : std::nullopt, output_mask);
  if (dw.defined()) dw = dw.unflatten(0, {pieces, -1});
  if (db.defined()) db = db.unflatten(0, {pieces, -1});
  return {shaped(dx, grad_output), dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpext, CPU, m) {
  m.impl("linear_activation", linear_activation);
  m.impl("linear_activation_forward", linear_activation_forward);
  m.impl("linear_activation_backward", linear_activation_backward);
  m.impl("linear_maxout", linear_maxout);
  m.impl("linear_maxout_forward", linear_maxout_forward);
  m.impl("linear_maxout_backward", linear_maxout_backward);
}

}  // namespace mlpext::cpu
