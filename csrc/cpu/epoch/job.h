// One epoch of gradient descent as plain data: what the tensor side hands to the engine. No torch header is
// included here or in the engine.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mlpext::cpu {

// A weight or a bias, contiguous, with the optimizer's buffers of the same shape.
struct EpochParameter {
  void* value = nullptr;  // null: there is none
  void* state[2] = {};    // velocity; or Adam's two averages
  bool trained = false;
};

// A layer's dropout: y_j m_j, where m_j is 0 with probability p, else 1 / (1 - p), by a generator whose
// numbers depend on nothing but these and the sample's place in the epoch (dropout.h).
struct Dropout {
  double p = 0;  // 0 <= p < 1; 0: none
  uint64_t seed = 0;
  uint32_t epoch = 0, layer = 0;
};
// m, (rows, units), its rows `stride` apart, of the samples from `first` on.
using DropoutMask = void (*)(const Dropout& dropout, int64_t first, int64_t rows, int64_t units,
                             int64_t stride, void* mask);

// z = x W' + b with W (out, in), and y = f(z). With W (pieces, out, in) there is a z of each piece, side by
// side, and y is the largest of them (maxout), or f(z1) z2 of two (gated).
struct EpochLayer {
  enum Kind { activated, maxout, gated } kind;
  int64_t in, out, pieces;  // pieces: of an activated layer 1
  std::size_t activation;   // its place in the list of activations.h
  const double* params;
  bool output_suffices;  // f' follows from y
  EpochParameter weight, bias;
  Dropout dropout;
};

// As torch.optim has them. Plain descent is momentum 0.
struct UpdateRule {
  enum Kind { descent, adam, adamw } kind = descent;
  double lr = 0, weight_decay = 0;
  double momentum = 0;
  bool nesterov = false;
  double beta1 = 0, beta2 = 0, eps = 0;
  int64_t steps = 0;     // done before
  double l2 = 0;         // a step minimises l2/2 ||W||^2 too
  double clip_norm = 0;  // what the gradient's norm is held to; 0: nothing
};

// Sample i is row order[i] (row i where order is null) of x (*, n0), of d (*, n_last) or of classes, and of
// weights where there are any.
struct SampleRows {
  const void* x = nullptr;
  const void* d = nullptr;
  const int64_t* classes = nullptr;
  const int64_t* order = nullptr;
  const void* weights = nullptr;
};

struct EpochJob {
  const EpochLayer* layers;
  int64_t layer_count;
  UpdateRule rule;
  std::size_t loss;    // its place in the list of losses.h
  bool mean;           // minimise the (weighted) mean of E over the samples of a step, else the sum
  int64_t samples;     // to visit
  int64_t step_size;   // samples an update; the last takes those that are left
  SampleRows rows;     // all of them, unless `fetch` brings them block_size at a time
  int64_t block_size;  // whole steps, or less than one, or all samples
  double* losses;      // mean E of each step, and its share of l2/2 ||W||^2
  void*
      outputs;  // null, or (block_size, n_last): what the model gave as the steps met the samples of a block
  void* context;  // of the functions below, which return false to stop; either may be null
  bool (*fetch)(void* context, int64_t first, int64_t count, SampleRows* rows);
  // Every 16 samples or more, between two steps (in batch mode two chunks): samples done, and their number
  // times their mean E.
  bool (*poll)(void* context, int64_t done, double error);
};

struct EpochReport {
  int64_t steps = 0;     // complete; the last has a loss that is NaN or infinite where training broke down
  bool stopped = false;  // by fetch or poll
  int64_t memory = 0;    // bytes of scratch that the job needs
};

// With null memory: only how much is needed (64-byte aligned, zeroed).
using TrainEpoch = EpochReport (*)(const EpochJob& job, void* memory);

}  // namespace mlpext::cpu
