// Narrow networks on CUDA: tensors to pointers. The mlp operators ask here first (cuda/mlp.cpp); nothing
// comes back where the switch is off or the kernels do not serve, and the layers are run one by one.
//
// What is kept for backward is exactly what the layers one by one keep, in the same order (ops/schema.cpp),
// so that the backward of either serves the forward of the other.
#include "cuda/experimental/narrow/narrow.h"

#include "cuda/experimental/narrow/network.h"
#include "cuda/tensors.h"
#include "ops/switches.h"

namespace mlpext::cuda {
namespace {

// A network as the kernels take it, and the tensors that it points to.
struct NarrowJob : Narrow {
  std::vector<Tensor> held;

  const void* hold(const Tensor& tensor) { return held.emplace_back(tensor.contiguous()).const_data_ptr(); }
  void* hold_mutable(const Tensor& tensor) { return const_cast<void*>(hold(tensor)); }
};

// Nothing where the kernels do not serve: what is wrong is the layers' to say.
std::optional<NarrowJob> job_of(const Network& network, const Tensor& input) {
  const auto dtype = input.scalar_type();
  if (!network.is_supported(input) || dtype == at::kDouble || input.dim() == 0 || input.numel() == 0 ||
      network.size() > Narrow::deepest)
    return std::nullopt;
  NarrowJob job{};
  job.depth = static_cast<int>(network.size());
  int64_t width = input.size(-1);
  job.rows = input.numel() / width;
  for (int l = 0; l < job.depth; ++l) {
    const Tensor& weight = network.weights[l];
    const OptionalTensor bias = network.bias(l);
    if (network.layers[l].is_maxout() || width > Narrow::widest || weight.dim() != 2 ||
        weight.size(1) != width)
      return std::nullopt;
    const int64_t in = std::exchange(width, weight.size(0));
    if (bias && (bias->dim() != 1 || bias->size(0) != width || bias->scalar_type() != dtype))
      return std::nullopt;
    NarrowLayer& layer = job.layers[l];
    layer.in = static_cast<int>(in), layer.out = static_cast<int>(width);
    layer.activation = static_cast<int>(network.layers[l].activation);
    std::ranges::copy(network.layers[l].params, layer.params);
  }
  if (width < 1 || width > Narrow::widest) return std::nullopt;
  return job;
}

Narrow::Device limits_of(const Tensor& tensor) {
  Narrow::Device device{};
  const int index = tensor.device().index();
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  return device;
}

void hold_parameters(NarrowJob& job, const Network& network, const Tensor& input) {
  job.x = job.hold(input);
  for (int l = 0; l < job.depth; ++l) {
    job.layers[l].weight = job.hold(network.weights[l]);
    if (const OptionalTensor bias = network.bias(l)) job.layers[l].bias = job.hold(*bias);
  }
}

}  // namespace

OptionalTensor narrow_mlp(const Tensor& input, at::TensorList weights, at::TensorList biases,
                          at::IntArrayRef activations, Params params) {
  if (!narrow_switch.is_on()) return std::nullopt;
  const Network network(weights, biases, activations, params);
  auto job = job_of(network, input);
  const int size = static_cast<int>(input.element_size());
  if (!job || !job->plan(size, /*backward=*/false, limits_of(input))) return std::nullopt;
  const DeviceStreamGuard on(input);
  hold_parameters(*job, network, input);
  const Tensor output = empty(with_last(input.sizes(), weights.back().size(0)), input.scalar_type());
  job->layers[job->depth - 1].y = output.mutable_data_ptr();
  C10_CUDA_CHECK(narrow_kernels(dtype_of(input)).forward(*job, on.stream));
  return output;
}

std::optional<std::tuple<Tensor, Tensor, std::vector<Tensor>>> narrow_mlp_forward(const Tensor& input,
                                                                                  at::TensorList weights,
                                                                                  at::TensorList biases,
                                                                                  at::IntArrayRef activations,
                                                                                  Params params) {
  if (!narrow_switch.is_on()) return std::nullopt;
  const Network network(weights, biases, activations, params);
  auto job = job_of(network, input);
  if (!job) return std::nullopt;
  const DeviceStreamGuard on(input);
  std::vector<Tensor> kept, more;
  for (int l = 0; l < job->depth; ++l) {
    NarrowLayer& layer = job->layers[l];
    const auto store = [&](std::vector<Tensor>& to) {
      to.push_back(empty(with_last(input.sizes(), layer.out), input.scalar_type()));
      return to.back().mutable_data_ptr();
    };
    layer.y = store(kept);
    if (network.layers[l].kept(input.scalar_type()) == Kept::preactivation) layer.z = store(more);
  }
  if (!job->plan(static_cast<int>(input.element_size()), /*backward=*/false, limits_of(input)))
    return std::nullopt;
  hold_parameters(*job, network, input);
  C10_CUDA_CHECK(narrow_kernels(dtype_of(input)).forward(*job, on.stream));
  Tensor output = std::move(kept.back()), source;
  kept.pop_back();
  if (job->layers[job->depth - 1].z) source = std::move(more.back()), more.pop_back();
  kept.insert(kept.end(), more.begin(), more.end());
  return std::tuple(output, source, std::move(kept));
}

std::optional<std::vector<Tensor>> narrow_mlp_backward(const Tensor& grad_output, const Tensor& input,
                                                       at::TensorList weights, at::TensorList biases,
                                                       at::TensorList kept, const OptionalTensor& last,
                                                       bool last_is_output, at::IntArrayRef activations,
                                                       Params params, at::IntArrayRef output_mask) {
  if (!narrow_switch.is_on()) return std::nullopt;
  const Network network(weights, biases, activations, params);
  auto job = job_of(network, input);
  if (!job || !is_supported(grad_output) || grad_output.scalar_type() != input.scalar_type() ||
      grad_output.device() != input.device())
    return std::nullopt;
  const int64_t n = job->depth;
  const auto asked = [&](int64_t i) { return output_mask[i] != 0; };
  std::vector<Tensor> gradients(1 + n + static_cast<int64_t>(biases.size()));
  const DeviceStreamGuard on(input);
  const auto fresh_gradient = [&](int64_t i, const Tensor& of) -> void* {
    if (!asked(i)) return nullptr;
    gradients[i] = empty(of.sizes(), of.scalar_type());
    return gradients[i].mutable_data_ptr();
  };
  // From the last layer to the first: where its kept tensors are, and which gradients are asked for. `lowest`
  // ends as the first layer, counted from the input, whose gradients anybody wants.
  job->lowest = job->depth;
  auto more = kept.end();  // those that go with the layers, from the last
  for (int64_t l = n - 1; l >= 0; --l) {
    NarrowLayer& layer = job->layers[l];
    const Kept keep = network.layers[l].kept(input.scalar_type());
    if (l == n - 1) {
      if (last) (last_is_output ? layer.y : layer.z) = job->hold_mutable(*last);
    } else {
      layer.y = job->hold_mutable(kept[l]);
      if (keep == Kept::preactivation) layer.z = job->hold_mutable(*--more);
    }
    layer.dw = fresh_gradient(1 + l, weights[l]);
    if (!biases.empty()) layer.db = fresh_gradient(1 + n + l, biases[l]);
    if (asked(0) || layer.dw || layer.db) job->lowest = static_cast<int>(l);
  }
  if (job->lowest == n) return gradients;
  job->dx = fresh_gradient(0, input);
  if (!job->plan(static_cast<int>(input.element_size()), /*backward=*/true, limits_of(input)))
    return std::nullopt;
  hold_parameters(*job, network, input);
  job->g = job->hold(grad_output);
  const Tensor partial = empty({static_cast<int64_t>(job->blocks) * job->sums}, at::kFloat);
  job->partial = static_cast<float*>(partial.mutable_data_ptr());
  C10_CUDA_CHECK(narrow_kernels(dtype_of(input)).backward(*job, on.stream));
  return gradients;
}

}  // namespace mlpext::cuda
