// The pool behind huge_pages.h: freed memory by size, the youngest handed out first, the oldest unmapped once
// more than the limit is held. Every block is a mapping of its own, so giving one back is one munmap.
#include "cpu/huge_pages.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <deque>
#include <mutex>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "ops/switches.h"

namespace mlpext::cpu {
namespace {

#if defined(__linux__)

constexpr std::size_t huge_page = std::size_t(2) << 20;

// Memory of whole huge pages, on a huge page's boundary; null if there is none.
void* map_pages(std::size_t bytes) {
  void* mapped = mmap(nullptr, bytes + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* start = static_cast<char*>(mapped);
  const std::size_t before = -reinterpret_cast<std::uintptr_t>(start) % huge_page;
  if (before > 0) munmap(start, before);
  munmap(start + before + bytes, huge_page - before);
  madvise(start + before, bytes, MADV_HUGEPAGE);
  return start + before;
}

std::size_t limit_from_environment() {
  const char* text = pool_switch.value();
  std::size_t mib = 512;
  if (text) {
    const char* end = text + std::strlen(text);
    const auto [rest, error] = std::from_chars(text, end, mib);
    TORCH_CHECK_VALUE(error == std::errc() && rest == end && mib < (std::size_t(1) << 40),
                      "MLPEXT_POOL_MIB='", text, "' is not a whole number of MiB (0: no pool)");
  }
  return mib << 20;
}

// torch's allocator interface: a tensor made with it frees its memory through release(), from whatever thread
// it dies in. One mutex guards all of it.
class LargeMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    const std::size_t size = std::max((bytes + huge_page - 1) / huge_page, std::size_t(1)) * huge_page;
    void* data = take(size);
    if (!data) {
      trim(0);
      data = map_pages(size);
    }
    if (!data) {
      c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
      TORCH_CHECK(false, "mlpext: can't allocate memory: you tried to allocate ", bytes, " bytes");
    }
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  std::size_t limit() {
    const std::lock_guard lock(mutex_);
    return limit_;
  }
  void set_limit(std::size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      limit_ = bytes;
    }
    trim(bytes);
  }
  std::size_t held() {
    const std::lock_guard lock(mutex_);
    return held_;
  }

 private:
  struct Block {
    void* data;
    std::size_t size;
  };

  // From the pool, or fresh.
  void* take(std::size_t size) {
    void* data = nullptr;
    {
      const std::lock_guard lock(mutex_);
      // The youngest first: its pages are the likeliest to be there.
      const auto found = std::find_if(pool_.rbegin(), pool_.rend(), [&](Block b) { return b.size == size; });
      if (found != pool_.rend()) {
        data = found->data;
        held_ -= size;
        pool_.erase(std::next(found).base());
      }
    }
    if (!data) data = map_pages(size);
    if (data) {
      const std::lock_guard lock(mutex_);
      sizes_[data] = size;
    }
    return data;
  }

  static void release(void* data);

  void give(void* data) {
    std::size_t size;
    {
      const std::lock_guard lock(mutex_);
      const auto found = sizes_.find(data);
      size = found->second;
      sizes_.erase(found);
    }
    if (size > limit()) {
      munmap(data, size);
      return;
    }
    // The system may take the pages from now on; if it does not, the next output finds them mapped. The
    // memory must not be read between, and is not: a fresh output is written first.
    madvise(data, size, MADV_FREE);
    {
      const std::lock_guard lock(mutex_);
      pool_.push_back({data, size});
      held_ += size;
    }
    trim(limit());
  }

  // The oldest go until no more than `bytes` are held.
  void trim(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    while (held_ > bytes) {
      const Block oldest = pool_.front();
      pool_.pop_front();
      held_ -= oldest.size;
      munmap(oldest.data, oldest.size);
    }
  }

  std::mutex mutex_;
  std::deque<Block> pool_;
  std::unordered_map<void*, std::size_t> sizes_;  // of what is in use
  std::size_t held_ = 0, limit_ = limit_from_environment();
};

// Never destroyed: tensors may die after the statics of this library.
LargeMemory& the_memory() {
  static LargeMemory& memory = *new LargeMemory;
  return memory;
}

void LargeMemory::release(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  the_memory().give(data);
}

#endif

}  // namespace

#if defined(__linux__)
c10::Allocator& large_memory() { return the_memory(); }
std::size_t pool_limit() { return the_memory().limit(); }
void set_pool_limit(std::size_t bytes) { the_memory().set_limit(bytes); }
std::size_t pool_bytes() { return the_memory().held(); }
#else
c10::Allocator& large_memory() { return *c10::GetCPUAllocator(); }
std::size_t pool_limit() { return 0; }
void set_pool_limit(std::size_t) {}
std::size_t pool_bytes() { return 0; }
#endif

void copy_non_temporal(const void* from_, void* to_, std::size_t bytes) {
#if defined(__SSE2__)
  const char* from = static_cast<const char*>(from_);
  char* to = static_cast<char*>(to_);
  const std::size_t before = std::min(-reinterpret_cast<std::uintptr_t>(to) % 64, bytes);
  std::memcpy(to, from, before);
  std::size_t i = before;
  for (; i + 64 <= bytes; i += 64)
    for (std::size_t j = i; j < i + 64; j += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
  std::memcpy(to + i, from + i, bytes - i);
  _mm_sfence();
#else
  std::memcpy(to_, from_, bytes);
#endif
}

}  // namespace mlpext::cpu
