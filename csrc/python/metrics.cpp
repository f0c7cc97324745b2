// What an epoch's losses, weights and outputs add up to (mlpext/training/_loop.py, _metrics.py). Float32 and
// float64 in the CPU's memory are read by loops, 1 us for a few samples where torch's operators take 20. All
// else goes through torch's operators.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>

#include "python/bindings.h"

namespace mlpext::python {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Contiguous float32 or float64 in the CPU's memory.
bool is_readable(const Tensor& tensor) {
  return tensor.is_cpu() && tensor.is_contiguous() &&
         (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}

// (n, ...) as (n, outputs) in float64.
Tensor flat(const Tensor& rows) { return rows.reshape({rows.size(0), -1}).to(at::kDouble); }

// The targets of `rows`, or all of them in turn.
struct Targets {
  const Tensor& all;
  const OptionalTensor& rows;
  const int64_t* order = rows ? rows->const_data_ptr<int64_t>() : nullptr;

  // Whether there is one for each row of output, where a loop can read both.
  bool are_readable_with(const Tensor& output) const {
    return is_readable(output) && output.dim() > 1 && all.is_cpu() && all.is_contiguous() &&
           (rows ? *rows : all).size(0) == output.size(0);
  }
  Tensor gathered() const { return rows ? all.index_select(0, *rows) : all; }
  int64_t row(int64_t i) const { return order ? order[i] : i; }
};

bool is_finite(const Tensor& tensor) {
  // Finite values mostly have a finite sum, which torch finds in a quarter of the time.
  if (!is_readable(tensor) || tensor.numel() > 4096)
    return std::isfinite(tensor.sum().item<double>()) || tensor.isfinite().all().item<bool>();
  return AT_DISPATCH_FLOATING_TYPES(tensor.scalar_type(), "all_finite", [&] {
    return std::ranges::all_of(std::span(tensor.const_data_ptr<scalar_t>(), tensor.numel()),
                               [](scalar_t value) { return std::isfinite(value); });
  });
}

bool all_finite(const std::vector<Tensor>& tensors) {
  HANDLE_TH_ERRORS
  at::NoGradGuard no_grad;
  return std::ranges::all_of(tensors, is_finite);
  END_HANDLE_TH_ERRORS_PYBIND
}

double mean_loss(const Tensor& losses, int64_t step_size, int64_t samples) {
  HANDLE_TH_ERRORS
  const std::span<const double> means(losses.const_data_ptr<double>(), losses.numel());
  const auto rest = samples - step_size * static_cast<int64_t>(means.size() - 1);
  const double sum = std::accumulate(means.begin(), means.end() - 1, 0.0);
  return (sum * static_cast<double>(step_size) + means.back() * static_cast<double>(rest)) /
         static_cast<double>(samples);
  END_HANDLE_TH_ERRORS_PYBIND
}

Tensor count_correct(const Tensor& output, const Tensor& target, const OptionalTensor& rows) {
  HANDLE_TH_ERRORS
  const Targets targets{target, rows};
  if (!targets.are_readable_with(output) || target.scalar_type() != at::kLong) {
    const Tensor d = targets.gathered();
    return (output.argmax(1) == (d.dim() == 1 ? d : d.argmax(1))).sum();
  }
  const auto* labels = target.const_data_ptr<int64_t>();
  const int64_t classes = output.size(1);
  int64_t correct = 0;
  AT_DISPATCH_FLOATING_TYPES(output.scalar_type(), "count_correct", [&] {
    const auto* o = output.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < output.size(0); ++i, o += classes) {
      const int64_t label = labels[targets.row(i)];
      // As argmax: of equal outputs the first is the largest. A wrong row ends at the first larger one.
      correct += label < classes &&
                 std::all_of(
                     o, o + label, [=](scalar_t other) { return other < o[label]; }) &&
                 std::all_of(o + label + 1, o + classes, [=](scalar_t other) { return other <= o[label]; });
    }
  });
  return at::scalar_tensor(correct, at::kLong);
  END_HANDLE_TH_ERRORS_PYBIND
}

Tensor squared_errors(const Tensor& output, const Tensor& target, const OptionalTensor& rows) {
  HANDLE_TH_ERRORS
  const Targets targets{target, rows};
  if (!targets.are_readable_with(output) || target.scalar_type() != output.scalar_type() ||
      target.sizes().slice(1) != output.sizes().slice(1))
    return (flat(targets.gathered()) - flat(output)).square().sum(0);
  const int64_t outputs = output.numel() / output.size(0);
  Tensor sums = at::zeros({outputs}, at::kDouble);
  auto* sum = sums.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(output.scalar_type(), "squared_errors", [&] {
    const auto *o = output.const_data_ptr<scalar_t>(), *all = target.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < output.size(0); ++i, o += outputs) {
      const auto* d = all + targets.row(i) * outputs;
      for (int64_t c = 0; c < outputs; ++c) {
        const double error = static_cast<double>(d[c]) - o[c];
        sum[c] += error * error;
      }
    }
  });
  return sums;
  END_HANDLE_TH_ERRORS_PYBIND
}

std::vector<double> spread(const py::iterable& blocks) {
  HANDLE_TH_ERRORS
  std::vector<double> origin, sums, squares;
  double samples = 0;
  for (py::handle block : blocks) {
    const Tensor d = flat(py::cast<Tensor>(block)).cpu().contiguous();
    const auto outputs = static_cast<std::size_t>(d.size(1));
    const auto* row = d.const_data_ptr<double>();
    if (origin.empty()) origin.assign(row, row + outputs), sums.resize(outputs), squares.resize(outputs);
    for (int64_t i = 0; i < d.size(0); ++i, row += outputs) {
      for (std::size_t c = 0; c < outputs; ++c) {
        const double difference = row[c] - origin[c];
        sums[c] += difference;
        squares[c] += difference * difference;
      }
    }
    samples += static_cast<double>(d.size(0));
  }
  for (std::size_t c = 0; c < sums.size(); ++c)
    squares[c] = std::max(squares[c] - sums[c] * sums[c] / samples, 0.0);
  return squares;
  END_HANDLE_TH_ERRORS_PYBIND
}

double r2(const Tensor& squared_errors, const std::vector<double>& spread) {
  HANDLE_TH_ERRORS
  const auto* errors = squared_errors.const_data_ptr<double>();
  double sum = 0;
  for (std::size_t c = 0; c < spread.size(); ++c)
    sum += spread[c] == 0 ? errors[c] == 0 : 1 - errors[c] / spread[c];
  return sum / static_cast<double>(spread.size());
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace

void bind_metrics(pybind11::module_& m) {
  m.def("all_finite", all_finite, py::arg("tensors"),
        "Whether no value of these tensors is NaN or infinite.");
  m.def("mean_loss", mean_loss, py::arg("losses"), py::arg("step_size"), py::arg("samples"),
        "The mean of E over an epoch's samples, from the means over its steps; the last may have fewer.");
  m.def("count_correct", count_correct, py::arg("output"), py::arg("target"), py::arg("rows"),
        "Of how many rows the largest output is that of their class, or of the largest entry of d.");
  m.def("squared_errors", squared_errors, py::arg("output"), py::arg("target"), py::arg("rows"),
        "sum over the rows of (d - o)^2, float64, one value an output.");
  m.def(
      "spread", spread, py::arg("blocks"),
      "sum (d - mean d)^2 of each output, over blocks of rows of d; from their differences to the first row, "
      "because squares of d itself would cancel.");
  m.def(
      "r2", r2, py::arg("squared_errors"), py::arg("spread"),
      "The mean over the outputs of 1 - squared_errors / spread; where spread is 0, of 1 for no error, else "
      "0.");
}

}  // namespace mlpext::python
