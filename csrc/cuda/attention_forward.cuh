// Attention forward: one block a tile of queries, over the keys tile by tile (Milakov and Gimelshein's online softmax,
// as in FlashAttention 2). Neighbouring blocks share a head, so its keys and values stay in L2.
#pragma once
#include "attention_tiles.cuh"

namespace vk {

template <class Cores>
struct ForwardTiles {  // offsets in shared memory, in bytes
  static constexpr int kMaskRow = Cores::kCols + 8;  // lanes of neighbouring rows read other banks
  static __host__ __device__ int queries(int width) { return Cores::kRows * Cores::row(width) * int(sizeof(typename Cores::T)); }
  static __host__ __device__ int keys(int width) { return Cores::kCols * Cores::row(width) * int(sizeof(typename Cores::T)); }
  static __host__ __device__ int scratch(int width) { return queries(width) + 2 * Cores::kStages * keys(width); }
  static __host__ __device__ int mask(int width) { return scratch(width) + Cores::scratch(); }
  static __host__ __device__ int total(const Attention& at) {
    const int rows = at.mask.kind == MaskKind::none ? 0 : at.mask.query == 0 ? 1 : Cores::kRows;
    return mask(at.width) + rows * kMaskRow * int(sizeof(float));
  }
};

template <class Cores, class T = typename Cores::T>
__global__ void __launch_bounds__(Cores::kThreads)
    attention_forward(const T* q, const T* k, const T* v, const void* mask, T* out, float* stats,
                      const __grid_constant__ Attention at) {
  using Tiles = ForwardTiles<Cores>;
  constexpr int kQueries = Cores::kRows, kKeys = Cores::kCols;
  extern __shared__ __align__(16) char shared[];
  const int tiles = (at.queries + kQueries - 1) / kQueries;
  const int64_t head = blockIdx.x / tiles, b = head / at.heads, h = head % at.heads;
  const int q0 = blockIdx.x % tiles * kQueries;
  const int keys = at.causal ? min(at.keys, q0 + kQueries) : at.keys;  // that some query sees

  T* const q_tile = reinterpret_cast<T*>(shared);
  float* const mask_tile = reinterpret_cast<float*>(shared + Tiles::mask(at.width));
  const Cores cores(at.width, reinterpret_cast<float*>(shared + Tiles::scratch(at.width)));
  T* const kv_tiles = reinterpret_cast<T*>(shared + Tiles::queries(at.width));
  const auto k_tile = [&](int stage) { return kv_tiles + 2 * stage * kKeys * cores.row(); };
  const auto v_tile = [&](int stage) { return k_tile(stage) + kKeys * cores.row(); };

  k += b * at.k.batch + h * at.k.head;
  v += b * at.v.batch + h * at.v.head;
  load_rows<kQueries>(cores, q_tile, q + b * at.q.batch + h * at.q.head, at.q, q0, at.queries);
  const auto load = [&](int i, int stage) {
    load_rows<kKeys>(cores, k_tile(stage), k, at.k, i * kKeys, at.keys);
    load_rows<kKeys>(cores, v_tile(stage), v, at.v, i * kKeys, at.keys);
  };

  float acc[Cores::kR][Cores::kA] = {}, top[Cores::kR], total[Cores::kR] = {};
  for (float& each : top) each = kNone;
  const auto step = [&](int i, int stage) {
    const int k0 = i * kKeys;
    if (at.mask.kind != MaskKind::none) {
      const int64_t begin = b * at.mask.batch + h * at.mask.head;
      load_mask<kQueries, kKeys, Tiles::kMaskRow, Cores::kThreads>(mask_tile, mask, begin, at, q0, k0);
      __syncthreads();
    }
    float s[Cores::kR][Cores::kC];
    cores.across(s, q_tile, k_tile(stage));
    to_scores<false, Tiles::kMaskRow>(cores, s, mask_tile, at, q0, k0);
#pragma unroll
    for (int r = 0; r < Cores::kR; ++r) {
      float now = top[r];
#pragma unroll
      for (int j = 0; j < Cores::kC; ++j) now = fmaxf(now, s[r][j]);
      now = Cores::row_max(now);
      const float base = now == kNone ? 0.0f : now;  // a row of -inf alone gives zeros, not NaN
      const float shrink = exp2_of((top[r] - base) * at.unit);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < Cores::kC; ++j) {
        s[r][j] = exp2_of((s[r][j] - base) * at.unit);
        sum += s[r][j];
      }
      top[r] = now;
      total[r] = total[r] * shrink + sum;  // of this thread's columns
#pragma unroll
      for (int j = 0; j < Cores::kA; ++j) acc[r][j] *= shrink;
    }
    cores.along(acc, s, v_tile(stage));
  };
  for_tiles<Cores::kStages>((keys + kKeys - 1) / kKeys, load, step);

  float inverse[Cores::kR];
  stats += head * 2 * at.queries;
  for (int r = 0; r < Cores::kR; ++r) {
    const float sum = Cores::row_sum(total[r]);
    const bool empty = sum == 0;  // NaN is not empty
    inverse[r] = empty ? 0.0f : 1.0f / sum;
    const int query = q0 + cores.row_of(r);
    if (query < at.queries && cores.first_of_row()) {
      stats[query] = empty ? 0.0f : top[r];
      stats[at.queries + query] = empty ? -kNone : log2_of(sum) * kLn2;
    }
  }
  cores.put(q_tile, acc, inverse);
  store_rows(cores, q_tile, out + b * at.out.batch + h * at.out.head, at.out, q0, at.queries);
}

}  // namespace vk
