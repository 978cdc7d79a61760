// What the kernels of rotary and rotary_qkv share: where heads lie, and the turn of eight numbers at a time.
#pragma once
#include "cuda/common.cuh"
#include "cuda/launch.h"
#include "shared/pairs.h"

namespace vk {

// [B, H, N, K], wherever its axes lie in memory; steps are 0 along axes of size 1, where one serves all.
template <class Pointer>
struct Heads {
  Pointer data;
  DType dtype;
  int64_t step[4];
};

// Columns [from, ...) of one head of one token, as a row.
template <class AnyRows, class Pointer>
__device__ __forceinline__ AnyRows row_of(const Heads<Pointer>& t, int64_t sample, int head, int64_t token, int from) {
  const int64_t at = sample * t.step[0] + head * t.step[1] + token * t.step[2] + from * t.step[3];
  return {t.data + at * size_of(t.dtype), t.dtype, 0, t.step[3]};
}

using TwoParts = float[2][kLanes];  // of a head's first half and the same of its second; else the first alone

// out = x * cos + its partner * factor; out is not x.
__device__ __forceinline__ void turn(TwoParts& out, const TwoParts& x, const TwoParts& sine, const TwoParts& cosine,
                                     bool half, bool backward) {
  if (half) {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      out[0][j] = x[0][j] * cosine[0][j] + x[1][j] * cuda::sine_factor(true, backward, sine[0][j], sine[1][j]);
      out[1][j] = x[1][j] * cosine[1][j] + x[0][j] * cuda::sine_factor(false, backward, sine[1][j], sine[0][j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      const float factor = cuda::sine_factor(j % 2 == 0, backward, sine[0][j], sine[0][j ^ 1]);
      out[0][j] = x[0][j] * cosine[0][j] + x[0][j ^ 1] * factor;
    }
  }
}

// A tensor whose axes `batch`, `head`, `token` and `column` are those of heads.
template <class Pointer>
Heads<Pointer> heads_of(const Tensor& t, int batch = 0, int head = 1, int token = 2, int column = 3) {
  const int axes[] = {batch, head, token, column};
  Heads<Pointer> out{bytes(t), dtype_of(t), {}};
  for (int i = 0; i < 4; ++i) out.step[i] = t.size(axes[i]) == 1 ? 0 : t.stride(axes[i]);
  if (t.size(column) == 1) out.step[3] = 1;
  return out;
}

template <class Pointer>
bool is_aligned(const Heads<Pointer>& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.step[3] == 1 && t.step[0] % kLanes == 0 &&
         t.step[1] % kLanes == 0 && t.step[2] % kLanes == 0;
}

}  // namespace vk
