// The kernels compiled for avx512.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v4")
#define VK_ISA avx512
#define VK_VECTOR_BYTES 64
#include "isa.inc"
#endif
