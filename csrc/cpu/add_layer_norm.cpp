// add_layer_norm and add_rms_norm: the schemas of vitkernels/ops/add_layer_norm.py on the CPU.
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

bool by_sample(const Maybe& vector) { return vector && vector->dim() == 2; }

// The weight of a norm, or the ones that an absent weight stands for.
template <class A>
class Weight {
 public:
  Weight(const Maybe& weight, int64_t width) : given_(weight), ones_(weight ? 0 : width, A(1)) {}
  const A* get() const { return ones_.empty() ? given_.get() : ones_.data(); }

 private:
  Vector<A> given_;
  std::vector<A> ones_;
};

Norm norm(bool rms, const Tensor& x, const Maybe& branch, const Maybe& weight, const Maybe& bias, double eps,
          const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale, int64_t out_dtype) {
  Shape shape = shape_of(x);
  Tensor total = branch ? empty(x, shape) : nothing(x);
  Tensor normed = empty(shape, ScalarType(out_dtype));
  shape.pop_back();
  Tensor rstd = empty(shape, accumulate_dtype(x.scalar_type())), mean = rms ? nothing(rstd) : empty(rstd, shape);
  with_accumulate(x.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Operand x_rows(x);
    std::optional<Operand> branch_rows;
    if (branch) branch_rows.emplace(*branch);
    const int64_t width = x.size(x.dim() - 1);
    const Weight<A> w(weight, width);
    const Vector<A> b(bias), bb(branch_bias), s(scale), rs(row_scale);
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
                                   by_sample(weight) ? width : 0,
                                   by_sample(scale) ? width : 0,
                                   branch ? out_rows(total) : kNoOut,
                                   out_rows(normed),
                                   rms ? nullptr : reinterpret_cast<A*>(bytes(mean)),
                                   reinterpret_cast<A*>(bytes(rstd))};
    parallel(rows_of(x), grain(width), [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(kLayerNormScratch * width);
      kernels<A>().layer_norm_forward(args, begin, end, scratch.get());
    });
  });
  return {total, normed, mean, rstd};
}

NormBackward norm_backward(bool rms, const Maybe& dtotal, const Maybe& dnormed, const Tensor& total,
                           const Maybe& branch, const Maybe& weight, const Tensor& mean, const Tensor& rstd,
                           const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale,
                           std::optional<ScalarType> branch_dtype, const std::vector<bool>& needs) {
  const Shape shape = shape_of(total);
  Tensor dx = needs[0] ? empty(total, shape) : nothing(total);
  Tensor dbranch = needs[1] ? empty(shape, *branch_dtype) : nothing(total);
  return with_accumulate(rstd.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Operand total_rows(total);
    std::optional<Operand> dtotal_rows, dnormed_rows, branch_rows;
    if (dtotal) dtotal_rows.emplace(*dtotal);
    if (dnormed) dnormed_rows.emplace(*dnormed);
    if (branch) branch_rows.emplace(*branch);
    const int64_t width = shape.back(), rows = rows_of(total), samples = samples_of(total);
    const Weight<A> w(weight, width);
    const Vector<A> bb(branch_bias), s(scale), rs(row_scale);
    const Tensor means = packed(mean), rstds = packed(rstd);
    const LayerNormBackward<A> args{width,
                                    rows_per_sample(total),
                                    dtotal ? dtotal_rows->rows : kNoRows,
                                    dnormed ? dnormed_rows->rows : kNoRows,
                                    total_rows.rows,
                                    branch ? branch_rows->rows : kNoRows,
                                    w.get(),
                                    rms ? nullptr : reinterpret_cast<const A*>(bytes(means)),
                                    reinterpret_cast<const A*>(bytes(rstds)),
                                    bb.get(),
                                    s.get(),
                                    rs.get(),
                                    by_sample(weight) ? width : 0,
                                    by_sample(scale) ? width : 0,
                                    needs[0] ? out_rows(dx) : kNoOut,
                                    needs[1] ? out_rows(dbranch) : kNoOut,
                                    needs[4],
                                    needs[5],
                                    needs[6]};
    std::vector<A> row_sums(needs[6] ? rows : 0);
    const int64_t kinds = needs[5] ? 4 : needs[4] ? 3 : 2;
    const int64_t groups = by_sample(weight) || by_sample(scale) ? samples : 1;
    const int64_t rows_of_group = groups ? rows / groups : 0;
    const auto sums = sum_in_parts<A>(groups, rows_of_group, kinds * width, [&](int64_t begin, int64_t end, A* part) {
      Buffer<A> scratch(kLayerNormScratch * width);
      kernels<A>().layer_norm_backward(args, begin, end, part, row_sums.data(), scratch.get());
    });
    const auto vector = [&](int i, ScalarType dtype, bool of_sample) {
      if (!needs[2 + i]) return nothing(total);
      std::vector<A> values((of_sample ? groups : 1) * width);
      for (int64_t group = 0; group < groups; ++group) {
        A* const out = values.data() + (of_sample ? group * width : 0);
        const A* const own = sums.data() + (group * kinds + i) * width;
        for (int64_t j = 0; j < width; ++j) out[j] += own[j];
      }
      return from_values<A>(of_sample ? Shape{groups, width} : Shape{width}, dtype, values.data());
    };
    Tensor drow_scale = nothing(total);
    if (needs[6]) {
      std::vector<A> per_sample(samples);
      for (int64_t i = 0; i < rows; ++i) per_sample[i / args.rows_per_sample] += row_sums[i];
      drow_scale = from_values<A>({samples}, rstd.scalar_type(), per_sample.data());
    }
    const ScalarType accumulate = rstd.scalar_type(), own = weight ? weight->scalar_type() : accumulate;
    return std::make_tuple(dx, dbranch, vector(0, own, by_sample(weight)), vector(1, own, by_sample(weight)),
                           vector(2, accumulate, false), vector(3, accumulate, by_sample(scale)), drow_scale);
  });
}

}  // namespace

Norm add_layer_norm(const Tensor& x, const Maybe& branch, const Maybe& weight, const Maybe& bias, double eps,
                    const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale, int64_t out_dtype) {
  return norm(false, x, branch, weight, bias, eps, branch_bias, scale, row_scale, out_dtype);
}

NormBackward add_layer_norm_backward(const Maybe& dtotal, const Maybe& dnormed, const Tensor& total,
                                     const Maybe& branch, const Maybe& weight, const Tensor& mean, const Tensor& rstd,
                                     const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale,
                                     std::optional<ScalarType> branch_dtype, const std::vector<bool>& needs) {
  return norm_backward(false, dtotal, dnormed, total, branch, weight, mean, rstd, branch_bias, scale, row_scale,
                       branch_dtype, needs);
}

Norm add_rms_norm(const Tensor& x, const Maybe& branch, const Maybe& weight, const Maybe& bias, double eps,
                  const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale, int64_t out_dtype) {
  return norm(true, x, branch, weight, bias, eps, branch_bias, scale, row_scale, out_dtype);
}

NormBackward add_rms_norm_backward(const Maybe& dtotal, const Maybe& dnormed, const Tensor& total, const Maybe& branch,
                                   const Maybe& weight, const Tensor& mean, const Tensor& rstd,
                                   const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale,
                                   std::optional<ScalarType> branch_dtype, const std::vector<bool>& needs) {
  return norm_backward(true, dtotal, dnormed, total, branch, weight, mean, rstd, branch_bias, scale, row_scale,
                       branch_dtype, needs);
}

}  // namespace vk
