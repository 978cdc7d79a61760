// glu_mlp: the schemas of vitkernels/ops/glu_mlp.py on the CPU. The gate, its derivative and the first biases' gradient
// follow the extension's own product while it is in cache; a library's product is followed by one pass that does them.
// Gate and up that lie apart are multiplied as one where the product can read them so (gemm.h).
#include <cstring>

#include "gemm.h"
#include "shared/ops.h"

namespace vk {
namespace {

// Biases that are apart, in `dtype`; zeros for one that is not there.
Maybe bias_of(const Maybe& gate, const Maybe& up, int64_t width, ScalarType dtype) {
  if (!gate && !up) return std::nullopt;
  std::vector<Tensor> both;
  for (const Maybe& each : {gate, up}) {
    both.push_back(each ? *each : empty({width}, dtype));
    if (!each) std::memset(bytes(both.back()), 0, size_t(width * size_of(dtype_of(both.back()))));
  }
  return stacked(both, dtype);
}

}  // namespace

std::tuple<Tensor, Tensor> glu_mlp(const Tensor& x, const Tensor& w_gate_up, const Maybe& b_gate_up,
                                   const Maybe& w_up, const Maybe& b_up, const Tensor& w_down, const Maybe& b_down,
                                   const std::string& activation, bool save) {
  const Activation kind = activation_of(activation);
  const Matrix a(x);
  const Parted weight = weight_of(packed(w_gate_up), w_up, a.dtype), b = weight.transposed();
  const int64_t hidden = b.cols / 2;
  const Maybe bias = w_up ? bias_of(b_gate_up, b_up, hidden, a.dtype) : b_gate_up;
  const Shape shape = with_width(shape_of(x), hidden), wide = with_width(shape, 2 * hidden);
  const Way way = way_of(a, b, Kind::forward);
  const Tensor gated = empty(x, shape);
  Tensor pre = nothing(x);
  if (way != Way::library) {
    if (save) pre = empty(x, wide);
    multiply(way, gated, a, b, bias, {Then::gate, kind, save ? &pre : nullptr});
  } else {
    pre = linear(a, weight, bias, wide);
    const DType dtype = dtype_of(pre);
    const int64_t row = hidden * size_of(dtype);
    with_accumulate(x.scalar_type(), [&](auto zero) {
      parallel(a.rows, 16384 / std::max<int64_t>(hidden, 1), [&](int64_t begin, int64_t end) {
        kernels<decltype(zero)>().gate(kind, bytes(gated) + begin * row, bytes(pre) + begin * 2 * row, dtype,
                                       end - begin, hidden);
      });
    });
  }
  Tensor y = linear(Matrix(gated), Matrix(w_down), b_down, with_width(shape, w_down.size(0)));
  return {y, save ? pre : nothing(x)};
}

GluMlpBackward glu_mlp_backward(const Tensor& dy, const Tensor& x, const Tensor& pre, const Tensor& w_gate_up,
                                const Maybe& w_up, const Tensor& w_down, const std::string& activation,
                                const std::vector<bool>& needs, int64_t grad_dtype) {
  const Activation kind = activation_of(activation);
  const Tensor h = packed(pre);
  const Matrix g(dy), rows(x), b(w_down);
  const int64_t hidden = w_down.size(1), count = rows.rows;
  Tensor dx = nothing(x), dw_gate_up = nothing(x), db_gate_up = nothing(x), dw_up = nothing(x), db_up = nothing(x);
  Tensor dw_down = nothing(x);
  const bool needs_bias = needs[2] || needs[4], needs_down = needs[5];
  const bool needed = needs[0] || needs[1] || needs[3] || needs_bias || needs_down;
  const Way way = needed ? way_of(g, b, Kind::of_input) : Way::library;
  Tensor dpre = needed ? empty(x, {count, 2 * hidden}) : nothing(x), gated = nothing(x);
  const auto set_biases = [&](auto& sums) {
    using Sums = std::decay_t<decltype(sums)>;
    if (w_up) {
      Sums up(sums.begin() + hidden, sums.end());
      sums.resize(hidden);
      if (needs[4]) db_up = gradient_of_bias(rows, dtype_for(grad_dtype, *w_up), up);
    }
    if (needs[2]) db_gate_up = gradient_of_bias(rows, dtype_for(grad_dtype, w_gate_up), sums);
  };
  bool in_panels = false;
  if (way != Way::library) {
    // dw_down = dy^T gated: its right side can be written as the product wants to read it
    Matrix as_written = g;
    as_written.cols = as_written.row = hidden;
    as_written.col = 1;
    in_panels = way == Way::panels && needs_down &&
                way_of(g.transposed(), as_written, Kind::of_weight) == Way::panels;
    if (needs_down) gated = in_panels ? space_for_panels(h, count, hidden) : empty(x, {count, hidden});
    std::vector<float> sums;
    multiply(way, dpre, g, b, std::nullopt,
             {Then::gate_backward, kind, &h, needs_down ? &gated : nullptr, needs_bias ? &sums : nullptr, in_panels});
    if (needs_bias) set_biases(sums);
    if (in_panels) dw_down = gradient_by_panels(g, as_written, gated, shape_of(w_down), dtype_for(grad_dtype, w_down));
  } else if (needed) {
    gated = gradient_of_input(g, b, {count, hidden});  // becomes what was multiplied, in place
    with_accumulate(x.scalar_type(), [&](auto zero) {
      using A = decltype(zero);
      const DType dtype = dtype_of(h);
      const int64_t row = hidden * size_of(dtype);
      auto sums = sum_in_parts<A>(count, 2 * hidden, [&](int64_t begin, int64_t end, A* part) {
        char* const here = bytes(gated) + begin * row;
        kernels<A>().gate_backward(kind, bytes(dpre) + begin * 2 * row, needs_down ? here : nullptr,
                                   needs_bias ? part : nullptr, here, bytes(h) + begin * 2 * row, dtype, end - begin,
                                   hidden);
      });
      if (needs_bias) set_biases(sums);
    });
  }
  if (needs_down && !in_panels) {
    dw_down = gradient_of_weight(g, Matrix(gated), shape_of(w_down), dtype_for(grad_dtype, w_down));
  }
  gated = nothing(x);  // its memory may serve the next products
  const auto dweight = [&](const Tensor& dright, const Tensor& weight) {
    return gradient_of_weight(Matrix(dright), rows, shape_of(weight), dtype_for(grad_dtype, weight));
  };
  if (needs[1]) dw_gate_up = dweight(w_up ? columns_of(dpre, 0, hidden) : dpre, w_gate_up);
  if (needs[3]) dw_up = dweight(columns_of(dpre, hidden, hidden), *w_up);
  if (needs[0]) dx = gradient_of_input(Matrix(dpre), weight_of(w_gate_up, w_up, rows.dtype), shape_of(x));
  const Tensor db_down = needs[6] ? gradient_of_bias(g, dtype_for(grad_dtype, w_down)) : nothing(x);
  return {dx, dw_gate_up, db_gate_up, dw_up, db_up, dw_down, db_down};
}

}  // namespace vk
