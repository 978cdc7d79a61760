#include "cuda/attention_kernels.cuh"
#include "cuda/attention_plain.cuh"

namespace vk {

// Tiles of 32 by 32 for all widths. In backward four of them, of 128 columns, take 66 KiB and leave room for a second
// block on every capability from 8.0 on; capability 7.5 has 64 KiB, and heads up to 112 wide (kWidestHeadTuring).
const AttentionKernels& attention_f32(int64_t) {
  static constexpr AttentionKernels kernels = attention_kernels<OrdinaryCores<32>, OrdinaryCores<32>>(kWidestHead);
  return kernels;
}

}  // namespace vk
