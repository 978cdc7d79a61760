#include "cuda/attention_tensor_kernels.cuh"

namespace vk {

const AttentionKernels& attention_rel_pos_f16(int64_t width) { return image_kernels<__half>(width); }

}  // namespace vk
