// Relative positions of an image of keys: what each query adds to the scores of its rows and columns, and the gradients
// of that.
//
// Where queries stay and keys come (forward, dq), tiles go down the image (ImageTiles): what a thread adds to its
// columns stays in registers, and so do the sums for the gradient of it; what is added to rows comes with each tile. Sums
// along rows go through shared memory, within a warp. A query is one warp's, so nothing is added from two places.
#pragma once
#include "cuda/attention_tiles.cuh"

namespace vk {

// What kQueries queries, `there` of them, add to the rows of tile i, as [down, kQueries].
template <int kQueries, int kThreads>
__device__ inline void load_row_positions(float* to, const float* rel_h, const ImageTiles& tiles, int i, int there) {
  for (int n = threadIdx.x; n < tiles.down * kQueries; n += kThreads) {
    const int query = n % kQueries, y = i * tiles.down + n / kQueries;
    const bool exists = query < there && y < tiles.rows;
    copy<4>(to + n, rel_h + (exists ? int64_t(query) * tiles.rows + y : 0), exists);
  }
}

// Keys of a tile that are not there get -inf.
template <bool kTurned, class Cores, int kR, int kC>
__device__ inline void hide(const Cores& cores, float (&s)[kR][kC], int keys) {
  if (keys == (kTurned ? Cores::kRows : Cores::kCols)) return;
#pragma unroll
  for (int r = 0; r < kR; ++r) {
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      if ((kTurned ? cores.row_of(r) : cores.col_of(j)) >= keys) s[r][j] = kNone;
    }
  }
}

// For tiles whose rows are queries.
template <class Cores>
struct QueryPositions {
  static constexpr int kR = Cores::kR, kC = Cores::kC, kQueries = Cores::kRows;
  static constexpr int kStage = ImageTiles::kMostDown * kQueries;
  static constexpr int kBytes = Cores::kStages * kStage * int(sizeof(float));

  const Cores& cores;
  const ImageTiles tiles;
  const float *const rel_h, *const rel_w;  // of the block's first query
  const int there;                         // queries
  float* const of_rows;                    // [kStages, kMostDown, kQueries] in shared memory
  float of_columns[kR][kC];

  // `row` is the first query's in [B, H, Nq].
  __device__ QueryPositions(const Cores& cores, const Image& image, int64_t row, int there, float* space)
      : cores(cores),
        tiles(image, Cores::kCols),
        rel_h(image.rel_h + row * image.rows),
        rel_w(image.rel_w + row * image.columns),
        there(there),
        of_rows(space) {}

  __device__ void begin(int part) {
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      const int key = cores.col_of(j), x = part * tiles.across + key - tiles.row_of(key) * tiles.across;
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const int query = cores.row_of(r);
        of_columns[r][j] = query < there && x < tiles.columns ? rel_w[int64_t(query) * tiles.columns + x] : 0.0f;
      }
    }
  }

  __device__ void load(int i, int stage) const {
    load_row_positions<kQueries, Cores::kThreads>(of_rows + stage * kStage, rel_h, tiles, i, there);
  }

  // Products of q and k to scores.
  __device__ void add(float (&s)[kR][kC], float factor, int part, int i, int stage) const {
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      const float* const of_row = of_rows + stage * kStage + tiles.row_of(cores.col_of(j)) * kQueries;
#pragma unroll
      for (int r = 0; r < kR; ++r) s[r][j] = fmaf(s[r][j], factor, of_row[cores.row_of(r)] + of_columns[r][j]);
    }
    hide<false>(cores, s, tiles.keys(part, i));
  }
};

// The gradients of what queries add: sums of the scores' gradients along the image's rows and down its columns.
template <class Cores>
struct PositionSums {
  static constexpr int kR = Cores::kR, kC = Cores::kC, kWarpRows = Cores::kWarpRows;
  static constexpr int kRow = Cores::kCols + 4;
  static constexpr int kBytes = Cores::kRows * kRow * int(sizeof(float));

  const Cores& cores;
  const ImageTiles& tiles;
  float *const drel_h, *const drel_w;  // of the block's first query
  const int there;                     // queries
  float* const space;                  // [kRows, kRow]; a warp has its rows to itself
  float down[kR][kC];

  __device__ PositionSums(const Cores& cores, const ImageTiles& tiles, const Image& image, int64_t row, int there,
                          float* space)
      : cores(cores),
        tiles(tiles),
        drel_h(image.drel_h + row * image.rows),
        drel_w(image.drel_w + row * image.columns),
        there(there),
        space(space) {}

  __device__ void begin() {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int j = 0; j < kC; ++j) down[r][j] = 0;
    }
  }

  __device__ void add(const float (&ds)[kR][kC], int part, int i) {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int j = 0; j < kC; ++j) down[r][j] += ds[r][j];
    }
    lay(ds);
    for (int n = threadIdx.x % 32; n < kWarpRows * tiles.down; n += 32) {
      const int query = first() + n % kWarpRows, y = i * tiles.down + n / kWarpRows;
      const float* const from = space + query * kRow + n / kWarpRows * tiles.across;
      float sum = 0;
      for (int x = 0; x < tiles.across; ++x) sum += from[x];
      if (query >= there || y >= tiles.rows) continue;
      float* const to = drel_h + int64_t(query) * tiles.rows + y;
      *to = part == 0 ? sum : *to + sum;  // in each part the same thread's
    }
  }

  __device__ void end(int part) {
    __syncwarp();
    lay(down);
    for (int n = threadIdx.x % 32; n < kWarpRows * tiles.across; n += 32) {
      const int query = first() + n / tiles.across, in_part = n % tiles.across, x = part * tiles.across + in_part;
      float sum = 0;
      for (int y = 0; y < tiles.down; ++y) sum += space[query * kRow + y * tiles.across + in_part];
      if (query < there && x < tiles.columns) drel_w[int64_t(query) * tiles.columns + x] = sum;
    }
    __syncwarp();
  }

 private:
  __device__ static int first() { return threadIdx.x / 32 * kWarpRows; }
  __device__ void lay(const float (&values)[kR][kC]) const {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int j = 0; j < kC; ++j) space[cores.row_of(r) * kRow + cores.col_of(j)] = values[r][j];
    }
    __syncwarp();
  }
};

// For tiles whose rows are keys of one tile of the image: all that the queries add comes with them.
template <class Cores>
struct KeyPositions {
  static constexpr int kR = Cores::kR, kC = Cores::kC, kKeys = Cores::kRows, kQueries = Cores::kCols;
  static constexpr int kRow = kKeys + Cores::kApart;
  static constexpr int kStage = kQueries * kRow + ImageTiles::kMostDown * kQueries;
  static constexpr int kBytes = Cores::kStages * kStage * int(sizeof(float));

  const Cores& cores;
  const ImageTiles tiles;
  const int part, i;   // the tile
  float* const space;  // of each stage, what is added to columns, [kQueries, kRow], and to rows, [kMostDown, kQueries]

  // Of queries from `row` on in [B, H, Nq], `there` of them.
  __device__ void load(const Image& image, int64_t row, int there, int stage) const {
    float* const to = space + stage * kStage;
    const int x0 = part * tiles.across;
    const float* const rel_w = image.rel_w + row * tiles.columns + x0;
    for (int query = threadIdx.x / 32; query < kQueries; query += Cores::kThreads / 32) {
      for (int x = threadIdx.x % 32; x < tiles.across; x += 32) {
        const bool exists = query < there && x0 + x < tiles.columns;
        copy<4>(to + query * kRow + x, exists ? rel_w + int64_t(query) * tiles.columns + x : image.rel_w, exists);
      }
    }
    const float* const rel_h = image.rel_h + row * tiles.rows;
    load_row_positions<kQueries, Cores::kThreads>(to + kQueries * kRow, rel_h, tiles, i, there);
  }

  // Products of k and q to scores, in the order of QueryPositions: backward has the bits of forward.
  __device__ void add(float (&s)[kR][kC], float factor, int stage) const {
    const float *const of_columns = space + stage * kStage, *const of_rows = of_columns + kQueries * kRow;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int key = cores.row_of(r), y = tiles.row_of(key), x = std::min(key - y * tiles.across, tiles.across - 1);
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        const int query = cores.col_of(j);
        s[r][j] = fmaf(s[r][j], factor, of_rows[y * kQueries + query] + of_columns[query * kRow + x]);
      }
    }
    hide<true>(cores, s, tiles.keys(part, i));
  }
};

}  // namespace vk
