// The three kernels as table entries: on which Cores, and how many of their blocks a multiprocessor has registers for.
#pragma once
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"

namespace vk {

template <class Cores, int kBlocks>
constexpr AttentionKernel forward_kernel() {
  return {attention_forward<Cores, kBlocks>, ForwardTiles<Cores>::total, Cores::kRows};
}

template <class Cores, int kBlocks>
constexpr AttentionKernel dq_kernel() {
  return {attention_dq<Cores, kBlocks>, QueryTiles<Cores>::total, Cores::kRows};
}

template <class Cores, int kBlocks>
constexpr AttentionKernel dkdv_kernel() {
  return {attention_dkdv<Cores, kBlocks>, KeyTiles<Cores>::total, Cores::kRows};
}

}  // namespace vk
