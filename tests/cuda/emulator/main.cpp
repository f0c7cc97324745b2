// Runs kernels of csrc/cuda on request (tests/cuda/test_cuda_emulated.py asks): words on standard input, then
// the bytes of each buffer; afterwards the bytes of every buffer on standard output.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "cuda/experimental/narrow/narrow.h"
#include "cuda/kernels.h"
#include "formulas/activation_info.h"

namespace mlpext::cuda {

// A program may be linked with some of them only.
extern const Kernels float64_kernels __attribute__((weak)), float32_kernels __attribute__((weak)),
    bfloat16_kernels __attribute__((weak)), float16_kernels __attribute__((weak));
extern const NarrowKernels narrow_float32_kernels __attribute__((weak)),
    narrow_bfloat16_kernels __attribute__((weak)), narrow_float16_kernels __attribute__((weak));

}  // namespace mlpext::cuda

namespace {

using namespace mlpext;
using namespace mlpext::cuda;

template <class T = int64_t> T next() {
  T value{};
  if (!(std::cin >> value)) std::exit(2);
  return value;
}

// An allocation of its own that ends where the data ends; it starts `offset` bytes behind an address that
// malloc returns.
struct Buffer {
  std::size_t bytes = next<std::size_t>(), offset = next<std::size_t>();
  std::unique_ptr<char, decltype(&std::free)> memory{static_cast<char*>(std::malloc(bytes + offset)),
                                                     &std::free};
  char* data() const { return bytes ? memory.get() + offset : nullptr; }
};

// The buffers that the request announces, filled.
std::vector<Buffer> buffers() {
  std::vector<Buffer> all;
  for (auto count = next(); count > 0; --count) all.emplace_back();
  std::cin.get();
  for (const Buffer& buffer : all) std::cin.read(buffer.data(), buffer.bytes);
  return all;
}

std::size_t index_of(const std::string& name) {
  for (std::size_t i = 0; i < activation_count; ++i)
    if (activation_infos[i].name == name) return i;
  std::exit(2);
}
const ActivationKernels& activation(const Kernels& table, const std::string& name) {
  return table.activations[index_of(name)];
}

void elementwise(const Kernels& table) {
  const ActivationKernels& kernels = activation(table, next<std::string>());
  const LaunchElementwise launchers[] = {kernels.forward, kernels.backward, kernels.backward_from_output};
  const LaunchElementwise launcher = launchers[next()];
  const double params[] = {next<double>(), next<double>()};
  Elementwise job{};
  job.n = next(), job.columns = next(), job.layout.dims = static_cast<int>(next());
  for (int d = 0; d < job.layout.dims; ++d) job.layout.sizes[d] = next();
  for (auto& strides : job.layout.strides)
    for (int d = 0; d < job.layout.dims; ++d) strides[d] = next();
  const auto all = buffers();
  job.output = all[0].data(), job.bias = all[3].data();
  // An empty second input stands for the output: in place.
  for (int k = 0; k < 2; ++k) job.inputs[k] = all[k + 1].bytes ? all[k + 1].data() : all[0].data();
  launcher(params, job, nullptr);
  for (const Buffer& buffer : all) std::cout.write(buffer.data(), buffer.bytes);
}

void rows(const Kernels& table) {
  const auto name = next<std::string>();
  const int64_t kind = next();
  const double params[] = {next<double>(), next<double>()};
  RowsJob job{};
  job.rows = next(), job.columns = next(), job.pieces = next();
  job.g.row_stride = next(), job.g.column_stride = next();
  job.saved.row_stride = next(), job.saved.column_stride = next();
  const int value_size = static_cast<int>(next());
  const auto all = buffers();
  job.g.data = all[0].data(), job.saved.data = all[1].data(), job.dz = all[2].data(), job.db = all[3].data();
  const RowTiles tiles(value_size, job.rows, job.columns);
  const auto partial =
      std::make_unique<char[]>(tiles.chunks * job.pieces * job.columns * sum_size(value_size));
  job.partial = partial.get();
  const LaunchRows launcher = name == "maxout" ? table.maxout_rows[kind]
                              : kind == 1      ? activation(table, name).backward_rows
                                               : activation(table, name).backward_rows_from_output;
  launcher(params, job, nullptr);
  for (const Buffer& buffer : all) std::cout.write(buffer.data(), buffer.bytes);
}

void maxout(const Kernels& table, bool backward) {
  const int64_t width = next(), outer = next(), pieces = next(), inner = next();
  const auto all = buffers();
  if (backward)
    table.maxout_backward[width]({outer, pieces, inner, all[0].data(), all[1].data(), all[2].data()},
                                 nullptr);
  else
    table.maxout_forward[width]({outer, pieces, inner, all[0].data(), all[1].data(), all[2].data()}, nullptr);
  for (const Buffer& buffer : all) std::cout.write(buffer.data(), buffer.bytes);
}

// relu of n values, of which memory holds only the last ones and only the last blocks run.
void last_of_many(const Kernels& table) {
  const std::size_t size = next(), n = next(), tail = next();
  const auto all = buffers();
  const auto reserve = [&] {
    void* memory =
        mmap(nullptr, n * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::exit(3);
    return static_cast<char*>(memory);
  };
  char *const x = reserve(), *const y = reserve();
  std::memcpy(x + (n - tail) * size, all[0].data(), tail * size);
  Elementwise job{};
  job.n = static_cast<int64_t>(n), job.output = y, job.inputs[0] = x;
  emulator::only_last = 2;
  activation(table, "relu").forward(nullptr, job, nullptr);
  emulator::only_last = ~uint64_t(0);
  std::cout.write(y + (n - tail) * size, tail * size);
  munmap(x, n * size), munmap(y, n * size);
}

// A whole network. The first buffer receives how the plan lets it run: resident, shared_sums, blocks.
void narrow(Dtype dtype) {
  const bool backward = next();
  Narrow::Device device{next<int>(), next<int>()};
  Narrow job{};
  job.rows = next(), job.lowest = next<int>(), job.depth = next<int>();
  for (int l = 0; l < job.depth; ++l) {
    NarrowLayer& layer = job.layers[l];
    layer.in = next<int>(), layer.out = next<int>();
    layer.activation = static_cast<int>(index_of(next<std::string>()));
    for (double& param : layer.params) param = next<double>();
  }
  const auto all = buffers();
  auto buffer = all.begin();
  char* const plan = buffer++->data();
  job.x = buffer++->data(), job.g = buffer++->data(), job.dx = buffer++->data();
  for (int l = 0; l < job.depth; ++l) {
    NarrowLayer& layer = job.layers[l];
    layer.weight = buffer++->data(), layer.bias = buffer++->data();
    layer.y = buffer++->data(), layer.z = buffer++->data();
    layer.dw = buffer++->data(), layer.db = buffer++->data();
  }
  if (!job.plan(dtype == float32 ? 4 : 2, backward, device)) std::exit(4);
  const int64_t how[] = {job.resident, job.shared_sums, job.blocks};
  std::memcpy(plan, how, sizeof(how));
  const auto partial = std::make_unique_for_overwrite<float[]>(std::size_t(job.blocks) * job.sums);
  job.partial = partial.get();
  const NarrowKernels& table = narrow_kernels(dtype);
  (backward ? table.backward : table.forward)(job, nullptr);
  for (const Buffer& buffer : all) std::cout.write(buffer.data(), buffer.bytes);
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string request; std::cin >> request; std::cout.flush()) {
    const auto dtype = static_cast<Dtype>(next());
    const Kernels& table = kernels(dtype);
    if (request == "narrow") narrow(dtype);
    else if (request == "elementwise") elementwise(table);
    else if (request == "rows") rows(table);
    else if (request == "maxout") maxout(table, false);
    else if (request == "maxout_backward") maxout(table, true);
    else if (request == "last_of_many") last_of_many(table);
    else return 2;
  }
}
