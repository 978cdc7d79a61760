// add_layer_norm and add_rms_norm: the schemas of vitkernels/ops/add_layer_norm.py on CUDA.
#include "cuda/add_layer_norm.cuh"

#include <type_traits>

#include "cuda/column_sums.cuh"
#include "cuda/launch.h"

namespace vk {
namespace {

constexpr Rows kNoRows{nullptr, DType::f32, 0, 0};
constexpr OutRows kNoOut{nullptr, DType::f32, 0, 0};
constexpr int kWarpColumns = 1024;
constexpr int kMostColumns = 6144;  // 8 a thread: more threads in a block would leave each too few registers
constexpr int kRowsPerBlock = 4;    // of a warp each

// Rows of one sample share a row_scale; a tensor of one axis is one row of one sample.
int64_t samples_of(const Tensor& x) { return x.dim() > 1 ? x.size(0) : 1; }
int64_t rows_per_sample(const Tensor& x, int64_t rows) {
  return std::max<int64_t>(rows / std::max<int64_t>(samples_of(x), 1), 1);
}

bool by_sample(const Maybe& vector) { return vector && vector->dim() == 2; }

// What Python declines in a sentence.
void check(const char* op, int64_t width) {
  STD_TORCH_CHECK(width <= kMostColumns, op, ": the CUDA C++ kernels take rows of up to ", kMostColumns,
                  " columns; got ", width);
}

unsigned threads_for(int64_t width) { return unsigned(round_up(blocks(width, kLanes), kWarp)); }

bool all_aligned(int64_t width, std::initializer_list<Rows> in, std::initializer_list<OutRows> out) {
  return std::all_of(in.begin(), in.end(), [&](const Rows& r) { return is_aligned(r, width); }) &&
         std::all_of(out.begin(), out.end(), [&](const OutRows& r) { return is_aligned(r, width); });
}

// Whether all that are there are of 16-bit dtypes.
template <class AnyRows = Rows>
bool are_narrow(std::initializer_list<AnyRows> all) {
  return std::all_of(all.begin(), all.end(), [](const AnyRows& r) { return !r.data || size_of(r.dtype) == 2; });
}

template <int count>
using pieces_t = std::integral_constant<int, count>;

Norm norm(const char* op, bool rms, const Tensor& x, const Maybe& branch, const Maybe& weight, const Maybe& bias,
          double eps, const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale, int64_t out_dtype) {
  const Shape shape = shape_of(x), lead(shape.begin(), shape.end() - 1);
  const int64_t width = shape.back(), rows = x.numel() / width;
  check(op, width);
  Tensor total = branch ? empty(x, shape) : nothing(x);
  Tensor normed = empty(x, shape, ScalarType(out_dtype));
  Tensor rstd = empty(x, lead, ScalarType::Float), mean = rms ? nothing(rstd) : empty(x, lead, ScalarType::Float);
  const Operand x_rows(x);
  std::optional<Operand> branch_rows;
  if (branch) branch_rows.emplace(*branch);
  const LayerNormForward a{rows,
                           row_scale || by_sample(weight) || by_sample(scale) ? rows_per_sample(x, rows) : 0,
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
                           rms ? nullptr : static_cast<float*>(mean.data_ptr()),
                           static_cast<float*>(rstd.data_ptr())};
  const bool aligned =
      all_aligned(width, {a.x, a.branch, a.weight, a.bias, a.branch_bias, a.scale}, {a.total, a.normed});
  const Launches launches(op, x, {given(branch), given(weight)});
  const bool narrow = are_narrow({a.x, a.branch}) && are_narrow({a.total, a.normed});
  const auto kernel_of = [&](auto pieces, auto block) {
    return narrow ? layer_norm_forward<pieces, true, 1, block> : layer_norm_forward<pieces, true, 2, block>;
  };
  using std::true_type, std::false_type;
  if (width > kWarpColumns) {
    const auto kernel = aligned ? kernel_of(pieces_t<1>(), true_type()) : layer_norm_forward<1, false, 2, true>;
    launches("layer_norm_forward", kernel, {rows}, dim3(threads_for(width)), 0, a);
  } else {
    const auto kernel = !aligned       ? layer_norm_forward<4, false, 2, false>
                        : width <= 256 ? kernel_of(pieces_t<1>(), false_type())
                        : width <= 512 ? kernel_of(pieces_t<2>(), false_type())
                        : width <= 768 ? kernel_of(pieces_t<3>(), false_type())
                                       : kernel_of(pieces_t<4>(), false_type());
    launches("layer_norm_forward", kernel, {blocks(rows, kRowsPerBlock)}, dim3(kWarp, kRowsPerBlock), 0, a);
  }
  return {total, normed, mean, rstd};
}

NormBackward norm_backward(const char* op, bool rms, const Maybe& dtotal, const Maybe& dnormed, const Tensor& total,
                           const Maybe& branch, const Maybe& weight, const Tensor& mean, const Tensor& rstd,
                           const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale,
                           std::optional<ScalarType> branch_dtype, const std::vector<bool>& needs) {
  const Shape shape = shape_of(total);
  const int64_t width = shape.back(), rows = total.numel() / width;
  check(op, width);
  Tensor dx = needs[0] ? empty(total, shape) : nothing(total);
  Tensor dbranch = needs[1] ? empty(total, shape, *branch_dtype) : nothing(total);
  const int64_t samples = samples_of(total);
  const bool of_sample[] = {by_sample(weight), by_sample(weight), false, by_sample(scale)};
  Tensor vectors[] = {nothing(total), nothing(total), nothing(total), nothing(total)};
  for (int i = 0; i < kSums; ++i) {
    if (!needs[2 + i]) continue;
    const ScalarType dtype = i < 2 ? weight->scalar_type() : ScalarType::Float;
    vectors[i] = empty(total, of_sample[i] ? Shape{samples, width} : Shape{width}, dtype);
    if (rows == 0) torch::stable::zero_(vectors[i]);
  }
  const Launches launches(op, total, {given(dtotal), given(dnormed), given(branch)});

  const Operand total_rows(total);
  std::optional<Operand> dtotal_rows, dnormed_rows, branch_rows;
  if (dtotal) dtotal_rows.emplace(*dtotal);
  if (dnormed) dnormed_rows.emplace(*dnormed);
  if (branch) branch_rows.emplace(*branch);
  const Tensor means = packed(mean), rstds = packed(rstd);
  const int sums = needs[5] ? 4 : needs[4] ? 3 : 2;
  const Tensor row_sums = needs[6] ? empty(total, {rows}, ScalarType::Float) : nothing(total);
  // parameters' gradients are summed over all rows, or over those of each sample that has vectors of its own
  const int64_t groups = of_sample[0] || of_sample[3] ? samples : 1, each = rows / std::max<int64_t>(groups, 1);
  LayerNormBackward a{rows_per_sample(total, rows),
                      each,
                      0,
                      int(width),
                      sums,
                      1.f / float(width),
                      dtotal ? dtotal_rows->rows : kNoRows,
                      dnormed ? dnormed_rows->rows : kNoRows,
                      total_rows.rows,
                      branch ? branch_rows->rows : kNoRows,
                      vector_rows(weight),
                      vector_rows(branch_bias),
                      vector_rows(scale),
                      vector_rows(row_scale),
                      rms ? nullptr : static_cast<const float*>(means.data_ptr()),
                      static_cast<const float*>(rstds.data_ptr()),
                      needs[0] ? out_rows(dx) : kNoOut,
                      needs[1] ? out_rows(dbranch) : kNoOut,
                      nullptr,
                      needs[6] ? static_cast<float*>(row_sums.data_ptr()) : nullptr};
  const bool aligned = all_aligned(width, {a.dtotal, a.dnormed, a.total, a.branch, a.weight, a.branch_bias, a.scale},
                                   {a.dx, a.dbranch});
  const bool narrow = are_narrow({a.dtotal, a.dnormed, a.total, a.branch}) && are_narrow({a.dx, a.dbranch});
  const bool scaled = needs[1] || sums > 2 || needs[6];
  const auto kernel_of = [&](auto threads) {
    return !aligned ? layer_norm_backward<false, 2, threads>
           : narrow ? layer_norm_backward<true, 1, threads>
                    : layer_norm_backward<true, 2, threads>;
  };
  const unsigned threads = threads_for(width);
  const auto kernel = threads > kFourSums ? (aligned ? layer_norm_backward<true, 2, kSumsInMemory>
                                                     : layer_norm_backward<false, 2, kSumsInMemory>)
                      : scaled || threads > kTwoSums ? kernel_of(std::integral_constant<int, kFourSums>())
                                                     : kernel_of(std::integral_constant<int, kTwoSums>());
  // as many blocks as are at work at once, for one more would run alone when all others are done; or one a sample that
  // has sums of its own: each writes one row of partial sums
  const int64_t at_once = launches.at_once(kernel, threads);
  const int64_t blocks_each = std::min(each, std::max<int64_t>(at_once / std::max<int64_t>(groups, 1), 1));
  const int64_t parts = groups * blocks_each;
  const Tensor partial = empty(total, {parts, sums, width}, ScalarType::Float);
  a.blocks_per_group = int(blocks_each);
  a.partial = static_cast<float*>(partial.data_ptr());
  launches("layer_norm_backward", kernel, {parts}, dim3(threads), 0, a);

  for (const bool own : {false, true}) {  // sums over all blocks, and over those of a sample
    const Rows in{bytes(partial), DType::f32, sums * width, 1};
    ColumnSums columns{in, width, parts, own ? blocks_each : parts, int(width), {kNoOut, kNoOut, kNoOut, kNoOut}};
    bool wanted = false;
    for (int i = 0; i < sums; ++i) {
      if (!needs[2 + i] || of_sample[i] != own || rows == 0) continue;
      columns.out[i] = out_rows(vectors[i]);
      wanted = true;
    }
    if (wanted) column_sums(launches, columns, sums);
  }
  Tensor drow_scale = nothing(total);
  if (needs[6]) {
    const std::vector<int64_t> inner{1};
    drow_scale = torch::stable::sum(
        torch::stable::reshape(row_sums, {samples, rows / std::max<int64_t>(samples, 1)}), inner);
  }
  return {dx, dbranch, vectors[0], vectors[1], vectors[2], vectors[3], drow_scale};
}

}  // namespace

Norm add_layer_norm(const Tensor& x, const Maybe& branch, const Maybe& weight, const Maybe& bias, double eps,
                    const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale, int64_t out_dtype) {
  return norm("add_layer_norm", false, x, branch, weight, bias, eps, branch_bias, scale, row_scale, out_dtype);
}

NormBackward add_layer_norm_backward(const Maybe& dtotal, const Maybe& dnormed, const Tensor& total,
                                     const Maybe& branch, const Maybe& weight, const Tensor& mean, const Tensor& rstd,
                                     const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale,
                                     std::optional<ScalarType> branch_dtype, const std::vector<bool>& needs) {
  return norm_backward("add_layer_norm_backward", false, dtotal, dnormed, total, branch, weight, mean, rstd,
                       branch_bias, scale, row_scale, branch_dtype, needs);
}

Norm add_rms_norm(const Tensor& x, const Maybe& branch, const Maybe& weight, const Maybe& bias, double eps,
                  const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale, int64_t out_dtype) {
  return norm("add_rms_norm", true, x, branch, weight, bias, eps, branch_bias, scale, row_scale, out_dtype);
}

NormBackward add_rms_norm_backward(const Maybe& dtotal, const Maybe& dnormed, const Tensor& total, const Maybe& branch,
                                   const Maybe& weight, const Tensor& mean, const Tensor& rstd,
                                   const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale,
                                   std::optional<ScalarType> branch_dtype, const std::vector<bool>& needs) {
  return norm_backward("add_rms_norm_backward", true, dtotal, dnormed, total, branch, weight, mean, rstd, branch_bias,
                       scale, row_scale, branch_dtype, needs);
}

}  // namespace vk
