// The kernels of a 16-bit dtype, by width in whole pieces of 16: 72 runs in 80, 88 in 96, 104 in 112.
//
// Four warps with 16 rows each: what a warp holds of a product are 16 rows by the width, in backward twice (dk and dv),
// and registers of a thread end at 255. Keys (in dkdv queries) come 64 at a time, the more the fewer barriers; 32 where
// 64, in two stages and with a mask, would not fit the 99 KiB of shared memory that capabilities 8.6 and 8.9 give a
// block (widths from 112 on), and all through backward, where scores and their gradients share the registers with sums.
#pragma once
#include "cuda/attention_kernels.cuh"
#include "cuda/attention_tensor.cuh"

namespace vk {

template <class T, int kWidth, int kKeys>
constexpr AttentionKernels tensor_kernels() {
  return attention_kernels<TensorCores<T, kWidth, kKeys>, TensorCores<T, kWidth, 32>>(kWidth);
}

template <class T>
const AttentionKernels& tensor_kernels_for(int64_t width) {
  static constexpr AttentionKernels rows[] = {
      tensor_kernels<T, 32, 64>(), tensor_kernels<T, 64, 64>(),  tensor_kernels<T, 80, 64>(),
      tensor_kernels<T, 96, 64>(), tensor_kernels<T, 112, 32>(), tensor_kernels<T, kWidestHead, 32>(),
  };
  const AttentionKernels* row = rows;
  while (row->width < width) ++row;
  return *row;
}

}  // namespace vk
