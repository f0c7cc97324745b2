// Python's way in. A call with plain tensors goes straight to the dispatcher: 0.4 us less than through
// torch.ops. Anything else (a subclass with __torch_function__, a function mode, an fx proxy, an argument of
// the wrong type) goes to mlpext/_torch_fallback.py, which calls torch's own functions, so that it behaves, or is
// refused, as natively.
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/huge_pages.h"
#include "ops/ops.h"
#include "python/epoch.h"

namespace {

using namespace mlpext;

bool plain(py::handle object) { return THPVariable_CheckTypeExact(Py_TYPE(object.ptr())); }
bool plain_or_none(py::handle object) { return object.is_none() || plain(object); }

const Tensor& tensor(py::handle object) { return THPVariable_Unpack(object.ptr()); }
OptionalTensor optional_tensor(py::handle object) {
  return object.is_none() ? std::nullopt : OptionalTensor(tensor(object));
}

// What float(object) is, for a number of NumPy's or a tensor of one too; none for what torch refuses: a
// tensor that wants a gradient or has dimensions, an integer beyond 64 bits.
std::optional<double> number(PyObject* object) {
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  if (THPVariable_Check(object) &&
      (THPVariable_Unpack(object).dim() > 0 || THPVariable_Unpack(object).requires_grad()))
    return std::nullopt;
  int overflow = 0;
  if (PyLong_Check(object)) static_cast<void>(PyLong_AsLongLongAndOverflow(object, &overflow));
  const double value = overflow ? -1 : PyFloat_AsDouble(object);
  if (overflow || (value == -1 && PyErr_Occurred())) return PyErr_Clear(), std::nullopt;
  return value;
}

// What operator.index(object) is; none for a bool and for what is no integer.
std::optional<int64_t> integer(py::handle object) {
  const bool is_bool = PyBool_Check(object.ptr()) ||
                       (THPVariable_Check(object.ptr()) && tensor(object).scalar_type() == at::kBool);
  const auto index = py::reinterpret_steal<py::object>(is_bool ? nullptr : PyNumber_Index(object.ptr()));
  const int64_t value = index ? PyLong_AsLongLong(index.ptr()) : -1;
  if (!index || (value == -1 && PyErr_Occurred())) return PyErr_Clear(), std::nullopt;
  return value;
}

// A tuple of at most two numbers; anything else is left to the native functions to accept or refuse.
struct Numbers {
  std::array<double, 2> values;
  std::size_t size = 0;
  bool valid = false;

  explicit Numbers(py::handle tuple) {
    if (!PyTuple_CheckExact(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) > 2) return;
    for (size = 0; size < static_cast<std::size_t>(PyTuple_GET_SIZE(tuple.ptr())); ++size) {
      const auto value = number(PyTuple_GET_ITEM(tuple.ptr(), size));
      if (!value) return;
      values[size] = *value;
    }
    valid = true;
  }
  Params params() const { return {values.data(), size}; }
};

std::string_view text(py::handle object) {
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
  if (!data) throw py::error_already_set();
  return {data, static_cast<std::size_t>(size)};
}

// torch's exception types for C++ errors, without a C++ stack in the message; the GIL released while `call`
// runs.
template <class Call> py::object released(Call call) {
  HANDLE_TH_ERRORS
  Tensor result;
  {
    struct Release {
      PyThreadState* state = PyEval_SaveThread();
      ~Release() { PyEval_RestoreThread(state); }
    } release;
    result = call();
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(result)));
  END_HANDLE_TH_ERRORS_PYBIND
}

template <class... Arguments> py::object native(const char* function, Arguments... arguments) {
  return py::module_::import("mlpext._torch_fallback").attr(function)(arguments...);
}

py::object activation(py::handle input, py::handle name, py::handle params, bool inplace) {
  const Numbers numbers(params);
  if (!numbers.valid || !plain(input) || at::impl::torch_function_mode_enabled())
    return native("activation", input, name, params, inplace);
  if (inplace) {
    Tensor self = tensor(input);
    released([&] { return ops::activation_().call(self, text(name), numbers.params()); });
    return py::reinterpret_borrow<py::object>(input);
  }
  return released([&] { return ops::activation().call(tensor(input), text(name), numbers.params()); });
}

py::object maxout(py::handle input, py::handle pieces, py::handle dim) {
  const auto k = integer(pieces), d = integer(dim);
  if (!plain(input) || !k || !d || at::impl::torch_function_mode_enabled())
    return native("maxout", input, pieces, dim);
  return released([&] { return ops::maxout().call(tensor(input), *k, *d); });
}

py::object linear_activation(py::handle input, py::handle weight, py::handle bias, py::handle name,
                             py::handle params) {
  const Numbers numbers(params);
  if (!numbers.valid || !plain(input) || !plain(weight) || !plain_or_none(bias) ||
      at::impl::torch_function_mode_enabled())
    return native("linear_activation", input, weight, bias, name, params);
  return released([&] {
    return ops::linear_activation().call(tensor(input), tensor(weight), optional_tensor(bias), text(name),
                                         numbers.params());
  });
}

py::object linear_maxout(py::handle input, py::handle weight, py::handle bias) {
  if (!plain(input) || !plain(weight) || !plain_or_none(bias) || at::impl::torch_function_mode_enabled())
    return native("linear_maxout", input, weight, bias);
  return released(
      [&] { return ops::linear_maxout().call(tensor(input), tensor(weight), optional_tensor(bias)); });
}

// A network as the mlp operators take it, read from a module in the way of its layers' own forward.
class NetworkModule {
 public:
  std::vector<Tensor> weights, biases;
  std::string names;
  std::vector<double> params;

  // False unless every layer is a LinearActivation or a Maxout with nothing in the way of its forward: no
  // hook, no parametrization, no forward of its own.
  bool read(py::handle module) {
    const py::object own = attributes(module);
    PyObject* layers = PyDict_GetItem(own.ptr(), words().modules);
    if (!layers || !PyDict_Check(layers) || any(global_hooks())) return false;
    PyObject *key, *layer;
    Py_ssize_t position = 0;
    while (PyDict_Next(layers, &position, &key, &layer))
      if (!add(layer)) return false;
    return !weights.empty() && (biases.empty() || biases.size() == weights.size());
  }

 private:
  bool add(py::handle layer) {
    static const auto& types =
        *new std::array<py::object, 2>{py::module_::import("mlpext.nn").attr("LinearActivation"),
                                       py::module_::import("mlpext.nn").attr("Maxout")};
    const bool maxout = Py_TYPE(layer.ptr()) == reinterpret_cast<PyTypeObject*>(types[1].ptr());
    if (!maxout && Py_TYPE(layer.ptr()) != reinterpret_cast<PyTypeObject*>(types[0].ptr())) return false;
    const py::object own = attributes(layer);
    for (PyObject* hooks : words().hooks)
      if (PyObject* found = PyDict_GetItem(own.ptr(), hooks); !found || any(found)) return false;
    if (PyDict_GetItem(own.ptr(), words().forward)) return false;
    PyObject* parameters = PyDict_GetItem(own.ptr(), words().parameters);
    if (!parameters || !PyDict_Check(parameters)) return false;
    PyObject *weight = PyDict_GetItem(parameters, words().weight),
             *bias = PyDict_GetItem(parameters, words().bias);
    if (!weight || !bias || !plain(weight) || !plain_or_none(bias)) return false;
    weights.push_back(tensor(weight));
    if (bias != Py_None) biases.push_back(tensor(bias));
    if (!names.empty()) names += ',';
    return maxout ? (names += "maxout", true) : add_activation(own);
  }

  bool add_activation(py::handle own) {
    PyObject *name = PyDict_GetItem(own.ptr(), words().activation),
             *values = PyDict_GetItem(own.ptr(), words().params);
    if (!name || !PyUnicode_Check(name) || !values || !PyDict_Check(values)) return false;
    names += text(name);
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(values, &position, &key, &value)) {
      const auto param = number(value);
      if (!param) return false;
      params.push_back(*param);
    }
    return true;
  }

  static py::object attributes(py::handle module) {
    PyObject* own = PyObject_GenericGetDict(module.ptr(), nullptr);
    if (!own) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(own);
  }

  // Keys of modules' dictionaries, made once.
  struct Words {
    static PyObject* intern(const char* text) { return PyUnicode_InternFromString(text); }
    PyObject *modules = intern("_modules"), *parameters = intern("_parameters"), *weight = intern("weight"),
             *bias = intern("bias"), *activation = intern("activation"), *params = intern("params"),
             *forward = intern("forward");
    std::array<PyObject*, 4> hooks{intern("_forward_hooks"), intern("_forward_pre_hooks"),
                                   intern("_backward_hooks"), intern("_backward_pre_hooks")};
  };
  static const Words& words() {
    static const Words all;
    return all;
  }
  static bool any(PyObject* hooks) { return !PyDict_Check(hooks) || PyDict_Size(hooks) > 0; }
  // torch's dictionaries of hooks on all modules.
  static const std::array<py::object, 4>& global_hooks() {
    static const auto& hooks = *[] {
      const auto torch = py::module_::import("torch.nn.modules.module");
      return new std::array<py::object, 4>{
          torch.attr("_global_forward_hooks"), torch.attr("_global_forward_pre_hooks"),
          torch.attr("_global_backward_hooks"), torch.attr("_global_backward_pre_hooks")};
    }();
    return hooks;
  }
  static bool any(const std::array<py::object, 4>& hooks) {
    return std::ranges::any_of(hooks, [](const py::object& each) { return any(each.ptr()); });
  }
};

py::object mlp(py::handle module, py::handle input) {
  NetworkModule network;
  if (!plain(input) || at::impl::torch_function_mode_enabled() || !network.read(module))
    return py::reinterpret_borrow<py::object>(Py_NotImplemented);
  return released([&] {
    return ops::mlp().call(tensor(input), network.weights, network.biases, network.names, network.params);
  });
}

bool all_finite(const std::vector<Tensor>& tensors) {
  HANDLE_TH_ERRORS
  at::NoGradGuard no_grad;
  // Finite values mostly have a finite sum, which takes a quarter of the time.
  return std::ranges::all_of(tensors, [](const Tensor& each) {
    return std::isfinite(each.sum().item<double>()) || each.isfinite().all().item<bool>();
  });
  END_HANDLE_TH_ERRORS_PYBIND
}

py::dict activations() {
  py::dict all;
  for (const ActivationInfo& info : activation_infos) {
    py::dict defaults;
    for (const Param& param : info.params) defaults[py::str(std::string(param.name))] = param.value;
    all[py::str(std::string(info.name))] = defaults;
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The compiled part of mlpext: operators (also torch.ops.mlpext), their list, and the instruction set "
      "in use.";
  m.def("activation", activation, py::arg("input"), py::arg("name"), py::arg("params") = py::tuple(),
        py::arg("inplace") = false);
  m.def("maxout", maxout, py::arg("input"), py::arg("pieces"), py::arg("dim") = -1);
  m.def("linear_activation", linear_activation, py::arg("input"), py::arg("weight"), py::arg("bias"),
        py::arg("name"), py::arg("params") = py::tuple());
  m.def("linear_maxout", linear_maxout, py::arg("input"), py::arg("weight"), py::arg("bias") = py::none());
  m.def(
      "mlp", mlp, py::arg("module"), py::arg("input"),
      "The output of a module with LinearActivation and Maxout layers, as one operator; NotImplemented where "
      "its layers must be called one by one.");
  m.def("activations", activations,
        "Names of the elementwise activations, each with its parameters and their defaults.");
  m.def("cpu_isa", [] {
    HANDLE_TH_ERRORS
    return std::string(cpu::kernels().isa);
    END_HANDLE_TH_ERRORS_PYBIND
  });
  m.def("cpu_isas", [] {
    py::list names;
    for (std::string_view name : cpu::available_isas()) names.append(std::string(name));
    return names;
  });
  m.def("pool_limit", cpu::pool_limit);
  m.def("set_pool_limit", cpu::set_pool_limit, py::arg("bytes"));
  m.def("pool_bytes", cpu::pool_bytes);
  m.def("has_cuda", [] { return has_cuda; });
  m.def("all_finite", all_finite, py::arg("tensors"),
        "Whether no value of these tensors is NaN or infinite.");
  training::bind(m);
}
