// The three kernels as table entries: on which Cores, for an image of keys or for masks, and how many of their blocks a
// multiprocessor has registers for.
#pragma once
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"

namespace vk {

template <class Cores, int kBlocks, bool kImage = false>
constexpr AttentionKernel forward_kernel() {
  return {attention_forward<Cores, kImage, kBlocks>, ForwardTiles<Cores, kImage>::total, Cores::kRows};
}

template <class Cores, int kBlocks, bool kImage = false>
constexpr AttentionKernel dq_kernel() {
  return {attention_dq<Cores, kImage, kBlocks>, QueryTiles<Cores, kImage>::total, Cores::kRows};
}

template <class Cores, int kBlocks, bool kImage = false>
constexpr AttentionKernel dkdv_kernel() {
  return {attention_dkdv<Cores, kImage, kBlocks>, KeyTiles<Cores, kImage>::total, Cores::kRows};
}

}  // namespace vk
