#include "cuda/attention_kernels.cuh"
#include "cuda/attention_plain.cuh"

namespace vk {

// The tiles of attention_f32.cu. Backward's, 104 wide, take with positions all of capability 7.5's 64 KiB.
const AttentionKernels& attention_rel_pos_f32(int64_t) {
  using Cores = OrdinaryCores<32>;
  static constexpr AttentionKernels kernels = {kWidestHead, Cores::kThreads, forward_kernel<Cores, 3, true>(),
                                               dq_kernel<Cores, 3, true>(), dkdv_kernel<Cores, 3, true>()};
  return kernels;
}

}  // namespace vk
