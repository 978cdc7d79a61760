// What the kernels of mlp and glu_mlp share: activations eight at a time, and tiles whose columns are summed.
#pragma once
#include "cuda/common.cuh"
#include "shared/activations.h"

namespace vk {

template <Activation kind>
__device__ __forceinline__ void activate_each(const float (&h)[kLanes], float (&value)[kLanes],
                                              float (&slope)[kLanes]) {
#pragma unroll
  for (int i = 0; i < kLanes; ++i) cuda::activate_one<float, kind>(h[i], value[i], slope[i]);
}

__device__ __forceinline__ void activate_lanes(Activation kind, const float (&h)[kLanes], float (&value)[kLanes],
                                               float (&slope)[kLanes]) {
  switch (kind) {
    case Activation::gelu: return activate_each<Activation::gelu>(h, value, slope);
    case Activation::gelu_tanh: return activate_each<Activation::gelu_tanh>(h, value, slope);
    case Activation::quick_gelu: return activate_each<Activation::quick_gelu>(h, value, slope);
    case Activation::relu: return activate_each<Activation::relu>(h, value, slope);
    case Activation::silu: return activate_each<Activation::silu>(h, value, slope);
  }
}

// A warp reads 256 columns of a row, 512 bytes of a 16-bit dtype; 8 warps have a row each and go down 64 rows, which
// keeps a bias's partial sums in registers and makes their second sum a hundredth of the work.
constexpr int kTileRows = 8, kTileColumns = kWarp * kLanes;
constexpr int64_t kRowsPerPart = 64;

using TileSums = float[kTileRows][kTileColumns];

// What the threads of a block have summed down its rows, to the columns of its tile in a row of partial sums. `space` is
// free again after the next barrier.
__device__ __forceinline__ void store_sums(TileSums& space, const float (&sum)[kLanes], float* sums, int width) {
#pragma unroll
  for (int i = 0; i < kLanes; ++i) space[threadIdx.y][threadIdx.x + i * kWarp] = sum[i];  // each thread its own bank
  __syncthreads();
  const int thread = threadIdx.y * kWarp + threadIdx.x, mine = blockIdx.y * kTileColumns + thread;
  if (mine >= width) return;
  float total = 0;
#pragma unroll
  for (int row = 0; row < kTileRows; ++row) total += space[row][thread / kLanes + thread % kLanes * kWarp];
  sums[mine] = total;
}

}  // namespace vk
