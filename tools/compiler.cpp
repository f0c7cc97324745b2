// Tried before anything else is compiled, by setup.py and by tools/preflight.sh: an older compiler would stop at
// the first lane of SIMD code, with a hundred lines.
#if defined(__clang__) ? __clang_major__ < 14 : __GNUC__ < 11
#error "mlpext needs GCC 11, clang 14, or newer"
#endif
#if __cplusplus < 202002L
#error "mlpext needs C++20"
#endif
