#include "cuda/attention_tensor_kernels.cuh"

namespace vk {

const AttentionKernels& attention_rel_pos_bf16(int64_t width) { return image_kernels<__nv_bfloat16>(width); }

}  // namespace vk
