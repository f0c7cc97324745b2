// Asks csrc/cuda/cutlass.cpp for products, which cutlass_launchers.cpp computes
// (tests/test_cutlass_emulated.py). The last buffer of a request takes what happened, in a number of 8 bytes.
#include "cuda/cutlass.h"

#include "cuda/cutlass/launchers.h"
#include "requests.h"

namespace {

using namespace mlpext::cuda;
using namespace emulator;

const ct::Table table{{ct::bfloat16_forward, ct::float16_forward},
                      {ct::bfloat16_input_gradient, ct::float16_input_gradient}};

struct Request {
  Sizes sizes{0, static_cast<mlpext::Dtype>(next()), next(), next(), next()};
  ct::Activation f{static_cast<int>(next()), {next<double>(), next<double>()}};
  int64_t strides[4] = {next(), next(), next(), next()};
  std::vector<Buffer> all = buffers();

  Matrix matrix(int i) const { return {all[i].data(), strides[2 * i], strides[2 * i + 1]}; }
  void respond(const std::optional<ct::Call>& call) {
    const int64_t done = call && call->launch(call->product, nullptr) == cudaSuccess;
    std::memcpy(all.back().data(), &done, sizeof(done));
    for (const Buffer& buffer : all) std::cout.write(buffer.data(), buffer.bytes);
  }
};

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string request; std::cin >> request; std::cout.flush()) {
    if (request == "capability") {
      compute_capability[0] = static_cast<int>(next());
      compute_capability[1] = static_cast<int>(next());
    } else if (request == "forward") {  // x, w, bias, y, z
      Request r;
      r.respond(ct::forward(table, r.sizes, r.f, r.matrix(0), r.matrix(1), r.all[2].data(), r.all[3].data(),
                            r.all[4].data()));
    } else if (request == "input_gradient") {  // dz, w, kept, dx, sums
      Request r;
      r.respond(ct::input_gradient(table, r.sizes, r.f, r.matrix(0), r.matrix(1), r.all[2].data(),
                                   r.all[3].data(), reinterpret_cast<float*>(r.all[4].data())));
    } else {
      return 2;
    }
  }
}
