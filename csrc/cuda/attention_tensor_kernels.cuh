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

// The first row that is wide enough.
inline const AttentionKernels& of_width(const AttentionKernels* row, int64_t width) {
  while (row->width < width) ++row;
  return *row;
}

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
  return of_width(rows, width);
}

// The same for an image of keys. What positions add to a thread's columns, and in dq the sums for the gradient of it,
// are registers too: keys come 32 at a time, and dq has one strip a warp.
template <class T, int kWidth, int kStrips, int kForwardBlocks, int kDqBlocks, int kKeyStrips, int kKeyBlocks>
constexpr AttentionKernels image_kernels_of() {
  using Forward = TensorCores<T, kWidth, 32, kStrips>;
  using Queries = TensorCores<T, kWidth, 32, 1>;
  using Keys = TensorCores<T, kWidth, 32, kKeyStrips>;
  return {kWidth, Forward::kThreads, forward_kernel<Forward, kForwardBlocks, true>(),
          dq_kernel<Queries, kDqBlocks, true>(), dkdv_kernel<Keys, kKeyBlocks, true>()};
}

template <class T>
const AttentionKernels& image_kernels(int64_t width) {
  static constexpr AttentionKernels rows[] = {
      // width, forward: strips a warp, blocks a multiprocessor; dq: blocks; dkdv: strips, blocks
      image_kernels_of<T, 32, 2, 2, 3, 2, 2>(),  image_kernels_of<T, 64, 2, 2, 3, 2, 2>(),
      image_kernels_of<T, 80, 1, 3, 2, 1, 2>(),  image_kernels_of<T, 96, 1, 2, 2, 1, 2>(),
      image_kernels_of<T, 112, 1, 2, 2, 1, 2>(), image_kernels_of<T, kWidestHead, 1, 2, 2, 1, 2>(),
  };
  return of_width(rows, width);
}

}  // namespace vk
