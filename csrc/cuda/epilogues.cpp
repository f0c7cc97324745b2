// cuBLASLt's epilogues on tensors. Each function returns undefined tensors where the switch is off or the
// library does not serve the case, and nothing has been done then.
#include "../composites.h"
#include "cublaslt.h"
#include "tensors.h"

namespace mlpext::cuda {
namespace {

std::optional<lt::Activation> activation_of(std::string_view name) {
  if (name == Identity::name) return lt::Activation::identity;
  if (name == ReLU::name) return lt::Activation::relu;
  if (name == GELUTanh::name) return lt::Activation::gelu_tanh;
  return std::nullopt;
}

lt::Sizes sizes_of(const Tensor& rows, int64_t in_features, int64_t out_features) {
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

}  // namespace

int64_t cublaslt_plans() { return static_cast<int64_t>(lt::served_plans()); }

std::tuple<Tensor, Tensor> epilogue_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                            std::string_view name, bool keep) {
  const auto f = activation_of(name);
  // A product alone has nothing to gain.
  if (!cublaslt() || x.element_size() != 2 || !f || (f == lt::Activation::identity && !bias)) return {};
  const On on(x);
  const int64_t rows = x.size(0), out_features = weight.size(0);
  const Tensor y = fresh({rows, out_features}, x.scalar_type());
  Tensor aux;
  if (keep && f == lt::Activation::relu) aux = fresh({rows, lt::sign_bytes(out_features)}, at::kByte);
  else if (keep) aux = fresh_like(y);
  const OptionalTensor b = bias ? OptionalTensor(bias->contiguous()) : bias;
  const auto product = lt::forward(sizes_of(x, x.size(1), out_features), *f, matrix(x), matrix(weight),
                                   b ? b->const_data_ptr() : nullptr, y.mutable_data_ptr(),
                                   keep ? aux.mutable_data_ptr() : nullptr);
  if (!run(product, on)) return {};
  return {y, aux};
}

std::tuple<Tensor, Tensor> epilogue_input_gradient(const Tensor& dz, const Tensor& weight,
                                                   std::string_view name, const Tensor& aux, bool with_sums) {
  const auto f = activation_of(name);
  if (!cublaslt() || dz.element_size() != 2 || !f || f == lt::Activation::identity || !alike(dz, weight) ||
      dz.size(1) != weight.size(0))
    return {};
  const int64_t rows = dz.size(0), in_features = weight.size(1);
  const bool signs = f == lt::Activation::relu;
  if (aux.device() != dz.device() || aux.scalar_type() != (signs ? at::kByte : dz.scalar_type()) ||
      aux.sizes() != at::IntArrayRef{rows, signs ? lt::sign_bytes(in_features) : in_features} ||
      !aux.is_contiguous())
    return {};
  const On on(dz);
  const Tensor dx = fresh({rows, in_features}, dz.scalar_type());
  const Tensor db = with_sums ? fresh({in_features}, dz.scalar_type()) : Tensor();
  const auto product = lt::input_gradient(sizes_of(dz, in_features, weight.size(0)), *f, matrix(dz),
                                          matrix(weight), aux.const_data_ptr(), dx.mutable_data_ptr(),
                                          with_sums ? db.mutable_data_ptr() : nullptr);
  if (!run(product, on)) return {};
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
