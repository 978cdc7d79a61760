// The kernels of add_layer_norm and add_rms_norm, which has no mean. Vectors are rows: one for all samples, or one for
// each (Rows with a step from one to the next); a weight that is absent stands for ones.
#pragma once
#include "cuda/common.cuh"

namespace vk {

// ------------------------------------------------------------------------------------------------------- forward

struct LayerNormForward {
  int64_t rows, rows_per_sample;  // 0 where nothing is a sample's own
  int width;
  float eps;
  Rows x, branch, weight, bias, branch_bias, scale, row_scale;  // data null where absent
  OutRows total, normed;
  float *mean, *rstd;  // mean null: an RMSNorm's
};

__device__ __forceinline__ float scale_of(const Rows& row_scale, int64_t sample) {
  return row_scale.data ? load(row_scale.data, row_scale.dtype, sample * row_scale.col) : 1.f;
}

// Of one row of vectors, as `at_row` gives it.
template <bool kAligned>
__device__ __forceinline__ void load_weight(float (&out)[kLanes], const Rows& weight, int column, int width) {
  if (weight.data) return load_floats<kAligned>(out, weight, 0, column, width);
#pragma unroll
  for (float& each : out) each = 1;
}

// A row stays in registers from its first load to its last store: kPieces times 8 columns a thread. Up to 1,024 columns
// a warp has the row, which needs no barrier, and four of them make a block; beyond, the block has it. All of x and
// branch is on its way before anything is computed: at 768 columns of 16 bits 3 KiB a warp, and a multiprocessor has 24
// warps or more.
template <int kPieces, bool kAligned, int kWords, bool kBlock>
__global__ void __launch_bounds__(kBlock ? 768 : 128, 1)
    layer_norm_forward(const __grid_constant__ LayerNormForward a) {
  __shared__ float2 spaces[2][kWarp];
  const int threads = kBlock ? blockDim.x : kWarp;
  const int64_t row = kBlock ? int64_t(blockIdx.x) : int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  const auto row_sum = [&](float value, float2* space) {
    return kBlock ? block_sum({value, 0.f}, space).x : warp_sum(value);
  };
  const auto column_of = [&](int piece) { return (piece * threads + int(threadIdx.x)) * kLanes; };

  Loaded<kWords> x_loaded[kPieces], branch_loaded[kPieces];
  const Rows x = at_row<kAligned, kWords>(a.x, row), branch = at_row<kAligned, kWords>(a.branch, row);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) x_loaded[p] = load_lanes<kAligned, kWords>(x, 0, column_of(p), a.width);
  if (a.branch.data) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) branch_loaded[p] = load_lanes<kAligned, kWords>(branch, 0, column_of(p), a.width);
  }
  const int64_t sample = a.rows_per_sample ? row / a.rows_per_sample : 0;

  float value[kPieces][kLanes], sum = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) to_floats<kAligned>(value[p], x_loaded[p], a.x.dtype);
  if (a.branch.data) {  // total = x + row_scale * scale * (branch + branch_bias), as it is once stored
    const float row_scale = scale_of(a.row_scale, sample);
    const Rows scale = at_row<kAligned>(a.scale, sample);
    const OutRows total = at_row<kAligned, kWords>(a.total, row);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      float added[kLanes], vector[kLanes];
      to_floats<kAligned>(added, branch_loaded[p], a.branch.dtype);
      if (a.branch_bias.data) {
        load_floats<kAligned>(vector, a.branch_bias, 0, column_of(p), a.width);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) added[i] += vector[i];
      }
      if (a.scale.data) {
        load_floats<kAligned>(vector, scale, 0, column_of(p), a.width);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) added[i] *= vector[i];
      }
#pragma unroll
      for (int i = 0; i < kLanes; ++i) value[p][i] += row_scale * added[i];
      round_floats<kWords>(value[p], a.total.dtype);
      store_floats<kAligned, kWords>(total, 0, column_of(p), a.width, value[p]);
    }
  }
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) sum += value[p][i];  // zeros from `width` on, as what is loaded there
  }
  const float mean = a.mean ? row_sum(sum, spaces[0]) / a.width : 0.f;  // of equal numbers the same

  float squares = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      value[p][i] = is_inside<kAligned>(column_of(p), i, a.width) ? value[p][i] - mean : 0.f;
      squares += value[p][i] * value[p][i];
    }
  }
  const float rstd = 1.f / sqrtf(row_sum(squares, spaces[1]) / a.width + a.eps);
  if (threadIdx.x == 0) {
    if (a.mean) a.mean[row] = mean;
    a.rstd[row] = rstd;
  }

  const Rows weights = at_row<kAligned>(a.weight, sample), biases = at_row<kAligned>(a.bias, sample);
  const OutRows normed = at_row<kAligned, kWords>(a.normed, row);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    float weight[kLanes], bias[kLanes] = {};
    load_weight<kAligned>(weight, weights, column_of(p), a.width);
    if (a.bias.data) load_floats<kAligned>(bias, biases, 0, column_of(p), a.width);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) value[p][i] = value[p][i] * rstd * weight[i] + bias[i];
    store_floats<kAligned, kWords>(normed, 0, column_of(p), a.width, value[p]);
  }
}

// ------------------------------------------------------------------------------------------------------ backward

constexpr int kSums = 4;  // dweight, dbias, dbranch_bias, dscale

struct LayerNormBackward {
  int64_t rows_per_sample;
  // rows in groups that parameters' gradients are summed over, all rows or a sample's; blocks of each
  int64_t rows_per_group;
  int blocks_per_group;
  int width, sums;                                                             // so many of the four
  float share;                                                                 // 1 over the width
  Rows dtotal, dnormed, total, branch, weight, branch_bias, scale, row_scale;  // data null where absent
  const float *mean, *rstd;                                                    // mean null: an RMSNorm's
  OutRows dx, dbranch;  // data null where not wanted
  float *partial;       // [blocks, sums, width]
  float *row_sums;      // of row_scale's gradient, [rows]; null where it is not wanted
};

// What a thread has of a row as it was loaded.
template <int kWords>
struct LoadedRow {
  Loaded<kWords> dnormed, total, dtotal, branch;
  float mean, rstd;
};

// The most threads of a block, by where it keeps the sums of the parameters' gradients until its last row: in
// registers, the first two of the four, which is all there is without LayerScale and DropPath, so few that five blocks
// fit; all four; or, where so many threads have too few registers, in `partial`.
constexpr int kTwoSums = 128, kFourSums = 512, kSumsInMemory = 768;

// One row at a time, all its columns at once: a thread keeps the same 8 columns from row to row, so the parameters'
// gradients are sums in its registers, written once a block. The next row is on its way meanwhile: of 768 columns of 16
// bits each, 27 KiB a multiprocessor with two sums, where 21 hide the latency.
template <bool kAligned, int kWords, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == kTwoSums ? 5 : 1)
    layer_norm_backward(const __grid_constant__ LayerNormBackward a) {
  __shared__ float2 spaces[2][2][kWarp];  // of two rows, so that one barrier a sum is enough
  constexpr bool kInRegisters = kThreads != kSumsInMemory, kScaled = kThreads != kTwoSums;
  constexpr int kMostSums = !kInRegisters ? 1 : kScaled ? kSums : 2;
  // the others have so many addresses, threads or words that it would spill
  constexpr bool kAhead = kAligned && kInRegisters && (kWords == 1 || !kScaled);
  int column = threadIdx.x * kLanes;
  float* const mine = a.partial + int64_t(blockIdx.x) * a.sums * a.width;
  float sums[kMostSums][kLanes] = {};
  float weight[kLanes];
  // a sample, where it matters
  const int64_t group = blockIdx.x / a.blocks_per_group, begin = group * a.rows_per_group;
  const bool branch_read = kScaled && (a.sums > 3 || a.row_sums);
  // adds to sum `kind`: in memory the first row of a block writes, for nobody has cleared it
  const auto add = [&](int kind, bool first, const float(&term)[kLanes]) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      if constexpr (kInRegisters) {
        sums[kind][i] += term[i];
      } else if (column + i < a.width) {
        float* at = mine + kind * a.width + column + i;
        *at = first ? term[i] : *at + term[i];
      }
    }
  };
  const auto load_row = [&](LoadedRow<kWords>& out, int64_t row) {
    if (a.dnormed.data) {
      out.dnormed = load_lanes<kAligned, kWords>(a.dnormed, row, column, a.width);
      out.total = load_lanes<kAligned, kWords>(a.total, row, column, a.width);
      out.mean = a.mean ? a.mean[row] : 0.f;
      out.rstd = a.rstd[row];
    }
    if constexpr (kInRegisters) {  // with less of them, where they are wanted
      if (a.dtotal.data) out.dtotal = load_lanes<kAligned, kWords>(a.dtotal, row, column, a.width);
      if (branch_read) out.branch = load_lanes<kAligned, kWords>(a.branch, row, column, a.width);
    }
  };

  int64_t at = blockIdx.x % a.blocks_per_group;
  LoadedRow<kWords> next;
  if (kAhead && at < a.rows_per_group) load_row(next, begin + at);
  if (kInRegisters) load_weight<kAligned>(weight, at_row<kAligned>(a.weight, group), column, a.width);
  for (int parity = 0; at < a.rows_per_group; at += a.blocks_per_group, parity ^= 1) {
    // element by element, addresses of vectors that are kept from row to row would take the sums' registers
    if constexpr (!kAligned) asm volatile("" : "+r"(column));
    const int64_t row = begin + at;
    const bool first = at < a.blocks_per_group;
    if (!kAhead) load_row(next, row);
    LoadedRow<kWords> now = next;
    if (kAhead && at + a.blocks_per_group < a.rows_per_group) load_row(next, row + a.blocks_per_group);
    float2(&space)[2][kWarp] = spaces[parity];
    float g[kLanes] = {}, term[kLanes];
    if (a.dnormed.data) {
      float normalised[kLanes], dy[kLanes];
      if (!kInRegisters) load_weight<kAligned>(weight, at_row<kAligned>(a.weight, group), column, a.width);
      to_floats<kAligned>(normalised, now.total, a.total.dtype);
      to_floats<kAligned>(dy, now.dnormed, a.dnormed.dtype);
      float2 c = {};  // the means of dy * weight, and of that times the normalised row
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        normalised[i] = (normalised[i] - now.mean) * now.rstd;
        term[i] = dy[i] * normalised[i];
        c.x += dy[i] * weight[i];
        c.y += term[i] * weight[i];
      }
      add(0, first, term);
      add(1, first, dy);
      c = block_sum(c, space[0]);
      const float c0 = a.mean ? c.x * a.share : 0.f, c1 = c.y * a.share;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) g[i] = (dy[i] * weight[i] - c0 - normalised[i] * c1) * now.rstd;
    }
    if (a.dtotal.data) {
      if constexpr (!kInRegisters) now.dtotal = load_lanes<kAligned, kWords>(a.dtotal, row, column, a.width);
      to_floats<kAligned>(term, now.dtotal, a.dtotal.dtype);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) g[i] += term[i];
    }
    if (a.dx.data) store_floats<kAligned, kWords>(a.dx, row, column, a.width, g);
    if constexpr (!kScaled) continue;

    float scale[kLanes];
    const float row_scale = scale_of(a.row_scale, row / a.rows_per_sample);
    if (a.scale.data) load_floats<kAligned>(scale, a.scale, group, column, a.width);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) term[i] = g[i] * row_scale * (a.scale.data ? scale[i] : 1.f);
    if (a.dbranch.data) store_floats<kAligned, kWords>(a.dbranch, row, column, a.width, term);
    if (a.sums > 2) add(2, first, term);
    if (!branch_read) continue;

    float branch[kLanes], bias[kLanes] = {}, sum = 0;
    if constexpr (!kInRegisters) now.branch = load_lanes<kAligned, kWords>(a.branch, row, column, a.width);
    to_floats<kAligned>(branch, now.branch, a.branch.dtype);
    if (a.branch_bias.data) load_floats<kAligned>(bias, a.branch_bias, 0, column, a.width);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float value = (branch[i] + bias[i]) * g[i];
      term[i] = value * row_scale;
      if (is_inside<kAligned>(column, i, a.width)) sum += a.scale.data ? value * scale[i] : value;
    }
    if (a.sums > 3) add(3, first, term);
    if (a.row_sums) {
      sum = block_sum({sum, 0.f}, space[1]).x;
      if (threadIdx.x == 0) a.row_sums[row] = sum;
    }
  }
  if constexpr (kInRegisters) {
#pragma unroll
    for (int kind = 0; kind < kMostSums; ++kind) {
      if (kind >= a.sums) break;
      const OutRows out{reinterpret_cast<char*>(mine + kind * a.width), DType::f32, 0, 1};
      store_floats<kAligned>(out, 0, column, a.width, sums[kind]);
    }
  }
}

}  // namespace vk
