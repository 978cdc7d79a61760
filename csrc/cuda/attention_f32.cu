#include "cuda/attention_kernels.cuh"
#include "cuda/attention_plain.cuh"

namespace vk {

// Tiles of 32 by 32 for all widths: backward's four, 128 wide, take 66 KiB beside scratch and a mask. Capability 7.5
// has 64 KiB and serves heads up to 104 wide (ext_cuda.py).
const AttentionKernels& attention_f32(int64_t) {
  using Cores = OrdinaryCores<32>;
  static constexpr AttentionKernels kernels = {kWidestHead, Cores::kThreads, forward_kernel<Cores, 3>(),
                                               dq_kernel<Cores, 3>(), dkdv_kernel<Cores, 3>()};
  return kernels;
}

}  // namespace vk
