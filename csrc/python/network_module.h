// A network as the mlp operators take it, read from an mlpext.nn.MLP or GatedMLP: the modules' dictionaries are
// read with Python's C interface, 0.1 us a layer where getattr would take one.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <array>

#include "ops/network.h"

namespace mlpext::python {

bool is_plain(py::handle object);  // a torch.Tensor or Parameter, no subclass of them
bool is_plain_or_none(py::handle object);
const Tensor& tensor(py::handle object);
std::string_view text(py::handle object);
// What float(object) is, for a number of NumPy's or a tensor of one too; none for what torch refuses: a
// tensor that wants a gradient or has dimensions, an integer beyond 64 bits.
std::optional<double> number(PyObject* object);

// The dictionaries of a module whose entries run with its forward or backward: whatever looks into a module
// instead of calling it must find them empty. Python has them as _C.MODULE_HOOKS.
inline constexpr std::array module_hooks{"_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
                                         "_backward_pre_hooks"};

// mlpext.nn tells which classes its layers are, so that this module need not import it.
void register_layers(py::object linear_activation, py::object maxout, py::object gated_linear);

struct NetworkModule {
  std::vector<Tensor> weights, biases;
  std::vector<int64_t> activations;
  std::vector<double> params;

  // False unless every layer is a LinearActivation, a Maxout or a GatedLinear with nothing in the way of its
  // forward: no hook, no parametrization, no forward of its own. ValueError for an activation that there is
  // not.
  //
  // Read again at every call: to know that nothing has changed since the last one (a weight replaced, a hook
  // registered, a parameter set) would take the same look into the same dictionaries.
  bool read(py::handle module);

 private:
  bool add(py::handle layer);
  bool add_activation(py::handle own);
};

}  // namespace mlpext::python
