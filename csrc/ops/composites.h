// The same functions as native operators: what every unusual path runs (functorch transforms, forward mode,
// dispatch modes, wrapper subclasses, dtypes and devices that have no kernel here, parameters that are not
// usual(), and the graph of a backward), so that each inherits all of native's behaviour and derivatives of
// any order.
//
// Signatures are the operators' own.
#pragma once
#include "ops/ops.h"

namespace mlpext::composite {

Tensor activation(const Tensor& input, std::string_view name, Params params);
Tensor& activation_(Tensor& input, std::string_view name, Params params);
Tensor activation_backward(const Tensor& grad_output, const Tensor& saved, std::string_view name,
                           Params params, bool from_output);
std::tuple<Tensor, Tensor> maxout_forward(const Tensor& input, int64_t pieces, int64_t dim);
Tensor maxout(const Tensor& input, int64_t pieces, int64_t dim);
Tensor maxout_backward(const Tensor& grad_output, const Tensor& index, int64_t pieces, int64_t dim);
std::tuple<Tensor, Tensor> linear_activation_forward(const Tensor& input, const Tensor& weight,
                                                     const OptionalTensor& bias, std::string_view name,
                                                     Params params, bool keep_preactivation);
Tensor linear_activation(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                         std::string_view name, Params params);
std::tuple<Tensor, Tensor, Tensor> linear_activation_backward(
    const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& saved, std::string_view name, Params params, bool from_output, Mask output_mask);
std::tuple<Tensor, Tensor> linear_maxout_forward(const Tensor& input, const Tensor& weight,
                                                 const OptionalTensor& bias);
Tensor linear_maxout(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);
std::tuple<Tensor, Tensor, Tensor> linear_maxout_backward(const Tensor& grad_output,
                                                          const OptionalTensor& input,
                                                          const OptionalTensor& weight, const Tensor& index,
                                                          int64_t pieces, Mask output_mask);
Tensor mlp(const Tensor& input, at::TensorList weights, at::TensorList biases, std::string_view names,
           Params params);
std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_forward(const Tensor& input, at::TensorList weights,
                                                            at::TensorList biases, std::string_view names,
                                                            Params params);
std::vector<Tensor> mlp_backward(const Tensor& grad_output, const Tensor& input, at::TensorList weights,
                                 at::TensorList biases, at::TensorList kept, const OptionalTensor& last,
                                 bool last_is_output, std::string_view names, Params params,
                                 at::IntArrayRef output_mask);
// The same without what mlp_forward kept: goes forward again from the input, so that a graph of it reaches
// all that the gradients depend on.
std::vector<Tensor> mlp_backward_from_input(const Tensor& grad_output, const Tensor& input,
                                            at::TensorList weights, at::TensorList biases,
                                            std::string_view names, Params params,
                                            at::IntArrayRef output_mask);

}  // namespace mlpext::composite
