// Tiles of shared memory: rows of a head come in by cp.async, 16 bytes at a time, and leave the same way; a mask comes
// in as float32. Rows and columns that are not there are zeros.
//
// `Cores` (attention_tensor.cuh, attention_plain.cuh) says how wide a tile's row is in memory, and who holds what.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention.h"

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
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(count) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(count) : "memory");
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
// is computed. The one barrier a tile says both: what was copied has arrived, and what the next copy overwrites is read.
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
}

// ---------------------------------------------------------------------------------------------------- rows of a head

template <class T>
union Chunk {  // what one thread moves at once
  static constexpr int kCount = 16 / sizeof(T);
  int4 all;
  T each[kCount];
  __device__ Chunk() : all{} {}
};

// Rows [begin, begin + kRows) of a head that has `count`.
template <int kRows, class Cores, class T>
__device__ inline void load_rows(const Cores& cores, T* tile, const T* head, const HeadsAt& at, int begin, int count) {
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
__device__ inline void store_rows(const Cores& cores, const T* tile, T* head, const HeadsAt& at, int begin, int count) {
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

// ------------------------------------------------------------------------------------------------------------- masks

__device__ inline float mask_value(const void* mask, MaskKind kind, int64_t at) {
  switch (kind) {
    case MaskKind::boolean: return static_cast<const uint8_t*>(mask)[at] ? 0.0f : kNone;
    case MaskKind::f32: return static_cast<const float*>(mask)[at];
    case MaskKind::f16: return __half2float(static_cast<const __half*>(mask)[at]);
    default: return __bfloat162float(static_cast<const __nv_bfloat16*>(mask)[at]);
  }
}

// What is added to scores of kQueries by kKeys, [queries, keys] or, where all queries share one, a row. `begin` is
// where the head's mask does.
template <int kQueries, int kKeys, int kRow, int kThreads>
__device__ inline void load_mask(float* tile, const void* mask, int64_t begin, const Attention& at, int q0, int k0) {
  const int rows = at.mask.query == 0 ? 1 : kQueries;
  for (int i = threadIdx.x; i < rows * kKeys; i += kThreads) {
    const int query = i / kKeys, key = i % kKeys;
    const bool there = q0 + query < at.queries && k0 + key < at.keys;
    const int64_t where = begin + (q0 + query) * at.mask.query + (k0 + key) * at.mask.key;
    tile[query * kRow + key] = there ? mask_value(mask, at.mask.kind, where) : 0.0f;
  }
}

// Products of q and k to scores: times the factor, plus the mask, -inf where query q0 + i may not see key k0 + j. Rows
// of s are queries and its columns keys or, turned, the other way round. One text for all kernels: what backward
// computes is what forward did, to the bit.
template <bool kTurned, int kMaskRow, class Cores, int kR, int kC>
__device__ inline void to_scores(const Cores& cores, float (&s)[kR][kC], const float* mask, const Attention& at, int q0, int k0) {
  constexpr int kKeys = kTurned ? Cores::kRows : Cores::kCols;
  if (at.mask.kind != MaskKind::none) {
    const int mask_row = at.mask.query == 0 ? 0 : kMaskRow;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        const int row = cores.row_of(r), col = cores.col_of(j);
        s[r][j] = fmaf(s[r][j], at.factor, kTurned ? mask[col * mask_row + row] : mask[row * mask_row + col]);
      }
    }
  } else if (at.factor != 1) {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int j = 0; j < kC; ++j) s[r][j] *= at.factor;
    }
  }
  if (k0 + kKeys <= at.keys && !(at.causal && k0 + kKeys - 1 > q0)) return;  // each query sees every key
#pragma unroll
  for (int r = 0; r < kR; ++r) {
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      const int row = cores.row_of(r), col = cores.col_of(j);
      const int query = q0 + (kTurned ? col : row), key = k0 + (kTurned ? row : col);
      if (key >= at.keys || (at.causal && key > query)) s[r][j] = kNone;
    }
  }
}

}  // namespace vk
