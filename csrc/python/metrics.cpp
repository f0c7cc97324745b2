// The sums behind accuracy and R2 (mlpext/training/_metrics.py), and the check of values. They are torch's own
// operators, on every device; called from here one costs 0.4 us, from Python 1.5, and an epoch of few samples
// takes 30.
#include "python/metrics.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <span>

namespace mlpext::python {
namespace {

using at::Tensor;

// (n, ...) as (n, outputs) in float64.
Tensor flat(const Tensor& rows) { return rows.reshape({rows.size(0), -1}).to(at::kDouble); }

bool is_finite(const Tensor& tensor) {
  if (tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == at::kFloat &&
      tensor.numel() <= 4096)  //
    return std::ranges::all_of(std::span(tensor.const_data_ptr<float>(), tensor.numel()),
                               [](float value) { return std::isfinite(value); });
  // Finite values mostly have a finite sum, which takes a quarter of the time.
  return std::isfinite(tensor.sum().item<double>()) || tensor.isfinite().all().item<bool>();
}

bool all_finite(const std::vector<Tensor>& tensors) {
  HANDLE_TH_ERRORS
  at::NoGradGuard no_grad;
  return std::ranges::all_of(tensors, is_finite);
  END_HANDLE_TH_ERRORS_PYBIND
}

Tensor count_correct(const Tensor& output, const Tensor& target) {
  HANDLE_TH_ERRORS
  const Tensor labels = target.dim() == 1 ? target : target.argmax(1);
  return (output.argmax(1) == labels).sum();
  END_HANDLE_TH_ERRORS_PYBIND
}

Tensor squared_errors(const Tensor& output, const Tensor& target) {
  HANDLE_TH_ERRORS
  return flat(target - output).square().sum(0);
  END_HANDLE_TH_ERRORS_PYBIND
}

Tensor spread(const Tensor& origin, const py::iterable& blocks) {
  HANDLE_TH_ERRORS
  const Tensor first = flat(origin);
  Tensor total, squares;
  int64_t samples = 0;
  for (py::handle block : blocks) {
    const Tensor each = flat(py::cast<Tensor>(block)) - first;
    const Tensor sum = each.sum(0), square = each.square().sum(0);
    total = total.defined() ? total + sum : sum;
    squares = squares.defined() ? squares + square : square;
    samples += each.size(0);
  }
  return (squares - total.square() / samples).clamp_min(0).cpu();
  END_HANDLE_TH_ERRORS_PYBIND
}

double r2(const Tensor& squared_errors, const Tensor& spread) {
  HANDLE_TH_ERRORS
  Tensor explained = at::empty_like(spread);
  for (int64_t i = 0; i < spread.numel(); ++i) {
    const double error = squared_errors.const_data_ptr<double>()[i], all = spread.const_data_ptr<double>()[i];
    explained.mutable_data_ptr<double>()[i] = all == 0 ? error == 0 : 1 - error / all;
  }
  return explained.mean().item<double>();
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace

void bind_metrics(pybind11::module_& m) {
  m.def("all_finite", all_finite, py::arg("tensors"),
        "Whether no value of these tensors is NaN or infinite.");
  m.def("count_correct", count_correct, py::arg("output"), py::arg("target"),
        "Of how many rows the largest output is that of their class, or of the largest entry of d.");
  m.def("squared_errors", squared_errors, py::arg("output"), py::arg("target"),
        "sum over the rows of (d - o)^2, float64, one value an output.");
  m.def("spread", spread, py::arg("origin"), py::arg("blocks"),
        "sum (d - mean d)^2 of each output, float64, over blocks of rows; from their differences to one row, "
        "`origin`, because squares of d itself would cancel.");
  m.def(
      "r2", r2, py::arg("squared_errors"), py::arg("spread"),
      "The mean over the outputs of 1 - squared_errors / spread; where spread is 0, of 1 for no error, else "
      "0.");
}

}  // namespace mlpext::python
