// An epoch of gradient descent on a multilayer perceptron, compiled once an instruction set: one sample at a
// time under plain descent, or steps of any size under any rule.
#pragma once
#include "cpu/epoch/minibatch.h"
#include "cpu/epoch/sgd_single_sample.h"

namespace mlpext::MLPEXT_ISA {
namespace {

template <class Epoch> EpochReport train_epoch(const EpochJob& job, void* memory) {
  Arena arena{static_cast<char*>(memory)};
  Epoch epoch(job, arena);
  if (memory) return epoch.run();
  EpochReport report;
  report.memory = arena.used;
  return report;
}

template <class T> EpochReport train(const EpochJob& job, void* memory) {
  return (SingleSampleSgd<T>::serves(job) ? train_epoch<SingleSampleSgd<T>>
                                          : train_epoch<Minibatches<T>>)(job, memory);
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
