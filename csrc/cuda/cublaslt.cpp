// What is asked of cuBLASLt. It needs no -l flag: libtorch_cuda has it among its libraries.
#include "cublaslt.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace mlpext::cuda::lt {
namespace {

constexpr uint64_t max_workspace = 32u << 20u;  // what NVIDIA advises for Hopper

void check(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string("cuBLASLt: ") + call + ": " + cublasLtGetStatusString(status));
}
#define MLPEXT_LT(call, ...) check(call(__VA_ARGS__), #call)

template <class T>
void set(cublasLtMatmulDescOpaque_t& operation, cublasLtMatmulDescAttributes_t attribute, T value) {
  MLPEXT_LT(cublasLtMatmulDescSetAttribute, &operation, attribute, &value, sizeof(value));
}
template <class T> void set(cublasLtMatmulPreferenceOpaque_t& preference,
                            cublasLtMatmulPreferenceAttributes_t attribute, T value) {
  MLPEXT_LT(cublasLtMatmulPreferenceSetAttribute, &preference, attribute, &value, sizeof(value));
}

Matrix transposed(Matrix matrix) { return {matrix.data, matrix.column_stride, matrix.row_stride}; }

// c = a b, row-major: c' = b' a' for the library, which has its matrices column-major. bias and aux are c's,
// by columns; sums are by rows.
std::optional<Product> product(const Sizes& sizes, cublasLtEpilogue_t epilogue, int64_t rows, int64_t depth,
                               int64_t columns, Matrix a, Matrix b, void* c, void* bias, void* aux,
                               int64_t ld_aux) {
  const bool half = sizes.dtype == float16;
  if ((!half && sizes.dtype != bfloat16) || rows == 0 || depth == 0 || columns == 0) return std::nullopt;
  const std::optional<Operand> left = operand(b, depth, columns), right = operand(a, rows, depth);
  if (!left || !right || !aligned(a.data) || !aligned(b.data) || !aligned(c) || !aligned(bias) ||
      !aligned(aux))
    return std::nullopt;
  return Product{{sizes.device, half ? CUDA_R_16F : CUDA_R_16BF, epilogue, columns, rows, depth,
                  left->transposed, left->ld, right->transposed, right->ld, ld_aux},
                 b.data,
                 a.data,
                 c,
                 bias,
                 aux};
}

// Of what f leaves for backward; 0 where there is none. Nothing where the library refuses it.
std::optional<int64_t> ld_of_aux(Activation f, const void* aux, int64_t columns) {
  if (!aux) return 0;
  if (f == Activation::relu) return sign_bytes(columns) * 8;
  return f == Activation::gelu_tanh && columns % 8 == 0 ? std::optional(columns) : std::nullopt;
}

// One for each device, kept to the end of the process.
cublasLtHandle_t handle_of(int64_t device) {
  static auto& handles = *new std::map<int64_t, cublasLtHandle_t>;
  const auto found = handles.find(device);
  if (found != handles.end()) return found->second;
  cublasLtHandle_t handle = nullptr;
  MLPEXT_LT(cublasLtCreate, &handle);
  return handles[device] = handle;
}

Plan make_plan(const Product& product) {
  const Product::Shape& shape = product.shape;
  const Relaxed relaxed;
  Plan plan{};
  plan.handle = handle_of(shape.device);
  MLPEXT_LT(cublasLtMatmulDescInit, &plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, shape.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, shape.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<cublasLtEpilogue_t>(shape.epilogue));
  // The heuristic reads off these addresses how they are aligned: here as badly as any to come.
  const auto anywhere = reinterpret_cast<void*>(alignment);
  if (product.bias) set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, anywhere);
  if (product.aux) {
    set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, anywhere);
    set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, shape.ld_aux);
  }
  const auto layout = [&](cublasLtMatrixLayoutOpaque_t& matrix, int64_t rows, int64_t columns, bool transpose,
                          int64_t ld) {
    if (transpose) std::swap(rows, columns);
    MLPEXT_LT(cublasLtMatrixLayoutInit, &matrix, static_cast<cudaDataType_t>(shape.type), rows, columns, ld);
  };
  layout(plan.a, shape.m, shape.k, shape.transpose_a, shape.lda);
  layout(plan.b, shape.k, shape.n, shape.transpose_b, shape.ldb);
  layout(plan.d, shape.m, shape.n, false, shape.m);

  cublasLtMatmulPreferenceOpaque_t preference;
  MLPEXT_LT(cublasLtMatmulPreferenceInit, &preference);
  set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, max_workspace);
  // Sums over parts of k are added in float, not in the type of the output.
  set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  for (auto operand :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    set(preference, operand, static_cast<uint32_t>(alignment));

  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      plan.handle, &plan.operation, &plan.a, &plan.b, &plan.d, &plan.d, &preference, 1, &result, &found);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) check(status, "cublasLtMatmulAlgoGetHeuristic");
  plan.served = status == CUBLAS_STATUS_SUCCESS && found > 0 && result.state == CUBLAS_STATUS_SUCCESS;
  plan.algorithm = result.algo;
  plan.workspace = result.workspaceSize;
  return plan;
}

struct Cache {
  std::mutex mutex;  // also held while a plan is made, so that each is made once
  std::map<Product::Shape, Plan> plans;
};
Cache& cache() {
  static Cache& all = *new Cache;
  return all;
}

}  // namespace

std::optional<Product> forward(const Sizes& sizes, Activation f, Matrix x, Matrix w, const void* bias,
                               void* y, void* aux) {
  const auto ld_aux = ld_of_aux(f, aux, sizes.out_features);
  if (!ld_aux) return std::nullopt;
  constexpr cublasLtEpilogue_t epilogues[3][2][2] = {
      {{CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS}},
      {{CUBLASLT_EPILOGUE_RELU, CUBLASLT_EPILOGUE_RELU_BIAS},
       {CUBLASLT_EPILOGUE_RELU_AUX, CUBLASLT_EPILOGUE_RELU_AUX_BIAS}},
      {{CUBLASLT_EPILOGUE_GELU, CUBLASLT_EPILOGUE_GELU_BIAS},
       {CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_GELU_AUX_BIAS}},
  };
  return product(sizes, epilogues[static_cast<int>(f)][aux != nullptr][bias != nullptr], sizes.rows,
                 sizes.in_features, sizes.out_features, x, transposed(w), y, const_cast<void*>(bias), aux,
                 *ld_aux);
}

std::optional<Product> input_gradient(const Sizes& sizes, Activation f, Matrix dz, Matrix w, const void* aux,
                                      void* dx, void* db) {
  const auto ld_aux = ld_of_aux(f, aux, sizes.in_features);
  if (!ld_aux || !*ld_aux) return std::nullopt;
  const cublasLtEpilogue_t epilogue = f == Activation::relu
                                          ? (db ? CUBLASLT_EPILOGUE_DRELU_BGRAD : CUBLASLT_EPILOGUE_DRELU)
                                          : (db ? CUBLASLT_EPILOGUE_DGELU_BGRAD : CUBLASLT_EPILOGUE_DGELU);
  return product(sizes, epilogue, sizes.rows, sizes.out_features, sizes.in_features, dz, w, dx, db,
                 const_cast<void*>(aux), *ld_aux);
}

std::optional<Product> weight_gradient(const Sizes& sizes, Matrix dz, Matrix x, void* dw, void* db) {
  return product(sizes, CUBLASLT_EPILOGUE_BGRADB, sizes.out_features, sizes.rows, sizes.in_features,
                 transposed(dz), x, dw, db, nullptr, 0);
}

Plan plan_of(const Product& product) {
  Cache& all = cache();
  const std::lock_guard lock(all.mutex);
  const auto found = all.plans.find(product.shape);
  if (found != all.plans.end()) return found->second;
  const Plan plan = make_plan(product);
  if (all.plans.size() == max_plans) all.plans.clear();
  all.plans.emplace(product.shape, plan);
  return plan;
}

std::size_t served_plans() {
  Cache& all = cache();
  const std::lock_guard lock(all.mutex);
  return std::ranges::count_if(all.plans, [](const auto& each) { return each.second.served; });
}

void run(Plan plan, const Product& product, void* workspace, cudaStream_t stream) {
  if (product.bias) set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias);
  if (product.aux) set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, product.aux);
  const float one = 1, zero = 0;
  MLPEXT_LT(cublasLtMatmul, plan.handle, &plan.operation, &one, product.a, &plan.a, product.b, &plan.b, &zero,
            product.d, &plan.d, product.d, &plan.d, &plan.algorithm, workspace, plan.workspace, stream);
}

}  // namespace mlpext::cuda::lt
