// What the kernels of rotary and rotary_qkv share: where heads lie, and the turn of eight pairs of numbers, or four.
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
template <bool kAligned, class AnyRows, class Pointer>
__device__ __forceinline__ AnyRows row_of(const Heads<Pointer>& t, int64_t sample, int head, int64_t token, int from) {
  const int64_t at = sample * t.step[0] + token * t.step[2] + head * t.step[1] + from * t.step[3];
  return {t.data + at * size_in<kAligned>(t.dtype), t.dtype, 0, t.step[3]};
}

// What a thread has of a head: 8 numbers that lie together, and in a head of halves the 8 of its second half that turn
// with them.
template <int kParts>
using Parts = float[kParts][kLanes];

// Of the columns from `column` on of each part, whose width is `span`.
template <bool kAligned, int kParts, int kWords>
__device__ __forceinline__ void load_parts(Loaded<kWords> (&out)[kParts], const Heads<const char*>& t, int64_t sample,
                                           int head, int64_t token, int column, int span) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    out[p] = load_lanes<kAligned, kWords>(row_of<kAligned, Rows>(t, sample, head, token, p * span), 0, column, span);
  }
}

template <bool kAligned, int kParts, int kWords>
__device__ __forceinline__ void to_floats(Parts<kParts>& out, const Loaded<kWords> (&in)[kParts], DType dtype) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) to_floats<kAligned>(out[p], in[p], dtype);
}

template <bool kAligned, int kParts>
__device__ __forceinline__ void store_parts(const Heads<char*>& t, int64_t sample, int head, int64_t token, int column,
                                            int span, const Parts<kParts>& values) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    store_floats<kAligned>(row_of<kAligned, OutRows>(t, sample, head, token, p * span), 0, column, span, values[p]);
  }
}

// Sines become what the other number of each pair is multiplied with.
template <int kParts>
__device__ __forceinline__ void to_factors(Parts<kParts>& sine, bool backward) {
#pragma unroll
  for (int j = 0; j < kLanes; j += kParts == 2 ? 1 : 2) {
    float &first = sine[0][j], &second = kParts == 2 ? sine[kParts - 1][j] : sine[0][j + 1];
    const float of_first = cuda::sine_factor(true, backward, first, second);
    second = cuda::sine_factor(false, backward, second, first);
    first = of_first;
  }
}

template <int kParts>
__device__ __forceinline__ void turn(Parts<kParts>& x, const Parts<kParts>& factor, const Parts<kParts>& cosine) {
#pragma unroll
  for (int j = 0; j < kLanes; j += kParts == 2 ? 1 : 2) {
    float &first = x[0][j], &second = kParts == 2 ? x[kParts - 1][j] : x[0][j + 1];
    const float turned = first * cosine[0][j] + second * factor[0][j];
    if (kParts == 2) {
      second = second * cosine[kParts - 1][j] + first * factor[kParts - 1][j];
    } else {
      second = second * cosine[0][j + 1] + first * factor[0][j + 1];
    }
    first = turned;
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
