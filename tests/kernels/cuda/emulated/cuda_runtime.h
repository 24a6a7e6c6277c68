// In place of CUDA's header: what kernels name, for a CPU (emulated.h).
#pragma once
#include <emulated.h>
