// What the kernels of both halves of the extension are told: dtypes, rows of an operand, activations.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define VK_BOTH __host__ __device__ __forceinline__
#else
#define VK_BOTH inline
#endif

namespace vk {

enum class DType { f32, f64, bf16, f16, boolean, u8 };
enum class Activation { gelu, gelu_tanh, quick_gelu, relu, silu };

// Rows of one operand: element (i, j) of type `dtype` at data + (i * row + j * col) * size.
struct Rows {
  const char* data;
  DType dtype;
  int64_t row, col;
};
struct OutRows {
  char* data;
  DType dtype;
  int64_t row, col;
};

VK_BOTH constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return 8;
    case DType::f32: return 4;
    case DType::bf16:
    case DType::f16: return 2;
    default: return 1;
  }
}

VK_BOTH constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace vk
