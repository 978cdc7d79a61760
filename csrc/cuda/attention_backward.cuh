// Attention backward in two kernels, dq by queries and dk, dv by keys: weights are computed anew from the rows'
// statistics, each by both kernels, so no two blocks add into one place. No atomics, the same bits every time.
//
// dq comes first: it leaves delta, the sum over keys of weight times its gradient, which is a row of dout times out.
#pragma once
#include "attention_tiles.cuh"

namespace vk {

// The difference first: beside huge scores the log of the sum would be rounded away.
__device__ inline float weight(float score, float largest, float log_sum, float unit) {
  return exp2_of((score - largest) * unit - log_sum * kLog2E);
}

// Offsets in shared memory, in bytes: two tiles that stay, of kRows; two that come, of kCols, for each stage; numbers
// that come with them; scratch; a mask.
template <class Cores, int kNumbers, int kMaskColumns>
struct BackwardTiles {
  static constexpr int kMaskRow = kMaskColumns;
  static __host__ __device__ int pair(int rows, int width) {
    return 2 * rows * Cores::row(width) * int(sizeof(typename Cores::T));
  }
  static __host__ __device__ int coming(int width) { return pair(Cores::kRows, width); }
  static __host__ __device__ int numbers(int width) {
    return coming(width) + Cores::kStages * pair(Cores::kCols, width);
  }
  static __host__ __device__ int scratch(int width) {
    return numbers(width) + Cores::kStages * kNumbers * int(sizeof(float));
  }
  static __host__ __device__ int mask(int width) { return scratch(width) + Cores::scratch(); }
  static __host__ __device__ int total(const Attention& at, int queries) {
    const int rows = at.mask.kind == MaskKind::none ? 0 : at.mask.query == 0 ? 1 : queries;
    return mask(at.width) + rows * kMaskRow * int(sizeof(float));
  }
};

template <class Cores>
using QueryTiles = BackwardTiles<Cores, 0, Cores::kCols + 8>;  // of dq; a row of the mask as in forward

// Where `dscores`, [B, H, Nq, Nk] in float32, is given, it gets the gradient of the scores. A mask's gradient sums it
// over queries or keys, where all but rounding can cancel: delta is then summed from the very weights, in a pass of its
// own, not from an out that was rounded.
template <class Cores, class T = typename Cores::T>
__global__ void __launch_bounds__(Cores::kThreads)
    attention_dq(const T* q, const T* k, const T* v, const void* mask, const T* out, const T* dout, const float* stats,
                 float* delta, T* dq, float* dscores, const __grid_constant__ Attention at) {
  using Tiles = QueryTiles<Cores>;
  constexpr int kQueries = Cores::kRows, kKeys = Cores::kCols;
  extern __shared__ __align__(16) char shared[];
  const int tiles = (at.queries + kQueries - 1) / kQueries;
  const int64_t head = blockIdx.x / tiles, b = head / at.heads, h = head % at.heads;
  const int q0 = blockIdx.x % tiles * kQueries;
  const int keys = at.causal ? min(at.keys, q0 + kQueries) : at.keys;  // that some query sees
  const int passes = dscores ? 2 : 1, key_tiles = (keys + kKeys - 1) / kKeys;

  const Cores cores(at.width, reinterpret_cast<float*>(shared + Tiles::scratch(at.width)));
  float* const mask_tile = reinterpret_cast<float*>(shared + Tiles::mask(at.width));
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const dout_tile = q_tile + kQueries * cores.row();
  T* const kv_tiles = reinterpret_cast<T*>(shared + Tiles::coming(at.width));
  const auto k_tile = [&](int stage) { return kv_tiles + 2 * stage * kKeys * cores.row(); };
  const auto v_tile = [&](int stage) { return k_tile(stage) + kKeys * cores.row(); };

  k += b * at.k.batch + h * at.k.head;
  v += b * at.v.batch + h * at.v.head;
  load_rows<kQueries>(cores, q_tile, q + b * at.q.batch + h * at.q.head, at.q, q0, at.queries);
  load_rows<kQueries>(cores, dout_tile, dout + b * at.dout.batch + h * at.dout.head, at.dout, q0, at.queries);

  stats += head * 2 * at.queries;
  delta += head * at.queries;
  float largest[Cores::kR], log_sum[Cores::kR], row_delta[Cores::kR] = {};
#pragma unroll
  for (int r = 0; r < Cores::kR; ++r) {
    const int query = q0 + cores.row_of(r);
    largest[r] = query < at.queries ? stats[query] : 0.0f;
    log_sum[r] = query < at.queries ? stats[at.queries + query] : 0.0f;
  }
  const auto finish_delta = [&] {
#pragma unroll
    for (int r = 0; r < Cores::kR; ++r) {
      row_delta[r] = Cores::row_sum(row_delta[r]);
      const int query = q0 + cores.row_of(r);
      if (query < at.queries && cores.first_of_row()) delta[query] = row_delta[r];
    }
  };
  if (passes == 1) {
    static_assert(2 * kKeys >= kQueries, "out waits where the keys and values of the last stage will come");
    T* const out_tile = k_tile(Cores::kStages - 1);
    load_rows<kQueries>(cores, out_tile, out + b * at.out.batch + h * at.out.head, at.out, q0, at.queries);
    wait_for_copies();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < Cores::kR; ++r) row_delta[r] = cores.row_dot(r, dout_tile, out_tile);
    finish_delta();
  }

  float acc[Cores::kR][Cores::kA] = {};
  const auto load = [&](int i, int stage) {
    const int k0 = (i < key_tiles ? i : i - key_tiles) * kKeys;
    load_rows<kKeys>(cores, k_tile(stage), k, at.k, k0, at.keys);
    load_rows<kKeys>(cores, v_tile(stage), v, at.v, k0, at.keys);
  };
  const auto step = [&](int i, int stage) {
    const int k0 = (i < key_tiles ? i : i - key_tiles) * kKeys;
    if (at.mask.kind != MaskKind::none) {
      const int64_t begin = b * at.mask.batch + h * at.mask.head;
      load_mask<kQueries, kKeys, Tiles::kMaskRow, Cores::kThreads>(mask_tile, mask, begin, at, q0, k0);
      __syncthreads();
    }
    float s[Cores::kR][Cores::kC], ds[Cores::kR][Cores::kC];
    cores.across(s, q_tile, k_tile(stage));
    to_scores<false, Tiles::kMaskRow>(cores, s, mask_tile, at, q0, k0);
    cores.across(ds, dout_tile, v_tile(stage));
    if (passes == 2 && i == key_tiles) finish_delta();
    const bool summing = passes == 2 && i < key_tiles;
#pragma unroll
    for (int r = 0; r < Cores::kR; ++r) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < Cores::kC; ++j) {
        const float p = weight(s[r][j], largest[r], log_sum[r], at.unit);
        sum += p * ds[r][j];
        ds[r][j] = p * (ds[r][j] - row_delta[r]);
      }
      if (summing) row_delta[r] += sum;
    }
    if (summing) return;
    if (dscores) {
#pragma unroll
      for (int r = 0; r < Cores::kR; ++r) {
#pragma unroll
        for (int j = 0; j < Cores::kC; ++j) {
          const int query = q0 + cores.row_of(r), key = k0 + cores.col_of(j);
          if (query < at.queries && key < at.keys) dscores[(head * at.queries + query) * at.keys + key] = ds[r][j];
        }
      }
    }
    cores.along(acc, ds, k_tile(stage));
  };
  for_tiles<Cores::kStages>(passes * key_tiles, load, step);

  float scale[Cores::kR];
  for (float& each : scale) each = at.scale;
  cores.put(q_tile, acc, scale);
  store_rows(cores, q_tile, dq + b * at.dq.batch + h * at.dq.head, at.dq, q0, at.queries);
}

template <class Cores>
using KeyTiles = BackwardTiles<Cores, 3 * Cores::kCols, Cores::kRows + 4>;  // of dk and dv; the mask is read down its columns

// Rows of its tiles are keys: scores are turned, [keys, queries], so that weights are where a product with dout, and
// gradients of scores where one with q, wants them.
template <class Cores, class T = typename Cores::T>
__global__ void __launch_bounds__(Cores::kThreads)
    attention_dkdv(const T* q, const T* k, const T* v, const void* mask, const T* dout, const float* stats,
                   const float* delta, T* dk, T* dv, const __grid_constant__ Attention at) {
  using Tiles = KeyTiles<Cores>;
  constexpr int kKeys = Cores::kRows, kQueries = Cores::kCols;
  extern __shared__ __align__(16) char shared[];
  const int tiles = (at.keys + kKeys - 1) / kKeys;
  const int64_t head = blockIdx.x / tiles, b = head / at.heads, h = head % at.heads;
  const int k0 = blockIdx.x % tiles * kKeys;
  const int first = at.causal ? min(at.queries, k0) / kQueries : 0;  // tile of queries that sees one of these keys
  const int count = (at.queries + kQueries - 1) / kQueries - first;

  const Cores cores(at.width, reinterpret_cast<float*>(shared + Tiles::scratch(at.width)));
  float* const mask_tile = reinterpret_cast<float*>(shared + Tiles::mask(at.width));
  T* const k_tile = reinterpret_cast<T*>(shared);
  T* const v_tile = k_tile + kKeys * cores.row();
  T* const coming = reinterpret_cast<T*>(shared + Tiles::coming(at.width));
  const auto q_tile = [&](int stage) { return coming + 2 * stage * kQueries * cores.row(); };
  const auto dout_tile = [&](int stage) { return q_tile(stage) + kQueries * cores.row(); };
  const auto numbers = [&](int stage) {  // largest, log_sum and delta of the tile's queries
    return reinterpret_cast<float*>(shared + Tiles::numbers(at.width)) + stage * 3 * kQueries;
  };

  q += b * at.q.batch + h * at.q.head;
  dout += b * at.dout.batch + h * at.dout.head;
  stats += head * 2 * at.queries;
  delta += head * at.queries;
  load_rows<kKeys>(cores, k_tile, k + b * at.k.batch + h * at.k.head, at.k, k0, at.keys);
  load_rows<kKeys>(cores, v_tile, v + b * at.v.batch + h * at.v.head, at.v, k0, at.keys);
  const auto load = [&](int i, int stage) {
    const int q0 = (first + i) * kQueries;
    load_rows<kQueries>(cores, q_tile(stage), q, at.q, q0, at.queries);
    load_rows<kQueries>(cores, dout_tile(stage), dout, at.dout, q0, at.queries);
    for (int j = threadIdx.x; j < kQueries; j += Cores::kThreads) {
      const bool there = q0 + j < at.queries;  // zeros add nothing: dout and q are zeros there too
      const int query = there ? q0 + j : 0;
      copy<4>(numbers(stage) + j, stats + query, there);
      copy<4>(numbers(stage) + kQueries + j, stats + at.queries + query, there);
      copy<4>(numbers(stage) + 2 * kQueries + j, delta + query, there);
    }
  };

  float dk_acc[Cores::kR][Cores::kA] = {}, dv_acc[Cores::kR][Cores::kA] = {};
  const auto step = [&](int i, int stage) {
    const int q0 = (first + i) * kQueries;
    if (at.mask.kind != MaskKind::none) {
      const int64_t begin = b * at.mask.batch + h * at.mask.head;
      load_mask<kQueries, kKeys, Tiles::kMaskRow, Cores::kThreads>(mask_tile, mask, begin, at, q0, k0);
      __syncthreads();
    }
    float p[Cores::kR][Cores::kC], ds[Cores::kR][Cores::kC];
    cores.across(p, k_tile, q_tile(stage));
    to_scores<true, Tiles::kMaskRow>(cores, p, mask_tile, at, q0, k0);
    cores.across(ds, v_tile, dout_tile(stage));
    const float* const of_query = numbers(stage);
#pragma unroll
    for (int j = 0; j < Cores::kC; ++j) {
      const int col = cores.col_of(j);
      const float largest = of_query[col], log_sum = of_query[kQueries + col], row_delta = of_query[2 * kQueries + col];
#pragma unroll
      for (int r = 0; r < Cores::kR; ++r) {
        p[r][j] = weight(p[r][j], largest, log_sum, at.unit);
        ds[r][j] = p[r][j] * (ds[r][j] - row_delta);
      }
    }
    cores.along(dv_acc, p, dout_tile(stage));
    cores.along(dk_acc, ds, q_tile(stage));
  };
  for_tiles<Cores::kStages>(count, load, step);
  if (count == 0) {  // what was copied first arrives before its place is written
    wait_for_copies();
    __syncthreads();
  }

  float one[Cores::kR], scale[Cores::kR];
  for (int r = 0; r < Cores::kR; ++r) one[r] = 1, scale[r] = at.scale;
  cores.put(k_tile, dk_acc, scale);
  cores.put(v_tile, dv_acc, one);
  store_rows(cores, k_tile, dk + b * at.dk.batch + h * at.dk.head, at.dk, k0, at.keys);
  store_rows(cores, v_tile, dv + b * at.dv.batch + h * at.dv.head, at.dv, k0, at.keys);
}

}  // namespace vk
