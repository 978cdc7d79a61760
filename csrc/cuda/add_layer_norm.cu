// add_layer_norm: the schemas of vitkernels/ops/add_layer_norm.py on CUDA.
#include "cuda/column_sums.cuh"
#include "cuda/common.cuh"
#include "cuda/launch.h"

namespace vk {

// ------------------------------------------------------------------------------------------------------- forward

struct LayerNormForward {
  int64_t rows, rows_per_sample;
  int width;
  float eps;
  Rows x, branch, weight, bias, branch_bias, scale, row_scale;  // data null where absent
  OutRows total, normed;
  float *mean, *rstd;
};

__device__ __forceinline__ float scale_of(const Rows& row_scale, int64_t sample) {
  return row_scale.data ? load(row_scale.data, row_scale.dtype, sample * row_scale.col) : 1.f;
}

// total = x + row_scale * scale * (branch + branch_bias) as it is once stored, 8 columns.
template <bool kAligned>
__device__ __forceinline__ void add_branch(float (&value)[kLanes], const LayerNormForward& a, int64_t row, int column,
                                           float row_scale) {
  float branch[kLanes], factor[kLanes];
  load_floats<kAligned>(branch, a.branch, row, column, a.width);
  if (a.branch_bias.data) {
    load_floats<kAligned>(factor, a.branch_bias, 0, column, a.width);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) branch[i] += factor[i];
  }
  if (a.scale.data) {
    load_floats<kAligned>(factor, a.scale, 0, column, a.width);
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
  const float row_scale = scale_of(a.row_scale, row / a.rows_per_sample);

  float value[kPieces][kLanes], sum = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) load_floats<kAligned>(value[p], a.x, row, column_of(p), a.width);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    if (column_of(p) >= a.width) continue;
    if (a.branch.data) add_branch<kAligned>(value[p], a, row, column_of(p), row_scale);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) sum += column_of(p) + i < a.width ? value[p][i] : 0.f;
  }
  const float mean = row_sum(sum, spaces[0]) / a.width;

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
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }

#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    float weight[kLanes], bias[kLanes] = {};
    load_floats<kAligned>(weight, a.weight, 0, column_of(p), a.width);
    if (a.bias.data) load_floats<kAligned>(bias, a.bias, 0, column_of(p), a.width);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) value[p][i] = (value[p][i] - mean) * rstd * weight[i] + bias[i];
    store_floats<kAligned>(a.normed, row, column_of(p), a.width, value[p]);
  }
}

// ------------------------------------------------------------------------------------------------------ backward

constexpr int kSums = 4;  // dweight, dbias, dbranch_bias, dscale

struct LayerNormBackward {
  int64_t rows, rows_per_sample;
  int width, sums;                                                                      // so many of the four
  Rows dtotal, dnormed, total, branch, weight, branch_bias, scale, row_scale;  // data null where absent
  const float *mean, *rstd;
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
  const int column = threadIdx.x * kLanes;
  float* const mine = a.partial + int64_t(blockIdx.x) * a.sums * a.width;
  float sums[kInRegisters ? kSums : 1][kLanes] = {};
  float weight[kLanes];
  load_floats<kAligned>(weight, a.weight, 0, column, a.width);
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
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, parity ^= 1) {
    const bool first = row == blockIdx.x;
    float(&space)[3][kWarp] = spaces[parity];
    float g[kLanes] = {}, term[kLanes];
    if (a.dnormed.data) {
      float normalised[kLanes], dy[kLanes];
      const Loaded dnormed = load_lanes<kAligned>(a.dnormed, row, column, a.width);
      load_floats<kAligned>(normalised, a.total, row, column, a.width);
      to_floats<kAligned>(dy, dnormed, a.dnormed.dtype);
      const float mean = a.mean[row], rstd = a.rstd[row];
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
      c0 = block_sum(c0, space[0]) / a.width;
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
    if (a.scale.data) load_floats<kAligned>(scale, a.scale, 0, column, a.width);
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

// ----------------------------------------------------------------------------------------------------- launchers

namespace {

constexpr Rows kNoRows{nullptr, DType::f32, 0, 0};
constexpr OutRows kNoOut{nullptr, DType::f32, 0, 0};
constexpr int kWarpColumns = 1024, kInRegisters = 4096;
constexpr int kMostColumns = 6144;  // 8 a thread: more threads in a block would leave each too few registers
constexpr int kRowsPerBlock = 4;    // of a warp each
constexpr int kBlocksPerProcessor = 8;

// Rows of one sample share a row_scale; a tensor of one axis is one row of one sample.
int64_t samples_of(const Tensor& x) { return x.dim() > 1 ? x.size(0) : 1; }
int64_t rows_per_sample(const Tensor& x, int64_t rows) {
  return std::max<int64_t>(rows / std::max<int64_t>(samples_of(x), 1), 1);
}

// What Python declines in a sentence; gives the weight.
const Tensor& check(int64_t width, const Maybe& weight, const Maybe& scale) {
  STD_TORCH_CHECK(weight && weight->dim() == 1 && (!scale || scale->dim() == 1),
                  "add_layer_norm: the CUDA C++ kernels need one weight, and one scale at the most, for all samples");
  STD_TORCH_CHECK(width <= kMostColumns, "add_layer_norm: the CUDA C++ kernels take rows of up to ", kMostColumns,
                  " columns; got ", width);
  return *weight;
}

unsigned threads_for(int64_t width) { return unsigned(round_up(blocks(width, kLanes), kWarp)); }

bool all_aligned(int64_t width, std::initializer_list<Rows> in, std::initializer_list<OutRows> out) {
  return std::all_of(in.begin(), in.end(), [&](const Rows& r) { return is_aligned(r, width); }) &&
         std::all_of(out.begin(), out.end(), [&](const OutRows& r) { return is_aligned(r, width); });
}

}  // namespace

Norm add_layer_norm(const Tensor& x, const Maybe& branch, const Maybe& given_weight, const Maybe& bias, double eps,
                    const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale, ScalarType out_dtype) {
  const Shape shape = shape_of(x), lead(shape.begin(), shape.end() - 1);
  const int64_t width = shape.back(), rows = x.numel() / width;
  const Tensor& weight = check(width, given_weight, scale);
  Tensor total = branch ? empty(x, shape) : nothing(x);
  Tensor normed = empty(x, shape, out_dtype);
  Tensor mean = empty(x, lead, ScalarType::Float), rstd = empty(x, lead, ScalarType::Float);
  const Operand x_rows(x);
  std::optional<Operand> branch_rows;
  if (branch) branch_rows.emplace(*branch);
  const LayerNormForward a{rows,
                           rows_per_sample(x, rows),
                           int(width),
                           float(eps),
                           x_rows.rows,
                           branch ? branch_rows->rows : kNoRows,
                           vector_rows(weight),
                           vector_rows(bias),
                           vector_rows(branch_bias),
                           vector_rows(scale),
                           vector_rows(row_scale),
                           branch ? out_rows(total) : kNoOut,
                           out_rows(normed),
                           static_cast<float*>(mean.data_ptr()),
                           static_cast<float*>(rstd.data_ptr())};
  const bool aligned =
      all_aligned(width, {a.x, a.branch, a.weight, a.bias, a.branch_bias, a.scale}, {a.total, a.normed});
  const Launches launches("add_layer_norm", x, {given(branch), &weight});
  if (width > kWarpColumns) {
    launches("layer_norm_forward", aligned ? layer_norm_forward<1, true, true> : layer_norm_forward<1, false, true>,
             {rows}, dim3(threads_for(width)), 0, a);
  } else {
    const auto kernel = !aligned       ? layer_norm_forward<4, false, false>
                        : width <= 256 ? layer_norm_forward<1, true, false>
                        : width <= 512 ? layer_norm_forward<2, true, false>
                                       : layer_norm_forward<4, true, false>;
    launches("layer_norm_forward", kernel, {blocks(rows, kRowsPerBlock)}, dim3(kWarp, kRowsPerBlock), 0, a);
  }
  return {total, normed, mean, rstd};
}

NormBackward add_layer_norm_backward(const Maybe& dtotal, const Maybe& dnormed, const Tensor& total,
                                     const Maybe& branch, const Maybe& given_weight, const Tensor& mean,
                                     const Tensor& rstd, const Maybe& branch_bias, const Maybe& scale,
                                     const Maybe& row_scale, std::optional<ScalarType> branch_dtype,
                                     const std::vector<bool>& needs) {
  const Shape shape = shape_of(total);
  const int64_t width = shape.back(), rows = total.numel() / width;
  const Tensor& weight = check(width, given_weight, scale);
  Tensor dx = needs[0] ? empty(total, shape) : nothing(total);
  Tensor dbranch = needs[1] ? empty(total, shape, *branch_dtype) : nothing(total);
  const auto vector = [&](bool needed, ScalarType dtype) {
    return needed ? empty(total, {width}, dtype) : nothing(total);
  };
  Tensor vectors[] = {vector(needs[2], weight.scalar_type()), vector(needs[3], weight.scalar_type()),
                      vector(needs[4], ScalarType::Float), vector(needs[5], ScalarType::Float)};
  const Launches launches("add_layer_norm_backward", total, {given(dtotal), given(dnormed), given(branch)});

  const Operand total_rows(total);
  std::optional<Operand> dtotal_rows, dnormed_rows, branch_rows;
  if (dtotal) dtotal_rows.emplace(*dtotal);
  if (dnormed) dnormed_rows.emplace(*dnormed);
  if (branch) branch_rows.emplace(*branch);
  const Tensor means = packed(mean), rstds = packed(rstd);
  const int sums = needs[5] ? 4 : needs[4] ? 3 : 2;
  const bool in_registers = width <= kInRegisters;
  // as many blocks as are at work at once: each writes one row of partial sums
  const int64_t parts = std::min<int64_t>(rows, int64_t(kBlocksPerProcessor) * launches.multiprocessors());
  const Tensor partial = empty(total, {parts, sums, width}, ScalarType::Float);
  const Tensor row_sums = needs[6] ? empty(total, {rows}, ScalarType::Float) : nothing(total);
  const LayerNormBackward a{rows,
                            rows_per_sample(total, rows),
                            int(width),
                            sums,
                            dtotal ? dtotal_rows->rows : kNoRows,
                            dnormed ? dnormed_rows->rows : kNoRows,
                            total_rows.rows,
                            branch ? branch_rows->rows : kNoRows,
                            vector_rows(weight),
                            vector_rows(branch_bias),
                            vector_rows(scale),
                            vector_rows(row_scale),
                            static_cast<const float*>(means.data_ptr()),
                            static_cast<const float*>(rstds.data_ptr()),
                            needs[0] ? out_rows(dx) : kNoOut,
                            needs[1] ? out_rows(dbranch) : kNoOut,
                            static_cast<float*>(partial.data_ptr()),
                            needs[6] ? static_cast<float*>(row_sums.data_ptr()) : nullptr};
  const bool aligned = all_aligned(width, {a.dtotal, a.dnormed, a.total, a.branch, a.weight, a.branch_bias, a.scale},
                                   {a.dx, a.dbranch});
  const auto kernel = in_registers ? (aligned ? layer_norm_backward<true, true> : layer_norm_backward<false, true>)
                                   : (aligned ? layer_norm_backward<true, false> : layer_norm_backward<false, false>);
  launches("layer_norm_backward", kernel, {parts}, dim3(threads_for(width)), 0, a);

  if (needs[2] || needs[3] || needs[4] || needs[5]) {
    const Rows in{bytes(partial), DType::f32, sums * width, 1};
    ColumnSums columns{in, width, parts, std::max<int64_t>(parts, 1), int(width), {kNoOut, kNoOut, kNoOut, kNoOut}};
    for (int i = 0; i < sums; ++i) {
      if (needs[2 + i]) columns.out[i] = out_rows(vectors[i]);
    }
    column_sums(launches, columns, sums);
  }
  Tensor drow_scale = nothing(total);
  if (needs[6]) {
    const int64_t samples = samples_of(total);
    const std::vector<int64_t> inner{1};
    drow_scale = torch::stable::sum(
        torch::stable::reshape(row_sums, {samples, rows / std::max<int64_t>(samples, 1)}), inner);
  }
  return {dx, dbranch, vectors[0], vectors[1], vectors[2], vectors[3], drow_scale};
}

}  // namespace vk
