// Linear + activation, linear + maxout and gated layers on CPU: tensors to pointers for the gemm, whose tiles
// take bias and activation or maxout while they are in the cache (gemm/gemm.h). Where that gemm is not
// the faster one, torch's product, then the rest in place.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/sum_cpu_dispatch.h>
#include <torch/library.h>

#include "cpu/choice.h"
#include "cpu/gate.h"
#include "cpu/gemm/gemm.h"
#include "cpu/tensors.h"
#include "ops/checks.h"

namespace mlpext::cpu {
namespace {

// Whether the package's gemm is the faster one (docs/benchmarks.md). Not on the baseline, whose loops are
// made to run on every machine while torch's product picks its instructions at run time; nor for bfloat16
// with AVX-512 but without AVX512_BF16: the values would be widened to float first, which torch does better
// there. On AVX2 torch has no such loops, and takes 4 to 100 times as long. On NEON neither has been
// measured.
bool uses_gemm(Dtype dtype) {
  if (kernels().isa == "baseline") return false;
  return dtype != bfloat16 || has_pairs() || kernels().isa == "avx2";
}

Matrix matrix(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}
const void* data(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
void* data(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

// x W' + b for rows of x: (rows, out_features).
Tensor torch_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return bias ? at::cpu::addmm(*bias, x, weight.t()) : at::cpu::mm(x, weight.t());
}

bool any(Mask mask) { return mask[0] || mask[1] || mask[2]; }

// Which of the gradients asked for torch makes: `all` of them, or those that it makes faster.
Mask torch_gradients(const Tensor& dz, const OptionalTensor& x, const OptionalTensor& weight, bool all,
                     Mask mask) {
  const Dtype dtype = dtype_of(dz);
  if (all || !uses_gemm(dtype)) return mask;
  const int64_t out = dz.size(-1), rows = dz.numel() / std::max<int64_t>(out, 1);
  return {mask[0] && torch_serves(Product::dx, dtype, rows, weight->size(1), out),
          mask[1] && torch_serves(Product::dw, dtype, rows, x->size(-1), out), false};
}

// Gradients of torch's product from dz (rows, out_features); only those asked for.
std::tuple<Tensor, Tensor, Tensor> torch_linear_backward(const Tensor& dz, const OptionalTensor& x,
                                                         const OptionalTensor& weight, Mask mask) {
  return {mask[0] ? at::cpu::mm(dz, *weight) : Tensor(),
          mask[1] ? at::cpu::mm(dz.t(), rows_of(*x)) : Tensor(),
          mask[2] ? at::cpu::sum(dz, at::OptionalIntArrayRef(0)) : Tensor()};
}

// The same by the package's gemm, where dz is formed as it is used. `features` are the columns of dz.
std::tuple<Tensor, Tensor, Tensor> gemm_gradients(Dtype dtype, at::ScalarType type,
                                                  const PreactivationGradient& dz, const OptionalTensor& x,
                                                  const OptionalTensor& weight, Mask mask) {
  std::tuple<Tensor, Tensor, Tensor> gradients;
  auto& [dx, dw, db] = gradients;
  Matrix input{}, w{};
  Tensor rows;
  if (mask[0]) dx = empty({dz.rows, weight->size(1)}, type), w = matrix(*weight);
  if (mask[1]) rows = rows_of(*x), input = matrix(rows), dw = empty({dz.columns, rows.size(1)}, type);
  if (mask[2]) db = empty({dz.columns}, type);
  gemm_backward(dtype, dz, input, w, data(dx), data(dw), data(db));
  return gradients;
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
  const Dtype dtype = dtype_of(input);
  if (!uses_gemm(dtype) || torch_serves(Product::forward, dtype, x.size(0), x.size(1), weight.size(0))) {
    Tensor z = torch_linear(x, weight, bias);
    if (index == index_of<Identity> && !keep_preactivation) return {shaped(z, input), Tensor()};
    const bool in_place = !keep_preactivation && !torch_serves(Pass::forward, index, dtype, z.numel());
    const Tensor y = in_place ? activation_(z, name, params) : activation(z, name, params);
    return {shaped(y, input), keep_preactivation ? shaped(z, input) : Tensor()};
  }
  const int64_t columns = weight.size(0), size = input.element_size();
  const Tensor z = empty({x.size(0), columns}, input.scalar_type());
  const Tensor y = keep_preactivation ? empty(z.sizes(), input.scalar_type()) : z;
  const OptionalTensor dense_bias = bias ? OptionalTensor(bias->contiguous()) : bias;
  auto* const from = static_cast<char*>(z.mutable_data_ptr());
  auto* const to = static_cast<char*>(y.mutable_data_ptr());
  const ForwardRows activate = index == index_of<Identity> && !keep_preactivation
                                   ? nullptr
                                   : kernels().activations[index].forward_rows[dtype];
  gemm_forward(dtype, matrix(x), matrix(weight), data(dense_bias), from, [&](const OutputTile& tile) {
    const int64_t at = (tile.row * columns + tile.column) * size;
    // Whole rows are one run of memory.
    const int64_t n = tile.columns == columns ? tile.rows * columns : tile.columns;
    if (activate)
      activate(params.data(), from + at, columns, to + at, columns, n == tile.columns ? tile.rows : 1, n);
  });
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
  if (!is_supported(grad_output))
    return composite::linear_activation_backward(grad_output, input, weight, saved, name, params, from_output,
                                                 output_mask);
  const Dtype dtype = dtype_of(grad_output);
  const std::size_t index = activation_index(name, params);
  const ActivationKernels& table = kernels().activations[index];
  const bool identity = index == index_of<Identity>;
  const bool forms_dz =
      identity || (is_supported(*saved) && saved->scalar_type() == grad_output.scalar_type() &&
                   has_kernel(grad_output, index, params) && (!from_output || table.backward_from_output[0]));
  const Mask torchs = torch_gradients(grad_output, input, weight, !forms_dz, output_mask);
  if (any(torchs)) {
    const Tensor dz =
        rows_of(identity ? grad_output : activation_backward(grad_output, *saved, name, params, from_output));
    auto [dx, dw, db] = torch_linear_backward(dz, input, weight, torchs);
    const Mask rest{output_mask[0] && !torchs[0], output_mask[1] && !torchs[1], output_mask[2] && !torchs[2]};
    if (any(rest)) {
      auto [own_dx, own_dw, own_db] = linear_activation_backward(
          dz, input, weight, std::nullopt, Identity::name, {}, /*from_output=*/true, rest);
      if (rest[0]) dx = own_dx;
      if (rest[1]) dw = own_dw;
      if (rest[2]) db = own_db;
    }
    return {shaped(dx, grad_output), dw, db};
  }
  const Tensor dy = rows_of(grad_output);
  const Tensor kept = identity ? Tensor() : rows_of(*saved).contiguous();
  const Matrix g = matrix(dy);
  const int64_t size = dy.element_size();
  const BackwardRows derive = (from_output ? table.backward_rows_from_output : table.backward_rows)[dtype];
  const auto form = [&](int64_t row, int64_t rows, void* to, int64_t stride) {
    const auto* from = static_cast<const char*>(g.data) + row * g.row_stride * size;
    int64_t from_stride = g.row_stride;
    if (g.column_stride != 1) {
      copy_rows(dtype, {from, rows, g.columns, g.row_stride, g.column_stride}, to, stride);
      from = static_cast<const char*>(to), from_stride = stride;
    }
    // Identity's derivative looks at nothing; it is given what is there in any case.
    const auto* source =
        identity ? from : static_cast<const char*>(kept.const_data_ptr()) + row * g.columns * size;
    const int64_t source_stride = identity ? from_stride : g.columns;
    const bool one_run = from_stride == g.columns && source_stride == g.columns && stride == g.columns;
    derive(params.data(), from, from_stride, source, source_stride, to, stride, one_run ? 1 : rows,
           one_run ? rows * g.columns : g.columns);
  };
  auto [dx, dw, db] =
      gemm_gradients(dtype, dy.scalar_type(), {g.rows, g.columns, identity ? &g : nullptr, form}, input,
                     weight, output_mask);
  return {shaped(dx, grad_output), dw, db};
}

namespace {

// y, and the index of the winner if it is asked for.
std::tuple<Tensor, Tensor> run_linear_maxout(const Tensor& input, const Tensor& weight,
                                             const OptionalTensor& bias, bool with_index) {
  check_linear_maxout(input, weight, bias);
  const int64_t pieces = weight.size(0);
  const Tensor x = rows_of(input), w = weight.flatten(0, 1);
  const OptionalTensor b = bias ? OptionalTensor(bias->flatten(0, 1).contiguous()) : bias;
  const Dtype dtype = dtype_of(input);
  Tensor output, index;
  if (uses_gemm(dtype) && pieces <= max_fused_pieces) {
    output = empty({x.size(0), weight.size(1)}, input.scalar_type());
    if (with_index) index = empty(output.sizes(), maxout_index_dtype(pieces));
    auto* const y = static_cast<char*>(data(output));
    auto* const winner = static_cast<uint8_t*>(data(index));
    const int64_t columns = output.size(1), size = output.element_size();
    const MaxoutForward maxout = kernels().maxout_forward[0][dtype];
    gemm_pieces(dtype, matrix(x), matrix(w), data(b), pieces, [&](const PiecesOfRow& part) {
      const int64_t at = part.row * columns + part.column;
      maxout(part.z, y + at * size, winner ? winner + at : nullptr, pieces, part.columns, part.columns);
    });
  } else if (with_index) {
    std::tie(output, index) = maxout_forward(torch_linear(x, w, b), pieces, 1);
  } else {
    output = maxout(torch_linear(x, w, b), pieces, 1);
  }
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
  if (!is_supported(grad_output))
    return composite::linear_maxout_backward(grad_output, input, weight, index, pieces, output_mask);
  const OptionalTensor w = weight ? OptionalTensor(weight->flatten(0, 1)) : weight;
  const Tensor dy = rows_of(grad_output);
  const Dtype dtype = dtype_of(dy);
  Tensor dx, dw, db;
  if (uses_gemm(dtype) && pieces <= max_fused_pieces && dy.stride(1) == 1) {
    const Tensor winners = rows_of(index).contiguous();
    const Matrix g = matrix(dy);
    const auto* winner = static_cast<const uint8_t*>(winners.const_data_ptr());
    const MaxoutBackward scatter = kernels().maxout_backward[0][dtype];
    const int64_t size = dy.element_size();
    const auto form = [&](int64_t row, int64_t rows, void* to, int64_t stride) {
      for (int64_t i = 0; i < rows; ++i)
        scatter(static_cast<const char*>(g.data) + (row + i) * g.row_stride * size,
                winner + (row + i) * g.columns, static_cast<char*>(to) + i * stride * size, pieces, g.columns,
                g.columns);
    };
    const Winners all{g, winner, pieces};
    std::tie(dx, dw, db) = gemm_gradients(
        dtype, dy.scalar_type(), {g.rows, pieces * g.columns, nullptr, form, &all}, input, w, output_mask);
  } else {
    std::tie(dx, dw, db) =
        torch_linear_backward(maxout_backward(dy, rows_of(index), pieces, 1), input, w, output_mask);
  }
  if (dw.defined()) dw = dw.unflatten(0, {pieces, -1});
  if (db.defined()) db = db.unflatten(0, {pieces, -1});
  return {shaped(dx, grad_output), dw, db};
}

namespace {

// Calls run(row) for all rows of z, cut for the threads.
template <class Run> void by_rows(const Tensor& z, Run run) {
  at::parallel_for(0, z.size(0), 1 + grain_size / std::max<int64_t>(1, z.size(1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) run(row);
                   });
}

}  // namespace

Tensor gate_forward(const Tensor& preactivation, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  if (!has_kernel(preactivation, index, params)) return composite::gate_forward(preactivation, name, params);
  const Tensor z = rows_of(preactivation).contiguous();
  const Dtype dtype = dtype_of(z);
  const int64_t columns = z.size(1) / 2, bytes = columns * z.element_size();
  const Gate gate{dtype, kernels().activations[index], params.data()};
  const Tensor output = empty({z.size(0), columns}, z.scalar_type());
  const auto* const from = static_cast<const char*>(z.const_data_ptr());
  auto* const y = static_cast<char*>(data(output));
  by_rows(z, [&](int64_t row) {
    const auto* const z1 = from + 2 * row * bytes;
    gate.forward(z1, z1 + bytes, y + row * bytes, columns);
  });
  return shaped(output, preactivation);
}

// The product, then a pass over its rows: up to 23 % faster than a gate that takes each tile of the product
// while it is hot (Zen 4), which would write 128 bytes at a time.
std::tuple<Tensor, Tensor> linear_gated_forward(const Tensor& input, const Tensor& weight,
                                                const OptionalTensor& bias, std::string_view name,
                                                Params params) {
  const std::size_t index = activation_index(name, params);
  if (!is_supported_linear_maxout(input, weight, bias) || !has_kernel(input, index, params))
    return composite::linear_gated_forward(input, weight, bias, name, params);
  check_linear_gated(input, weight, bias);
  const OptionalTensor b = bias ? OptionalTensor(bias->flatten(0, 1)) : bias;
  const Tensor z = linear_activation(input, weight.flatten(0, 1), b, Identity::name, {});
  return {gate_forward(z, name, params), z};
}

Tensor linear_gated(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                    std::string_view name, Params params) {
  return std::get<0>(linear_gated_forward(input, weight, bias, name, params));
}

std::tuple<Tensor, Tensor, Tensor> linear_gated_backward(const Tensor& grad_output,
                                                         const OptionalTensor& input,
                                                         const OptionalTensor& weight,
                                                         const Tensor& preactivation, std::string_view name,
                                                         Params params, Mask output_mask) {
  const std::size_t index = activation_index(name, params);
  if (!is_supported(preactivation) || grad_output.scalar_type() != preactivation.scalar_type() ||
      !has_kernel(grad_output, index, params))
    return composite::linear_gated_backward(grad_output, input, weight, preactivation, name, params,
                                            output_mask);
  const OptionalTensor w = weight ? OptionalTensor(weight->flatten(0, 1)) : weight;
  const Tensor z = rows_of(preactivation).contiguous();
  Tensor dy = rows_of(grad_output);
  if (dy.stride(1) != 1) dy = dy.contiguous();
  const Dtype dtype = dtype_of(dy);
  const int64_t columns = dy.size(1), half = columns * dy.element_size();
  const Gate gate{dtype, kernels().activations[index], params.data()};
  const auto* const g = static_cast<const char*>(dy.const_data_ptr());
  const auto* const z1 = static_cast<const char*>(z.const_data_ptr());
  const int64_t g_stride = dy.stride(0) * dy.element_size();
  const auto form = [&](int64_t row, int64_t rows, void* to, int64_t stride) {
    auto* dz = static_cast<char*>(to);
    for (const int64_t end = row + rows; row < end; ++row, dz += stride * dy.element_size()) {
      const auto* const kept = z1 + 2 * row * half;
      gate.backward(g + row * g_stride, kept, kept + half, dz, dz + half, columns);
    }
  };
  std::tuple<Tensor, Tensor, Tensor> gradients;
  auto& [dx, dw, db] = gradients;
  if (any(torch_gradients(z, input, w, /*all=*/false, output_mask))) {
    const Tensor dz = empty(z.sizes(), z.scalar_type());
    auto* const to = static_cast<char*>(data(dz));
    by_rows(dz, [&](int64_t row) { form(row, 1, to + 2 * row * half, 2 * columns); });
    gradients = linear_activation_backward(dz, input, w, std::nullopt, Identity::name, {},
                                           /*from_output=*/true, output_mask);
  } else {
    gradients = gemm_gradients(dtype, dy.scalar_type(), {dy.size(0), 2 * columns, nullptr, form}, input, w,
                               output_mask);
  }
  return {shaped(dx, grad_output), composite::in_halves(dw), composite::in_halves(db)};
}

TORCH_LIBRARY_IMPL(mlpext, CPU, m) {
  m.impl("linear_activation", linear_activation);
  m.impl("linear_activation_forward", linear_activation_forward);
  m.impl("linear_activation_backward", linear_activation_backward);
  m.impl("linear_maxout", linear_maxout);
  m.impl("linear_maxout_forward", linear_maxout_forward);
  m.impl("linear_maxout_backward", linear_maxout_backward);
  m.impl("linear_gated", linear_gated);
  m.impl("linear_gated_forward", linear_gated_forward);
  m.impl("linear_gated_backward", linear_gated_backward);
}

}  // namespace mlpext::cpu
