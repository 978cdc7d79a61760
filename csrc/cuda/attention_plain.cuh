// The products of attention on the ordinary cores: float32 throughout, every capability.
//
// A thread of the 8 x 16 computes 4 rows by kCols / 16 columns of scores, and of results 4 rows by two groups of four
// columns, 64 apart: 16 bytes at a time from shared memory, and no two threads of a quarter-warp in one bank. One text
// for all widths: columns past the width are left out while running.
#pragma once
#include "cuda/attention_tiles.cuh"

namespace vk {

template <int kColumns>
struct OrdinaryCores {
  using T = float;
  static constexpr int kThreads = 128, kRows = 32, kWarpRows = 8, kCols = kColumns;
  static constexpr bool kThere = true;
  static constexpr int kStages = 1;  // arithmetic is slow enough to hide little behind it, and shared memory is short
  static constexpr int kApart = 1;  // as in TensorCores
  static constexpr int kR = 4, kC = kCols / 16, kA = 8;
  static constexpr int kScratchRow = kCols + 4;
  const int width, lane = threadIdx.x % 16, group = threadIdx.x / 16;
  float* const weights;  // [kRows, kScratchRow]; a row is written and read by the lanes that share it

  __device__ OrdinaryCores(int width, float* scratch) : width(width), weights(scratch) {}

  // Elements from one row of a tile to the next: an odd number of 16 bytes.
  static __host__ __device__ int row(int width) { return ((width + 3) / 4 | 1) * 4; }
  __device__ int row() const { return row(width); }
  static constexpr __host__ __device__ int scratch() { return kRows * kScratchRow * int(sizeof(float)); }
  __device__ int chunks() const { return (width + 3) / 4; }

  __device__ int row_of(int r) const { return group * 4 + r; }
  __device__ int col_of(int j) const { return j * 16 + lane; }
  __device__ bool first_of_row() const { return lane == 0; }

  // s = rows cols^T over the width.
  __device__ void across(float (&s)[kR][kC], const float* rows, const float* cols) const {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int j = 0; j < kC; ++j) s[r][j] = 0;
    }
    for (int d = 0; d < width; d += 4) {
      float4 a[kR], b[kC];
#pragma unroll
      for (int r = 0; r < kR; ++r) a[r] = *reinterpret_cast<const float4*>(rows + row_of(r) * row() + d);
#pragma unroll
      for (int j = 0; j < kC; ++j) b[j] = *reinterpret_cast<const float4*>(cols + col_of(j) * row() + d);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
#pragma unroll
        for (int j = 0; j < kC; ++j) {
          s[r][j] = fmaf(a[r].x, b[j].x, s[r][j]);
          s[r][j] = fmaf(a[r].y, b[j].y, s[r][j]);
          s[r][j] = fmaf(a[r].z, b[j].z, s[r][j]);
          s[r][j] = fmaf(a[r].w, b[j].w, s[r][j]);
        }
      }
    }
  }

  // acc += p tile; a row of the tile for each column of p.
  __device__ void along(float (&acc)[kR][kA], const float (&p)[kR][kC], const float* tile) const {
    __syncwarp();  // the weights before these are read
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int j = 0; j < kC; ++j) weights[row_of(r) * kScratchRow + col_of(j)] = p[r][j];
    }
    __syncwarp();
    for (int n = 0; n < kCols; n += 4) {
      float4 a[kR];
#pragma unroll
      for (int r = 0; r < kR; ++r) a[r] = *reinterpret_cast<const float4*>(weights + row_of(r) * kScratchRow + n);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int col = half * 64 + lane * 4;
        if (col >= width) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float4 b = *reinterpret_cast<const float4*>(tile + (n + i) * row() + col);
#pragma unroll
          for (int r = 0; r < kR; ++r) {
            const float w = i == 0 ? a[r].x : i == 1 ? a[r].y : i == 2 ? a[r].z : a[r].w;
            acc[r][half * 4] = fmaf(w, b.x, acc[r][half * 4]);
            acc[r][half * 4 + 1] = fmaf(w, b.y, acc[r][half * 4 + 1]);
            acc[r][half * 4 + 2] = fmaf(w, b.z, acc[r][half * 4 + 2]);
            acc[r][half * 4 + 3] = fmaf(w, b.w, acc[r][half * 4 + 3]);
          }
        }
      }
    }
  }

  // This thread's part of a row of a times the same row of b.
  __device__ float row_dot(int r, const float* a, const float* b) const {
    float sum = 0;
    for (int col = lane * 4; col < width; col += 64) {
      const float4 x = *reinterpret_cast<const float4*>(a + row_of(r) * row() + col);
      const float4 y = *reinterpret_cast<const float4*>(b + row_of(r) * row() + col);
      sum += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
    }
    return sum;
  }

  // acc, each row times its factor, to the rows of a tile that only this warp reads.
  __device__ void put(float* tile, const float (&acc)[kR][kA], const float (&factor)[kR]) const {
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int col = half * 64 + lane * 4;
        if (col >= width) continue;
        const float* each = acc[r] + half * 4;
        *reinterpret_cast<float4*>(tile + row_of(r) * row() + col) =
            make_float4(each[0] * factor[r], each[1] * factor[r], each[2] * factor[r], each[3] * factor[r]);
      }
    }
  }

  // Over the sixteen lanes that share a row; each gets the result.
  __device__ static float row_max(float x) {
    for (int step = 1; step < 16; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
  }
  __device__ static float row_sum(float x) {
    for (int step = 1; step < 16; step *= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
  }
};

}  // namespace vk
