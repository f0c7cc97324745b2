// The epilogues of cuBLASLt and CUTLASS on tensors. Each function returns undefined tensors where the
// switches are off or no library serves the case, and nothing has been done then.
#include <algorithm>
#include <atomic>

#include "../composites.h"
#include "cublaslt.h"
#include "cutlass.h"
#include "tensors.h"

namespace mlpext::cuda {
namespace {

std::optional<lt::Activation> activation_of(std::string_view name) {
  if (name == Identity::name) return lt::Activation::identity;
  if (name == ReLU::name) return lt::Activation::relu;
  if (name == GELUTanh::name) return lt::Activation::gelu_tanh;
  return std::nullopt;
}

Sizes sizes_of(const Tensor& rows, int64_t in_features, int64_t out_features) {
  return {rows.device().index(), dtype_of(rows), rows.size(0), in_features, out_features};
}

bool alike(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.device() == b.device();
}

bool run(const std::optional<lt::Product>& product, const On& on) {
  if (!product) return false;
  const lt::Plan plan = lt::plan_of(*product);
  if (!plan.served) return false;
  const Tensor workspace = fresh({static_cast<int64_t>(plan.workspace)}, at::kByte);
  lt::run(plan, *product, workspace.mutable_data_ptr(), on.stream);
  return true;
}

std::atomic<const ct::Table*> kernels_of_cutlass = nullptr;
std::atomic<int64_t> calls_of_cutlass = 0;

// What is asked of CUTLASS, if it is switched on and there.
const ct::Table* cutlass_table() { return cutlass() ? kernels_of_cutlass.load() : nullptr; }

ct::Activation cutlass_activation(std::size_t index, Params params) {
  ct::Activation f{static_cast<int>(index), {}};
  std::ranges::copy(params, f.params);
  return f;
}

bool run(const std::optional<ct::Call>& call, const On& on) {
  if (!call) return false;
  C10_CUDA_CHECK(call->launch(call->product, on.stream));
  ++calls_of_cutlass;
  return true;
}

const void* data_or_null(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
void* mutable_or_null(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : tensor;
}

}  // namespace

int64_t cublaslt_plans() { return static_cast<int64_t>(lt::served_plans()); }

const ct::Table* cutlass_kernels() { return kernels_of_cutlass; }
void set_cutlass_kernels(const ct::Table* kernels) { kernels_of_cutlass = kernels; }
int64_t cutlass_calls() { return calls_of_cutlass; }

std::tuple<Tensor, Tensor> epilogue_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                            std::size_t activation, Params params, bool keep) {
  const std::string_view name = activation_infos[activation].name;
  const bool identity = name == Identity::name;
  const auto f = activation_of(name);
  // A product alone has nothing to gain; of relu cuBLASLt keeps no z; CUTLASS has no need to add a bias only.
  const bool lt_serves = cublaslt() && f && !(identity && !bias) && (!keep || f == lt::Activation::gelu_tanh);
  const ct::Table* const table = identity ? nullptr : cutlass_table();
  if (x.element_size() != 2 || !(lt_serves || table)) return {};
  const On on(x);
  const Sizes sizes = sizes_of(x, x.size(1), weight.size(0));
  const Tensor y = fresh({sizes.rows, sizes.out_features}, x.scalar_type());
  const Tensor z = keep ? fresh_like(y) : Tensor();
  const OptionalTensor b = contiguous(bias);
  if (lt_serves && run(lt::forward(sizes, *f, matrix(x), matrix(weight), data_or_null(b),
                                   y.mutable_data_ptr(), mutable_or_null(z)),
                       on))
    return {y, z};
  if (table && run(ct::forward(*table, sizes, cutlass_activation(activation, params), matrix(x),
                               matrix(weight), data_or_null(b), y.mutable_data_ptr(), mutable_or_null(z)),
                   on))
    return {y, z};
  return {};
}

std::tuple<Tensor, Tensor> epilogue_relu_and_signs(const Tensor& x, const Tensor& weight,
                                                   const OptionalTensor& bias) {
  if (!cublaslt() || x.element_size() != 2) return {};
  const On on(x);
  const Sizes sizes = sizes_of(x, x.size(1), weight.size(0));
  const Tensor y = fresh({sizes.rows, sizes.out_features}, x.scalar_type());
  const Tensor signs = fresh({sizes.rows, lt::sign_bytes(sizes.out_features)}, at::kByte);
  const OptionalTensor b = contiguous(bias);
  if (!run(lt::forward(sizes, lt::Activation::relu, matrix(x), matrix(weight), data_or_null(b),
                       y.mutable_data_ptr(), signs.mutable_data_ptr()),
           on))
    return {};
  return {y, signs};
}

std::tuple<Tensor, Tensor> epilogue_input_gradient(const Tensor& dz, const Tensor& weight,
                                                   std::size_t activation, Params params, const Tensor& kept,
                                                   const Tensor& signs, bool with_sums) {
  if (!(cublaslt() || cutlass_table()) || dz.element_size() != 2 || !alike(dz, weight) ||
      dz.size(1) != weight.size(0))
    return {};
  const Sizes sizes = sizes_of(dz, weight.size(1), weight.size(0));
  const auto usable = [&](const Tensor& aux, at::ScalarType dtype, int64_t width) {
    return aux.defined() && aux.device() == dz.device() && aux.scalar_type() == dtype &&
           aux.sizes() == at::IntArrayRef{sizes.rows, width} && aux.is_contiguous();
  };
  const bool kept_usable = usable(kept, dz.scalar_type(), sizes.in_features);
  const auto f = activation_of(activation_infos[activation].name);
  const bool by_signs =
      f == lt::Activation::relu && usable(signs, at::kByte, lt::sign_bytes(sizes.in_features));
  const bool lt_serves = cublaslt() && (by_signs || (f == lt::Activation::gelu_tanh && kept_usable));
  const ct::Table* const table = kept_usable ? cutlass_table() : nullptr;
  if (!(lt_serves || table)) return {};
  const On on(dz);
  const Tensor dx = fresh({sizes.rows, sizes.in_features}, dz.scalar_type());
  const Tensor db = with_sums ? fresh({sizes.in_features}, dz.scalar_type()) : Tensor();
  if (lt_serves && run(lt::input_gradient(sizes, *f, matrix(dz), matrix(weight),
                                          (by_signs ? signs : kept).const_data_ptr(), dx.mutable_data_ptr(),
                                          mutable_or_null(db)),
                       on))
    return {dx, db};
  if (!table) return {};
  const Tensor sums = with_sums
                          ? fresh({ct::sum_rows(sizes.rows), ct::sum_columns(sizes.in_features)}, at::kFloat)
                          : Tensor();
  if (!run(ct::input_gradient(*table, sizes, cutlass_activation(activation, params), matrix(dz),
                              matrix(weight), kept.const_data_ptr(), dx.mutable_data_ptr(),
                              static_cast<float*>(mutable_or_null(sums))),
           on))
    return {};
  if (with_sums)
    C10_CUDA_CHECK(kernels(sizes.dtype)
                       .add_sums({sums.size(0), sizes.in_features, sums.size(1), sums.const_data_ptr(),
                                  db.mutable_data_ptr()},
                                 on.stream));
  return {dx, db};
}

std::tuple<Tensor, Tensor> epilogue_weight_gradient(const Tensor& dz, const Tensor& x) {
  if (!cublaslt() || dz.element_size() != 2 || !alike(dz, x) || dz.size(0) != x.size(0)) return {};
  const On on(dz);
  const int64_t in_features = x.size(1), out_features = dz.size(1);
  const Tensor dw = fresh({out_features, in_features}, dz.scalar_type());
  const Tensor db = fresh({out_features}, dz.scalar_type());
  const auto product = lt::weight_gradient(sizes_of(dz, in_features, out_features), matrix(dz), matrix(x),
                                           dw.mutable_data_ptr(), db.mutable_data_ptr());
  if (!run(product, on)) return {};
  return {dw, db};
}

}  // namespace mlpext::cuda
