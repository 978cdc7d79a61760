// The kernels compiled for avx512_bf16: avx512 with dot products of bfloat16 pairs.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define VK_ISA avx512_bf16
#define VK_VECTOR_BYTES 64
#define VK_BF16_PAIRS
#include "isa.inc"
#endif
