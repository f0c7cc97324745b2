// Products of a linear layer with what goes before or after them in cuBLASLt's epilogue. No torch header:
// device pointers, sizes and a stream. Matrices are row-major by their strides; outputs are contiguous.
#pragma once
#include <cublasLt.h>

#include <compare>

#include "products.h"

namespace mlpext::cuda::lt {

// The activations that the library has epilogues for; its gelu is the one by tanh.
enum class Activation { identity, relu, gelu_tanh };

// What backward wants of forward besides y: relu's signs, one bit each, or gelu's z, as wide as y. A row of
// bits takes a multiple of 16 bytes.
constexpr int64_t sign_bytes(int64_t columns) { return ceil_div(columns, 128) * 16; }

// D = op(A) op(B) and its epilogue, column-major as the library has it: everything that an algorithm depends
// on, and the operands.
struct Product {
  struct Shape {
    int64_t device, type, epilogue, m, n, k, transpose_a, lda, transpose_b, ldb, ld_aux;
    auto operator<=>(const Shape&) const = default;
  } shape;
  const void *a, *b;
  void *d, *bias, *aux;  // the last two may be null
};

// Each is empty where the library cannot be asked: a dtype of more than 16 bits, an empty matrix, strides
// that are no leading dimension, an address or a row of z that is no multiple of 16 bytes.
//
// y = f(x w' + bias), and aux if it is not null.
std::optional<Product> forward(const Sizes& sizes, Activation f, Matrix x, Matrix w, const void* bias,
                               void* y, void* aux);
// dx = (dz w) f'(aux), and its sums over the rows, db, if that is not null: f, aux and db belong to the layer
// below. w is (out_features, in_features), dx (rows, in_features).
std::optional<Product> input_gradient(const Sizes& sizes, Activation f, Matrix dz, Matrix w, const void* aux,
                                      void* dx, void* db);
// dw = dz' x, and db, the sums of dz over the rows.
std::optional<Product> weight_gradient(const Sizes& sizes, Matrix dz, Matrix x, void* dw, void* db);

// A product as the library wants it, with the algorithm that its heuristic chose. Plain data: a thread works
// on a copy.
struct Plan {
  cublasLtHandle_t handle;
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t a, b, d;
  cublasLtMatmulAlgo_t algorithm;
  std::size_t workspace;  // bytes
  bool served;            // whether there is an algorithm
};

// From the cache, which begins anew when it is full; product.shape.device must be the current one.
constexpr std::size_t max_plans = 256;
Plan plan_of(const Product& product);
std::size_t served_plans();  // in the cache

void run(Plan plan, const Product& product, void* workspace, cudaStream_t stream);

}  // namespace mlpext::cuda::lt
