// The standard headers that the loops use. A file for one instruction set includes them before it switches
// its target on, so that no inline function of theirs is compiled for it, then perhaps linked into code that
// runs on every machine.
#pragma once
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef MLPEXT_DEBUG
#include <cstdio>
#include <cstdlib>
#endif
