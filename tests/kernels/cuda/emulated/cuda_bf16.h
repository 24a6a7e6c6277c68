// In place of CUDA's header: brain floats (emulated.h).
#pragma once
#include <emulated.h>
