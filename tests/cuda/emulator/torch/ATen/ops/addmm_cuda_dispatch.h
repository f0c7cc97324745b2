#pragma once
#include <ATen/ops/addmm.h>

namespace at::cuda {
using at::addmm;
}
