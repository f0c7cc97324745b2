// The rules behind checks.h: one page that says what the kernels take and what every device refuses.
#include "ops/checks.h"

#include <ATen/WrapDimUtils.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace mlpext {

std::size_t activation_index(std::string_view name, Params params) {
  for (std::size_t index = 0; index < activation_count; ++index) {
    const ActivationInfo& info = activation_infos[index];
    if (info.name == name) {
      TORCH_CHECK_VALUE(params.size() == info.params.size(), "params: activation '", name, "' takes ",
                        info.params.size(), " parameter(s), got ", params.size());
      return index;
    }
  }
  std::string known;
  for (const ActivationInfo& info : activation_infos)
    known += (known.empty() ? "" : ", ") + std::string(info.name);
  TORCH_CHECK_VALUE(false, "activation: unknown name '", name, "', expected one of ", known);
}

namespace {

// Whether a parameter is a number in the dtype of the tensor; `exactly`: to its last digit.
template <class Number> bool fits(double param, bool exactly) {
  return std::abs(param) <= static_cast<double>(std::numeric_limits<Number>::max()) &&
         (!exactly || static_cast<double>(static_cast<Number>(static_cast<float>(param))) == param);
}

}  // namespace

bool has_kernel(const Tensor& input, std::size_t activation, Params params) {
  const ActivationInfo& info = activation_infos[activation];
  return is_supported(input) && info.has_kernel(params.data()) &&
         std::ranges::all_of(params, [&, dtype = input.scalar_type()](double param) {
           switch (dtype) {
             case at::kFloat: return fits<float>(param, false);  // the kernels round there too
             case at::kHalf: return fits<c10::Half>(param, info.rounds_params);
             case at::kBFloat16: return fits<c10::BFloat16>(param, info.rounds_params);
             default: return true;
           }
         });
}

bool is_supported(const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return (tensor.device().is_cpu() || (has_cuda && tensor.device().is_cuda())) &&
         tensor.layout() == at::kStrided &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf) &&
         !tensor.is_nested();
}

bool has_gate_kernel(const Tensor& gate, const Tensor& value, std::size_t activation, Params params) {
  return activation != index_of<Identity> && has_kernel(gate, activation, params) && is_supported(value) &&
         value.sizes() == gate.sizes() && value.scalar_type() == gate.scalar_type() &&
         value.device() == gate.device();
}

bool is_supported_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  if (!is_supported_linear_maxout(input, weight, bias)) return false;
  // torch's linear takes a vector as weight, and broadcasts the bias.
  return weight.dim() >= 2 && (!bias || (bias->dim() == 1 && (bias->size(0) != 1 || weight.size(-2) == 1)));
}

bool is_supported_linear_maxout(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return is_supported(input) && is_supported(weight) && weight.device() == input.device() &&
         (!bias || (is_supported(*bias) && bias->device() == input.device()));
}

at::ScalarType maxout_index_dtype(int64_t pieces) { return pieces <= 256 ? at::kByte : at::kInt; }

namespace {

void check_dtypes(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(weight.scalar_type() == input.scalar_type(), "weight: dtype ", weight.scalar_type(),
              " does not match input's ", input.scalar_type());
  TORCH_CHECK(!bias || bias->scalar_type() == input.scalar_type(), "bias: dtype ",
              bias ? bias->scalar_type() : input.scalar_type(), " does not match input's ",
              input.scalar_type());
}

void check_in_features(const Tensor& input, const Tensor& weight) {
  TORCH_CHECK(input.dim() >= 1 && input.size(-1) == weight.size(-1), "input: shape ", input.sizes(),
              " does not end in the in_features of weight, whose shape is ", weight.sizes(),
              "; expected (*, ", weight.size(-1), ")");
}

}  // namespace

void check_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(weight.dim() == 2, "weight: shape ", weight.sizes(), ", expected (out_features, in_features)");
  check_in_features(input, weight);
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "bias: shape ",
              bias ? bias->sizes() : at::IntArrayRef(), ", expected (", weight.size(0),
              "), the out_features of weight");
  check_dtypes(input, weight, bias);
}

void check_linear_maxout(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(weight.dim() == 3 && weight.size(0) >= 1, "weight: shape ", weight.sizes(),
              ", expected (pieces, out_features, in_features) with at least one piece");
  check_in_features(input, weight);
  TORCH_CHECK(!bias || bias->sizes() == weight.sizes().slice(0, 2), "bias: shape ",
              bias ? bias->sizes() : at::IntArrayRef(), ", expected ", weight.sizes().slice(0, 2),
              ", the pieces and out_features of weight");
  check_dtypes(input, weight, bias);
}

void check_linear_gated(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(weight.dim() == 3 && weight.size(0) == 2, "weight: shape ", weight.sizes(),
              ", expected (2, out_features, in_features), that of the gate and that of the value");
  check_linear_maxout(input, weight, bias);
}

int64_t check_maxout(const Tensor& input, int64_t pieces, int64_t dim) {
  dim = at::maybe_wrap_dim(dim, input.dim());
  TORCH_CHECK(input.dim() >= 1, "input: a 0-d tensor has no dimension to split into pieces");
  TORCH_CHECK(pieces >= 1 && input.size(dim) % pieces == 0, "pieces: ", pieces, " does not divide dimension ",
              dim, " of input, whose shape is ", input.sizes());
  return dim;
}

}  // namespace mlpext
