// What the operators must know of an activation at run time, read off the structs of activations.h: its name,
// parameters and traits as a table, its index by type, and a call with the struct of an index.
#pragma once
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>

#include "formulas/activations.h"

namespace mlpext {

struct ActivationInfo {
  std::string_view name;
  std::span<const Param> params;
  bool keeps_output;
  bool output_too_coarse_in_16bit;
  bool rounds_params;
  bool has_derivative_from_output;
  bool (*has_kernel)(const double* params);
  bool (*output_suffices)(const double* params);
};

// The struct A with its parameters filled in, in order.
template <class A> MLPEXT_FORMULA constexpr A with_params(const double* params) {
  return [&]<std::size_t... I>(std::index_sequence<I...>) {
    return A{{}, params[I]...};
  }(std::make_index_sequence<A::params.size()>());
}

// Calls run(f) with the activation of that index, found by halves: in five branches.
template <int first = 0, int last = activation_count, class Run>
MLPEXT_FORMULA void with_activation(int index, const double* params, const Run& run) {
  constexpr int middle = (first + last) / 2;
  if constexpr (last - first == 1) run(with_params<std::tuple_element_t<first, Activations>>(params));
  else if (index < middle) with_activation<first, middle>(index, params, run);
  else with_activation<middle, last>(index, params, run);
}

template <class... A> constexpr std::array<ActivationInfo, sizeof...(A)> activation_table(std::tuple<A...>*) {
  return {ActivationInfo{
      A::name,
      A::params,
      A::keeps_output,
      A::output_too_coarse_in_16bit,
      A::rounds_params,
      HasDerivativeFromOutput<A>,
      [](const double* params) {
        for (const double param : std::span<const double>(params, A::params.size()))
          if (param - param != 0) return false;  // infinite or NaN
        return with_params<A>(params).has_kernel();
      },
      [](const double* params) {
        return HasDerivativeFromOutput<A> && with_params<A>(params).output_suffices();
      },
  }...};
}

// The place of A in the list.
template <class A, class... Others> constexpr std::size_t place_in(std::tuple<Others...>*) {
  std::size_t place = 0;
  static_cast<void>(((std::is_same_v<A, Others> || (++place, false)) || ...));
  return place;
}
template <class A> inline constexpr std::size_t index_of = place_in<A>(static_cast<Activations*>(nullptr));

inline constexpr auto activation_infos = activation_table(static_cast<Activations*>(nullptr));

}  // namespace mlpext
