// Attention backward in two kernels, dq by queries and dk, dv by keys: weights are computed anew from the rows'
// statistics, by both, so no two blocks add into one place. No atomics, the same bits every time.
//
// dq comes first: it leaves delta, the sum over keys of weight times its gradient, which is a row of dout times out.
#pragma once
#include "cuda/attention_image.cuh"
#include "cuda/attention_tiles.cuh"

namespace vk {

// The difference first: beside huge scores the log of the sum would be rounded away.
__device__ inline float weight(float score, float largest, float log_sum, float unit) {
  return exp2_of((score - largest) * unit - log_sum * kLog2E);
}

// Offsets in shared memory, in bytes: two tiles that stay; of each stage, two that come, and so many numbers of each of
// their rows; scratch; a mask or positions.
template <class Cores, int kNumbers, int kScratch = Cores::scratch()>
struct BackwardTiles {
  static __host__ __device__ int pair(int rows, int width) {
    return 2 * rows * Cores::row(width) * int(sizeof(typename Cores::T));
  }
  static __host__ __device__ int coming(int width) { return pair(Cores::kRows, width); }
  static __host__ __device__ int numbers(int width) {
    return coming(width) + Cores::kStages * pair(Cores::kCols, width);
  }
  static __host__ __device__ int scratch(int width) {
    return numbers(width) + Cores::kStages * kNumbers * Cores::kCols * int(sizeof(float));
  }
  static __host__ __device__ int mask(int width) { return scratch(width) + kScratch; }
};

// Sums of positions go through scratch: where Cores have some, it is as large, and weights follow in the same rows.
template <class Cores, bool kImage>
struct QueryTiles : BackwardTiles<Cores, 0, kImage ? PositionSums<Cores>::kBytes : Cores::scratch()> {
  static constexpr int kMaskRow = Cores::kCols + 8;  // as in forward
  static_assert(PositionSums<Cores>::kBytes >= Cores::scratch());
  static int total(const Attention& a) {
    const int added = kImage ? QueryPositions<Cores>::kBytes : mask_bytes<kMaskRow>(a, Cores::kRows);
    return QueryTiles::mask(a.width) + added;
  }
};

// Where `dscores` is asked for, a mask's gradient will sum it over queries, keys or samples, and all but rounding can
// cancel: delta is then summed from the very weights, in a pass of its own, not from an out that was rounded. The same
// where gradients of positions are.
template <class Cores, bool kImage, int kBlocks>
__global__ void __launch_bounds__(Cores::kThreads, kBlocks) attention_dq(const __grid_constant__ Attention a) {
  if (!Cores::kThere) return;
  using T = typename Cores::T;
  using Tiles = QueryTiles<Cores, kImage>;
  constexpr int kQueries = Cores::kRows, kKeys = Cores::kCols;
  extern __shared__ __align__(16) char shared[];
  const int tiles = (a.queries + kQueries - 1) / kQueries;
  const int head = blockIdx.x / tiles, b = head / a.heads, h = head % a.heads;
  const int q0 = blockIdx.x % tiles * kQueries;
  const Span span = a.span(b);
  if (q0 >= span.queries) return;  // others are longer
  const int keys = a.causal ? min(span.keys, q0 + kQueries) : span.keys;  // that some query sees
  const int key_tiles = (keys + kKeys - 1) / kKeys;
  const int before = a.dscores ? key_tiles : 0;  // tiles of the pass that sums delta
  const bool exact = kImage ? a.image.drel_h != nullptr : before > 0;

  float* const scratch = reinterpret_cast<float*>(shared + Tiles::scratch(a.width));
  const Cores cores(a.width, scratch);
  float* const mask_tile = reinterpret_cast<float*>(shared + Tiles::mask(a.width));
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const dout_tile = q_tile + kQueries * cores.row();
  T* const coming = reinterpret_cast<T*>(shared + Tiles::coming(a.width));
  const auto k_tile = [&](int stage) { return coming + 2 * stage * kKeys * cores.row(); };
  const auto v_tile = [&](int stage) { return k_tile(stage) + kKeys * cores.row(); };

  load_rows<kQueries>(cores, q_tile, a.q.of<T>(span.q, h), a.q, q0, span.queries);
  load_rows<kQueries>(cores, dout_tile, a.dout.of<T>(span.q, h), a.dout, q0, span.queries);

  const float* const stats = a.stats_of(span.q, h);
  float largest[Cores::kR], log_sum[Cores::kR], delta[Cores::kR] = {};
#pragma unroll
  for (int r = 0; r < Cores::kR; ++r) {
    const int query = q0 + cores.row_of(r);
    largest[r] = query < span.queries ? stats[query] : 0.0f;
    log_sum[r] = query < span.queries ? stats[a.rows + query] : 0.0f;
  }
  const auto finish_delta = [&] {
#pragma unroll
    for (int r = 0; r < Cores::kR; ++r) {
      delta[r] = Cores::row_sum(delta[r]);
      const int query = q0 + cores.row_of(r);
      if (query < span.queries && cores.first_of_row()) a.delta_of(span.q, h)[query] = delta[r];
    }
  };
  if (!exact) {
    static_assert(Cores::kStages * 2 * kKeys >= kQueries, "out comes where keys and values will");
    load_rows<kQueries>(cores, coming, a.out.of<T>(span.q, h), a.out, q0, span.queries);
    wait_for_copies();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < Cores::kR; ++r) delta[r] = cores.row_dot(r, dout_tile, coming);
    finish_delta();
    __syncthreads();
  }

  float acc[Cores::kR][Cores::kA] = {};
  const T *const k = a.k.of<T>(span.k, h / a.group), *const v = a.v.of<T>(span.k, h / a.group);
  const auto load = [&](int begin, int end, int stage) {
    load_rows<kKeys>(cores, k_tile(stage), k, a.k, begin, end);
    load_rows<kKeys>(cores, v_tile(stage), v, a.v, begin, end);
  };
  // Gradients of scores; or, from weights' gradients in ds, what they add to delta.
  const auto to_gradients = [&](const float (&s)[Cores::kR][Cores::kC], float (&ds)[Cores::kR][Cores::kC], bool sums) {
#pragma unroll
    for (int r = 0; r < Cores::kR; ++r) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < Cores::kC; ++j) {
        const float p = weight(s[r][j], largest[r], log_sum[r], a.unit);
        sum += p * ds[r][j];
        ds[r][j] = p * (ds[r][j] - delta[r]);
      }
      if (sums) delta[r] += sum;
    }
  };
  if constexpr (kImage) {
    const int64_t row = int64_t(head) * a.queries + q0;
    QueryPositions<Cores> positions(cores, a.image, row, a.queries - q0, mask_tile);
    const ImageTiles& at = positions.tiles;
    PositionSums<Cores> sums(cores, at, a.image, row, a.queries - q0, scratch);
    const int first = exact ? at.parts : 0;  // parts are gone through twice
    for (int pass = 0; pass < first + at.parts; ++pass) {
      const bool sums_delta = pass < first;
      const int part = sums_delta ? pass : pass - first;
      if (pass > 0) __syncthreads();
      if (exact && pass == first) finish_delta();
      positions.begin(part);
      sums.begin();
      const auto load_part = [&](int i, int stage) {
        const int begin = at.begin(part, i);
        load(begin, begin + at.keys(part, i), stage);
        positions.load(i, stage);
      };
      const auto step = [&](int i, int stage) {
        float s[Cores::kR][Cores::kC], ds[Cores::kR][Cores::kC];
        cores.across(s, q_tile, k_tile(stage));
        positions.add(s, a.factor, part, i, stage);
        cores.across(ds, dout_tile, v_tile(stage));
        to_gradients(s, ds, sums_delta);
        if (sums_delta) return;
        if (exact) sums.add(ds, part, i);
        cores.along(acc, ds, k_tile(stage));
      };
      for_tiles<Cores::kStages>(at.count, load_part, step);
      if (exact && !sums_delta) sums.end(part);
    }
  } else {
    const auto load_all = [&](int i, int stage) { load((i < before ? i : i - before) * kKeys, span.keys, stage); };
    const auto step = [&](int i, int stage) {
      const int k0 = (i < before ? i : i - before) * kKeys;
      load_mask<kQueries, kKeys, Tiles::kMaskRow, Cores::kThreads>(mask_tile, a, b, h, q0, k0);
      float s[Cores::kR][Cores::kC], ds[Cores::kR][Cores::kC];
      cores.across(s, q_tile, k_tile(stage));
      to_scores<false, Tiles::kMaskRow>(cores, s, mask_tile, a, span.keys, q0, k0);
      cores.across(ds, dout_tile, v_tile(stage));
      if (before && i == before) finish_delta();
      to_gradients(s, ds, i < before);
      if (i < before) return;
      if (before) {
        float* const dscores = a.dscores + int64_t(head) * a.queries * a.keys;
#pragma unroll
        for (int r = 0; r < Cores::kR; ++r) {
#pragma unroll
          for (int j = 0; j < Cores::kC; ++j) {
            const int query = q0 + cores.row_of(r), key = k0 + cores.col_of(j);
            if (query < span.queries && key < span.keys) dscores[int64_t(query) * a.keys + key] = ds[r][j];
          }
        }
      }
      cores.along(acc, ds, k_tile(stage));
    };
    for_tiles<Cores::kStages>(before + key_tiles, load_all, step);
  }

  float scale[Cores::kR];
  for (float& each : scale) each = a.scale;
  cores.put(q_tile, acc, scale);
  store_rows(cores, q_tile, a.dq.of<T>(span.q, h), a.dq, q0, span.queries);
}

// blockIdx.x, which the compiler may not keep.
__device__ inline unsigned block_number() {
  unsigned number;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(number));
  return number;
}

template <class Cores, bool kImage>
struct KeyTiles : BackwardTiles<Cores, 3> {  // largest, log_sum and delta of each query
  static constexpr int kMaskRow = Cores::kRows + 4;  // read down its columns: so do these lanes find other banks
  static int total(const Attention& a) {
    return KeyTiles::mask(a.width) + (kImage ? KeyPositions<Cores>::kBytes : mask_bytes<kMaskRow>(a, Cores::kCols));
  }
};

// Rows of its tiles are keys: scores are turned, [keys, queries], so that weights are where a product with dout, and
// gradients of scores where one with q, wants them. A block goes over the queries of all heads that share its keys.
template <class Cores, bool kImage, int kBlocks>
__global__ void __launch_bounds__(Cores::kThreads, kBlocks) attention_dkdv(const __grid_constant__ Attention a) {
  if (!Cores::kThere) return;
  using T = typename Cores::T;
  using Tiles = KeyTiles<Cores, kImage>;
  constexpr int kKeys = Cores::kRows, kQueries = Cores::kCols;
  extern __shared__ __align__(16) char shared[];
  const auto image = [&] { return ImageTiles(a.image, kKeys); };
  const int tiles = [&] {
    if constexpr (kImage) return image().total();
    return (a.keys + kKeys - 1) / kKeys;
  }();
  const int tile = blockIdx.x % tiles, key_heads = a.heads / a.group;
  // asked anew at each tile: kept, they would take registers that sums need
  const auto sample = [&] { return int(block_number() / tiles) / key_heads; };
  const auto key_head = [&] { return int(block_number() / tiles) % key_heads; };
  const auto span = [&] { return a.span(sample()); };
  const auto part = [&] { return tile / image().count; };  // of the image's columns, and the tile in it
  const auto down = [&] { return tile % image().count; };
  const int k0 = [&] {
    if constexpr (kImage) return image().begin(part(), down());
    return tile * kKeys;
  }();
  const auto end = [&] {
    if constexpr (kImage) return k0 + image().keys(part(), down());
    return span().keys;
  };
  if (k0 >= span().keys) return;  // others are longer
  const int queries = span().queries;
  const int first = a.causal ? min(queries, k0) / kQueries : 0;  // tile of queries that sees one of these keys
  const unsigned each = (queries + kQueries - 1) / kQueries - first;  // of a head
  const auto head_of = [&](int i) { return key_head() * a.group + unsigned(i) / each; };
  const auto query_of = [&](int i) { return (first + unsigned(i) % each) * kQueries; };

  const Cores cores(a.width, reinterpret_cast<float*>(shared + Tiles::scratch(a.width)));
  float* const mask_tile = reinterpret_cast<float*>(shared + Tiles::mask(a.width));
  T* const k_tile = reinterpret_cast<T*>(shared);
  T* const v_tile = k_tile + kKeys * cores.row();
  T* const coming = reinterpret_cast<T*>(shared + Tiles::coming(a.width));
  const auto q_tile = [&](int stage) { return coming + 2 * stage * kQueries * cores.row(); };
  const auto dout_tile = [&](int stage) { return q_tile(stage) + kQueries * cores.row(); };
  const auto numbers = [&](int stage) {
    return reinterpret_cast<float*>(shared + Tiles::numbers(a.width)) + stage * 3 * kQueries;
  };

  load_rows<kKeys>(cores, k_tile, a.k.of<T>(span().k, key_head()), a.k, k0, end());
  load_rows<kKeys>(cores, v_tile, a.v.of<T>(span().k, key_head()), a.v, k0, end());
  const auto positions = [&] { return KeyPositions<Cores>{cores, image(), part(), down(), mask_tile}; };
  const auto load = [&](int i, int stage) {
    const int h = head_of(i), q0 = query_of(i);
    const Span s = span();
    const float *const stats = a.stats_of(s.q, h), *const delta = a.delta_of(s.q, h);
    load_rows<kQueries>(cores, q_tile(stage), a.q.of<T>(s.q, h), a.q, q0, s.queries);
    load_rows<kQueries>(cores, dout_tile(stage), a.dout.of<T>(s.q, h), a.dout, q0, s.queries);
    for (int j = threadIdx.x; j < kQueries; j += Cores::kThreads) {
      const bool there = q0 + j < s.queries;  // zeros add nothing: dout and q are zeros there too
      const int query = there ? q0 + j : 0;
      copy<4>(numbers(stage) + j, stats + query, there);
      copy<4>(numbers(stage) + kQueries + j, stats + a.rows + query, there);
      copy<4>(numbers(stage) + 2 * kQueries + j, delta + query, there);
    }
    if constexpr (kImage) {
      const int64_t row = (int64_t(sample()) * a.heads + h) * a.queries + q0;
      positions().load(a.image, row, a.queries - q0, stage);
    }
  };

  float dk[Cores::kR][Cores::kA] = {}, dv[Cores::kR][Cores::kA] = {};
  const auto step = [&](int i, int stage) {
    const int q0 = query_of(i);
    if constexpr (!kImage) {
      load_mask<kQueries, kKeys, Tiles::kMaskRow, Cores::kThreads>(mask_tile, a, sample(), head_of(i), q0, k0);
    }
    float p[Cores::kR][Cores::kC], ds[Cores::kR][Cores::kC];
    cores.across(p, k_tile, q_tile(stage));
    if constexpr (kImage) {
      positions().add(p, a.factor, stage);
    } else {
      to_scores<true, Tiles::kMaskRow>(cores, p, mask_tile, a, span().keys, q0, k0);
    }
    cores.across(ds, v_tile, dout_tile(stage));
    const float* const of_query = numbers(stage);
#pragma unroll
    for (int j = 0; j < Cores::kC; ++j) {
      const int col = cores.col_of(j);
      const float largest = of_query[col], log_sum = of_query[kQueries + col], delta = of_query[2 * kQueries + col];
#pragma unroll
      for (int r = 0; r < Cores::kR; ++r) {
        p[r][j] = weight(p[r][j], largest, log_sum, a.unit);
        ds[r][j] = p[r][j] * (ds[r][j] - delta);
      }
    }
    cores.along(dv, p, dout_tile(stage));
    cores.along(dk, ds, q_tile(stage));
  };
  for_tiles<Cores::kStages>(each * a.group, load, step);

  float one[Cores::kR], scale[Cores::kR];
  for (float& each : one) each = 1;
  for (float& each : scale) each = a.scale;
  cores.put(k_tile, dk, scale);
  cores.put(v_tile, dv, one);
  store_rows(cores, k_tile, a.dk.of<T>(span().k, key_head()), a.dk, k0, end());
  store_rows(cores, v_tile, a.dv.of<T>(span().k, key_head()), a.dv, k0, end());
}

}  // namespace vk
