// The products of attention on tensor cores: float16 or bfloat16 operands, float32 sums, from capability 8.0 on.
//
// mma.sync m16n8k16 multiplies A [16, 16] by B [16, 8]. Lane 4 g + c of a warp holds, of an 8x8 piece of an operand,
// row g and columns 2c and 2c + 1 in one register, and of C [16, 8] rows g and g + 8, columns 2c and 2c + 1. So C of
// one product, rounded, is A of the next where it lies: weights never go through memory.
#pragma once
#include <type_traits>

#include "cuda/attention_tiles.cuh"

namespace vk {

// Four 8x8 pieces from shared memory, each from the eight rows that eight lanes point at; `turned` gives transposes.
template <bool kTurned>
__device__ inline void load_pieces(uint32_t (&piece)[4], const void* row) {
  const uint32_t at = shared_address(row);
  if constexpr (kTurned) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece[0]), "=r"(piece[1]), "=r"(piece[2]), "=r"(piece[3]) : "r"(at) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece[0]), "=r"(piece[1]), "=r"(piece[2]), "=r"(piece[3]) : "r"(at) : "memory");
  }
}

// C += A B; upper and lower are rows g and g + 8 of C.
template <class T>
__device__ inline void multiply(float* upper, float* lower, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(upper[0]), "+f"(upper[1]), "+f"(lower[0]), "+f"(lower[1])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(upper[0]), "+f"(upper[1]), "+f"(lower[0]), "+f"(lower[1])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <class T>
__device__ inline uint32_t packed(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <class T>
__device__ inline float2 unpacked(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  } else {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  }
}

// Four warps, each kStrips times 16 rows of a tile; kWidth is a head's width in whole pieces of 16, zeros past it.
template <class Element, int kWidth, int kColumns, int kStrips>
struct TensorCores {
  using T = Element;
  static constexpr int kThreads = 128, kWarpRows = 16 * kStrips, kRows = 4 * kWarpRows, kCols = kColumns;
  static constexpr int kStages = 2;
  static constexpr int kApart = 4;  // more numbers in a row that is read down its columns: so lanes find other banks
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr bool kThere = false;  // and every call is declined
#else
  static constexpr bool kThere = true;
#endif
  static constexpr int kR = 2 * kStrips, kC = kCols / 4, kA = kWidth / 4;  // a thread's rows, scores, results
  const int width, lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  __device__ TensorCores(int width, float*) : width(width) {}

  // A row of a tile in memory has 16 bytes more than its elements: an odd number of 16 bytes from one row to the next
  // brings the eight rows of a piece to different banks.
  static constexpr __host__ __device__ int row(int = kWidth) { return kWidth + 8; }
  static constexpr __host__ __device__ int scratch() { return 0; }
  static constexpr __device__ int chunks() { return kWidth / 8; }

  __device__ int row_of(int r) const { return warp * kWarpRows + r / 2 * 16 + r % 2 * 8 + lane / 4; }
  __device__ int col_of(int j) const { return j / 2 * 8 + j % 2 + lane % 4 * 2; }
  __device__ bool first_of_row() const { return lane % 4 == 0; }

  // s = rows cols^T over the width.
  __device__ void across(float (&s)[kR][kC], const T* rows, const T* cols) const {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int j = 0; j < kC; ++j) s[r][j] = 0;
    }
    const T* const a_row = rows + (warp * kWarpRows + lane % 16) * row() + lane / 16 * 8;
    const T* const b_row = cols + (lane % 8 + lane / 16 * 8) * row() + lane / 8 % 2 * 8;
#pragma unroll
    for (int d = 0; d < kWidth; d += 16) {
      uint32_t a[kStrips][4];
#pragma unroll
      for (int m = 0; m < kStrips; ++m) load_pieces<false>(a[m], a_row + m * 16 * row() + d);
#pragma unroll
      for (int n = 0; n < kCols; n += 16) {
        uint32_t b[4];
        load_pieces<false>(b, b_row + n * row() + d);
#pragma unroll
        for (int m = 0; m < kStrips; ++m) {
          float *upper = s[2 * m] + n / 4, *lower = s[2 * m + 1] + n / 4;
          multiply<T>(upper, lower, a[m], b[0], b[1]);
          multiply<T>(upper + 2, lower + 2, a[m], b[2], b[3]);
        }
      }
    }
  }

  // acc += p tile, p rounded to T; a row of the tile for each column of p.
  __device__ void along(float (&acc)[kR][kA], const float (&p)[kR][kC], const T* tile) const {
    const T* const b_row = tile + lane % 16 * row() + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < kCols; n += 16) {
      uint32_t a[kStrips][4];
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
        const float *upper = p[2 * m] + n / 4, *lower = p[2 * m + 1] + n / 4;
        a[m][0] = packed<T>(upper[0], upper[1]);
        a[m][1] = packed<T>(lower[0], lower[1]);
        a[m][2] = packed<T>(upper[2], upper[3]);
        a[m][3] = packed<T>(lower[2], lower[3]);
      }
#pragma unroll
      for (int d = 0; d < kWidth; d += 16) {
        uint32_t b[4];
        load_pieces<true>(b, b_row + n * row() + d);
#pragma unroll
        for (int m = 0; m < kStrips; ++m) {
          float *upper = acc[2 * m] + d / 4, *lower = acc[2 * m + 1] + d / 4;
          multiply<T>(upper, lower, a[m], b[0], b[1]);
          multiply<T>(upper + 2, lower + 2, a[m], b[2], b[3]);
        }
      }
    }
  }

  // This thread's part of a row of a times the same row of b.
  __device__ float row_dot(int r, const T* a, const T* b) const {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kA; j += 2) {
      const int at = row_of(r) * row() + col_of(j);
      const float2 x = unpacked<T>(*reinterpret_cast<const uint32_t*>(a + at));
      const float2 y = unpacked<T>(*reinterpret_cast<const uint32_t*>(b + at));
      sum += x.x * y.x + x.y * y.y;
    }
    return sum;
  }

  // acc, each row times its factor, to the rows of a tile that only this warp reads.
  __device__ void put(T* tile, const float (&acc)[kR][kA], const float (&factor)[kR]) const {
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int j = 0; j < kA; j += 2) {
        const uint32_t pair = packed<T>(acc[r][j] * factor[r], acc[r][j + 1] * factor[r]);
        *reinterpret_cast<uint32_t*>(tile + row_of(r) * row() + col_of(j)) = pair;
      }
    }
  }

  // Over the four lanes that share a row; each gets the result.
  __device__ static float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  }
  __device__ static float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }
};

}  // namespace vk
