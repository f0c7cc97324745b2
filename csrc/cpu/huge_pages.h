// Large fresh outputs. malloc maps 32 MiB and more anew each time, and filling fresh 4 KiB pages costs more
// than any arithmetic: relu of 64 MiB takes 2.1 ns a value, 0.3 in memory that is there. So large outputs
// live in huge pages, and a bounded pool keeps the memory of those that died for the next ones. The pages in
// the pool are the system's to take back whenever it needs them (MADV_FREE).
#pragma once
#include <c10/core/Allocator.h>

namespace mlpext::cpu {

// Outputs of this many bytes come from large_memory(). From 16 MiB on malloc may give memory back to the
// system at every release.
inline constexpr std::size_t large_bytes = std::size_t(16) << 20;
// Outputs of this many bytes (32 MiB, a usual L3) are written with non-temporal stores: they will not be
// found in a cache again, and so their lines need not be read before they are written.
inline constexpr std::size_t streamed_bytes = std::size_t(32) << 20;

c10::Allocator& large_memory();

// The most that the pool holds: MLPEXT_POOL_MIB, 512 if it is not set, 0 for no pool.
std::size_t pool_limit();
void set_pool_limit(std::size_t bytes);
std::size_t pool_bytes();  // what it holds

// Copies without reading the target into the cache first; any alignment.
void copy_non_temporal(const void* from, void* to, std::size_t bytes);

}  // namespace mlpext::cpu
