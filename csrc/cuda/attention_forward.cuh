// Attention forward: one block a tile of queries, over the keys tile by tile with a running maximum and sum, as in
// FlashAttention 2 (Dao 2023). Neighbouring blocks share a head, so its keys and values stay in L2.
#pragma once
#include "cuda/attention_image.cuh"
#include "cuda/attention_tiles.cuh"

namespace vk {

template <class Cores, bool kImage>
struct ForwardTiles {  // offsets in shared memory, in bytes: queries; keys and values of each stage; scratch; a mask or
                       // positions
  static constexpr int kMaskRow = Cores::kCols + 8;  // lanes that read neighbouring rows at once find other banks
  static __host__ __device__ int coming(int width) {
    return Cores::kRows * Cores::row(width) * int(sizeof(typename Cores::T));
  }
  static __host__ __device__ int scratch(int width) {
    return coming(width) + Cores::kStages * 2 * Cores::kCols * Cores::row(width) * int(sizeof(typename Cores::T));
  }
  static __host__ __device__ int mask(int width) { return scratch(width) + Cores::scratch(); }
  static int total(const Attention& a) {
    return mask(a.width) + (kImage ? QueryPositions<Cores>::kBytes : mask_bytes<kMaskRow>(a, Cores::kRows));
  }
};

template <class Cores, bool kImage, int kBlocks>
__global__ void __launch_bounds__(Cores::kThreads, kBlocks) attention_forward(const __grid_constant__ Attention a) {
  if (!Cores::kThere) return;
  using T = typename Cores::T;
  using Tiles = ForwardTiles<Cores, kImage>;
  constexpr int kQueries = Cores::kRows, kKeys = Cores::kCols;
  extern __shared__ __align__(16) char shared[];
  const int tiles = (a.queries + kQueries - 1) / kQueries;
  const int head = blockIdx.x / tiles, b = head / a.heads, h = head % a.heads;
  const int q0 = blockIdx.x % tiles * kQueries;
  const Span span = a.span(b);
  if (q0 >= span.queries) return;  // others are longer
  const int keys = a.causal ? min(span.keys, q0 + kQueries) : span.keys;  // that some query sees

  const Cores cores(a.width, reinterpret_cast<float*>(shared + Tiles::scratch(a.width)));
  float* const mask_tile = reinterpret_cast<float*>(shared + Tiles::mask(a.width));
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const coming = reinterpret_cast<T*>(shared + Tiles::coming(a.width));
  const auto k_tile = [&](int stage) { return coming + 2 * stage * kKeys * cores.row(); };
  const auto v_tile = [&](int stage) { return k_tile(stage) + kKeys * cores.row(); };

  load_rows<kQueries>(cores, q_tile, a.q.of<T>(span.q, h), a.q, q0, span.queries);
  const T *const k = a.k.of<T>(span.k, h / a.group), *const v = a.v.of<T>(span.k, h / a.group);
  const auto load = [&](int begin, int end, int stage) {
    load_rows<kKeys>(cores, k_tile(stage), k, a.k, begin, end);
    load_rows<kKeys>(cores, v_tile(stage), v, a.v, begin, end);
  };

  float acc[Cores::kR][Cores::kA] = {}, top[Cores::kR], total[Cores::kR] = {};
  for (float& each : top) each = kNone;
  const auto weigh = [&](float (&s)[Cores::kR][Cores::kC], int stage) {
#pragma unroll
    for (int r = 0; r < Cores::kR; ++r) {
      float now = top[r];
#pragma unroll
      for (int j = 0; j < Cores::kC; ++j) now = fmaxf(now, s[r][j]);
      now = Cores::row_max(now);
      const float base = now == kNone ? 0.0f : now;  // a row of -inf alone gives zeros, not NaN
      const float shrink = exp2_of((top[r] - base) * a.unit);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < Cores::kC; ++j) {
        s[r][j] = exp2_of((s[r][j] - base) * a.unit);
        sum += s[r][j];
      }
      top[r] = now;
      total[r] = total[r] * shrink + sum;  // over this thread's columns
#pragma unroll
      for (int j = 0; j < Cores::kA; ++j) acc[r][j] *= shrink;
    }
    cores.along(acc, s, v_tile(stage));
  };
  if constexpr (kImage) {
    QueryPositions<Cores> positions(cores, a.image, int64_t(head) * a.queries + q0, a.queries - q0, mask_tile);
    const ImageTiles& at = positions.tiles;
    for (int part = 0; part < at.parts; ++part) {
      if (part > 0) __syncthreads();
      positions.begin(part);
      const auto load_part = [&](int i, int stage) {
        const int begin = at.begin(part, i);
        load(begin, begin + at.keys(part, i), stage);
        positions.load(i, stage);
      };
      const auto step = [&](int i, int stage) {
        float s[Cores::kR][Cores::kC];
        cores.across(s, q_tile, k_tile(stage));
        positions.add(s, a.factor, part, i, stage);
        weigh(s, stage);
      };
      for_tiles<Cores::kStages>(at.count, load_part, step);
    }
  } else {
    const auto load_all = [&](int i, int stage) { load(i * kKeys, span.keys, stage); };
    const auto step = [&](int i, int stage) {
      load_mask<kQueries, kKeys, Tiles::kMaskRow, Cores::kThreads>(mask_tile, a, b, h, q0, i * kKeys);
      float s[Cores::kR][Cores::kC];
      cores.across(s, q_tile, k_tile(stage));
      to_scores<false, Tiles::kMaskRow>(cores, s, mask_tile, a, span.keys, q0, i * kKeys);
      weigh(s, stage);
    };
    for_tiles<Cores::kStages>((keys + kKeys - 1) / kKeys, load_all, step);
  }

  float inverse[Cores::kR];
  float* const stats = a.stats_of(span.q, h);
#pragma unroll
  for (int r = 0; r < Cores::kR; ++r) {
    const float sum = Cores::row_sum(total[r]);
    const bool empty = sum == 0;  // NaN is not empty
    inverse[r] = empty ? 0.0f : 1.0f / sum;
    const int query = q0 + cores.row_of(r);
    if (query < span.queries && cores.first_of_row()) {
      stats[query] = empty ? 0.0f : top[r];
      stats[a.rows + query] = empty ? -kNone : log2_of(sum) * kLn2;
    }
  }
  cores.put(q_tile, acc, inverse);
  store_rows(cores, q_tile, a.out.of<T>(span.q, h), a.out, q0, span.queries);
}

}  // namespace vk
