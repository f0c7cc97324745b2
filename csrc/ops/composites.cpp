// Every operator as torch's own operators: the activations of formulas/activations.h in a table, a line or
// two each, and the linear layers by their parts (networks: network.cpp). signatures.h says who runs them.
#include <ATen/ScalarOps.h>
#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/celu.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardshrink.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/log_sigmoid_backward.h>
#include <ATen/ops/log_sigmoid_forward.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/max.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/relu6.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/selu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/softplus_backward.h>
#include <ATen/ops/softshrink.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/square.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace mlpext::composite {
namespace {

using T = const Tensor&;
using P = const double*;

struct Row {
  std::string_view name;
  Tensor (*forward)(T x, P p);
  Tensor (*backward)(T g, T x, P p);
  Tensor (*backward_from_output)(T g, T y, P p) = nullptr;
  Tensor& (*in_place)(Tensor& x, P p) = nullptr;  // where torch.nn.functional has `inplace`
};

// torch's Python adds numbers as tensors, which nested tensors can and Scalars cannot.
Tensor one() { return at::native::wrapped_scalar_tensor(1); }

// Whether x is of the dtypes that have kernels, and dense; all else takes torch's own formulas.
bool ordinary(T x) {
  const auto dtype = x.scalar_type();
  return (dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) &&
         x.layout() == at::kStrided && !x.is_nested();
}

// Several operators in `least` or wider, rounded once at the end, as the kernels and torch's own single
// operators are.
template <class F> Tensor wide(T x, const F& f, at::ScalarType least = at::kFloat) {
  const auto dtype = x.scalar_type();
  if (!ordinary(x) || at::promote_types(dtype, least) == dtype) return f(x);
  return f(x.to(at::promote_types(dtype, least))).to(dtype);
}

// (x + root) / 2 cancels below 0, where b / (root - x) / 2 is the same number. Each side has every derivative
// at 0, which a kink at 0 in both, as in max(x, 0) and |x|, would lose.
struct SquareplusParts {
  Tensor root, slope, left;  // slope: of the root

  SquareplusParts(T x, double b) {
    const Tensor size = at::abs(x);
    // Where b no longer shows. Further out the square, and in autograd's gradient of the root its inverse,
    // would leave the dtype.
    const Tensor far = size > std::min(1e9 * std::sqrt(b), 1e154);
    const Tensor near = x.masked_fill(far, 0);
    const Tensor near_root = at::sqrt(near * near + b);
    root = at::where(far, size, near_root);
    slope = at::where(far, at::sign(x), near / near_root);
    left = b / 4 / (root / 2 + size / 2);  // halves, whose sum cannot overflow
  }
};

at::ScalarType squareplus_dtype(double b) {
  return Squareplus{{}, b}.has_kernel() ? at::kFloat : at::kDouble;
}
bool squareplus_is_ordinary(T x, double b) { return ordinary(x) && 0 < b && std::isfinite(b); }

Tensor squareplus(T x, double b) {
  if (!squareplus_is_ordinary(x, b)) return (x + at::sqrt(x * x + b)) / 2;
  return wide(
      x,
      [&](T x) {
        const SquareplusParts parts(x, b);
        return at::where(x >= 0, x / 2 + parts.root / 2, parts.left);
      },
      squareplus_dtype(b));
}

Tensor squareplus_backward(T g, T x, double b) {
  if (!squareplus_is_ordinary(x, b)) return g * (x * at::rsqrt(x * x + b) + 1) / 2;
  return wide(
      x,
      [&](T x) {
        const SquareplusParts parts(x, b);
        return g * at::where(x >= 0, parts.slope / 2 + 0.5, parts.left / parts.root);
      },
      squareplus_dtype(b));
}

// As at::hardshrink_backward, which has no symbolic shapes: with an edge to x, and lambd rounded to its
// dtype.
Tensor shrink_backward(T g, T x, P p) {
  const auto dtype = x.scalar_type();
  const auto rounded = static_cast<float>(p[0]);
  const double lambd = dtype == at::kHalf       ? static_cast<double>(c10::Half(rounded))
                       : dtype == at::kBFloat16 ? static_cast<double>(c10::BFloat16(rounded))
                                                : p[0];
  return at::threshold_backward(g, at::abs(x), lambd);
}

void check_bounds(P p) {  // as torch's Python does
  TORCH_CHECK_VALUE(!(p[0] > p[1]), "min_val cannot be greater than max_val, got ", p[0], " and ", p[1]);
}

// clang-format off
constexpr Row rows[] = {
    {"identity", [](T x, P) { return x.clone(); }, [](T g, T, P) { return g.clone(); }, [](T g, T, P) { return g.clone(); }},
    {"sigmoid", [](T x, P) { return at::sigmoid(x); },
     [](T g, T x, P) { return at::sigmoid_backward(g, at::sigmoid(x)); },
     [](T g, T y, P) { return at::sigmoid_backward(g, y); }},
    {"tanh", [](T x, P) { return at::tanh(x); },
     [](T g, T x, P) { return at::tanh_backward(g, at::tanh(x)); },
     [](T g, T y, P) { return at::tanh_backward(g, y); }},
    {"relu", [](T x, P) { return at::relu(x); },
     [](T g, T x, P) { return at::threshold_backward(g, x, 0); },
     [](T g, T y, P) { return at::threshold_backward(g, y, 0); },
     [](Tensor& x, P) -> Tensor& { return at::relu_(x); }},
    {"leaky_relu", [](T x, P p) { return at::leaky_relu(x, p[0]); },
     [](T g, T x, P p) { return at::leaky_relu_backward(g, x, p[0], false); },
     [](T g, T y, P p) { return at::leaky_relu_backward(g, y, p[0], true); },
     [](Tensor& x, P p) -> Tensor& { return at::leaky_relu_(x, p[0]); }},
    {"elu", [](T x, P p) { return at::elu(x, p[0]); },
     [](T g, T x, P p) { return at::elu_backward(g, p[0], 1, 1, false, x); },
     [](T g, T y, P p) { return at::elu_backward(g, p[0], 1, 1, true, y); },
     [](Tensor& x, P p) -> Tensor& { return at::elu_(x, p[0]); }},
    {"gelu", [](T x, P) { return at::gelu(x, "none"); },
     [](T g, T x, P) { return at::gelu_backward(g, x, "none"); }},
    {"gelu_tanh", [](T x, P) { return at::gelu(x, "tanh"); },
     [](T g, T x, P) { return at::gelu_backward(g, x, "tanh"); }},
    {"silu", [](T x, P) { return at::silu(x); },
     [](T g, T x, P) { return wide(x, [&](T x) { Tensor s = at::sigmoid(x); return g * (s * (1 + x * (1 - s))); }); }, nullptr,
     [](Tensor& x, P) -> Tensor& { return at::silu_(x); }},
    {"mish", [](T x, P) { return at::mish(x); },
     [](T g, T x, P) {
       return wide(x, [&](T x) { Tensor t = at::tanh(at::softplus(x)); return g * (t + x * at::sigmoid(x) * (1 - t * t)); });
     }, nullptr,
     [](Tensor& x, P) -> Tensor& { return at::mish_(x); }},
    {"softplus", [](T x, P p) { return at::softplus(x, p[0], p[1]); },
     [](T g, T x, P p) { return at::softplus_backward(g, x, p[0], p[1]); }},
    {"selu", [](T x, P) { return at::selu(x); },
     [](T g, T x, P) { return at::elu_backward(g, SELU::alpha, SELU::scale, 1, false, x); },
     [](T g, T y, P) { return at::elu_backward(g, SELU::alpha, SELU::scale, 1, true, y); },
     [](Tensor& x, P) -> Tensor& { return at::selu_(x); }},
    {"celu", [](T x, P p) { return at::celu(x, p[0]); },
     [](T g, T x, P p) { return at::elu_backward(g, p[0], 1, 1 / p[0], false, x); },
     [](T g, T y, P p) { return at::elu_backward(g, p[0], 1, 1 / p[0], true, y); },
     [](Tensor& x, P p) -> Tensor& { return at::celu_(x, p[0]); }},
    {"relu6", [](T x, P) { return at::relu6(x); },
     [](T g, T x, P) { return at::hardtanh_backward(g, x, 0, 6); }, nullptr,
     [](Tensor& x, P) -> Tensor& { return at::relu6_(x); }},
    {"hardtanh", [](T x, P p) { check_bounds(p); return at::hardtanh(x, p[0], p[1]); },
     [](T g, T x, P p) { return at::hardtanh_backward(g, x, p[0], p[1]); }, nullptr,
     [](Tensor& x, P p) -> Tensor& { check_bounds(p); return at::hardtanh_(x, p[0], p[1]); }},
    // Not at::hardsigmoid, whose backward has no derivative.
    {"hardsigmoid", [](T x, P) { return ordinary(x) ? wide(x, [](T x) { return (at::hardtanh(x, -3, 3) + 3) / 6; }) : at::hardsigmoid(x); },
     [](T g, T x, P) { return at::hardtanh_backward(g, x, -3, 3) / 6; }, nullptr,
     [](Tensor& x, P) -> Tensor& { return at::hardsigmoid_(x); }},
    {"hardswish", [](T x, P) { return at::hardswish(x); },
     [](T g, T x, P) { return at::hardswish_backward(g, x); }, nullptr,
     [](Tensor& x, P) -> Tensor& { return at::hardswish_(x); }},
    {"logsigmoid", [](T x, P) { return at::log_sigmoid(x); },
     [](T g, T x, P) { return at::log_sigmoid_backward(g, x, std::get<1>(at::log_sigmoid_forward(x))); }},
    {"softsign", [](T x, P) { return x / at::add(at::abs(x), one()); },
     [](T g, T x, P) { return g * at::square(at::reciprocal(at::abs(x) + 1)); }},
    {"tanhshrink", [](T x, P) { return x - at::tanh(x); }, [](T g, T x, P) { return g * at::square(at::tanh(x)); }},
    {"softshrink", [](T x, P p) { return at::softshrink(x, p[0]); }, shrink_backward},
    {"hardshrink", [](T x, P p) { return at::hardshrink(x, p[0]); }, shrink_backward},
    {"sine", [](T x, P p) { return wide(x, [&](T x) { return at::sin(x * p[0]); }); },
     [](T g, T x, P p) { return wide(x, [&](T x) { return g * at::cos(x * p[0]) * p[0]; }); }},
    {"squareplus", [](T x, P p) { return squareplus(x, p[0]); },
     [](T g, T x, P p) { return squareplus_backward(g, x, p[0]); }},
    {"relu_squared", [](T x, P) { return at::square(at::relu(x)); }, [](T g, T x, P) { return at::threshold_backward(g * at::relu(x) * 2, x, 0); }},
    {"quick_gelu", [](T x, P p) { return wide(x, [&](T x) { return x * at::sigmoid(x * p[0]); }); },
     [](T g, T x, P p) { return wide(x, [&](T x) { Tensor s = at::sigmoid(x * p[0]); return g * (s + x * (p[0] * s * (1 - s))); }); }},
    {"threshold", [](T x, P p) { return at::threshold(x, p[0], p[1]); }, [](T g, T x, P p) { return at::threshold_backward(g, x, p[0]); },
     [](T g, T y, P p) { return at::threshold_backward(g, y, p[0]); }, [](Tensor& x, P p) -> Tensor& { return at::threshold_(x, p[0], p[1]); }},
};
// clang-format on

static_assert(
    [] {
      for (std::size_t i = 0; i < activation_count; ++i)
        if (rows[i].name != activation_infos[i].name) return false;
      return std::size(rows) == activation_count;
    }(),
    "composites.cpp and activations.h must list the same activations in the same order");

// The pieces as one linear layer of pieces * out features, piece after piece: maxout splits it again.
Tensor stacked_linear(T input, T weight, const OptionalTensor& bias) {
  return at::linear(input, weight.flatten(0, 1), bias ? std::optional(bias->flatten(0, 1)) : std::nullopt);
}

// The gradients of at::linear for a weight of two dimensions, from dz = dE/dz.
std::tuple<Tensor, Tensor, Tensor> linear_backward(T dz, const OptionalTensor& input,
                                                   const OptionalTensor& weight, Mask mask) {
  auto rows_of = [](T t) { return t.dim() == 1 ? t.unsqueeze(0) : t.flatten(0, -2); };
  Tensor dx, dw, db;
  if (mask[0]) dx = at::matmul(dz, *weight);
  if (mask[1]) dw = at::mm(rows_of(dz).t(), rows_of(*input));
  if (mask[2]) db = rows_of(dz).sum(0);
  return {dx, dw, db};
}

}  // namespace

Tensor activation(T input, std::string_view name, Params params) {
  return rows[activation_index(name, params)].forward(input, params.data());
}

Tensor& activation_(Tensor& input, std::string_view name, Params params) {
  const Row& row = rows[activation_index(name, params)];
  return row.in_place ? row.in_place(input, params.data())
                      : input.copy_(row.forward(input.clone(), params.data()));
}

Tensor activation_backward(T grad_output, T saved, std::string_view name, Params params, bool from_output) {
  const std::size_t index = activation_index(name, params);
  TORCH_CHECK_VALUE(!from_output || activation_infos[index].output_suffices(params.data()),
                    "from_output: the derivative of '", name, "' with parameters ", params,
                    " does not follow from its output, expected False");
  const Row& row = rows[index];
  return (from_output ? row.backward_from_output : row.backward)(grad_output, saved, params.data());
}

std::tuple<Tensor, Tensor> maxout_forward(T input, int64_t pieces, int64_t dim) {
  dim = check_maxout(input, pieces, dim);
  auto [output, index] = at::max(input.unflatten(dim, {pieces, -1}), dim);
  return {output, index.to(maxout_index_dtype(pieces))};
}

Tensor maxout(T input, int64_t pieces, int64_t dim) {
  dim = check_maxout(input, pieces, dim);
  return std::get<0>(at::max(input.unflatten(dim, {pieces, -1}), dim));
}

Tensor maxout_backward(T grad_output, T index, int64_t pieces, int64_t dim) {
  dim = at::maybe_wrap_dim(dim, grad_output.dim());
  std::vector<int64_t> shape(grad_output.dim() + 1, 1);
  shape[dim] = pieces;
  Tensor piece = at::arange(pieces, index.options()).view(shape);
  Tensor zero = at::zeros({}, grad_output.options());
  return at::where(index.unsqueeze(dim) == piece, grad_output.unsqueeze(dim), zero).flatten(dim, dim + 1);
}

namespace {

// Without identity's copy.
Tensor activated(T x, std::string_view name, Params params) {
  return name == Identity::name ? x : activation(x, name, params);
}

}  // namespace

Tensor gated(T gate, T value, std::string_view name, Params params) {
  return activated(gate, name, params) * value;
}

std::tuple<Tensor, Tensor> gated_backward(T grad_output, T gate, const OptionalTensor& value,
                                          std::string_view name, Params params, GateMask output_mask) {
  TORCH_CHECK_VALUE(value || !output_mask[0], "value: None, expected a tensor for the gradient of the gate");
  Tensor of_gate, of_value;
  if (output_mask[0]) of_gate = grad_output * *value;
  if (output_mask[0] && name != Identity::name)
    of_gate = activation_backward(of_gate, gate, name, params, /*from_output=*/false);
  if (output_mask[1]) of_value = grad_output * activated(gate, name, params);
  return {of_gate, of_value};
}

std::tuple<Tensor, Tensor> linear_activation_forward(T input, T weight, const OptionalTensor& bias,
                                                     std::string_view name, Params params,
                                                     bool keep_preactivation) {
  Tensor z = at::linear(input, weight, bias);
  return {activation(z, name, params), keep_preactivation ? z : Tensor()};
}

Tensor linear_activation(T input, T weight, const OptionalTensor& bias, std::string_view name,
                         Params params) {
  return activated(at::linear(input, weight, bias), name, params);
}

std::tuple<Tensor, Tensor, Tensor> linear_activation_backward(T grad_output, const OptionalTensor& input,
                                                              const OptionalTensor& weight,
                                                              const OptionalTensor& saved,
                                                              std::string_view name, Params params,
                                                              bool from_output, Mask output_mask) {
  Tensor dz = name == Identity::name ? grad_output
                                     : activation_backward(grad_output, *saved, name, params, from_output);
  return linear_backward(dz, input, weight, output_mask);
}

std::tuple<Tensor, Tensor> linear_maxout_forward(T input, T weight, const OptionalTensor& bias) {
  return maxout_forward(stacked_linear(input, weight, bias), weight.size(0), -1);
}

Tensor linear_maxout(T input, T weight, const OptionalTensor& bias) {
  return maxout(stacked_linear(input, weight, bias), weight.size(0), -1);
}

std::tuple<Tensor, Tensor, Tensor> linear_maxout_backward(T grad_output, const OptionalTensor& input,
                                                          const OptionalTensor& weight, T index,
                                                          int64_t pieces, Mask output_mask) {
  Tensor dz = maxout_backward(grad_output, index, pieces, -1);
  auto [dx, dw, db] =
      linear_backward(dz, input, weight ? std::optional(weight->flatten(0, 1)) : std::nullopt, output_mask);
  if (output_mask[1]) dw = dw.unflatten(0, {pieces, -1});
  if (output_mask[2]) db = db.unflatten(0, {pieces, -1});
  return {dx, dw, db};
}

Tensor gate_forward(T z, std::string_view name, Params params) {
  const std::vector<Tensor> halves = z.chunk(2, -1);
  return gated(halves[0], halves[1], name, params);
}

Tensor gate_backward(T grad_output, T z, std::string_view name, Params params) {
  const std::vector<Tensor> halves = z.chunk(2, -1);
  const auto [of_gate, of_value] =
      gated_backward(grad_output, halves[0], halves[1], name, params, {true, true});
  return at::cat({of_gate, of_value}, -1);
}

Tensor in_halves(T rows) {
  if (!rows.defined()) return rows;
  std::vector<c10::SymInt> sizes{2, rows.sym_size(0) / 2};
  sizes.insert(sizes.end(), rows.sym_sizes().begin() + 1, rows.sym_sizes().end());
  return rows.reshape_symint(sizes);
}

Tensor linear_gated(T input, T weight, const OptionalTensor& bias, std::string_view name, Params params) {
  return std::get<0>(linear_gated_forward(input, weight, bias, name, params));
}

std::tuple<Tensor, Tensor> linear_gated_forward(T input, T weight, const OptionalTensor& bias,
                                                std::string_view name, Params params) {
  check_linear_gated(input, weight, bias);
  const Tensor z = stacked_linear(input, weight, bias);
  return {gate_forward(z, name, params), z};
}

std::tuple<Tensor, Tensor, Tensor> linear_gated_backward(T grad_output, const OptionalTensor& input,
                                                         const OptionalTensor& weight, T preactivation,
                                                         std::string_view name, Params params,
                                                         Mask output_mask) {
  auto [dx, dw, db] =
      linear_backward(gate_backward(grad_output, preactivation, name, params), input,
                      weight ? std::optional(weight->flatten(0, 1)) : std::nullopt, output_mask);
  return {dx, in_halves(dw), in_halves(db)};
}

namespace {

void register_composites(torch::Library& m) {
#define MLPEXT_IMPL(name) m.impl(#name, composite::name);
  MLPEXT_FOR_EACH_OPERATOR(MLPEXT_IMPL)
#undef MLPEXT_IMPL
}

TORCH_LIBRARY_IMPL(mlpext, CompositeExplicitAutograd, m) { register_composites(m); }
TORCH_LIBRARY_IMPL(mlpext, FuncTorchBatched, m) { register_composites(m); }
// The vmap behind is_grads_batched: its fallback takes no lists of tensors, but the layers' operators.
TORCH_LIBRARY_IMPL(mlpext, Batched, m) { m.impl("mlp_backward", mlp_backward); }
// torch's fallback for functionalization takes no operator that returns its argument.
TORCH_LIBRARY_IMPL(mlpext, Functionalize, m) { m.impl("activation_", activation_); }

}  // namespace
}  // namespace mlpext::composite
