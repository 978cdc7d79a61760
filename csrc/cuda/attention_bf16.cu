#include "cuda/attention_tensor_kernels.cuh"

namespace vk {

const AttentionKernels& attention_bf16(int64_t width) { return tensor_kernels<__nv_bfloat16>(width); }

}  // namespace vk
