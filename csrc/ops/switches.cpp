// Read when asked, not once at the start: a program may set a switch before the first call that asks for it.
#include "ops/switches.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace mlpext {

const char* Switch::value() const { return std::getenv(variable); }

bool Switch::is_on() const {
  const char* text = value();
  const std::string_view choice = text ? text : "0";
  TORCH_CHECK_VALUE(choice == "0" || choice == "1", variable, ": '", choice, "', expected 0 or 1");
  return choice == "1";
}

}  // namespace mlpext
