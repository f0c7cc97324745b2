// The parts of the Python module that have files of their own.
#pragma once

namespace pybind11 {
class module_;
}

namespace mlpext::python {

void bind_epoch(pybind11::module_& m);
void bind_metrics(pybind11::module_& m);

}  // namespace mlpext::python
