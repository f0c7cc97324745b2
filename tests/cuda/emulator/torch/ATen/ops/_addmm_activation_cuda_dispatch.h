#pragma once
#include <ATen/ops/_addmm_activation.h>

namespace at::cuda {
using at::_addmm_activation;
}
