// Linear + maxout by the kernel of mlpext/_triton.py, where the switch is on (ops.h).
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

#include "tensors.h"

namespace mlpext::cuda {
namespace {

// Of a device of compute capability 9.0, 9.
int capability(const Tensor& tensor) {
  int major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.device().index()));
  return major;
}

// What the kernel counts with: 32 bits with room for a tile more. Its offsets have 64.
bool countable(at::IntArrayRef sizes) {
  return std::ranges::all_of(sizes, [](int64_t size) { return 0 < size && size <= 1 << 30; });
}

}  // namespace

std::tuple<Tensor, Tensor> triton_linear_maxout(const Tensor& x, const Tensor& weight,
                                                const OptionalTensor& bias, bool with_index) {
  if (!triton() || x.element_size() != 2 || maxout_index_dtype(weight.size(0)) != at::kByte ||
      !countable(x.sizes()) || !countable(weight.sizes()))
    return {};
  const int major = capability(x);
  if (major < 8) return {};
  const On on(x);
  const at::DimVector sizes{x.size(0), weight.size(1)};
  const Tensor y = fresh(sizes, x.scalar_type()), index = with_index ? fresh(sizes, at::kByte) : Tensor();
  const Relaxed relaxed;  // the first call of its kind loads the kernel
  const py::gil_scoped_acquire gil;
  py::module_::import("mlpext._triton")
      .attr("linear_maxout")(x, weight, bias.value_or(Tensor()), y, index, major);
  return {y, index};
}

}  // namespace mlpext::cuda
