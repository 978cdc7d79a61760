// glu_mlp: the schemas of vitkernels/ops/glu_mlp.py on the CPU. The gate, its derivative and the first bias's gradient
// follow the extension's own product while it is in cache; a library's product is followed by one pass that does them.
#include "gemm.h"
#include "shared/ops.h"

namespace vk {

std::tuple<Tensor, Tensor> glu_mlp(const Tensor& x, const Tensor& w_gate_up, const Maybe& b_gate_up,
                                   const Tensor& w_down, const Maybe& b_down, const std::string& activation,
                                   bool save) {
  const Activation kind = activation_of(activation);
  const Tensor weight = packed(w_gate_up);
  const int64_t hidden = weight.size(0) / 2;
  const Matrix a(x), b = Matrix(weight).transposed();
  const Shape shape = with_width(shape_of(x), hidden), wide = with_width(shape, 2 * hidden);
  const Way way = way_of(a, b);
  const Tensor gated = empty(x, shape);
  Tensor pre = nothing(x);
  if (way != Way::library) {
    if (save) pre = empty(x, wide);
    multiply(way, gated, a, b, b_gate_up, {Then::gate, kind, save ? &pre : nullptr});
  } else {
    pre = linear(a, Matrix(weight), b_gate_up, wide);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> glu_mlp_backward(const Tensor& dy, const Tensor& x,
                                                                    const Tensor& pre, const Tensor& w_gate_up,
                                                                    const Tensor& w_down, const std::string& activation,
                                                                    const std::vector<bool>& needs) {
  const Activation kind = activation_of(activation);
  const Tensor h = packed(pre);
  const Matrix g(dy), rows(x), b(w_down);
  const int64_t hidden = w_down.size(1), count = rows.rows;
  Tensor dx = nothing(x), dw_gate_up = nothing(x), db_gate_up = nothing(x), dw_down = nothing(x);
  const bool needed = needs[0] || needs[1] || needs[2] || needs[3];
  const Way way = needed ? way_of(g, b) : Way::library;
  Tensor dpre = needed ? empty(x, {count, 2 * hidden}) : nothing(x), gated = nothing(x);
  bool in_panels = false;
  if (way != Way::library) {
    // dw_down = dy^T gated: its right side can be written as the product wants to read it
    Matrix as_written = g;
    as_written.cols = as_written.row = hidden;
    as_written.col = 1;
    in_panels = way == Way::panels && needs[3] && way_of(g.transposed(), as_written, true) == Way::panels;
    if (needs[3]) gated = in_panels ? space_for_panels(h, count, hidden) : empty(x, {count, hidden});
    std::vector<float> sums;
    multiply(way, dpre, g, b, std::nullopt,
             {Then::gate_backward, kind, &h, needs[3] ? &gated : nullptr, needs[2] ? &sums : nullptr, in_panels});
    if (needs[2]) db_gate_up = gradient_of_bias<float>(rows, w_gate_up.scalar_type(), sums);
    if (in_panels) {
      dw_down = empty(shape_of(w_down), w_down.scalar_type());
      multiply(Way::panels, dw_down, g.transposed(), as_written, std::nullopt, {}, &gated);
    }
  } else if (needed) {
    gated = gradient_of_input(g, b, {count, hidden});  // becomes what was multiplied, in place
    with_accumulate(x.scalar_type(), [&](auto zero) {
      using A = decltype(zero);
      const DType dtype = dtype_of(h);
      const int64_t row = hidden * size_of(dtype);
      auto sums = sum_in_parts<A>(count, 2 * hidden, [&](int64_t begin, int64_t end, A* part) {
        char* const here = bytes(gated) + begin * row;
        kernels<A>().gate_backward(kind, bytes(dpre) + begin * 2 * row, needs[3] ? here : nullptr,
                                   needs[2] ? part : nullptr, here, bytes(h) + begin * 2 * row, dtype, end - begin,
                                   hidden);
      });
      if (needs[2]) db_gate_up = gradient_of_bias<A>(rows, w_gate_up.scalar_type(), sums);
    });
  }
  if (needs[3] && !in_panels) dw_down = gradient_of_weight(g, Matrix(gated), shape_of(w_down), w_down.scalar_type());
  gated = nothing(x);  // its memory may serve the next products
  if (needs[1]) {
    dw_gate_up = gradient_of_weight(Matrix(dpre), rows, shape_of(w_gate_up), w_gate_up.scalar_type());
  }
  if (needs[0]) dx = gradient_of_input(Matrix(dpre), Matrix(w_gate_up), shape_of(x));
  return {dx, dw_gate_up, db_gate_up, dw_down, needs[4] ? gradient_of_bias(g, w_down.scalar_type()) : nothing(x)};
}

}  // namespace vk
