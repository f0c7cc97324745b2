// Every environment variable that the package reads at run time; `python -m mlpext info` prints
// them. (Those of the build are at the head of setup.py.)
#pragma once
#include <array>

namespace mlpext {

struct Switch {
  const char* variable;
  const char* meaning;

  // What the environment says now; null where it is not set.
  const char* value() const;
  // Of a switch that takes 0 or 1, 0 where it is not set; refuses anything else.
  bool is_on() const;
};

inline constexpr Switch cpu_isa_switch{
    "MLPEXT_CPU_ISA",
    "baseline, avx2, avx512, or neon on ARM: the instruction set to run (the best of this machine)"};
inline constexpr Switch choices_switch{
    "MLPEXT_TUNE",
    "which of torch's operators run in the place of the package's: none (0), or by a file of `mlpext tune` "
    "(the table of this CPU)"};
inline constexpr Switch pool_switch{
    "MLPEXT_POOL_MIB",
    "MiB of freed outputs of 16 MiB and more that are kept for the next ones (512; 0: none)"};
inline constexpr Switch narrow_switch{
    "MLPEXT_CUDA_NARROW", "1: networks of at most 128 wide as one CUDA kernel; never run on a GPU (0)"};

inline constexpr std::array switches{cpu_isa_switch, choices_switch, pool_switch, narrow_switch};

}  // namespace mlpext
