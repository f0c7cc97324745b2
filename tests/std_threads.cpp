// OpenMP's parallel region on std::thread, for `make tsan`: ThreadSanitizer does not see how libgomp's
// threads wait for each other, and would call every write of theirs a race. The compiler turns `#pragma omp
// parallel` of at::parallel_for into a call of GOMP_parallel, and this one, in the same library, comes before
// libgomp's.
#include <ATen/Parallel.h>

#include <thread>
#include <vector>

namespace {
thread_local int number = 0, team = 1;
}

extern "C" {
int omp_get_thread_num() noexcept { return number; }
int omp_get_num_threads() noexcept { return team; }

void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned /*flags*/) {
  const int size = threads ? static_cast<int>(threads) : at::get_num_threads();
  const auto run = [=](int n) {
    number = n, team = size;
    region(data);
    number = 0, team = 1;
  };
  std::vector<std::thread> others;
  for (int n = 1; n < size; ++n) others.emplace_back(run, n);
  run(0);
  for (std::thread& other : others) other.join();
}
}
