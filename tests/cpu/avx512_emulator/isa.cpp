// csrc/cpu/isa.cpp, to which the emulated table is the avx512 of every machine with AVX2.
#define MLPEXT_EMULATED_AVX512
#include "cpu/isa.cpp"
