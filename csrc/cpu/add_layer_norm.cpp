// add_layer_norm: the schemas of vitkernels/ops/add_layer_norm.py on the CPU.
#include "shared/ops.h"
#include "tensors.h"

namespace vk {
namespace {

const Rows kNoRows{nullptr, DType::f32, 0, 0};
const OutRows kNoOut{nullptr, DType::f32, 0, 0};

int64_t rows_of(const Tensor& x) { return x.numel() / x.size(x.dim() - 1); }
// The first axis is the batch; a tensor of one axis is one row of one sample.
int64_t samples_of(const Tensor& x) { return x.dim() > 1 ? x.size(0) : 1; }
int64_t rows_per_sample(const Tensor& x) { return std::max<int64_t>(rows_of(x) / std::max<int64_t>(samples_of(x), 1), 1); }

int64_t grain(int64_t width) { return 16384 / std::max<int64_t>(width, 1); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Maybe& branch, const Tensor& weight,
                                                          const Maybe& bias, double eps, const Maybe& branch_bias,
                                                          const Maybe& scale, const Maybe& row_scale,
                                                          ScalarType out_dtype) {
  Shape shape = shape_of(x);
  Tensor total = branch ? empty(x, shape) : nothing(x);
  Tensor normed = empty(x, shape, out_dtype);
  shape.pop_back();
  Tensor mean = empty(x, shape, accumulate_dtype(x.scalar_type())), rstd = empty(mean, shape);
  with_accumulate(x.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Operand x_rows(x);
    std::optional<Operand> branch_rows;
    if (branch) branch_rows.emplace(*branch);
    const Vector<A> w(weight), b(bias), bb(branch_bias), s(scale), rs(row_scale);
    const int64_t width = x.size(x.dim() - 1);
    const LayerNormForward<A> args{width,
                                   rows_per_sample(x),
                                   eps,
                                   x_rows.rows,
                                   branch ? branch_rows->rows : kNoRows,
                                   w.get(),
                                   b.get(),
                                   bb.get(),
                                   s.get(),
                                   rs.get(),
                                   branch ? out_rows(total) : kNoOut,
                                   out_rows(normed),
                                   reinterpret_cast<A*>(bytes(mean)),
                                   reinterpret_cast<A*>(bytes(rstd))};
    parallel(rows_of(x), grain(width), [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(kLayerNormScratch * width);
      kernels<A>().layer_norm_forward(args, begin, end, scratch.get());
    });
  });
  return {total, normed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Maybe& dtotal, const Maybe& dnormed, const Tensor& total, const Maybe& branch, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd, const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale,
    std::optional<ScalarType> branch_dtype, const std::vector<bool>& needs) {
  const Shape shape = shape_of(total);
  Tensor dx = needs[0] ? empty(total, shape) : nothing(total);
  Tensor dbranch = needs[1] ? empty(total, shape, *branch_dtype) : nothing(total);
  return with_accumulate(mean.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Operand total_rows(total);
    std::optional<Operand> dtotal_rows, dnormed_rows, branch_rows;
    if (dtotal) dtotal_rows.emplace(*dtotal);
    if (dnormed) dnormed_rows.emplace(*dnormed);
    if (branch) branch_rows.emplace(*branch);
    const Vector<A> w(weight), bb(branch_bias), s(scale), rs(row_scale);
    const Tensor means = packed(mean), rstds = packed(rstd);
    const int64_t width = shape.back(), rows = rows_of(total);
    const LayerNormBackward<A> args{width,
                                    rows_per_sample(total),
                                    dtotal ? dtotal_rows->rows : kNoRows,
                                    dnormed ? dnormed_rows->rows : kNoRows,
                                    total_rows.rows,
                                    branch ? branch_rows->rows : kNoRows,
                                    w.get(),
                                    reinterpret_cast<const A*>(bytes(means)),
                                    reinterpret_cast<const A*>(bytes(rstds)),
                                    bb.get(),
                                    s.get(),
                                    rs.get(),
                                    needs[0] ? out_rows(dx) : kNoOut,
                                    needs[1] ? out_rows(dbranch) : kNoOut,
                                    needs[4],
                                    needs[5],
                                    needs[6]};
    std::vector<A> row_sums(needs[6] ? rows : 0);
    const int64_t kinds = needs[5] ? 4 : needs[4] ? 3 : 2;
    const auto sums = sum_in_parts<A>(rows, kinds * width, [&](int64_t begin, int64_t end, A* part) {
      Buffer<A> scratch(kLayerNormScratch * width);
      kernels<A>().layer_norm_backward(args, begin, end, part, row_sums.data(), scratch.get());
    });
    const auto vector = [&](int i, ScalarType dtype) {
      return needs[2 + i] ? from_values<A>(total, {width}, dtype, sums.data() + i * width) : nothing(total);
    };
    Tensor drow_scale = nothing(total);
    if (needs[6]) {
      std::vector<A> per_sample(samples_of(total));
      for (int64_t i = 0; i < rows; ++i) per_sample[i / args.rows_per_sample] += row_sums[i];
      drow_scale = from_values<A>(total, {samples_of(total)}, mean.scalar_type(), per_sample.data());
    }
    return std::make_tuple(dx, dbranch, vector(0, weight.scalar_type()), vector(1, weight.scalar_type()),
                           vector(2, mean.scalar_type()), vector(3, mean.scalar_type()), drow_scale);
  });
}

}  // namespace vk
