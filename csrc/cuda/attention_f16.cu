#include "cuda/attention_tensor_kernels.cuh"

namespace vk {

const AttentionKernels& attention_f16(int64_t width) { return tensor_kernels<__half>(width); }

}  // namespace vk
