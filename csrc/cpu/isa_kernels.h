// All that is compiled once an instruction set: from the formulas, the loops of activations and maxout, those
// of a gemm and of an epoch, and the table of them. baseline.cpp, avx2.cpp, avx512.cpp and neon.cpp include
// this page, each in a namespace of its own (MLPEXT_ISA).
#pragma once
#include "cpu/epoch/epoch.h"
#include "cpu/gemm/microkernels.h"
#include "cpu/map.h"
#include "formulas/activation_info.h"

namespace mlpext::MLPEXT_ISA {
namespace {

// y = f(x) on rows, for the activation A and elements M in memory.
template <class A, class M> void forward_rows(const double* params, const void* x_, int64_t x_stride,
                                              void* y_, int64_t y_stride, int64_t rows, int64_t n) {
  using V = LanesOf<M>;
  const A f = with_params<A>(params);
  const M* x = static_cast<const M*>(x_);
  M* y = static_cast<M*>(y_);
  for (; rows > 0; --rows, x += x_stride, y += y_stride)
    map(n, y, [&](V v) MLPEXT_LAMBDA { return f.forward(v); }, x);
}

template <class A, class M> void forward(const double* params, const void* x, void* y, int64_t n) {
  forward_rows<A, M>(params, x, 0, y, 0, 1, n);
}

// dx = g f'(saved) on rows: saved is the output y (from_output) or the input.
template <class A, class M, bool from_output>
void backward_rows(const double* params, const void* grad_output_, int64_t grad_output_stride,
                   const void* saved_, int64_t saved_stride, void* grad_input_, int64_t grad_input_stride,
                   int64_t rows, int64_t n) {
  using V = LanesOf<M>;
  const A f = with_params<A>(params);
  auto gradient = [&](V g, V s) MLPEXT_LAMBDA {
    if constexpr (from_output) return chain<A>(g, f.derivative_from_output(s));
    else return chain<A>(g, f.derivative(s));
  };
  const M* grad_output = static_cast<const M*>(grad_output_);
  const M* saved = static_cast<const M*>(saved_);
  M* grad_input = static_cast<M*>(grad_input_);
  for (; rows > 0; --rows) {
    map(n, grad_input, gradient, grad_output, saved);
    grad_output += grad_output_stride, saved += saved_stride, grad_input += grad_input_stride;
  }
}

template <class A, class M, bool from_output>
void backward(const double* params, const void* grad_output, const void* saved, void* grad_input, int64_t n) {
  backward_rows<A, M, from_output>(params, grad_output, 0, saved, 0, grad_input, 0, 1, n);
}

template <class A, class M>
void gated(const double* params, const void* gate, const void* value, void* y, int64_t n) {
  using V = LanesOf<M>;
  const A f = with_params<A>(params);
  map(
      n, static_cast<M*>(y), [&](V x, V v) MLPEXT_LAMBDA { return f.forward(x) * v; },
      static_cast<const M*>(gate), static_cast<const M*>(value));
}

template <class A, class M> void gated_backward(const double* params, const void* grad_output,
                                                const void* gate, const void* value, void* of_gate,
                                                void* of_value, int64_t n) {
  using V = LanesOf<M>;
  const A f = with_params<A>(params);
  const auto gradients = [&](V g, V x, V v) MLPEXT_LAMBDA {
    return Two<V>{chain<A>(g * v, f.derivative(x)), g * f.forward(x)};
  };
  map_to_two(n, static_cast<M*>(of_gate), static_cast<M*>(of_value), gradients,
             static_cast<const M*>(grad_output), static_cast<const M*>(gate), static_cast<const M*>(value));
}

template <class A, class... M> constexpr cpu::ActivationKernels activation_kernels() {
  cpu::ActivationKernels kernels{{forward<A, M>...},      {backward<A, M, false>...},      {},
                                 {forward_rows<A, M>...}, {backward_rows<A, M, false>...}, {},
                                 {gated<A, M>...},        {gated_backward<A, M>...}};
  if constexpr (HasDerivativeFromOutput<A>) {
    kernels.backward_from_output = {backward<A, M, true>...};
    kernels.backward_rows_from_output = {backward_rows<A, M, true>...};
  }
  return kernels;
}

template <class... A>
constexpr std::array<cpu::ActivationKernels, sizeof...(A)> all_activation_kernels(std::tuple<A...>*) {
  return {activation_kernels<A, double, float, BFloat16, Half>()...};
}

// The index of the winner is kept in a register of M's own lanes beside the best piece so far, so that one
// comparison decides on both; it is narrowed to Index when it is stored. float holds every index up to 2^24.
template <class M, class Index>
void maxout_forward(const void* x_, void* y_, void* index_, int64_t pieces, int64_t stride, int64_t n) {
  using V = LanesOf<M>;
  const M* x = static_cast<const M*>(x_);
  M* y = static_cast<M*>(y_);
  Index* index = static_cast<Index*>(index_);
  auto reduce = [&](auto load_piece, V& best, V& winner) MLPEXT_LAMBDA {
    best = load_piece(0);
    winner = V(0);
    for (int64_t k = 1; k < pieces; ++k) {
      const V piece = load_piece(k);
      const auto better = wins(piece, best);
      best = select(better, piece, best);
      winner = select(better, V(static_cast<double>(k)), winner);
    }
  };
  V best(0), winner(0);
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) {
    reduce([&](int64_t k) MLPEXT_LAMBDA { return load<V>(x + k * stride + i); }, best, winner);
    store(y + i, best);
    if (index) store_index(index + i, winner);
  }
  const int left = static_cast<int>(n - i);
  if (left > 0) {
    reduce([&](int64_t k) MLPEXT_LAMBDA { return load_partial<V>(x + k * stride + i, left); }, best, winner);
    store_partial(y + i, best, left);
    if (index) store_index_partial(index + i, winner, left);
  }
}

template <class M, class Index> void maxout_backward(const void* grad_output_, const void* index_,
                                                     void* grad_input_, int64_t pieces, int64_t stride,
                                                     int64_t n) {
  using V = LanesOf<M>;
  const M* grad_output = static_cast<const M*>(grad_output_);
  const Index* index = static_cast<const Index*>(index_);
  M* grad_input = static_cast<M*>(grad_input_);
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) {
    const V g = load<V>(grad_output + i), winner = load_index<V>(index + i);
    for (int64_t k = 0; k < pieces; ++k)
      store(grad_input + k * stride + i, select(winner == V(static_cast<double>(k)), g, V(0)));
  }
  const int left = static_cast<int>(n - i);
  if (left > 0) {
    const V g = load_partial<V>(grad_output + i, left), winner = load_index_partial<V>(index + i, left);
    for (int64_t k = 0; k < pieces; ++k)
      store_partial(grad_input + k * stride + i, select(winner == V(static_cast<double>(k)), g, V(0)), left);
  }
}

template <class Index> constexpr PerDtype<cpu::MaxoutForward> maxout_forward_kernels() {
  return {maxout_forward<double, Index>, maxout_forward<float, Index>, maxout_forward<BFloat16, Index>,
          maxout_forward<Half, Index>};
}

template <class Index> constexpr PerDtype<cpu::MaxoutBackward> maxout_backward_kernels() {
  return {maxout_backward<double, Index>, maxout_backward<float, Index>, maxout_backward<BFloat16, Index>,
          maxout_backward<Half, Index>};
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA

namespace mlpext::MLPEXT_ISA {

extern const cpu::Kernels kernels;
constinit const cpu::Kernels kernels{
    MLPEXT_ISA_NAME,
    all_activation_kernels(static_cast<Activations*>(nullptr)),
    {maxout_forward_kernels<uint8_t>(), maxout_forward_kernels<int32_t>()},
    {maxout_backward_kernels<uint8_t>(), maxout_backward_kernels<int32_t>()},
    gemm_kernels<double, float, BFloat16, Half>(),
    {train<double>, train<float>},
    {dropout_mask<double>, dropout_mask<float>},
};

}  // namespace mlpext::MLPEXT_ISA
