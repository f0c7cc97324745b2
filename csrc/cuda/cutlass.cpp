// What is asked of CUTLASS's kernels.
#include "cutlass.h"

#include <limits>

namespace mlpext::cuda::ct {
namespace {

constexpr int64_t step = alignment / 2;  // what TMA wants rows to be a multiple of, in elements of 16 bits

bool is_sm90(int device) {
  int major = 0, minor = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

// Of a matrix by rows that TMA can read; 0: it cannot.
int64_t leading_dimension(Matrix matrix, int64_t rows, int64_t columns) {
  const std::optional<Operand> found = operand(matrix, rows, columns);
  return found && !found->transposed && found->ld % step == 0 && aligned(matrix.data) ? found->ld : 0;
}

// `product` has its sizes, f and pointers.
std::optional<Call> call(const std::array<Launch, 2>& launchers, const Sizes& sizes, Product product,
                         Matrix a, Matrix b, int64_t b_rows, int64_t b_columns) {
  const bool half = sizes.dtype == float16;
  if ((!half && sizes.dtype != bfloat16) || product.rows == 0 || product.depth == 0 || product.columns == 0 ||
      product.depth % step != 0 || product.columns % step != 0 ||
      std::max({product.rows, product.depth, product.columns}) > std::numeric_limits<int>::max() ||
      !aligned(product.d) || !aligned(product.aux) || !is_sm90(sizes.device))
    return std::nullopt;
  product.a = a.data, product.b = b.data;
  product.lda = leading_dimension(a, product.rows, product.depth);
  product.ldb = leading_dimension(b, b_rows, b_columns);
  if (product.lda == 0 || product.ldb == 0) return std::nullopt;
  return Call{launchers[half], product};
}

}  // namespace

std::optional<Call> forward(const Table& table, const Sizes& sizes, const Activation& f, Matrix x, Matrix w,
                            const void* bias, void* y, void* z) {
  Product product{};
  product.rows = sizes.rows, product.depth = sizes.in_features, product.columns = sizes.out_features;
  product.f = f, product.bias = bias, product.d = y, product.aux = z;
  return call(table.forward, sizes, product, x, w, sizes.out_features, sizes.in_features);
}

std::optional<Call> input_gradient(const Table& table, const Sizes& sizes, const Activation& f, Matrix dz,
                                   Matrix w, const void* kept, void* dx, float* sums) {
  Product product{};
  product.rows = sizes.rows, product.depth = sizes.out_features, product.columns = sizes.in_features;
  product.f = f, product.d = dx, product.aux = const_cast<void*>(kept), product.sums = sums;
  return call(table.input_gradient, sizes, product, dz, w, sizes.out_features, sizes.in_features);
}

}  // namespace mlpext::cuda::ct
