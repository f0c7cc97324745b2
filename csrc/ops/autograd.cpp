// Gradients: one autograd node a family, written as PyTorch's own generated code writes them, on the Autograd
// key.
//
// The kernels here decide once whether a call is plain eager. Under a functorch transform, with a forward
// tangent, under a dispatch mode or with a wrapper subclass, with tensors or parameters that the package does
// not serve, and in the backward operators whenever a graph of the backward is asked for, they run native
// operators instead (composites.h). So derivatives of every order come from one rule, and there is no
// hand-written double backward, jvp or batching rule.
#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>
#include <torch/version.h>

#include "ops/composites.h"
#include "ops/ops.h"

#define MLPEXT_TORCH_AT_LEAST(minor) (TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= minor)

namespace mlpext {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::autograd::collect_next_edges;
using torch::autograd::compute_requires_grad;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

bool has_tangent(const Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }
bool has_tangent(const OptionalTensor& tensor) { return tensor && has_tangent(*tensor); }
bool has_tangent(at::TensorList tensors) {
  return std::ranges::any_of(tensors, [](const Tensor& tensor) { return has_tangent(tensor); });
}

template <class... Tensors> bool plain_eager(DispatchKeySet keys, const Tensors&... tensors) {
  constexpr DispatchKeySet unusual({DispatchKey::FuncTorchDynamicLayerBackMode, DispatchKey::Python});
  return !keys.has_any(unusual) && !(has_tangent(tensors) || ...);
}

#if MLPEXT_TORCH_AT_LEAST(13)
template <class N> c10::intrusive_ptr<N> make_node() { return c10::make_intrusive<N>(); }
#else
template <class N> std::shared_ptr<N> make_node() {
  return std::shared_ptr<N>(new N(), torch::autograd::deleteNode);
}
#endif

template <class N> void finish([[maybe_unused]] const N& node) {
#if MLPEXT_TORCH_AT_LEAST(15)
  torch::autograd::fire_node_creation_hooks(node);
#endif
}

// An activation as a node remembers it.
struct Remembered {
  int64_t index = 0;
  std::array<double, 2> values{};

  Remembered() = default;
  Remembered(std::size_t index, Params params) : index(static_cast<int64_t>(index)) {
    std::copy(params.begin(), params.end(), values.begin());
  }
  std::string_view name() const { return activation_infos[index].name; }
  Params params() const { return {values.data(), activation_infos[index].params.size()}; }
  template <class Visit> void attributes(Visit&& visit) { visit(index), visit(values[0]), visit(values[1]); }
};
static_assert(std::ranges::all_of(activation_infos,
                                  [](const ActivationInfo& info) { return info.params.size() <= 2; }));

// How many gradients a rule returns and tensors it saves.
template <std::size_t inputs, std::size_t saved> struct Fixed {
  static constexpr bool fixed = true;
  template <class T> using PerInput = std::array<T, inputs>;
  template <class T> using PerSaved = std::array<T, saved>;
};
struct Varying {
  static constexpr bool fixed = false;
  template <class T> using PerInput = std::vector<T>;
  template <class T> using PerSaved = std::vector<T>;
};

// A tensor whose values the usual backward does not read: not packed, so that saved-tensor hooks copy nothing
// in vain, and an error only for a backward that does read it after a change in place.
struct Reference {
  Tensor tensor;
  uint32_t version;

  // Out of inference mode, where gradients are, an inference tensor cannot change, and it has no version.
  explicit Reference(const Tensor& tensor)
      : tensor(tensor), version(tensor.is_inference() ? 0 : tensor._version()) {}

  const Tensor& unchanged() const {
    TORCH_CHECK(
        tensor.is_inference() || tensor._version() == version,
        "one of the variables needed for gradient computation has been modified by an inplace operation: [",
        tensor.toString(), " ", tensor.sizes(), "] is at version ", tensor._version(), "; expected version ",
        version, " instead.");
    return tensor;
  }
};
using Saved = std::variant<SavedVariable, Reference>;

// What a backward wants of a saved tensor.
enum class Want { nothing, shape, values };

// The node of a family. Rule says what is saved and how the gradients come of it:
//   name                               what grad_fn prints
//   PerInput, PerSaved                 lists with an entry for each gradient returned, each tensor saved
//   saves_output(i)                    whether saved tensor i is an output of the node itself
//   wants(i, mask, graph)              what of saved tensor i the gradients, or a graph of them, need
//   attributes(visit)                  everything else that the gradients depend on (for compiled autograd)
//   backward(grads, tensors, mask)     the gradients
template <class Rule> struct FamilyNode final : torch::autograd::TraceableFunction {
  using InputMask = typename Rule::template PerInput<bool>;
  using Tensors = typename Rule::template PerSaved<Tensor>;

  Rule rule;
  typename Rule::template PerSaved<Saved> saved;

  std::string name() const override { return Rule::name; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (Saved& each : saved) {
      if (auto* variable = std::get_if<SavedVariable>(&each)) variable->reset_data();
      else each = SavedVariable();
    }
  }

  InputMask mask() const {
    InputMask asked;
    if constexpr (!Rule::fixed) asked.resize(num_outputs());
    for (std::size_t i = 0; i < asked.size(); ++i) asked[i] = task_should_compute_output(i);
    return asked;
  }

  Tensor unpack(const Saved& from, Want want) {
    if (want == Want::nothing) return {};
    if (const auto* reference = std::get_if<Reference>(&from))
      return want == Want::values ? reference->unchanged() : reference->tensor;
    const auto& variable = std::get<SavedVariable>(from);
    if (want == Want::shape && !variable.has_hooks()) return *variable.get_raw_data();  // changed or not
    return variable.unpack(getptr());
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);  // a graph may be run backward from several threads
    const InputMask asked = mask();
    Tensors tensors;
    if constexpr (!Rule::fixed) tensors.resize(saved.size());
    for (std::size_t i = 0; i < tensors.size(); ++i)
      tensors[i] = unpack(saved[i], rule.wants(i, asked, /*graph=*/at::GradMode::is_enabled()));
    return rule.backward(grads, tensors, asked);
  }

  // Compiled autograd, which makes no graph of a backward. What is not wanted must not be touched: it may
  // have been changed, and a call of an unpack hook whose result nobody takes is an error.
  Want compiled_want(std::size_t i) const { return rule.wants(i, mask(), /*graph=*/false); }

  void compiled_args(torch::autograd::CompiledNodeArgs& args) const override {
    for (std::size_t i = 0; i < saved.size(); ++i) {
      const Want want = compiled_want(i);
      args.collect(static_cast<int>(want));
      if (want == Want::nothing) continue;
      if (const auto* reference = std::get_if<Reference>(&saved[i]))
        args.collect(want == Want::values ? reference->unchanged() : reference->tensor);
      else args.collect(std::get<SavedVariable>(saved[i]), rule.saves_output(i));
    }
    Rule(rule).attributes([&](auto& attribute) { args.collect(attribute); });
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::autograd::SwapSavedVariables& swap) override {
    using torch::dynamo::autograd::IValuePacker;
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    static const bool bound = [&] {
      std::vector<at::TypePtr> types{IValuePacker<InputMask>::packed_type()};
      if constexpr (Rule::fixed)
        types.insert(types.end(), std::tuple_size_v<Tensors>, IValuePacker<Tensor>::packed_type());
      else types.push_back(IValuePacker<Tensors>::packed_type());
      Rule().attributes([&]<class A>(A&) { types.push_back(IValuePacker<A>::packed_type()); });
      compiler->bind_function(swap.get_py_compiler(), Rule::name, functional, std::move(types));
      return true;
    }();
    static_cast<void>(bound);
    Tensors tensors;
    if constexpr (!Rule::fixed) tensors.resize(saved.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (compiled_want(i) == Want::nothing) continue;
      if (auto* reference = std::get_if<Reference>(&saved[i])) {
        swap.before(reference->tensor);
        tensors[i] = reference->tensor;
        swap.after(reference->tensor);
      } else {
        auto& variable = std::get<SavedVariable>(saved[i]);
        swap.before(variable);
        tensors[i] = variable.unpack(getptr());
        swap.after(variable);
      }
    }
    torch::autograd::PackedArgs packed;
    packed.pack(mask());
    if constexpr (Rule::fixed)
      for (const Tensor& tensor : tensors) packed.pack(tensor);
    else packed.pack(tensors);
    rule.attributes([&](const auto& attribute) { packed.pack(attribute); });
    return compiler->call_function(
        swap.get_py_compiler(), "apply_functional", Rule::name, grads, packed.vec(),
        IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            torch::dynamo::autograd::get_input_metadata(next_edges())));
  }

  static variable_list functional(const variable_list& grads, const std::vector<c10::IValue>& values) {
    const at::NoGradGuard no_graph;
    torch::autograd::PackedArgs packed(values);
    const auto asked = packed.unpack<InputMask>();
    Tensors tensors;
    if constexpr (Rule::fixed)
      for (Tensor& tensor : tensors) tensor = packed.unpack<Tensor>();
    else tensors = packed.unpack<Tensors>();
    Rule rule;
    rule.attributes([&]<class A>(A& attribute) { attribute = packed.unpack<A>(); });
    return rule.backward(grads, tensors, asked);
  }
};

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// ---- activation

struct ActivationRule : Fixed<1, 1> {
  static constexpr const char* name = "ActivationBackward0";

  Remembered activation;
  bool from_output = false;

  bool saves_output(std::size_t) const { return from_output; }
  Want wants(std::size_t, PerInput<bool>, bool) const { return Want::values; }
  template <class Visit> void attributes(Visit&& visit) { activation.attributes(visit), visit(from_output); }
  variable_list backward(const variable_list& grads, const PerSaved<Tensor>& tensors,
                         PerInput<bool> mask) const {
    if (!grads[0].defined() || !mask[0]) return {Tensor()};
    return {ops::activation_backward().call(grads[0], tensors[0], activation.name(), activation.params(),
                                            from_output)};
  }
};

Tensor activation(DispatchKeySet keys, const Tensor& input, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  const ActivationInfo& info = activation_infos[index];
  if (!plain_eager(keys, input) || !served(input) || !usual(index, params, input.scalar_type()))
    return composite::activation(input, name, params);

  auto forward = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::activation().redispatch(keys & c10::after_autograd_keyset, input, name, params);
  };
  if (!compute_requires_grad(input)) return forward();

  auto node = make_node<FamilyNode<ActivationRule>>();
  node->set_next_edges(collect_next_edges(input));
  node->rule = {{}, {index, params}, info.keeps_output};
  if (!info.keeps_output) node->saved[0] = SavedVariable(input, /*is_output=*/false);
  Tensor output = forward();
  torch::autograd::set_history(output, node);
  if (info.keeps_output) node->saved[0] = SavedVariable(output, /*is_output=*/true);
  finish(node);
  return output;
}

Tensor& activation_(DispatchKeySet keys, Tensor& input, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  const ActivationInfo& info = activation_infos[index];
  const bool keeps_output = info.output_suffices(params.data());
  // With a negative slope native refuses the backward of the in-place form, and so do we.
  if (!plain_eager(keys, input) || !served(input) || !usual(index, params, input.scalar_type()) ||
      info.has_derivative_from_output != keeps_output)
    return composite::activation_(input, name, params);

  const bool requires_grad = compute_requires_grad(input);
  torch::autograd::check_inplace(input, requires_grad);
  auto node = requires_grad ? make_node<FamilyNode<ActivationRule>>() : nullptr;
  if (node) {
    node->set_next_edges(collect_next_edges(input));
    node->rule = {{}, {index, params}, keeps_output};
    if (!keeps_output) node->saved[0] = SavedVariable(input.clone(), /*is_output=*/false);
  }
  {
    at::AutoDispatchBelowAutograd guard;
    ops::activation_().redispatch(keys & c10::after_autograd_keyset, input, name, params);
  }
  if (node) {
    torch::autograd::rebase_history(input, node);
    if (keeps_output)
      node->saved[0] = SavedVariable(input, /*is_output=*/true, /*is_inplace_on_view=*/input.is_view());
    finish(node);
  }
  return input;
}

Tensor& bump_version(DispatchKeySet keys, Tensor& input, std::string_view name, Params params) {
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    ops::activation_().redispatch(keys & c10::after_ADInplaceOrView_keyset, input, name, params);
  }
  torch::autograd::increment_version(input);
  return input;
}

Tensor activation_backward(DispatchKeySet keys, const Tensor& grad_output, const Tensor& saved,
                           std::string_view name, Params params, bool from_output) {
  if (!plain_eager(keys, grad_output, saved) || compute_requires_grad(grad_output, saved))
    return composite::activation_backward(grad_output, saved, name, params, from_output);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::activation_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, saved, name,
                                               params, from_output);
}

// ---- maxout

struct MaxoutRule : Fixed<1, 1> {  // saved: the index of the piece that won
  static constexpr const char* name = "MaxoutBackward0";

  int64_t pieces = 1, dim = 0;

  bool saves_output(std::size_t) const { return false; }
  Want wants(std::size_t, PerInput<bool>, bool) const { return Want::values; }
  template <class Visit> void attributes(Visit&& visit) { visit(pieces), visit(dim); }
  variable_list backward(const variable_list& grads, const PerSaved<Tensor>& tensors,
                         PerInput<bool> mask) const {
    if (!grads[0].defined() || !mask[0]) return {Tensor()};
    return {ops::maxout_backward().call(grads[0], tensors[0], pieces, dim)};
  }
};

Tensor maxout(DispatchKeySet keys, const Tensor& input, int64_t pieces, int64_t dim) {
  if (!plain_eager(keys, input) || !served(input)) return composite::maxout(input, pieces, dim);
  const bool requires_grad = compute_requires_grad(input);
  at::AutoDispatchBelowADInplaceOrView guard;
  if (!requires_grad) return ops::maxout().redispatch(keys & c10::after_autograd_keyset, input, pieces, dim);

  auto node = make_node<FamilyNode<MaxoutRule>>();
  node->set_next_edges(collect_next_edges(input));
  auto [output, index] =
      ops::maxout_forward().redispatch(keys & c10::after_autograd_keyset, input, pieces, dim);
  node->rule = {{}, pieces, at::maybe_wrap_dim(dim, input.dim())};
  node->saved[0] = SavedVariable(index, /*is_output=*/false);
  torch::autograd::set_history(output, node);
  finish(node);
  return output;
}

Tensor maxout_backward(DispatchKeySet keys, const Tensor& grad_output, const Tensor& index, int64_t pieces,
                       int64_t dim) {
  if (!plain_eager(keys, grad_output, index) || compute_requires_grad(grad_output))
    return composite::maxout_backward(grad_output, index, pieces, dim);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::maxout_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, index, pieces,
                                           dim);
}

// ---- linear + activation

struct LinearActivationRule : Fixed<3, 4> {
  static constexpr const char* name = "LinearActivationBackward0";
  // `kept` is y where the derivative follows from it, else the pre-activation z, which is the node's second
  // output so that a graph of the backward reaches through it.
  enum Slot : std::size_t { input, weight, bias, kept };

  Remembered activation;
  bool from_output = false;
  // y's version counter, and its count when y was saved: after `y += skip` the derivative comes from z =
  // linear(x, W, b) again.
  std::optional<c10::VariableVersion> version;
  uint32_t saved_version = 0;

  bool saves_output(std::size_t i) const { return i == kept; }
  bool is_identity() const { return activation.index == 0; }
  bool output_changed() const { return version && version->current_version() != saved_version; }

  Want wants(std::size_t i, Mask mask, bool) const {
    const bool again = output_changed();
    const bool wanted =
        i == kept ? !is_identity() && !again : again || (i == input && mask[1]) || (i == weight && mask[0]);
    return wanted ? Want::values : Want::nothing;
  }
  template <class Visit> void attributes(Visit&& visit) { activation.attributes(visit), visit(from_output); }
  variable_list backward(const variable_list& grads, const PerSaved<Tensor>& tensors, Mask mask) const {
    if (!grads[0].defined() && !(grads.size() > 1 && grads[1].defined()))
      return {Tensor(), Tensor(), Tensor()};
    Tensor result = tensors[kept];
    bool derive_from_output = from_output;
    if (!result.defined() && !is_identity()) {
      result = at::linear(tensors[input], tensors[weight], optional(tensors[bias]));
      derive_from_output = false;
    }
    auto linear_backward = [&](const Tensor& grad_output, std::string_view name, Params params) {
      auto [dx, dw, db] = ops::linear_activation_backward().call(grad_output, optional(tensors[input]),
                                                                 optional(tensors[weight]), optional(result),
                                                                 name, params, derive_from_output, mask);
      return variable_list{dx, dw, db};
    };
    if (grads.size() == 1 || !grads[1].defined())
      return linear_backward(grads[0], activation.name(), activation.params());
    // The backward of a backward: z has a gradient of its own.
    Tensor dz = grads[1];
    if (grads[0].defined())
      dz = dz +
           ops::activation_backward().call(grads[0], result, activation.name(), activation.params(), false);
    return linear_backward(dz, Identity::name, {});
  }
};

Tensor linear_activation(DispatchKeySet keys, const Tensor& input, const Tensor& weight,
                         const OptionalTensor& bias, std::string_view name, Params params) {
  const std::size_t index = activation_index(name, params);
  const ActivationInfo& info = activation_infos[index];
  if (!plain_eager(keys, input, weight, bias) || !linear_served(input, weight, bias) ||
      !usual(index, params, input.scalar_type()))
    return composite::linear_activation(input, weight, bias, name, params);

  const bool requires_grad = compute_requires_grad(input, weight, bias);
  at::AutoDispatchBelowADInplaceOrView guard;
  keys = keys & c10::after_autograd_keyset;
  if (!requires_grad) return ops::linear_activation().redispatch(keys, input, weight, bias, name, params);

  const bool half = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  const bool keep_output = info.output_suffices(params.data()) && !(half && info.coarse_in_half);
  const bool keep_nothing = name == Identity::name;
  auto [output, z] = ops::linear_activation_forward().redispatch(keys, input, weight, bias, name, params,
                                                                 /*keep_preactivation=*/!keep_output);

  using Rule = LinearActivationRule;
  auto node = make_node<FamilyNode<Rule>>();
  node->set_next_edges(collect_next_edges(input, weight, bias));
  node->rule.activation = {index, params};
  node->rule.from_output = keep_output;
  // Where native's activation keeps its input (elu and its family), `y += skip` trains natively, and so must
  // it here; elsewhere it may where x is at hand.
  const bool for_weight = node->should_compute_output(1);
  const bool recomputable = keep_output && !keep_nothing && (for_weight || !info.keeps_output);
  const auto save = [&](Rule::Slot i, const Tensor& tensor, bool for_gradients) {
    if (for_gradients) node->saved[i] = SavedVariable(tensor, /*is_output=*/false);
    else if (recomputable) node->saved[i] = Reference(tensor);
  };
  save(Rule::input, input, for_weight);
  save(Rule::weight, weight, node->should_compute_output(0));
  if (bias) save(Rule::bias, *bias, false);

  torch::autograd::set_history(output, node);
  if (keep_output && !keep_nothing) {
    node->saved[Rule::kept] = SavedVariable(output, /*is_output=*/true);
    if (recomputable) {
      node->rule.version = torch::autograd::impl::version_counter(output);
      node->rule.saved_version = node->rule.version->current_version();
    }
  } else if (!keep_nothing) {
    torch::autograd::set_history(z, node);
    node->saved[Rule::kept] = SavedVariable(z, /*is_output=*/true);
  }
  finish(node);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> linear_activation_backward(
    DispatchKeySet keys, const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& saved, std::string_view name, Params params, bool from_output, Mask output_mask) {
  if (!plain_eager(keys, grad_output, input, weight, saved) ||
      compute_requires_grad(grad_output, input, weight, saved))
    return composite::linear_activation_backward(grad_output, input, weight, saved, name, params, from_output,
                                                 output_mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::linear_activation_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, input,
                                                      weight, saved, name, params, from_output, output_mask);
}

// ---- linear + maxout

struct LinearMaxoutRule : Fixed<3, 3> {
  static constexpr const char* name = "LinearMaxoutBackward0";
  enum Slot : std::size_t { input, weight, index };

  int64_t pieces = 1;

  bool saves_output(std::size_t) const { return false; }
  Want wants(std::size_t i, Mask mask, bool) const {
    return i == index || (i == input ? mask[1] : mask[0]) ? Want::values : Want::nothing;
  }
  template <class Visit> void attributes(Visit&& visit) { visit(pieces); }
  variable_list backward(const variable_list& grads, const PerSaved<Tensor>& tensors, Mask mask) const {
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor()};
    auto [dx, dw, db] = ops::linear_maxout_backward().call(
        grads[0], optional(tensors[input]), optional(tensors[weight]), tensors[index], pieces, mask);
    return {dx, dw, db};
  }
};

Tensor linear_maxout(DispatchKeySet keys, const Tensor& input, const Tensor& weight,
                     const OptionalTensor& bias) {
  if (!plain_eager(keys, input, weight, bias) || !linear_maxout_served(input, weight, bias))
    return composite::linear_maxout(input, weight, bias);

  const bool requires_grad = compute_requires_grad(input, weight, bias);
  at::AutoDispatchBelowADInplaceOrView guard;
  keys = keys & c10::after_autograd_keyset;
  if (!requires_grad) return ops::linear_maxout().redispatch(keys, input, weight, bias);

  auto [output, index] = ops::linear_maxout_forward().redispatch(keys, input, weight, bias);
  using Rule = LinearMaxoutRule;
  auto node = make_node<FamilyNode<Rule>>();
  node->set_next_edges(collect_next_edges(input, weight, bias));
  node->rule.pieces = weight.size(0);
  if (node->should_compute_output(1)) node->saved[Rule::input] = SavedVariable(input, /*is_output=*/false);
  if (node->should_compute_output(0)) node->saved[Rule::weight] = SavedVariable(weight, /*is_output=*/false);
  node->saved[Rule::index] = SavedVariable(index, /*is_output=*/false);
  torch::autograd::set_history(output, node);
  finish(node);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> linear_maxout_backward(DispatchKeySet keys, const Tensor& grad_output,
                                                          const OptionalTensor& input,
                                                          const OptionalTensor& weight, const Tensor& index,
                                                          int64_t pieces, Mask output_mask) {
  if (!plain_eager(keys, grad_output, input, weight, index) ||
      compute_requires_grad(grad_output, input, weight))
    return composite::linear_maxout_backward(grad_output, input, weight, index, pieces, output_mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::linear_maxout_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, input,
                                                  weight, index, pieces, output_mask);
}

// ---- a whole network

struct MlpRule : Varying {
  static constexpr const char* name = "MlpBackward0";
  // Saved: input, weights, biases, what mlp_forward keeps, and what the last activation's derivative comes
  // from, if anything.

  std::string names;
  std::vector<double> params;
  int64_t layers = 0;
  bool has_biases = false, has_last = false, from_output = false;
  // As LinearActivationRule's, of the network's output.
  std::optional<c10::VariableVersion> version;
  uint32_t saved_version = 0;
  std::size_t count = 0;  // of saved tensors

  bool saves_output(std::size_t i) const { return from_output && i + 1 == count; }
  bool output_changed() const { return version && version->current_version() != saved_version; }

  // A graph goes forward again from the input, and wants all of it but what was kept.
  Want wants(std::size_t i, const PerInput<bool>& mask, bool graph) const {
    const std::size_t n = layers, arguments = mask.size();
    if (i >= arguments) return graph || (saves_output(i) && output_changed()) ? Want::nothing : Want::values;
    const std::size_t layer = i == 0 ? 0 : (i - 1) % n;
    const bool again = graph || (output_changed() && layer == n - 1);
    const auto asked_below = [&] {  // whether a gradient passes through W of this layer
      if (mask[0]) return true;
      for (std::size_t j = 1; j < arguments; ++j)
        if (mask[j] && (j - 1) % n < layer) return true;
      return false;
    };
    return again || (i == 0 ? mask[1] : i <= n && asked_below()) ? Want::values : Want::shape;
  }
  template <class Visit> void attributes(Visit&& visit) {
    visit(names), visit(params), visit(layers), visit(has_biases), visit(has_last), visit(from_output);
  }

  variable_list backward(const variable_list& grads, const PerSaved<Tensor>& tensors,
                         const PerInput<bool>& mask) const {
    if (!grads[0].defined()) return variable_list(mask.size());
    const at::TensorList all = tensors;
    const std::size_t n = layers, end = all.size() - has_last;
    const at::TensorList weights = all.slice(1, n), biases = all.slice(1 + n, has_biases ? n : 0);
    const at::TensorList kept = all.slice(mask.size(), end - mask.size());
    const c10::SmallVector<int64_t, 17> asked(mask.begin(), mask.end());
    if (at::GradMode::is_enabled())
      return composite::mlp_backward_from_input(grads[0], all[0], weights, biases, names, params, asked);
    Tensor last = has_last ? all[end] : Tensor();
    bool last_is_output = from_output;
    if (has_last && !last.defined()) {
      last = at::linear(n > 1 ? kept[n - 2] : all[0], weights[n - 1],
                        has_biases ? OptionalTensor(biases[n - 1]) : std::nullopt);
      last_is_output = false;
    }
    return ops::mlp_backward().call(grads[0], all[0], weights, biases, kept, optional(last), last_is_output,
                                    names, params, asked);
  }
};

Tensor mlp(DispatchKeySet keys, const Tensor& input, at::TensorList weights, at::TensorList biases,
           std::string_view names, Params params) {
  const Network network(weights, biases, names, params);
  if (!plain_eager(keys, input, weights, biases) || !network.served(input))
    return composite::mlp(input, weights, biases, names, params);

  const bool requires_grad = compute_requires_grad(input, weights, biases);
  at::AutoDispatchBelowADInplaceOrView guard;
  keys = keys & c10::after_autograd_keyset;
  if (!requires_grad) return ops::mlp().redispatch(keys, input, weights, biases, names, params);

  // Frozen layers before the first one that learns keep nothing.
  std::size_t first = 0;
  if (!input.requires_grad())
    while (!weights[first].requires_grad() && (biases.empty() || !biases[first].requires_grad())) ++first;
  Tensor x = input;
  if (first > 0) {
    const std::string_view& next = network.layers[first].name;
    const std::size_t names_before = next.data() - names.data();
    std::size_t params_before = 0;
    for (std::size_t l = 0; l < first; ++l) params_before += network.layers[l].params.size();
    x = ops::mlp().redispatch(keys, input, weights.slice(0, first),
                              biases.slice(0, biases.empty() ? 0 : first), names.substr(0, names_before - 1),
                              params.slice(0, params_before));
    names = names.substr(names_before);
    params = params.slice(params_before);
    weights = weights.slice(first);
    if (!biases.empty()) biases = biases.slice(first);
  }
  auto [output, last, kept] = ops::mlp_forward().redispatch(keys, x, weights, biases, names, params);

  auto node = make_node<FamilyNode<MlpRule>>();
  node->set_next_edges(collect_next_edges(x, weights, biases));
  MlpRule& rule = node->rule;
  rule.names = names;
  rule.params = params.vec();
  rule.layers = static_cast<int64_t>(weights.size());
  rule.has_biases = !biases.empty();
  rule.from_output = network.layers.back().keep(input.scalar_type()) == Network::output;
  rule.has_last = rule.from_output || last.defined();
  rule.count = 1 + weights.size() + biases.size() + kept.size() + rule.has_last;
  node->saved.reserve(rule.count);
  const auto save = [&](const Tensor& tensor) {
    node->saved.emplace_back(SavedVariable(tensor, /*is_output=*/false));
  };
  const auto save_if = [&](bool for_gradients, const Tensor& tensor) {
    if (for_gradients) save(tensor);
    else node->saved.emplace_back(Reference(tensor));
  };
  save_if(node->should_compute_output(1), x);
  save_if(node->should_compute_output(0), weights[0]);
  for (const Tensor& weight : weights.slice(1)) save(weight);
  for (const Tensor& bias : biases) save_if(false, bias);
  for (const Tensor& tensor : kept) save(tensor);
  torch::autograd::set_history(output, node);
  if (rule.from_output) {
    node->saved.emplace_back(SavedVariable(output, /*is_output=*/true));
    rule.version = torch::autograd::impl::version_counter(output);
    rule.saved_version = rule.version->current_version();
  } else if (last.defined()) {
    save(last);
  }
  finish(node);
  return output;
}

std::vector<Tensor> mlp_backward(DispatchKeySet keys, const Tensor& grad_output, const Tensor& input,
                                 at::TensorList weights, at::TensorList biases, at::TensorList kept,
                                 const OptionalTensor& last, bool last_is_output, std::string_view names,
                                 Params params, at::IntArrayRef output_mask) {
  // What was kept is no function of the input and the parameters.
  if (compute_requires_grad(grad_output, input, weights, biases) || has_tangent(input) ||
      has_tangent(weights) || has_tangent(biases))
    return composite::mlp_backward_from_input(grad_output, input, weights, biases, names, params,
                                              output_mask);
  if (!plain_eager(keys, grad_output))
    return composite::mlp_backward(grad_output, input, weights, biases, kept, last, last_is_output, names,
                                   params, output_mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::mlp_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, input, weights,
                                        biases, kept, last, last_is_output, names, params, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpext, Autograd, m) {
  m.impl("activation", activation);
  m.impl("activation_", activation_);
  m.impl("activation_backward", activation_backward);
  m.impl("maxout", maxout);
  m.impl("maxout_backward", maxout_backward);
  m.impl("linear_activation", linear_activation);
  m.impl("linear_activation_backward", linear_activation_backward);
  m.impl("linear_maxout", linear_maxout);
  m.impl("linear_maxout_backward", linear_maxout_backward);
  m.impl("mlp", mlp);
  m.impl("mlp_backward", mlp_backward);
  // Called by themselves, the operators that also return what backward wants are differentiated as native
  // operators.
  m.impl("maxout_forward", composite::maxout_forward);
  m.impl("linear_activation_forward", composite::linear_activation_forward);
  m.impl("linear_maxout_forward", composite::linear_maxout_forward);
  m.impl("mlp_forward", composite::mlp_forward);
}

TORCH_LIBRARY_IMPL(mlpext, ADInplaceOrView, m) { m.impl("activation_", bump_version); }

}  // namespace mlpext
