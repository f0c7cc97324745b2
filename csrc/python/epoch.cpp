// Python's way into an epoch of the native engine: layers, rule and data from the records of
// mlpext/training/engines/native.py to an EpochJob of plain pointers (cpu/epoch/job.h), and its calls back
// into Python, for the next block of rows and for progress. The GIL is held in those calls only.
#include <ATen/ops/empty.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <chrono>
#include <cstdlib>
#include <memory>

#include "cpu/tensors.h"
#include "formulas/losses.h"
#include "python/bindings.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace mlpext::python {
namespace {

using cpu::Dropout;
using cpu::EpochJob;
using cpu::EpochLayer;
using cpu::EpochParameter;
using cpu::EpochReport;
using cpu::SampleRows;
using cpu::TrainEpoch;
using cpu::UpdateRule;

using Clock = std::chrono::steady_clock;
constexpr auto poll_interval = std::chrono::milliseconds(100);

const Tensor& tensor(py::handle object, const char* name) {
  TORCH_CHECK_TYPE(THPVariable_Check(object.ptr()), name, " must be a tensor");
  return THPVariable_Unpack(object.ptr());
}

// Memory for a job, kept by the thread from call to call: fresh pages would cost an epoch of digits 50 us.
void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  constexpr int64_t kept = 16 << 20;
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes || size > kept) {
    memory.reset();
    size = 0;
    memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    TORCH_CHECK(memory, "out of memory: training needs ", bytes, " bytes");
    size = bytes;
  }
#ifdef __SANITIZE_ADDRESS__  // the last job's pieces
  __asan_unpoison_memory_region(memory.get(), size);
#endif
  std::memset(memory.get(), 0, bytes);
  return memory.get();
}

// The data of an argument, after a check that the engine can take it as it lies.
void* data(const Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.layout() == at::kStrided && t.is_contiguous() &&
                        t.scalar_type() == dtype && t.sizes() == sizes,
                    name, ": expected a contiguous CPU tensor of ", dtype, " and shape ", sizes, ", got ",
                    t.scalar_type(), " and ", t.sizes());
  return t.data_ptr();
}

double probability(double p) {
  TORCH_CHECK_VALUE(0 <= p && p < 1, "dropout: expected 0 <= p < 1, got ", p);
  return p;
}

// Any integer, by its lowest 64 bits.
uint64_t seed_of(const py::int_& seed) {
  const uint64_t bits = PyLong_AsUnsignedLongLongMask(seed.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return bits;
}

// A job, and the Python objects behind it.
struct Run {
  std::vector<EpochLayer> layers;
  std::vector<std::array<double, 2>> params;
  EpochJob job{};
  at::ScalarType dtype = at::kFloat;
  py::object fetch, poll, x, d, weights;  // x, d and weights: of the block under way
  Clock::time_point polled = Clock::now();
  std::exception_ptr error;

  // A LayerRecord of mlpext/training/engines/_support.py. `dropout`: of the layer, but for its probability.
  void add(py::handle layer, std::size_t states, Dropout dropout) {
    const py::object weight_ = layer.attr("weight"), bias_ = layer.attr("bias");
    const auto name = py::cast<std::string>(layer.attr("activation"));
    const auto values = py::cast<std::vector<double>>(layer.attr("params"));
    const py::tuple weight_states = layer.attr("weight_states"), bias_states = layer.attr("bias_states");
    const Tensor& weight = tensor(weight_, "weight");
    if (layers.empty()) dtype = weight.scalar_type();
    TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble,
                      "weight: expected float32 or float64, got ", dtype);
    EpochLayer own{};
    const bool maxout = name == "maxout", gated = py::cast<bool>(layer.attr("gated"));
    own.kind = maxout ? EpochLayer::maxout : gated ? EpochLayer::gated : EpochLayer::activated;
    own.pieces = weight.dim() == 3 ? weight.size(0) : 1;
    TORCH_CHECK_VALUE(
        weight.dim() == (maxout || gated ? 3 : 2) && weight.numel() > 0 && (!gated || own.pieces == 2),
        "weight: expected (",
        maxout  ? "pieces, "
        : gated ? "2, "
                : "",
        "out, in), got ", weight.sizes());
    own.out = weight.size(-2);
    own.in = weight.size(-1);
    TORCH_CHECK_VALUE(layers.empty() || layers.back().out == own.in, "weight: a layer takes ", own.in,
                      " values, the one before gives ", layers.empty() ? 0 : layers.back().out);
    if (!maxout) {
      own.activation = activation_index(name, values);
      own.output_suffices = activation_infos[own.activation].output_suffices(values.data());
    }
    std::copy(values.begin(), values.end(), params.emplace_back().begin());
    own.weight = parameter(weight, weight_states, states);
    if (!bias_.is_none()) {
      const Tensor& bias = tensor(bias_, "bias");
      data(bias, dtype, weight.sizes().slice(0, weight.dim() - 1), "bias");
      own.bias = parameter(bias, bias_states, states);
    }
    own.dropout = dropout;
    own.dropout.p = probability(py::cast<double>(layer.attr("dropout")));
    layers.push_back(own);
  }

  EpochParameter parameter(const Tensor& value, const py::tuple& states, std::size_t count) {
    EpochParameter own{data(value, dtype, value.sizes(), "parameter"), {}, value.requires_grad()};
    TORCH_CHECK_VALUE(!own.trained || states.size() == count, "states: expected ", count, ", got ",
                      states.size());
    for (std::size_t i = 0; own.trained && i < count; ++i)
      own.state[i] = data(tensor(states[i], "state"), dtype, value.sizes(), "state");
    return own;
  }

  void finish() {
    for (std::size_t l = 0; l < layers.size(); ++l) layers[l].params = params[l].data();
    job.layers = layers.data();
    job.layer_count = static_cast<int64_t>(layers.size());
  }

  // Takes `count` rows of x and d, and their weights or None, as the block under way.
  SampleRows rows(py::object x_, py::object d_, py::object weights_, int64_t count) {
    const Tensor &x_rows = tensor(x_, "x"), &d_rows = tensor(d_, "d");
    const int64_t outputs = layers.back().out;
    SampleRows rows;
    rows.x = data(x_rows, dtype, {count, layers[0].in}, "x");
    if (d_rows.scalar_type() == at::kLong) {
      rows.classes = static_cast<const int64_t*>(data(d_rows, at::kLong, {count}, "d"));
      check_indices(rows.classes, count, outputs, "class");
    } else {
      rows.d = data(d_rows, dtype, {count, outputs}, "d");
    }
    if (!weights_.is_none())
      rows.weights = data(tensor(weights_, "sample_weight"), dtype, {count}, "sample_weight");
    x = std::move(x_);
    d = std::move(d_);
    weights = std::move(weights_);
    return rows;
  }

  static void check_indices(const int64_t* values, int64_t count, int64_t end, const char* name) {
    for (int64_t i = 0; i < count; ++i)
      TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < end, name, " ", values[i], " is not in 0..", end - 1);
  }

  // Calls Python from the engine, whose loops know no exceptions.
  template <class Call> bool python(Call call) {
    py::gil_scoped_acquire gil;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      return call();
    } catch (...) {
      error = std::current_exception();
      return false;
    }
  }
  static bool fetch_rows(void* context, int64_t first, int64_t count, SampleRows* rows) {
    Run& run = *static_cast<Run*>(context);
    return run.python([&] {
      py::tuple block = run.fetch(first, count);
      *rows = run.rows(block[0], block[1], block.size() > 2 ? py::object(block[2]) : py::none(), count);
      return true;
    });
  }
  static bool poll_python(void* context, int64_t done, double error_sum) {
    Run& run = *static_cast<Run*>(context);
    const auto now = Clock::now();
    if (now - run.polled < poll_interval) return true;
    run.polled = now;
    return run.python([&] { return run.poll(done, error_sum).template cast<bool>(); });
  }
};

// A Rule of mlpext/training/engines/optimizer.py.
UpdateRule rule_of(py::handle record) {
  UpdateRule rule;
  const auto kind = py::cast<std::string>(record.attr("kind"));
  TORCH_CHECK_VALUE(kind == "descent" || kind == "adam" || kind == "adamw", "rule: unknown kind ", kind);
  rule.kind = kind == "descent" ? UpdateRule::descent : kind == "adam" ? UpdateRule::adam : UpdateRule::adamw;
  rule.lr = py::cast<double>(record.attr("lr"));
  rule.weight_decay = py::cast<double>(record.attr("weight_decay"));
  rule.momentum = py::cast<double>(record.attr("momentum"));
  rule.nesterov = py::cast<bool>(record.attr("nesterov"));
  std::tie(rule.beta1, rule.beta2) = py::cast<std::pair<double, double>>(record.attr("betas"));
  rule.eps = py::cast<double>(record.attr("eps"));
  rule.steps = py::cast<int64_t>(record.attr("steps"));
  rule.l2 = py::cast<double>(record.attr("l2"));
  rule.clip_norm = py::cast<double>(record.attr("clip_grad_norm"));
  return rule;
}

py::tuple run_epoch(const py::list& layers, py::handle rule, const std::string& loss, bool mean,
                    int64_t samples, int64_t step_size, const py::object& x, const py::object& d,
                    py::handle order, py::object fetch, int64_t block_size, py::handle losses,
                    py::handle outputs, py::object poll, const py::object& sample_weight,
                    const py::int_& seed, uint32_t epoch) {
  HANDLE_TH_ERRORS
  Run run;
  EpochJob& job = run.job;
  job.rule = rule_of(rule);
  const std::size_t states = job.rule.kind != UpdateRule::descent ? 2 : job.rule.momentum != 0 ? 1 : 0;
  run.params.reserve(layers.size());
  Dropout dropout{0, seed_of(seed), epoch, 0};
  for (py::handle layer : layers) {
    run.add(layer, states, dropout);
    ++dropout.layer;
  }
  TORCH_CHECK_VALUE(!layers.empty() && samples > 0 && step_size > 0 && block_size > 0,
                    "layers, samples, step_size and block_size must be at least 1");
  run.finish();
  job.loss = std::find(loss_names.begin(), loss_names.end(), loss) - loss_names.begin();
  TORCH_CHECK_VALUE(job.loss < loss_names.size(), "loss: unknown name ", loss);
  job.mean = mean;
  job.samples = samples;
  job.step_size = step_size;
  job.block_size = block_size;
  job.context = &run;
  const int64_t steps = (samples + step_size - 1) / step_size;
  job.losses = static_cast<double*>(data(tensor(losses, "losses"), at::kDouble, {steps}, "losses"));
  if (!outputs.is_none())
    job.outputs = data(tensor(outputs, "outputs"), run.dtype, {block_size, run.layers.back().out}, "outputs");
  if (fetch.is_none()) {
    TORCH_CHECK_VALUE(block_size == samples, "block_size: expected all ", samples, " samples, got ",
                      block_size);
    const int64_t rows = tensor(x, "x").size(0);
    job.rows = run.rows(x, d, sample_weight, rows);
    job.rows.order = static_cast<const int64_t*>(data(tensor(order, "order"), at::kLong, {samples}, "order"));
    Run::check_indices(job.rows.order, samples, rows, "row");
  } else {
    TORCH_CHECK_VALUE(block_size >= samples || block_size < step_size || block_size % step_size == 0,
                      "block_size: expected whole steps of ", step_size, ", or less than one, got ",
                      block_size);
    run.fetch = std::move(fetch);
    job.fetch = Run::fetch_rows;
  }
  run.poll = std::move(poll);
  job.poll = Run::poll_python;

  const TrainEpoch train = cpu::kernels().train[run.dtype == at::kDouble ? 0 : 1];
  void* memory = scratch(train(job, nullptr).memory);
  EpochReport report;
  {
    py::gil_scoped_release no_gil;
    report = train(job, memory);
  }
  if (run.error) std::rethrow_exception(run.error);
  return py::make_tuple(report.steps, report.stopped);
  END_HANDLE_TH_ERRORS_PYBIND
}

at::Tensor dropout_mask(double p, const py::int_& seed, uint32_t epoch, uint32_t layer, int64_t first,
                        int64_t rows, int64_t units, const py::object& dtype) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(THPDtype_Check(dtype.ptr()), "dtype must be a torch.dtype");
  const at::ScalarType scalar = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
  TORCH_CHECK_VALUE(scalar == at::kFloat || scalar == at::kDouble, "dtype: expected float32 or float64, got ",
                    scalar);
  const Dropout dropout{probability(p), seed_of(seed), epoch, layer};
  at::Tensor mask = at::empty({rows, units}, scalar);
  py::gil_scoped_release no_gil;
  cpu::kernels().dropout_mask[scalar == at::kDouble ? 0 : 1](dropout, first, rows, units, units,
                                                             mask.data_ptr());
  return mask;
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace

void bind_epoch(pybind11::module_& m) {
  m.def("has_kernel", [](const std::string& name, const std::vector<double>& params) {
    HANDLE_TH_ERRORS
    return activation_infos[activation_index(name, params)].has_kernel(params.data());
    END_HANDLE_TH_ERRORS_PYBIND
  });
  m.def("run_epoch", run_epoch, py::arg("layers"), py::arg("rule"), py::arg("loss"), py::arg("mean"),
        py::arg("samples"), py::arg("step_size"), py::arg("x"), py::arg("d"), py::arg("order"),
        py::arg("fetch"), py::arg("block_size"), py::arg("losses"), py::arg("outputs"), py::arg("poll"),
        py::arg("sample_weight") = py::none(), py::arg("seed") = 0, py::arg("epoch") = 1);
  m.def(
      "losses", [] { return std::vector<std::string>(loss_names.begin(), loss_names.end()); },
      "The names of the losses that run_epoch knows.");
  m.def("dropout_mask", dropout_mask, py::arg("p"), py::arg("seed"), py::arg("epoch"), py::arg("layer"),
        py::arg("first"), py::arg("rows"), py::arg("units"), py::arg("dtype"),
        "0 or 1 / (1 - p) for each unit of a layer and each of the samples at first ... first + rows - 1 of "
        "an epoch, (rows, units).");
}

}  // namespace mlpext::python
