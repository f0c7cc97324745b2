// Everything that one instruction set's table (MLPEXT_ISA) computes, on fixed inputs, to standard output: for
// each result a line "name dtype count", with NumPy's name of the dtype, then the numbers as they lie in
// memory. test_emulated.py compares what a processor in an emulator writes with what this one does.
#include <bit>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/gemm/gemm.h"
#include "formulas/activation_info.h"
#include "formulas/losses.h"

namespace mlpext {
namespace MLPEXT_ISA {
extern const cpu::Kernels kernels;
}
namespace cpu {
const Kernels& kernels() { return MLPEXT_ISA::kernels; }
}  // namespace cpu
}  // namespace mlpext

using namespace mlpext;

namespace {

constexpr const char* dtypes[] = {"float64", "float32", "bfloat16", "float16"};

template <class T> constexpr const char* stored = sizeof(T) == 8 ? "f8" : sizeof(T) == 4 ? "f4" : "u2";
template <> constexpr const char* stored<uint8_t> = "u1";
template <> constexpr const char* stored<int32_t> = "i4";

template <class T> void emit(const std::string& name, const std::vector<T>& numbers) {
  std::printf("%s %s %zu\n", name.c_str(), stored<T>, numbers.size());
  std::fwrite(numbers.data(), sizeof(T), numbers.size(), stdout);
}

// x in the dtype M, where it must be exact: a small whole number, or one with few digits.
template <Dtype dtype, class M> M number(double x) {
  if constexpr (sizeof(M) > 2) return static_cast<M>(x);
  else {
    const auto b = std::bit_cast<uint32_t>(static_cast<float>(x));
    if (dtype == bfloat16 || x == 0) return static_cast<M>(b >> 16);
    return static_cast<M>((b >> 16 & 0x8000) | ((b & 0x7fffffff) - (112u << 23)) >> 13);
  }
}

int whole() {  // -4..4, by chance
  static uint32_t state = 1;
  state = state * 1664525 + 1013904223;
  return static_cast<int>((state >> 16) % 9) - 4;
}
template <Dtype dtype, class M> std::vector<M> wholes(int64_t n) {
  std::vector<M> x(n);
  for (M& each : x) each = number<dtype, M>(whole());
  return x;
}

// Every 16-bit number; of more bits as many, evenly among all. And 3 of them again, which fill no register.
template <class M> std::vector<M> all_numbers() {
  std::vector<M> x(65536 + 3);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const uint64_t bits = i % 65536 * 0x0001'0001'0001'0001;
    std::memcpy(&x[i], &bits, sizeof(M));
  }
  return x;
}

template <Dtype dtype, class M> void activations() {
  const std::vector<M> x = all_numbers<M>();
  const auto n = static_cast<int64_t>(x.size());
  std::vector<M> g(x.size()), result(x.size()), other(x.size());
  const std::vector<M> ones(x.size(), number<dtype, M>(1));
  for (std::size_t i = 0; i < x.size(); ++i) g[i] = number<dtype, M>(1 + i % 7 * 0.125);
  emit(std::string("x ") + dtypes[dtype], x);
  for (std::size_t a = 0; a < activation_count; ++a) {
    const ActivationInfo& info = activation_infos[a];
    const cpu::ActivationKernels& kernels = cpu::kernels().activations[a];
    double params[4] = {};
    for (std::size_t p = 0; p < info.params.size(); ++p) params[p] = info.params[p].value;
    const std::string name = std::string(info.name) + " " + dtypes[dtype];
    kernels.forward[dtype](params, x.data(), result.data(), n);
    emit("forward " + name, result);
    kernels.backward[dtype](params, g.data(), x.data(), result.data(), n);
    emit("backward " + name, result);
    kernels.gated[dtype](params, x.data(), g.data(), result.data(), n);
    emit("gated " + name, result);
    kernels.gated_backward[dtype](params, g.data(), x.data(), ones.data(), result.data(), other.data(), n);
    emit("backward_of_gate " + name, result), emit("of_value " + name, other);
    if (!kernels.backward_from_output[dtype]) continue;
    kernels.backward_from_output[dtype](params, g.data(), x.data(), result.data(), n);
    emit("backward_from_output " + name, result);
  }
}

template <Dtype dtype, class M, class Index> void maxout(int width) {
  const int64_t n = 37;
  for (int64_t pieces = 1; pieces <= 5; ++pieces) {
    std::vector<M> x = wholes<dtype, M>(pieces * n), y(n), dx(pieces * n);
    const uint64_t nan = ~uint64_t(0);
    std::memcpy(&x[n / 2], &nan, sizeof(M));
    std::vector<Index> index(n);
    cpu::kernels().maxout_forward[width][dtype](x.data(), y.data(), index.data(), pieces, n, n);
    cpu::kernels().maxout_backward[width][dtype](x.data(), index.data(), dx.data(), pieces, n, n);
    const std::string name = std::string(dtypes[dtype]) + " " + std::to_string(pieces) + " " + stored<Index>;
    emit("maxout " + name, y), emit("maxout_index " + name, index), emit("maxout_dx " + name, dx);
  }
}

// Whole numbers, so that every order of the sums gives the same bits.
template <Dtype dtype, class M> void products(int64_t rows, int64_t in, int64_t out) {
  const std::vector<M> x = wholes<dtype, M>(rows * in), w = wholes<dtype, M>(out * in);
  const std::vector<M> bias = wholes<dtype, M>(out), g = wholes<dtype, M>(rows * out);
  std::vector<M> z(rows * out), dx(rows * in), dw(out * in), db(out);
  const cpu::Matrix x_matrix{x.data(), rows, in, in, 1}, w_matrix{w.data(), out, in, in, 1};
  const std::string name = std::string(dtypes[dtype]) + " " + std::to_string(rows) + "x" +
                           std::to_string(in) + "x" + std::to_string(out);
  cpu::gemm_forward(dtype, x_matrix, w_matrix, bias.data(), z.data(), [](const cpu::OutputTile&) {});
  emit("product " + name, z);
  const auto form = [&](int64_t row, int64_t count, void* to, int64_t stride) {
    for (int64_t r = 0; r < count; ++r)
      std::memcpy(static_cast<M*>(to) + r * stride, &g[(row + r) * out], out * sizeof(M));
  };
  cpu::gemm_backward(dtype, {rows, out, nullptr, form}, x_matrix, w_matrix, dx.data(), dw.data(), db.data());
  emit("product_dx " + name, dx), emit("product_dw " + name, dw), emit("product_db " + name, db);
  const int64_t pieces = 3;
  const std::vector<M> v = wholes<dtype, M>(pieces * out * in);
  std::vector<uint8_t> index(rows * out);
  std::vector<M> product(rows * out);
  cpu::gemm_pieces(dtype, x_matrix, {v.data(), pieces * out, in, in, 1}, nullptr, pieces,
                   [&](const cpu::PiecesOfRow& part) {
                     const int64_t at = part.row * out + part.column, n = part.columns;
                     cpu::kernels().maxout_forward[0][dtype](part.z, &z[at], &index[at], pieces, n, n);
                     const M* const piece = static_cast<const M*>(part.z);
                     const auto gated = cpu::kernels().activations[index_of<Identity>].gated[dtype];
                     gated(nullptr, piece, piece + n, &product[at], n);
                   });
  emit("product_maxout " + name, z), emit("product_maxout_index " + name, index);
  emit("product_of_pieces " + name, product);
}

// Two epochs of 7 -> 13 (tanh, dropout) -> 5 (maxout of 3) -> 3 by cross-entropy: what the weights become.
template <Dtype dtype, class T>
void epochs(cpu::UpdateRule rule, int64_t step_size, const std::string& name) {
  constexpr int64_t samples = 41, widths[] = {7, 13, 5, 3}, pieces[] = {0, 3, 0};
  std::vector<T> x = wholes<dtype, T>(samples * widths[0]), weights[6], states[6][2];
  std::vector<int64_t> classes(samples);
  for (int64_t i = 0; i < samples; ++i) classes[i] = (whole() + 4) % 3;
  cpu::EpochLayer layers[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t in = widths[i], out = widths[i + 1], rows = out * std::max<int64_t>(1, pieces[i]);
    const bool tanh = i == 0;
    layers[i] = {in, out, pieces[i], tanh ? index_of<Tanh> : index_of<Identity>, nullptr, true, {}, {}, {}};
    for (const bool bias : {false, true}) {
      const int p = 2 * i + bias;
      weights[p] = wholes<dtype, T>(bias ? rows : rows * in);
      for (T& w : weights[p]) w /= 8;
      for (auto& state : states[p]) state.assign(weights[p].size(), 0);
      (bias ? layers[i].bias : layers[i].weight) =
          cpu::EpochParameter{weights[p].data(), {states[p][0].data(), states[p][1].data()}, true};
    }
  }
  layers[0].dropout = {.p = 0.25, .seed = 5, .epoch = 0, .layer = 0};
  std::vector<double> losses(samples);
  cpu::EpochJob job{};
  job.layers = layers, job.layer_count = 3, job.rule = rule, job.mean = true;
  job.loss = 1;  // cross-entropy
  job.samples = job.block_size = samples, job.step_size = step_size;
  job.rows.x = x.data(), job.rows.classes = classes.data(), job.losses = losses.data();
  for (int epoch = 0; epoch < 2; ++epoch, job.rule.steps += (samples + step_size - 1) / step_size) {
    layers[0].dropout.epoch = static_cast<uint32_t>(epoch);
    const auto train = cpu::kernels().train[dtype];
    std::vector<char> memory(train(job, nullptr).memory + 64);
    char* aligned = memory.data() + 64 - reinterpret_cast<uintptr_t>(memory.data()) % 64;
    train(job, aligned);
  }
  for (int p = 0; p < 6; ++p)
    emit("epochs_" + name + " " + dtypes[dtype] + " " + std::to_string(p), weights[p]);
}

template <Dtype dtype, class M> void everything() {
  activations<dtype, M>();
  maxout<dtype, M, uint8_t>(0);
  maxout<dtype, M, int32_t>(1);
  // One below, at and above the heights and widths of tiles: strips of 6 and 60 rows, 1 to 4 registers of 2
  // or 4 columns, panels of 64.
  for (const int64_t rows : {1, 2, 3, 5, 6, 7, 59, 61})
    for (const int64_t columns : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65}) {
      products<dtype, M>(rows, 11, columns);
      products<dtype, M>(rows, columns, 17);
    }
  if constexpr (sizeof(M) > 2) {
    const cpu::UpdateRule descent{.lr = 0.125, .momentum = 0.5, .nesterov = true};
    const cpu::UpdateRule plain{.lr = 0.125};
    const cpu::UpdateRule adam{
        .kind = cpu::UpdateRule::adam, .lr = 0.01, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8};
    epochs<dtype, M>(plain, 1, "stochastic");
    epochs<dtype, M>(descent, 10, "minibatch");
    epochs<dtype, M>(adam, 41, "batch");
  }
}

}  // namespace

int main() {
  everything<float64, double>();
  everything<float32, float>();
  everything<bfloat16, uint16_t>();
  everything<float16, uint16_t>();
}
