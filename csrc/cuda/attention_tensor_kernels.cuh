// The kernels of a 16-bit dtype, by width in whole pieces of 16: 72 runs in 80, 88 in 96, 104 in 112.
//
// A warp reads all keys and values that come from shared memory, for each of its strips of 16 rows once if it has one,
// and then reading takes as long as multiplying. So it has two where 255 registers a thread hold what belongs to them:
// sums of 16 rows by the width each (dkdv: two sums), scores of 16 rows by as many keys as come at once (backward: and
// their gradients). Keys come 64 at a time, the more the fewer barriers, or 32, for the registers' sake and because two
// stages of 64 beside two strips and a mask would pass the 99 KiB that capabilities 8.6 and 8.9 give a block.
#pragma once
#include "cuda/attention_kernels.cuh"
#include "cuda/attention_tensor.cuh"

namespace vk {

template <class T, int kWidth, int kKeys, int kForwardStrips, int kForwardBlocks, int kStrips, int kBlocks>
constexpr AttentionKernels tensor_kernels_of() {
  using Forward = TensorCores<T, kWidth, kKeys, kForwardStrips>;
  using Backward = TensorCores<T, kWidth, 32, kStrips>;
  return {kWidth, Forward::kThreads, forward_kernel<Forward, kForwardBlocks>(), dq_kernel<Backward, kBlocks>(),
          dkdv_kernel<Backward, kBlocks>()};
}

template <class T>
const AttentionKernels& tensor_kernels(int64_t width) {
  static constexpr AttentionKernels rows[] = {
      // width, forward: keys at once, strips a warp, blocks a multiprocessor; backward: strips, blocks
      tensor_kernels_of<T, 32, 64, 2, 2, 2, 2>(),  tensor_kernels_of<T, 64, 64, 2, 2, 2, 2>(),
      tensor_kernels_of<T, 80, 32, 2, 2, 1, 3>(),  tensor_kernels_of<T, 96, 32, 2, 2, 1, 2>(),
      tensor_kernels_of<T, 112, 32, 1, 3, 1, 2>(), tensor_kernels_of<T, kWidestHead, 32, 1, 3, 1, 2>(),
  };
  const AttentionKernels* row = rows;
  while (row->width < width) ++row;
  return *row;
}

}  // namespace vk
