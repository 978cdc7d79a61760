// Tiles of shared memory: rows of a head come in by cp.async, 16 bytes at a time, and leave the same way; a mask comes
// in as float32. Rows and columns that are not there are zeros.
//
// `Cores` (attention_tensor.cuh, attention_plain.cuh) says how wide a tile's row is in memory, and who holds what.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/attention.h"

namespace vk {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kNone = -__builtin_huge_valf();  // the score of a hidden key

__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float log2_of(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ------------------------------------------------------------------------------------------------ asynchronous copies

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes, or 4, to shared memory: `from` global memory where it is `there`, else zeros.
template <int kBytes>
__device__ inline void copy(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
  const int count = there ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(count) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(count) : "memory");
  }
#else
  if constexpr (kBytes == 16) {
    *static_cast<int4*>(to) = there ? *static_cast<const int4*>(from) : int4{};
  } else {
    *static_cast<int*>(to) = there ? *static_cast<const int*>(from) : 0;
  }
#endif
}

__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// load(i, stage), then step(i, stage), for `count` tiles in turn. With two stages the next tile is on its way while one
// is computed. The one barrier a tile says both: what was copied is here, and what the next copy overwrites was read.
template <int kStages, class Load, class Step>
__device__ inline void for_tiles(int count, const Load& load, const Step& step) {
  if (kStages == 2 && count > 0) load(0, 0);
  for (int i = 0; i < count; ++i) {
    if constexpr (kStages == 1) {
      __syncthreads();
      load(i, 0);
    }
    wait_for_copies();
    __syncthreads();
    if (kStages == 2 && i + 1 < count) load(i + 1, (i + 1) % 2);
    step(i, i % kStages);
  }
  if (count == 0) {  // what was copied before has arrived all the same
    wait_for_copies();
    __syncthreads();
  }
}

// ---------------------------------------------------------------------------------------------------- rows of a head

template <class T>
union Chunk {  // what a thread moves at once
  static constexpr int kCount = 16 / sizeof(T);
  int4 all;
  T each[kCount];
  __device__ Chunk() : all{} {}
};

// Rows [begin, begin + kRows) of a head that has `count`.
template <int kRows, class Cores, class T>
__device__ inline void load_rows(const Cores& cores, T* tile, const T* head, const DeviceHeads& at, int begin,
                                 int count) {
  constexpr int kCount = Chunk<T>::kCount;
  for (int i = threadIdx.x; i < kRows * cores.chunks(); i += Cores::kThreads) {
    const int row = i / cores.chunks(), col = i % cores.chunks() * kCount;
    const bool there = begin + row < count && col < cores.width;
    T* to = tile + row * cores.row() + col;
    const T* from = head + (there ? (begin + row) * at.token + col * at.col : 0);
    if (at.aligned) {
      copy<16>(to, from, there);
    } else {
      Chunk<T> chunk;
      for (int j = 0; j < kCount; ++j) {
        if (there && col + j < cores.width) chunk.each[j] = from[j * at.col];
      }
      *reinterpret_cast<int4*>(to) = chunk.all;
    }
  }
}

// The other way, each warp the rows that are its own: nobody else has touched them.
template <class Cores, class T>
__device__ inline void store_rows(const Cores& cores, const T* tile, T* head, const DeviceHeads& at, int begin,
                                  int count) {
  constexpr int kCount = Chunk<T>::kCount, kRows = Cores::kWarpRows;
  __syncwarp();
  const int first = threadIdx.x / 32 * kRows;
  for (int i = threadIdx.x % 32; i < kRows * cores.chunks(); i += 32) {
    const int row = first + i / cores.chunks(), col = i % cores.chunks() * kCount;
    if (begin + row >= count || col >= cores.width) continue;
    Chunk<T> chunk;
    chunk.all = *reinterpret_cast<const int4*>(tile + row * cores.row() + col);
    T* to = head + (begin + row) * at.token + col * at.col;
    if (at.aligned) {
      *reinterpret_cast<int4*>(to) = chunk.all;
    } else {
      for (int j = 0; j < kCount; ++j) {
        if (col + j < cores.width) to[j * at.col] = chunk.each[j];
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------- masks, scores

__device__ inline float mask_value(const DeviceMask& mask, int64_t at) {
  switch (mask.dtype) {
    case DType::boolean: return reinterpret_cast<const uint8_t*>(mask.data)[at] ? 0.0f : kNone;
    case DType::f16: return __half2float(reinterpret_cast<const __half*>(mask.data)[at]);
    case DType::bf16: return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(mask.data)[at]);
    default: return reinterpret_cast<const float*>(mask.data)[at];
  }
}

// Bytes of the mask's tile: none, a row where all queries share it, or `queries` rows.
template <int kMaskRow>
__host__ __device__ constexpr int mask_bytes(const Attention& a, int queries) {
  return (a.mask.data == nullptr ? 0 : a.mask.query == 0 ? 1 : queries) * kMaskRow * int(sizeof(float));
}

// What is added to the scores of kQueries by kKeys, as float32 [queries or 1, kMaskRow]; all threads meet after it.
template <int kQueries, int kKeys, int kMaskRow, int kThreads>
__device__ inline void load_mask(float* tile, const Attention& a, int64_t b, int64_t h, int q0, int k0) {
  if (a.mask.data == nullptr) return;
  const int64_t begin = uint32_t(b) % a.mask.masks * a.mask.batch + h * a.mask.head;
  const int rows = a.mask.query == 0 ? 1 : kQueries;
  for (int i = threadIdx.x; i < rows * kKeys; i += kThreads) {
    const int query = i / kKeys, key = i % kKeys;
    const bool there = q0 + query < a.queries && k0 + key < a.keys;
    const int64_t at = begin + (q0 + query) * a.mask.query + (k0 + key) * a.mask.key;
    tile[query * kMaskRow + key] = there ? mask_value(a.mask, at) : 0.0f;
  }
  __syncthreads();
}

// Products of q and k to scores: times the factor, plus the mask, -inf where query q0 + i may not see key k0 + j. Rows
// of s are queries and its columns keys or, turned, the other way round. One text for all kernels: what backward
// computes anew is what forward had.
template <bool kTurned, int kMaskRow, class Cores, int kR, int kC>
__device__ inline void to_scores(const Cores& cores, float (&s)[kR][kC], const float* mask, const Attention& a,
                                 int keys, int q0, int k0) {
  constexpr int kKeys = kTurned ? Cores::kRows : Cores::kCols;
  if (a.mask.data != nullptr) {
    const int mask_row = a.mask.query == 0 ? 0 : kMaskRow;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        const int row = cores.row_of(r), col = cores.col_of(j);
        s[r][j] = fmaf(s[r][j], a.factor, kTurned ? mask[col * mask_row + row] : mask[row * mask_row + col]);
      }
    }
  } else if (a.factor != 1) {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int j = 0; j < kC; ++j) s[r][j] *= a.factor;
    }
  }
  if (k0 + kKeys <= keys && !(a.causal && k0 + kKeys - 1 > q0)) return;  // each query sees every key
#pragma unroll
  for (int r = 0; r < kR; ++r) {
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      const int row = cores.row_of(r), col = cores.col_of(j);
      const int query = q0 + (kTurned ? col : row), key = k0 + (kTurned ? row : col);
      if (key >= keys || (a.causal && key > query)) s[r][j] = kNone;
    }
  }
}

}  // namespace vk
