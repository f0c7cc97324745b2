// How tests ask: words on standard input, then the bytes of each buffer; afterwards the bytes of every buffer
// on standard output. A buffer is an allocation of its own that ends where the data ends; it starts `offset`
// bytes behind an address that malloc returns.
#pragma once
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

template <class T = int64_t> T next() {
  T value{};
  if (!(std::cin >> value)) std::exit(2);
  return value;
}

struct Buffer {
  std::size_t bytes = next<std::size_t>(), offset = next<std::size_t>();
  std::unique_ptr<char, decltype(&std::free)> memory{static_cast<char*>(std::malloc(bytes + offset)),
                                                     &std::free};
  char* data() const { return bytes ? memory.get() + offset : nullptr; }
};

// The buffers that the request announces, filled.
inline std::vector<Buffer> buffers() {
  std::vector<Buffer> all;
  for (auto count = next(); count > 0; --count) all.emplace_back();
  std::cin.get();
  for (const Buffer& buffer : all) std::cin.read(buffer.data(), buffer.bytes);
  return all;
}

}  // namespace emulator
