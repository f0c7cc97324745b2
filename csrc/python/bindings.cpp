// Python's way in. A call with plain tensors goes straight to the dispatcher: 0.4 us less than through
// torch.ops. Anything else (a subclass with __torch_function__, a function mode, an fx proxy, an argument of
// the wrong type) goes to mlpext/_C_in_torch.py, which calls torch's own functions, so that it behaves,
// or is refused, as torch does.
#include "python/bindings.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

#include "cpu/choice.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "ops/switches.h"
#include "python/network_module.h"

namespace {

using namespace mlpext;
using namespace mlpext::python;

OptionalTensor optional_tensor(py::handle object) {
  return object.is_none() ? std::nullopt : OptionalTensor(tensor(object));
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

// A tuple of at most two numbers; anything else is left to torch's functions to accept or refuse.
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

// The functions of mlpext/_C_in_torch.py by name; mlpext/_torch_fallback.py registers them.
py::dict& fallbacks() {
  static auto& functions = *new py::dict;
  return functions;
}
template <class... Arguments> py::object fall_back(const char* function, Arguments... arguments) {
  return fallbacks()[function](arguments...);
}

py::object activation(py::handle input, py::handle name, py::handle params, bool inplace) {
  const Numbers numbers(params);
  if (!numbers.valid || !is_plain(input) || at::impl::torch_function_mode_enabled())
    return fall_back("activation", input, name, params, inplace);
  if (inplace) {
    Tensor self = tensor(input);
    released([&] { return ops::activation_().call(self, text(name), numbers.params()); });
    return py::reinterpret_borrow<py::object>(input);
  }
  return released([&] { return ops::activation().call(tensor(input), text(name), numbers.params()); });
}

py::object maxout(py::handle input, py::handle pieces, py::handle dim) {
  const auto k = integer(pieces), d = integer(dim);
  if (!is_plain(input) || !k || !d || at::impl::torch_function_mode_enabled())
    return fall_back("maxout", input, pieces, dim);
  return released([&] { return ops::maxout().call(tensor(input), *k, *d); });
}

py::object gated(py::handle gate, py::handle value, py::handle name, py::handle params) {
  const Numbers numbers(params);
  if (!numbers.valid || !is_plain(gate) || !is_plain(value) || at::impl::torch_function_mode_enabled())
    return fall_back("gated", gate, value, name, params);
  return released(
      [&] { return ops::gated().call(tensor(gate), tensor(value), text(name), numbers.params()); });
}

py::object linear_activation(py::handle input, py::handle weight, py::handle bias, py::handle name,
                             py::handle params) {
  const Numbers numbers(params);
  if (!numbers.valid || !is_plain(input) || !is_plain(weight) || !is_plain_or_none(bias) ||
      at::impl::torch_function_mode_enabled())
    return fall_back("linear_activation", input, weight, bias, name, params);
  return released([&] {
    return ops::linear_activation().call(tensor(input), tensor(weight), optional_tensor(bias), text(name),
                                         numbers.params());
  });
}

py::object linear_maxout(py::handle input, py::handle weight, py::handle bias) {
  if (!is_plain(input) || !is_plain(weight) || !is_plain_or_none(bias) ||
      at::impl::torch_function_mode_enabled())
    return fall_back("linear_maxout", input, weight, bias);
  return released(
      [&] { return ops::linear_maxout().call(tensor(input), tensor(weight), optional_tensor(bias)); });
}

py::object linear_gated(py::handle input, py::handle weight, py::handle bias, py::handle name,
                        py::handle params) {
  const Numbers numbers(params);
  if (!numbers.valid || !is_plain(input) || !is_plain(weight) || !is_plain_or_none(bias) ||
      at::impl::torch_function_mode_enabled())
    return fall_back("linear_gated", input, weight, bias, name, params);
  return released([&] {
    return ops::linear_gated().call(tensor(input), tensor(weight), optional_tensor(bias), text(name),
                                    numbers.params());
  });
}

py::object mlp(py::handle module, py::handle input) {
  NetworkModule network;
  HANDLE_TH_ERRORS
  if (!is_plain(input) || at::impl::torch_function_mode_enabled() || !network.read(module))
    return py::reinterpret_borrow<py::object>(Py_NotImplemented);
  END_HANDLE_TH_ERRORS_PYBIND
  return released([&] {
    return ops::mlp().call(tensor(input), network.weights, network.biases, network.activations,
                           network.params);
  });
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
  m.def("gated", gated, py::arg("gate"), py::arg("value"), py::arg("name"), py::arg("params") = py::tuple());
  m.def("linear_activation", linear_activation, py::arg("input"), py::arg("weight"), py::arg("bias"),
        py::arg("name"), py::arg("params") = py::tuple());
  m.def("linear_maxout", linear_maxout, py::arg("input"), py::arg("weight"), py::arg("bias") = py::none());
  m.def("linear_gated", linear_gated, py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("name"),
        py::arg("params") = py::tuple());
  m.def("mlp", mlp, py::arg("module"), py::arg("input"),
        "The output of a module whose layers are LinearActivation, Maxout and GatedLinear, as one operator; "
        "NotImplemented where they must be called one by one.");
  m.attr("MODULE_HOOKS") = py::cast(module_hooks).cast<py::tuple>();
  m.def("register_layers", register_layers, py::arg("linear_activation"), py::arg("maxout"),
        py::arg("gated_linear"));
  m.def("register_fallback",
        [](const py::str& name, py::object function) { fallbacks()[name] = std::move(function); });
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
  m.def(
      "switches",
      [] {
        py::list all;
        for (const Switch& each : switches)
          all.append(py::make_tuple(each.variable, each.value(), each.meaning));
        return all;
      },
      "The environment variables read at run time: name, value or None, meaning.");
  m.attr("VALUE_CELLS") = cpu::value_cells;
  m.attr("SIDE_CELLS") = cpu::side_cells;
  m.def(
      "leave_to_torch",
      [](std::size_t operation, std::size_t dtype, std::size_t activation,
         const std::vector<int64_t>& cells) {
        const auto in = static_cast<Dtype>(dtype);
        if (operation < 2) cpu::leave_to_torch(static_cast<cpu::Pass>(operation), activation, in, cells);
        else cpu::leave_to_torch(static_cast<cpu::Product>(operation - 2), in, cells);
      },
      py::arg("operation"), py::arg("dtype"), py::arg("activation"), py::arg("cells"),
      "Which calls torch serves (cpu/choice.h). operation: an activation's forward, backward; a linear "
      "layer's "
      "forward, dx, dw. dtype: float64, float32, bfloat16, float16.");
  m.def("pool_limit", cpu::pool_limit);
  m.def("set_pool_limit", cpu::set_pool_limit, py::arg("bytes"));
  m.def("pool_bytes", cpu::pool_bytes);
  m.def("has_cuda", [] { return has_cuda; });
  bind_epoch(m);
  bind_metrics(m);
}
