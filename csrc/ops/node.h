// What every autograd node of the package is made of, as PyTorch's own generated code has it: saved tensors,
// their unpacking, release, and compiled autograd.
//
// A family (activation, maxout, linear_activation, linear_maxout, mlp) gives a Rule, which says what is saved
// and how the gradients come of it; OpNode<Rule> is the node.
#pragma once
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/version.h>

#include "ops/checks.h"

#define MLPEXT_TORCH_AT_LEAST(minor) (TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= minor)

namespace mlpext {

using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::autograd::collect_next_edges;
using torch::autograd::compute_requires_grad;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

inline bool has_tangent(const Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const OptionalTensor& tensor) { return tensor && has_tangent(*tensor); }
inline bool has_tangent(at::TensorList tensors) {
  return std::ranges::any_of(tensors, [](const Tensor& tensor) { return has_tangent(tensor); });
}

// Whether a call is plain eager: no functorch transform, no dispatch mode or wrapper subclass, no forward
// tangent. All else runs torch's own operators (composite).
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

// An activation as a node refers to it: its index and the values of its parameters.
struct ActivationRef {
  int64_t index = 0;
  std::array<double, 2> values{};

  ActivationRef() = default;
  ActivationRef(std::size_t index, Params params) : index(static_cast<int64_t>(index)) {
    std::copy(params.begin(), params.end(), values.begin());
  }
  std::string_view name() const { return activation_infos[index].name; }
  Params params() const { return {values.data(), activation_infos[index].params.size()}; }
  template <class Visit> void attributes(Visit&& visit) { visit(index), visit(values[0]), visit(values[1]); }
};
static_assert(std::ranges::all_of(activation_infos,
                                  [](const ActivationInfo& info) { return info.params.size() <= 2; }));

// How many gradients a rule returns and tensors it saves.
template <std::size_t inputs, std::size_t saved> struct StaticArity {
  static constexpr bool is_static = true;
  template <class T> using PerInput = std::array<T, inputs>;
  template <class T> using PerSaved = std::array<T, saved>;
};
struct DynamicArity {
  static constexpr bool is_static = false;
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

// The node of a family. Its Rule has:
//   name                               what grad_fn prints
//   PerInput, PerSaved                 lists with an entry for each gradient returned, each tensor saved
//   saves_output(i)                    whether saved tensor i is an output of the node itself
//   wants(i, mask, graph)              what of saved tensor i the gradients, or a graph of them, need
//   attributes(visit)                  everything else that the gradients depend on (for compiled autograd)
//   backward(grads, tensors, mask)     the gradients
template <class Rule> struct OpNode final : torch::autograd::TraceableFunction {
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
    if constexpr (!Rule::is_static) asked.resize(num_outputs());
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
    if constexpr (!Rule::is_static) tensors.resize(saved.size());
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
      if constexpr (Rule::is_static)
        types.insert(types.end(), std::tuple_size_v<Tensors>, IValuePacker<Tensor>::packed_type());
      else types.push_back(IValuePacker<Tensors>::packed_type());
      Rule().attributes([&]<class A>(A&) { types.push_back(IValuePacker<A>::packed_type()); });
      compiler->bind_function(swap.get_py_compiler(), Rule::name, functional, std::move(types));
      return true;
    }();
    static_cast<void>(bound);
    Tensors tensors;
    if constexpr (!Rule::is_static) tensors.resize(saved.size());
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
    if constexpr (Rule::is_static)
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
    if constexpr (Rule::is_static)
      for (Tensor& tensor : tensors) tensor = packed.unpack<Tensor>();
    else tensors = packed.unpack<Tensors>();
    Rule rule;
    rule.attributes([&]<class A>(A& attribute) { attribute = packed.unpack<A>(); });
    return rule.backward(grads, tensors, asked);
  }
};

inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

}  // namespace mlpext
