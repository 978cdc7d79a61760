// The kernels compiled for amx: avx512_bf16, whose products of bfloat16 run on the matrix unit.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define VK_ISA amx
#define VK_VECTOR_BYTES 64
#define VK_BF16_PAIRS
#define VK_TILES
#include "isa.inc"
#endif
