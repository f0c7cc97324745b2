// Which instruction set runs: chosen once, when the kernels are first asked for.
#include <c10/util/Exception.h>

#include "cpu/kernels.h"
#include "ops/switches.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mlpext {

#if defined(__aarch64__)
namespace neon {
extern const cpu::Kernels kernels;
}
#else
namespace baseline {
extern const cpu::Kernels kernels;
}
#endif
#if defined(__x86_64__)
namespace avx2 {
extern const cpu::Kernels kernels;
}
namespace avx512 {
extern const cpu::Kernels kernels;
}
#endif

namespace cpu {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid(1, &a, &b, &c, &d);  // of F16C clang 14's builtin does not know
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (c & bit_F16C) != 0;
}
bool has_avx512() {
#ifdef MLPEXT_EMULATED_AVX512  // the tests' table: AVX2's instructions, and the same masks
  return __builtin_cpu_supports("bmi2");
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("bmi2");
#endif
}
#endif

std::vector<const Kernels*> available() {
#if defined(__aarch64__)
  return {&neon::kernels};
#else
  std::vector<const Kernels*> tables{&baseline::kernels};
#if defined(__x86_64__)
  if (has_avx2()) tables.push_back(&avx2::kernels);
  if (tables.size() == 2 && has_avx512()) tables.push_back(&avx512::kernels);
#endif
  return tables;
#endif
}

const Kernels& choose() {
  const std::vector<const Kernels*> tables = available();
  const char* wanted = cpu_isa_switch.value();
  if (!wanted || !*wanted) return *tables.back();
  std::string known;
  for (const Kernels* table : tables) {
    if (table->isa == wanted) return *table;
    known += (known.empty() ? "" : ", ") + std::string(table->isa);
  }
  TORCH_CHECK_VALUE(false, "MLPEXT_CPU_ISA: '", wanted,
                    "' is not an instruction set of this machine, expected one of ", known);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = choose();
  return table;
}

std::vector<std::string_view> available_isas() {
  std::vector<std::string_view> names;
  for (const Kernels* table : available()) names.push_back(table->isa);
  return names;
}

}  // namespace cpu
}  // namespace mlpext
