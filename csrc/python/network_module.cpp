// Which dictionaries of a module's layers are read, and what in them makes the layers go one by one instead.
#include "python/network_module.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

namespace mlpext::python {

bool is_plain(py::handle object) { return THPVariable_CheckTypeExact(Py_TYPE(object.ptr())); }
bool is_plain_or_none(py::handle object) { return object.is_none() || is_plain(object); }

const Tensor& tensor(py::handle object) { return THPVariable_Unpack(object.ptr()); }

std::string_view text(py::handle object) {
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
  if (!data) throw py::error_already_set();
  return {data, static_cast<std::size_t>(size)};
}

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

namespace {

py::object attributes(py::handle module) {
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
  std::array<PyObject*, module_hooks.size()> hooks;
  Words() { std::ranges::transform(module_hooks, hooks.begin(), intern); }
};
const Words& words() {
  static const Words all;
  return all;
}
// The classes of an MLP's layers.
struct LayerTypes {
  PyObject *linear_activation = nullptr, *maxout = nullptr, *gated_linear = nullptr;
};
LayerTypes& layer_types() {
  static LayerTypes types;
  return types;
}

bool any(PyObject* hooks) { return !PyDict_Check(hooks) || PyDict_Size(hooks) > 0; }
// torch's dictionaries of hooks on all modules.
const std::array<py::object, 4>& global_hooks() {
  static const auto& hooks = *[] {
    const auto torch = py::module_::import("torch.nn.modules.module");
    return new std::array<py::object, 4>{
        torch.attr("_global_forward_hooks"), torch.attr("_global_forward_pre_hooks"),
        torch.attr("_global_backward_hooks"), torch.attr("_global_backward_pre_hooks")};
  }();
  return hooks;
}
bool any(const std::array<py::object, 4>& hooks) {
  return std::ranges::any_of(hooks, [](const py::object& each) { return any(each.ptr()); });
}

}  // namespace

void register_layers(py::object linear_activation, py::object maxout, py::object gated_linear) {
  layer_types() = {linear_activation.release().ptr(), maxout.release().ptr(),
                   gated_linear.release().ptr()};  // alive to the end
}

bool NetworkModule::read(py::handle module) {
  const py::object own = attributes(module);
  PyObject* layers = PyDict_GetItem(own.ptr(), words().modules);
  if (!layers || !PyDict_Check(layers) || any(global_hooks())) return false;
  PyObject *key, *layer;
  Py_ssize_t position = 0;
  while (PyDict_Next(layers, &position, &key, &layer))
    if (!add(layer)) return false;
  return !weights.empty() && (biases.empty() || biases.size() == weights.size());
}

bool NetworkModule::add(py::handle layer) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(layer.ptr()));
  const bool maxout = type == layer_types().maxout, gated = type == layer_types().gated_linear;
  if (!maxout && !gated && type != layer_types().linear_activation) return false;
  const py::object own = attributes(layer);
  for (PyObject* hooks : words().hooks)
    if (PyObject* found = PyDict_GetItem(own.ptr(), hooks); !found || any(found)) return false;
  if (PyDict_GetItem(own.ptr(), words().forward)) return false;
  PyObject* parameters = PyDict_GetItem(own.ptr(), words().parameters);
  if (!parameters || !PyDict_Check(parameters)) return false;
  PyObject *weight = PyDict_GetItem(parameters, words().weight),
           *bias = PyDict_GetItem(parameters, words().bias);
  if (!weight || !bias || !is_plain(weight) || !is_plain_or_none(bias)) return false;
  if ((maxout || gated) != (tensor(weight).dim() == 3)) return false;  // the layer itself says what is wrong
  weights.push_back(tensor(weight));
  if (bias != Py_None) biases.push_back(tensor(bias));
  if (!maxout) return add_activation(own);
  activations.push_back(maxout_layer);
  return true;
}

bool NetworkModule::add_activation(py::handle own) {
  PyObject *name = PyDict_GetItem(own.ptr(), words().activation),
           *values = PyDict_GetItem(own.ptr(), words().params);
  if (!name || !PyUnicode_Check(name) || !values || !PyDict_Check(values)) return false;
  const std::size_t before = params.size();
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(values, &position, &key, &value)) {
    const auto param = number(value);
    if (!param) return false;
    params.push_back(*param);
  }
  activations.push_back(static_cast<int64_t>(activation_index(text(name), Params(params).slice(before))));
  return true;
}

}  // namespace mlpext::python
