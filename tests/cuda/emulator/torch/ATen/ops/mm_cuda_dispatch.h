#pragma once
#include <ATen/ops/mm.h>

namespace at::cuda {
using at::mm;
}
