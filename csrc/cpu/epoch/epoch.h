// An epoch of gradient descent on a multilayer perceptron, compiled once an instruction set.
#pragma once
#include "cpu/epoch/minibatch.h"
#include "cpu/epoch/sgd_single_sample.h"

namespace mlpext::MLPEXT_ISA {
namespace {

template <class Epoch> Report train_epoch(const Job& job, void* memory) {
  Arena arena{static_cast<char*>(memory)};
  Epoch epoch(job, arena);
  if (memory) return epoch.run();
  Report report;
  report.memory = arena.used;
  return report;
}

template <class T> Report train(const Job& job, void* memory) {
  return (Online<T>::serves(job) ? train_epoch<Online<T>> : train_epoch<Batches<T>>)(job, memory);
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
