// In the place of csrc/cuda/cutlass/*.cu: the same products and epilogues, naively, and a complaint about
// whatever Hopper's copies would refuse.
#include "cuda/cutlass/launchers.h"

#define MLPEXT_ISA cutlass_stand_in
#define MLPEXT_APPROXIMATE
#include "cuda/cutlass/epilogue.h"

namespace mlpext::cutlass_stand_in {
namespace {

using namespace cuda::ct;

void check(const Product& p, int64_t b_columns) {
  const auto refused = [](const void* pointer, int64_t ld, int64_t columns) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 != 0 || ld % 8 != 0 || ld < columns;
  };
  if (p.rows < 1 || p.depth % 8 != 0 || p.columns % 8 != 0 || refused(p.a, p.lda, p.depth) ||
      refused(p.b, p.ldb, b_columns) || refused(p.d, p.columns, p.columns) ||
      refused(p.aux, p.columns, p.columns))
    emulator::fail("no operand for TMA");
}

// One row of a product at a time.
template <class M, class B, class Epilogue> void multiply(const Product& p, B b, Epilogue epilogue) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const M* const a = static_cast<const M*>(p.a) + i * p.lda;
    for (int64_t j = 0; j < p.columns; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < p.depth; ++k) sum += double(widen(a[k]).v) * widen(b(k, j)).v;
      epilogue(i, j, static_cast<float>(sum));
    }
  }
}

template <class M> cudaError_t run_forward(const Product& p, cudaStream_t) {
  check(p, p.depth);
  const auto b = [&](int64_t k, int64_t j) { return static_cast<const M*>(p.b)[j * p.ldb + k]; };
  multiply<M>(p, b, [&](int64_t i, int64_t j, float z) {
    if (p.bias) z += widen(static_cast<const M*>(p.bias)[j]).v;
    const std::array<float, 1> y = forward<1>(p.f, std::array{z});
    static_cast<M*>(p.d)[i * p.columns + j] = narrow<M>(widen(y[0]));
    if (p.aux) static_cast<M*>(p.aux)[i * p.columns + j] = narrow<M>(widen(z));
  });
  return cudaSuccess;
}

template <class M> cudaError_t run_input_gradient(const Product& p, cudaStream_t) {
  check(p, p.columns);
  const int64_t width = sum_columns(p.columns);
  if (p.sums) std::fill_n(p.sums, sum_rows(p.rows) * width, 0.0f);
  const auto b = [&](int64_t k, int64_t j) { return static_cast<const M*>(p.b)[k * p.ldb + j]; };
  multiply<M>(p, b, [&](int64_t i, int64_t j, float dy) {
    const float kept = widen(static_cast<const M*>(p.aux)[i * p.columns + j]).v;
    const std::array<float, 1> d = backward<1>(p.f, std::array{dy}, std::array{kept});
    static_cast<M*>(p.d)[i * p.columns + j] = narrow<M>(widen(d[0]));
    if (p.sums) p.sums[(i / tile * strips + i % 64 / 16) * width + j] += d[0];  // a warp's rows
  });
  return cudaSuccess;
}

}  // namespace
}  // namespace mlpext::cutlass_stand_in

namespace mlpext::cuda::ct {

using namespace cutlass_stand_in;
constinit const Launch bfloat16_forward = run_forward<BFloat16>, float16_forward = run_forward<Half>,
                       bfloat16_input_gradient = run_input_gradient<BFloat16>,
                       float16_input_gradient = run_input_gradient<Half>;

}  // namespace mlpext::cuda::ct
