// Python's way in. A call with plain tensors goes straight to the dispatcher: 0.4 us less than through
// torch.ops. Anything else (a subclass with __torch_function__, a function mode, an fx proxy, an argument of
// the wrong type) goes to mlpext/_native.py, which calls torch's own functions, so that it behaves, or is
// refused, as natively.
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/kernels.h"
#include "ops.h"
#include "training/epoch.h"

namespace {

using namespace mlpext;

bool plain(py::handle object) { return THPVariable_CheckTypeExact(Py_TYPE(object.ptr())); }
bool plain_or_none(py::handle object) { return object.is_none() || plain(object); }

const Tensor& tensor(py::handle object) { return THPVariable_Unpack(object.ptr()); }
OptionalTensor optional_tensor(py::handle object) {
  return object.is_none() ? std::nullopt : OptionalTensor(tensor(object));
}

// A tuple of at most two numbers; anything else is left to the native functions to accept or refuse.
struct Numbers {
  std::array<double, 2> values;
  std::size_t size = 0;
  bool valid = false;

  explicit Numbers(py::handle tuple) {
    if (!PyTuple_CheckExact(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) > 2) return;
    for (size = 0; size < static_cast<std::size_t>(PyTuple_GET_SIZE(tuple.ptr())); ++size) {
      PyObject* number = PyTuple_GET_ITEM(tuple.ptr(), size);
      if (!PyFloat_Check(number) && !PyLong_Check(number)) return;
      values[size] = PyFloat_AsDouble(number);
      if (values[size] == -1 && PyErr_Occurred()) throw py::error_already_set();
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
  return py::module_::import("mlpext._native").attr(function)(arguments...);
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
  if (!plain(input) || !PyLong_CheckExact(pieces.ptr()) || !PyLong_CheckExact(dim.ptr()) ||
      at::impl::torch_function_mode_enabled())
    return native("maxout", input, pieces, dim);
  const auto k = pieces.cast<int64_t>(), d = dim.cast<int64_t>();
  return released([&] { return ops::maxout().call(tensor(input), k, d); });
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
  m.def("has_cuda", [] { return has_cuda; });
  training::bind(m);
}
