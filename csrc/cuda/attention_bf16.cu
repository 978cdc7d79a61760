#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "attention_tensor.cuh"
namespace vk {
using E = __nv_bfloat16;
#define INST(W, F, B) \
template __global__ void attention_forward<TensorCores<E, W, F>>(const E*, const E*, const E*, const void*, E*, float*, const __grid_constant__ Attention); \
template __global__ void attention_dq<TensorCores<E, W, B>>(const E*, const E*, const E*, const void*, const E*, const E*, const float*, float*, E*, float*, const __grid_constant__ Attention); \
template __global__ void attention_dkdv<TensorCores<E, W, B>>(const E*, const E*, const E*, const void*, const E*, const float*, const float*, E*, E*, const __grid_constant__ Attention);
INST(32, 64, 64)
INST(64, 64, 64)
INST(80, 64, 32)
INST(96, 64, 32)
INST(112, 32, 32)
INST(128, 32, 32)
}
