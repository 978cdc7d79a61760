// The kernels of add_layer_norm and add_rms_norm, which has no mean. Vectors are rows: one for all samples, or one for
// each (Rows with a step from one to the next); a weight that is absent stands for ones.
#pragma once
#include "cuda/common.cuh"

namespace vk {

// ------------------------------------------------------------------------------------------------------- forward

struct LayerNormForward {
  int64_t rows, rows_per_sample;
  int width;
  float eps;
  Rows x, branch, weight, bias, branch_bias, scale, row_scale;  // data null where absent
  OutRows total, normed;
  float *mean, *rstd;  // mean null: an RMSNorm's
};

__device__ __forceinline__ float scale_of(const Rows& row_scale, int64_t sample) {
  return row_scale.data ? load(row_scale.data, row_scale.dtype, sample * row_scale.col) : 1.f;
}

template <bool kAligned>
__device__ __forceinline__ void load_weight(float (&out)[kLanes], const Rows& weight, int64_t sample, int column,
                                            int width) {
  for (float& each : out) each = 1;
  if (weight.data) load_floats<kAligned>(out, weight, sample, column, width);
}

// total = x + row_scale * scale * (branch + branch_bias) as it is once stored, 8 columns.
template <bool kAligned>
__device__ __forceinline__ void add_branch(float (&value)[kLanes], const LayerNormForward& a, int64_t row,
                                           int64_t sample, int column, float row_scale) {
  float branch[kLanes], factor[kLanes];
  load_floats<kAligned>(branch, a.branch, row, column, a.width);
  if (a.branch_bias.data) {
    load_floats<kAligned>(factor, a.branch_bias, 0, column, a.width);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) branch[i] += factor[i];
  }
  if (a.scale.data) {
    load_floats<kAligned>(factor, a.scale, sample, column, a.width);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) branch[i] *= factor[i];
  }
#pragma unroll
  for (int i = 0; i < kLanes; ++i) value[i] = rounded(value[i] + row_scale * branch[i], a.total.dtype);
  store_floats<kAligned>(a.total, row, column, a.width, value);
}

// A row stays in registers from its first load to its last store: kPieces times 8 columns a thread. Up to 1,024 columns
// a warp has the row, which needs no barrier, and four of them make a block; beyond, the block has it.
template <int kPieces, bool kAligned, bool kBlock>
__global__ void __launch_bounds__(kBlock ? 768 : 128, 1)
    layer_norm_forward(const __grid_constant__ LayerNormForward a) {
  __shared__ float spaces[2][kWarp];
  const int threads = kBlock ? blockDim.x : kWarp;
  const int64_t row = kBlock ? int64_t(blockIdx.x) : int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  const auto row_sum = [&](float value, float* space) { return kBlock ? block_sum(value, space) : warp_sum(value); };
  const auto column_of = [&](int piece) { return (piece * threads + int(threadIdx.x)) * kLanes; };
  const int64_t sample = row / a.rows_per_sample;
  const float row_scale = scale_of(a.row_scale, sample);

  float value[kPieces][kLanes], sum = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) load_floats<kAligned>(value[p], a.x, row, column_of(p), a.width);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    if (column_of(p) >= a.width) continue;
    if (a.branch.data) add_branch<kAligned>(value[p], a, row, sample, column_of(p), row_scale);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) sum += column_of(p) + i < a.width ? value[p][i] : 0.f;
  }
  const float mean = a.mean ? row_sum(sum, spaces[0]) / a.width : 0.f;

  float squares = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float centred = column_of(p) + i < a.width ? value[p][i] - mean : 0.f;
      squares += centred * centred;
    }
  }
  const float rstd = 1.f / sqrtf(row_sum(squares, spaces[1]) / a.width + a.eps);
  if (threadIdx.x == 0) {
    if (a.mean) a.mean[row] = mean;
    a.rstd[row] = rstd;
  }

#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    float weight[kLanes], bias[kLanes] = {};
    load_weight<kAligned>(weight, a.weight, sample, column_of(p), a.width);
    if (a.bias.data) load_floats<kAligned>(bias, a.bias, sample, column_of(p), a.width);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) value[p][i] = (value[p][i] - mean) * rstd * weight[i] + bias[i];
    store_floats<kAligned>(a.normed, row, column_of(p), a.width, value[p]);
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
  Rows dtotal, dnormed, total, branch, weight, branch_bias, scale, row_scale;  // data null where absent
  const float *mean, *rstd;                                                    // mean null: an RMSNorm's
  OutRows dx, dbranch;  // data null where not wanted
  float *partial;       // [blocks, sums, width]
  float *row_sums;      // of row_scale's gradient, [rows]; null where it is not wanted
};

// One row at a time, all its columns at once: a thread keeps the same 8 columns from row to row, so the parameters'
// gradients are sums in its registers, written once a block. Beyond 4,096 columns a block has so many threads that
// registers do not hold the sums; they are kept in `partial`.
template <bool kAligned, bool kInRegisters>
__global__ void __launch_bounds__(kInRegisters ? 512 : 768)
    layer_norm_backward(const __grid_constant__ LayerNormBackward a) {
  __shared__ float spaces[2][3][kWarp];  // of two rows, so that one barrier a sum is enough
  int column = threadIdx.x * kLanes;
  float* const mine = a.partial + int64_t(blockIdx.x) * a.sums * a.width;
  float sums[kInRegisters ? kSums : 1][kLanes] = {};
  float weight[kLanes];
  const int64_t group = blockIdx.x / a.blocks_per_group, begin = group * a.rows_per_group;  // a sample, where it matters
  load_weight<kAligned>(weight, a.weight, group, column, a.width);
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

  int parity = 0;
  for (int64_t at = blockIdx.x % a.blocks_per_group; at < a.rows_per_group; at += a.blocks_per_group, parity ^= 1) {
    // element by element, addresses of vectors that are kept from row to row would take the sums' registers
    if constexpr (!kAligned) asm volatile("" : "+r"(column));
    const int64_t row = begin + at;
    const bool first = at < a.blocks_per_group;
    float(&space)[3][kWarp] = spaces[parity];
    float g[kLanes] = {}, term[kLanes];
    if (a.dnormed.data) {
      float normalised[kLanes], dy[kLanes];
      const Loaded dnormed = load_lanes<kAligned>(a.dnormed, row, column, a.width);
      load_floats<kAligned>(normalised, a.total, row, column, a.width);
      to_floats<kAligned>(dy, dnormed, a.dnormed.dtype);
      const float mean = a.mean ? a.mean[row] : 0.f, rstd = a.rstd[row];
      float c0 = 0, c1 = 0;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        normalised[i] = (normalised[i] - mean) * rstd;
        term[i] = dy[i] * normalised[i];
        c0 += dy[i] * weight[i];
        c1 += term[i] * weight[i];
      }
      add(0, first, term);
      add(1, first, dy);
      c0 = a.mean ? block_sum(c0, space[0]) / a.width : 0.f;
      c1 = block_sum(c1, space[1]) / a.width;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) g[i] = (dy[i] * weight[i] - c0 - normalised[i] * c1) * rstd;
    }
    if (a.dtotal.data) {
      load_floats<kAligned>(term, a.dtotal, row, column, a.width);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) g[i] += term[i];
    }
    if (a.dx.data) store_floats<kAligned>(a.dx, row, column, a.width, g);
    if (!a.dbranch.data && a.sums <= 2 && !a.row_sums) continue;

    float scale[kLanes];
    const float row_scale = scale_of(a.row_scale, row / a.rows_per_sample);
    if (a.scale.data) load_floats<kAligned>(scale, a.scale, group, column, a.width);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) term[i] = g[i] * row_scale * (a.scale.data ? scale[i] : 1.f);
    if (a.dbranch.data) store_floats<kAligned>(a.dbranch, row, column, a.width, term);
    if (a.sums > 2) add(2, first, term);
    if (a.sums <= 3 && !a.row_sums) continue;

    float branch[kLanes], bias[kLanes] = {}, sum = 0;
    load_floats<kAligned>(branch, a.branch, row, column, a.width);
    if (a.branch_bias.data) load_floats<kAligned>(bias, a.branch_bias, 0, column, a.width);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float value = (branch[i] + bias[i]) * g[i];
      term[i] = value * row_scale;
      if (column + i < a.width) sum += a.scale.data ? value * scale[i] : value;
    }
    if (a.sums > 3) add(3, first, term);
    if (a.row_sums) {
      sum = block_sum(sum, space[2]);
      if (threadIdx.x == 0) a.row_sums[row] = sum;
    }
  }
  if constexpr (kInRegisters) {
#pragma unroll
    for (int kind = 0; kind < kSums; ++kind) {
      if (kind >= a.sums) break;
      const OutRows out{reinterpret_cast<char*>(mine + kind * a.width), DType::f32, 0, 1};
      store_floats<kAligned>(out, 0, column, a.width, sums[kind]);
    }
  }
}

}  // namespace vk
