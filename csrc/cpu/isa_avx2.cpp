// The kernels compiled for avx2.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v3")
#define VK_ISA avx2
#define VK_VECTOR_BYTES 32
#include "isa.inc"
#endif
