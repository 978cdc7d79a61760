// What kernels share: elements of any dtype as float, eight at a time, and sums over warps and blocks. Nothing here
// knows torch.
//
// A row may be of any of the dtypes, told at run time: all threads of a launch take the same way, and kernels that wait
// for memory have time for it. Eight elements are what a thread takes at once: one access of 16 bytes in 16-bit dtypes,
// two in float32, where the row is packed and aligned (kAligned); one by one otherwise, by the same threads.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "shared/types.h"

// what shared/activations.h and shared/pairs.h are compiled as
#define VK_ISA cuda
#define VK_INLINE __device__ __forceinline__

namespace vk {
namespace cuda {

VK_INLINE float vexp(float x) { return __expf(x); }

}  // namespace cuda

constexpr int kWarp = 32;
constexpr int kLanes = 8;  // elements a thread takes at once

// ------------------------------------------------------------------------------------------------- one element

__device__ __forceinline__ float load(const char* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f32: return reinterpret_cast<const float*>(data)[at];
    case DType::bf16: return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data)[at]);
    case DType::f16: return __half2float(reinterpret_cast<const __half*>(data)[at]);
    default: return float(reinterpret_cast<const uint8_t*>(data)[at]);
  }
}

__device__ __forceinline__ void store(char* data, DType dtype, int64_t at, float value) {
  switch (dtype) {
    case DType::bf16: reinterpret_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(value); return;
    case DType::f16: reinterpret_cast<__half*>(data)[at] = __float2half_rn(value); return;
    default: reinterpret_cast<float*>(data)[at] = value;
  }
}

// ------------------------------------------------------------------------------------------------ eight elements

// Elements as they were loaded: words of memory, not yet numbers. Which numbers they are is a branch on the dtype, and
// no load moves past a branch that waits for another: so kernels load all that they can before they ask for the first
// number. kWords is 1 where all such rows are of 16-bit dtypes, for half the registers.
template <int kWords = 2>
struct Loaded {
  uint4 words[kWords];
};

// Bytes of an element; rows that are read in 16 bytes are of no 8-bit dtype.
template <bool kAligned, int kWords = 2>
__device__ __forceinline__ int size_in(DType dtype) {
  return kWords == 1 ? 2 : kAligned ? (dtype == DType::f32 ? 4 : 2) : int(size_of(dtype));
}

// One row alone, from whose address on columns are small numbers: the product of 64 bits is taken once.
template <bool kAligned, int kWords = 2, class AnyRows>
__device__ __forceinline__ AnyRows at_row(AnyRows r, int64_t row) {
  r.data += row * r.row * size_in<kAligned, kWords>(r.dtype);
  return r;
}

// Whether element `i` of those at `column` is one: all 8 are, or none, in aligned rows.
template <bool kAligned>
__device__ __forceinline__ bool is_inside(int column, int i, int width) {
  return column + (kAligned ? 0 : i) < width;
}

__device__ __forceinline__ int64_t offset(const Rows& r, int64_t row, int64_t column) {
  return row * r.row + column * r.col;
}

// Elements [column, column + 8) of a row, zeros from `width` on.
template <bool kAligned, int kWords = 2>
__device__ __forceinline__ Loaded<kWords> load_lanes(const Rows& r, int64_t row, int column, int width) {
  static_assert(kAligned || kWords == 2, "element by element each takes a word of 32 bits");
  Loaded<kWords> out{};
  if constexpr (kAligned) {
    if (column >= width) return out;
    const int64_t at = (row * r.row + column) * size_in<true, kWords>(r.dtype);
    const uint4* from = reinterpret_cast<const uint4*>(r.data + at);
    out.words[0] = from[0];
    if constexpr (kWords == 2) {
      if (r.dtype == DType::f32) out.words[1] = from[1];
    }
  } else {
    float* values = reinterpret_cast<float*>(out.words);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      if (column + i < width) values[i] = load(r.data, r.dtype, offset(r, row, column + i));
    }
  }
  return out;
}

template <bool kAligned, int kWords>
__device__ __forceinline__ void to_floats(float (&out)[kLanes], const Loaded<kWords>& in, DType dtype) {
  const uint4 &low = in.words[0], &high = in.words[kWords - 1];
  const uint32_t words[kLanes] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (!kAligned || (kWords == 2 && dtype == DType::f32)) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) out[i] = __uint_as_float(words[i]);
  } else if (dtype == DType::bf16) {  // float32's upper half
#pragma unroll
    for (int i = 0; i < kLanes; i += 2) {
      out[i] = __uint_as_float(words[i / 2] << 16);
      out[i + 1] = __uint_as_float(words[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLanes; i += 2) {
      const __half2_raw raw{static_cast<unsigned short>(words[i / 2] & 0xffffu),
                            static_cast<unsigned short>(words[i / 2] >> 16)};
      const float2 pair = __half22float2(__half2(raw));
      out[i] = pair.x;
      out[i + 1] = pair.y;
    }
  }
}

template <bool kAligned>
__device__ __forceinline__ void load_floats(float (&out)[kLanes], const Rows& r, int64_t row, int column, int width) {
  to_floats<kAligned>(out, load_lanes<kAligned>(r, row, column, width), r.dtype);
}

// As they are stored where rows are aligned.
template <int kWords = 2>
__device__ __forceinline__ Loaded<kWords> to_words(const float (&values)[kLanes], DType dtype) {
  uint32_t words[kLanes] = {};
  if (kWords == 2 && dtype == DType::f32) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) words[i] = __float_as_uint(values[i]);
  } else if (dtype == DType::bf16) {
#pragma unroll
    for (int i = 0; i < kLanes; i += 2) {
      const __nv_bfloat162_raw pair = __floats2bfloat162_rn(values[i], values[i + 1]);
      words[i / 2] = pair.x | uint32_t(pair.y) << 16;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLanes; i += 2) {
      const __half2_raw pair = __floats2half2_rn(values[i], values[i + 1]);
      words[i / 2] = pair.x | uint32_t(pair.y) << 16;
    }
  }
  Loaded<kWords> out;
  out.words[kWords - 1] = {words[4], words[5], words[6], words[7]};
  out.words[0] = {words[0], words[1], words[2], words[3]};
  return out;
}

// Numbers as they are once stored.
template <int kWords>
__device__ __forceinline__ void round_floats(float (&values)[kLanes], DType dtype) {
  if (kWords == 1 || dtype != DType::f32) to_floats<true>(values, to_words<1>(values, dtype), dtype);
}

template <bool kAligned, int kWords = 2>
__device__ __forceinline__ void store_floats(const OutRows& r, int64_t row, int column, int width,
                                             const float (&values)[kLanes]) {
  if constexpr (kAligned) {
    if (column >= width) return;
    uint4* to = reinterpret_cast<uint4*>(r.data + (row * r.row + column) * size_in<true, kWords>(r.dtype));
    const Loaded<kWords> words = to_words<kWords>(values, r.dtype);
    to[0] = words.words[0];
    if constexpr (kWords == 2) {
      if (r.dtype == DType::f32) to[1] = words.words[1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      if (column + i < width) store(r.data, r.dtype, row * r.row + (column + i) * r.col, values[i]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- sums

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// Two sums at once, over all threads of a block with an x axis alone; `space` is one pair a warp, and free again after
// the next barrier.
__device__ __forceinline__ float2 block_sum(float2 value, float2* space) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  value = {warp_sum(value.x), warp_sum(value.y)};
  if (threadIdx.x % kWarp == 0) space[warp] = value;
  __syncthreads();
  float2 sum = space[0];
#pragma unroll 2
  for (int i = 1; i < warps; ++i) {
    sum.x += space[i].x;
    sum.y += space[i].y;
  }
  return sum;
}

}  // namespace vk
