// The metrics' place in the Python module.
#pragma once

namespace pybind11 {
class module_;
}

namespace mlpext::python {

void bind_metrics(pybind11::module_& m);

}  // namespace mlpext::python
