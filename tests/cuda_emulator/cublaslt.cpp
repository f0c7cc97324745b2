// Asks csrc/cuda/cublaslt.cpp for products, which the cublasLt.h beside this file computes
// (tests/test_cublaslt_emulated.py). The last buffer of a request takes what happened, in numbers of 8 bytes.
#include "cuda/cublaslt.h"

#include <thread>

#include "requests.h"

namespace {

using namespace mlpext::cuda;
using namespace emulator;

enum Outcome : int64_t { not_asked, no_algorithm, done };

Outcome answer(const std::optional<lt::Product>& product) {
  if (!product) return not_asked;
  const lt::Plan plan = lt::plan_of(*product);
  if (!plan.served) return no_algorithm;
  const auto workspace = std::make_unique<char[]>(plan.workspace);
  lt::run(plan, *product, workspace.get(), nullptr);
  return done;
}

struct Request {
  Sizes sizes{0, static_cast<mlpext::Dtype>(next()), next(), next(), next()};
  lt::Activation activation = static_cast<lt::Activation>(next());
  int64_t strides[4] = {next(), next(), next(), next()};
  std::vector<Buffer> all = buffers();

  Matrix matrix(int i) const { return {all[i].data(), strides[2 * i], strides[2 * i + 1]}; }
  void respond(Outcome outcome) {
    const int64_t word = outcome;
    std::memcpy(all.back().data(), &word, sizeof(word));
    for (const Buffer& buffer : all) std::cout.write(buffer.data(), buffer.bytes);
  }
};

// A small layer of its own, forward, and what came out.
struct Layer {
  Sizes sizes;
  std::vector<uint16_t> x, w, y;

  explicit Layer(int64_t rows, int64_t in = 8, int64_t out = 16)
      : sizes{0, mlpext::bfloat16, rows, in, out}, x(rows * in), w(out * in), y(rows * out) {
    // Small whole numbers: every result is exact.
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = i * 7 % 5 ? 0x3f80 : 0xc000;  // 1, -2
    for (std::size_t i = 0; i < w.size(); ++i) w[i] = i * 3 % 4 ? 0x4000 : 0xbf80;  // 2, -1
  }
  Outcome forward() {
    return answer(lt::forward(sizes, lt::Activation::relu, {x.data(), sizes.in_features, 1},
                              {w.data(), sizes.in_features, 1}, nullptr, y.data(), nullptr));
  }
};

// Plans for `shapes` shapes one after the other, then ten times the last one.
void cache() {
  const int64_t shapes = next();
  const auto all = buffers();
  int64_t words[3] = {};  // most plans held, heuristics for the shapes, heuristics for the repetitions
  for (int64_t rows = 1; rows <= shapes; ++rows) {
    if (Layer(rows).forward() != done) fail("not served");
    words[0] = std::max<int64_t>(words[0], lt::served_plans());
  }
  words[1] = heuristics;
  for (int i = 0; i < 10; ++i) Layer(shapes).forward();
  words[2] = heuristics - words[1];
  std::memcpy(all[0].data(), words, sizeof(words));
  std::cout.write(all[0].data(), all[0].bytes);
}

// Threads that share plans, more of them than the cache holds, and compare with what one thread got.
void together() {
  const int64_t threads = next(), shapes = next();
  const auto all = buffers();
  std::vector<Layer> expected;
  for (int64_t rows = 1; rows <= shapes; ++rows) expected.emplace_back(rows).forward();
  std::atomic<int64_t> wrong = 0;
  std::vector<std::thread> team;
  for (int64_t t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      for (int64_t i = 0; i < 2 * shapes; ++i) {
        Layer layer((i + t * shapes / threads) % shapes + 1);
        wrong += layer.forward() != done || layer.y != expected[layer.sizes.rows - 1].y;
      }
    });
  for (std::thread& thread : team) thread.join();
  const int64_t words[] = {wrong, handles};
  std::memcpy(all[0].data(), words, sizeof(words));
  std::cout.write(all[0].data(), all[0].bytes);
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string request; std::cin >> request; std::cout.flush()) {
    if (request == "cache") {
      cache();
    } else if (request == "together") {
      together();
    } else if (request == "refuse") {
      refused = static_cast<int>(next());
    } else if (request == "forward") {  // x, w, bias, y, aux
      Request r;
      r.respond(answer(lt::forward(r.sizes, r.activation, r.matrix(0), r.matrix(1), r.all[2].data(),
                                   r.all[3].data(), r.all[4].data())));
    } else if (request == "input_gradient") {  // dz, w, aux, dx, db
      Request r;
      r.respond(answer(lt::input_gradient(r.sizes, r.activation, r.matrix(0), r.matrix(1), r.all[2].data(),
                                          r.all[3].data(), r.all[4].data())));
    } else if (request == "weight_gradient") {  // dz, x, dw, db
      Request r;
      r.respond(
          answer(lt::weight_gradient(r.sizes, r.matrix(0), r.matrix(1), r.all[2].data(), r.all[3].data())));
    } else {
      return 2;
    }
  }
}
