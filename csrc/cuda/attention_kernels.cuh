// A row of the table of kernels, for Cores of the forward's and of the backward's.
#pragma once
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"

namespace vk {

template <class Forward, class Backward>
constexpr AttentionKernels attention_kernels(int width) {
  static_assert(Forward::kRows == Backward::kRows && Forward::kThreads == Backward::kThreads);
  return {width,
          Forward::kThreads,
          Forward::kRows,
          attention_forward<Forward>,
          attention_dq<Backward>,
          attention_dkdv<Backward>,
          ForwardTiles<Forward>::total,
          QueryTiles<Backward>::total,
          KeyTiles<Backward>::total};
}

}  // namespace vk
