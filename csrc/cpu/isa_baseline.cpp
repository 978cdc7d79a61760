// The kernels compiled for any processor (SSE2 on x86-64, NEON on 64-bit ARM).
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define VK_ISA baseline
#define VK_VECTOR_BYTES 16
#include "isa.inc"
