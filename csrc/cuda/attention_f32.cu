#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "attention_plain.cuh"
namespace vk {
using E = float;
template __global__ void attention_forward<OrdinaryCores<32>>(const E*, const E*, const E*, const void*, E*, float*, const __grid_constant__ Attention);
template __global__ void attention_dq<OrdinaryCores<32>>(const E*, const E*, const E*, const void*, const E*, const E*, const float*, float*, E*, float*, const __grid_constant__ Attention);
template __global__ void attention_dkdv<OrdinaryCores<32>>(const E*, const E*, const E*, const void*, const E*, const float*, const float*, E*, E*, const __grid_constant__ Attention);
}
