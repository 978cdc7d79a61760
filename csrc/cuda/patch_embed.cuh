// The kernels of patch_embed: patches into rows and back, tokens into the op's result, gradients by position.
#pragma once
#include "cuda/common.cuh"
#include "shared/patches.h"

namespace vk {

constexpr int kMostChannels = 64;  // that can be normalised: their numbers travel with the launch

// An index in keep that is out of range stands for the nearest patch.
__device__ __forceinline__ int64_t kept(const PatchGrid& grid, int64_t sample, int64_t token) {
  return min(max(grid.patch(sample, token), int64_t(0)), grid.patches() - 1);
}

// f(token) for each token of an image that is this patch, in order. A warp looks at 32 of them at once, and all of it
// has to be here.
template <class F>
__device__ __forceinline__ void for_tokens_of(const PatchGrid& grid, int64_t sample, int64_t patch, const F& f) {
  if (!grid.keep) return f(patch);
  for (int64_t first = 0; first < grid.tokens; first += kWarp) {
    const int64_t token = first + threadIdx.x % kWarp;
    unsigned found = __ballot_sync(~0u, token < grid.tokens && kept(grid, sample, token) == patch);
    for (; found; found &= found - 1) f(first + __ffs(found) - 1);
  }
}

// ------------------------------------------------------------------------------------------- patches as rows

struct Pixels {
  PatchGrid grid;
  int64_t first;  // image that row 0 belongs to
  const char* image;
  DType dtype;
  int64_t step[4];
  OutRows out;  // [images * tokens, C * P * P]
  bool scaled;
  float factor[kMostChannels], offset[kMostChannels];
};

// A block has one patch; a thread takes 8 numbers of it, which lie in one line of pixels where kAligned: that line's
// place is found once, and read in one access of 16 bytes, or 8 of uint8.
template <bool kAligned>
__global__ void __launch_bounds__(256) gather_patches(const __grid_constant__ Pixels a) {
  const PatchGrid& grid = a.grid;
  const int64_t sample = a.first + blockIdx.x / grid.tokens, patch = kept(grid, sample, blockIdx.x % grid.tokens);
  const int64_t corner = sample * a.step[0] + grid.top(patch) * a.step[2] + grid.left(patch) * a.step[3];
  const int size = int(grid.patch_size()), rows = int(grid.rows), columns = int(grid.columns);
  for (int column = threadIdx.x * kLanes; column < size; column += blockDim.x * kLanes) {
    int line = column / columns, x = column % columns;
    float values[kLanes] = {};
    if constexpr (kAligned) {
      const int64_t at = corner + line / rows * a.step[1] + line % rows * a.step[2] + x;
      if (a.dtype == DType::u8) {
        const uint2 words = *reinterpret_cast<const uint2*>(a.image + at);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) values[i] = float((i < 4 ? words.x : words.y) >> (i % 4 * 8) & 0xff);
      } else {
        load_floats<true>(values, {a.image + at * size_of(a.dtype), a.dtype, 0, 1}, 0, 0, kLanes);
      }
      if (a.scaled) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) values[i] = values[i] * a.factor[line / rows] + a.offset[line / rows];
      }
    } else {
      for (int i = 0; i < kLanes && column + i < size; ++i) {
        const int channel = line / rows;
        const int64_t at = corner + channel * a.step[1] + line % rows * a.step[2] + x * a.step[3];
        const float value = load(a.image, a.dtype, at);
        values[i] = a.scaled ? value * a.factor[channel] + a.offset[channel] : value;
        if (++x == columns) {
          x = 0;
          ++line;
        }
      }
    }
    store_floats<kAligned>(a.out, blockIdx.x, column, size, values);
  }
}

// --------------------------------------------------------------------------------------------- tokens of the op

struct Tokens {
  PatchGrid grid;
  int64_t first, prefixes;  // image that row 0 belongs to; tokens in front
  int64_t table_first;      // row of the table that belongs to patch 0: 0 where it has none for the prefix
  int width;
  Rows tokens, prefix, table;  // data null where absent
  OutRows out;                 // all of the result
};

// A block has one token of the result, a thread 8 columns.
template <bool kAligned>
__global__ void __launch_bounds__(256) lay_out_tokens(const __grid_constant__ Tokens a) {
  const int64_t each = a.prefixes + a.grid.tokens, sample = blockIdx.x / each, token = blockIdx.x % each - a.prefixes;
  const bool in_front = token < 0;
  const int64_t position = in_front ? (a.table_first > 0 ? token + a.prefixes : -1)
                                    : a.table_first + kept(a.grid, a.first + sample, token);
  for (int column = threadIdx.x * kLanes; column < a.width; column += blockDim.x * kLanes) {
    float values[kLanes], added[kLanes];
    if (in_front) {
      load_floats<kAligned>(values, a.prefix, token + a.prefixes, column, a.width);
    } else {
      load_floats<kAligned>(values, a.tokens, sample * a.grid.tokens + token, column, a.width);
    }
    if (a.table.data && position >= 0) {
      load_floats<kAligned>(added, a.table, position, column, a.width);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) values[i] += added[i];
    }
    store_floats<kAligned>(a.out, a.first * each + blockIdx.x, column, a.width, values);
  }
}

// ------------------------------------------------------------------------------------------------ gradients

struct PositionSums {
  PatchGrid grid;
  int64_t prefixes, images_per_part;
  int width;
  Rows dout;    // [B * tokens of the result, D]
  OutRows out;  // [parts * (prefixes + patches), D]
};

// Sums of dout by row of the position table, where `keep` says which rows they are. A block has a row of the table and
// a few images, and looks for the row among what they keep: no two blocks add to one place.
template <bool kAligned>
__global__ void __launch_bounds__(256) sum_by_position(const __grid_constant__ PositionSums a) {
  const int64_t row = blockIdx.x, each = a.prefixes + a.grid.tokens;
  const int64_t begin = blockIdx.y * a.images_per_part, end = min(begin + a.images_per_part, a.grid.batch);
  for (int from = 0; from < a.width; from += blockDim.x * kLanes) {
    const int column = from + threadIdx.x * kLanes;
    float sum[kLanes] = {}, values[kLanes];
    for (int64_t sample = begin; sample < end; ++sample) {
      const auto add = [&](int64_t token) {
        load_floats<kAligned>(values, a.dout, sample * each + token, column, a.width);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) sum[i] += values[i];
      };
      if (row < a.prefixes) {
        add(row);
      } else {
        for_tokens_of(a.grid, sample, row - a.prefixes, [&](int64_t token) { add(a.prefixes + token); });
      }
    }
    store_floats<kAligned>(a.out, blockIdx.y * int64_t(gridDim.x) + row, column, a.width, sum);
  }
}

struct PatchGradients {
  PatchGrid grid;
  int64_t first;  // image that row 0 belongs to
  Rows dpatches;  // [images * tokens, C * P * P]
  char* dimage;   // [B, C, H, W], packed
  DType dtype;
  bool scaled;
  float factor[kMostChannels];  // 1 / std
};

// A block has one patch of an image, kept or not; a thread writes 8 numbers of it.
template <bool kAligned>
__global__ void __launch_bounds__(256) scatter_patches(const __grid_constant__ PatchGradients a) {
  const PatchGrid& grid = a.grid;
  // what counts blocks fits 32 bits; a division of 64 is a call, around which registers spill
  const unsigned patches = unsigned(grid.patches()), in_line = unsigned(grid.across), patch = blockIdx.x % patches;
  const int64_t sample = blockIdx.x / patches, top = patch / in_line * grid.rows, left = patch % in_line * grid.columns;
  const int64_t height = grid.down * grid.rows, across = grid.across * grid.columns;
  const int64_t corner = ((a.first + sample) * grid.channels * height + top) * across + left;
  const int size = int(grid.patch_size()), rows = int(grid.rows), columns = int(grid.columns);
  for (int from = 0; from < size; from += blockDim.x * kLanes) {
    const int column = from + threadIdx.x * kLanes;
    float sum[kLanes] = {}, values[kLanes];
    for_tokens_of(grid, a.first + sample, patch, [&](int64_t token) {
      load_floats<kAligned>(values, a.dpatches, sample * grid.tokens + token, column, size);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) sum[i] += values[i];
    });
    int line = column / columns, x = column % columns;
    for (int i = 0; i < kLanes && column + i < size; ++i) {
      const int channel = line / rows;
      const int64_t at = corner + (channel * height + line % rows) * across + x;
      store(a.dimage, a.dtype, at, a.scaled ? sum[i] * a.factor[channel] : sum[i]);
      if (++x == columns) {
        x = 0;
        ++line;
      }
    }
  }
}

}  // namespace vk
