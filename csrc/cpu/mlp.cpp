// mlp: the schemas of vitkernels/ops/mlp.py on the CPU. The activation, its derivative and the first bias's gradient
// follow the extension's own product while it is in cache; a library's product is followed by one pass that does them.
#include "gemm.h"
#include "shared/ops.h"

namespace vk {

std::tuple<Tensor, Tensor> mlp(const Tensor& x, const Tensor& w1, const Maybe& b1, const Tensor& w2, const Maybe& b2,
                               const std::string& activation, bool save) {
  const Activation kind = activation_of(activation);
  const Matrix a(x), b = Matrix(w1).transposed();
  const Shape hidden_shape = with_width(shape_of(x), b.cols);
  const Way way = way_of(a, b, Kind::forward);
  const Tensor pre = way == Way::library ? linear(a, Matrix(w1), b1, hidden_shape) : empty(x, hidden_shape);
  const Tensor activated = save ? empty(x, hidden_shape) : pre;  // in place where nothing is to be saved
  if (way != Way::library) {
    multiply(way, activated, a, b, b1, {Then::activate, kind, &pre});
  } else {
    const DType dtype = dtype_of(pre);
    const int64_t size = size_of(dtype);
    with_accumulate(x.scalar_type(), [&](auto zero) {
      parallel(pre.numel(), 16384, [&](int64_t begin, int64_t end) {
        kernels<decltype(zero)>().activate(kind, bytes(activated) + begin * size, bytes(pre) + begin * size, dtype,
                                           end - begin);
      });
    });
  }
  Tensor y = linear(Matrix(activated), Matrix(w2), b2, with_width(hidden_shape, w2.size(0)));
  return {y, save ? pre : nothing(x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(const Tensor& dy, const Tensor& x, const Tensor& pre,
                                                                const Tensor& w1, const Tensor& w2,
                                                                const std::string& activation,
                                                                const std::vector<bool>& needs, int64_t grad_dtype) {
  const Activation kind = activation_of(activation);
  const Tensor h = packed(pre);
  const Matrix g(dy), rows(x), b(w2), hidden_rows(h);
  const int64_t hidden = w1.size(0);
  const Shape hidden_shape{hidden_rows.rows, hidden};
  Maybe db1, dw2;
  const bool needed = needs[0] || needs[1] || needs[2] || needs[3];
  const Way way = needed ? way_of(g, b, Kind::of_input) : Way::library;
  // dw2 = dy^T activation(h): its right side can be written as the product wants to read it
  const bool in_panels = needs[3] && (way == Way::panels || (way == Way::library && dtype_of(h) == DType::bf16)) &&
                         way_of(g.transposed(), hidden_rows, Kind::of_weight) == Way::panels;
  // becomes the gradient of the pre-activation in place
  const Tensor dh = !needed                ? nothing(x)
                    : way == Way::library ? gradient_of_input(g, b, hidden_shape)
                                          : empty(x, hidden_shape);
  Maybe activated;
  if (needs[3]) activated = in_panels ? space_for_panels(h, hidden_rows.rows, hidden) : empty(x, hidden_shape);
  if (way != Way::library) {
    std::vector<float> sums;
    multiply(way, dh, g, b, std::nullopt,
             {Then::activate_backward, kind, &h, activated ? &*activated : nullptr, needs[2] ? &sums : nullptr, in_panels});
    if (needs[2]) db1 = gradient_of_bias<float>(rows, dtype_for(grad_dtype, w1), sums);
  } else if (needed) {
    with_accumulate(x.scalar_type(), [&](auto zero) {
      using A = decltype(zero);
      const DType dtype = dtype_of(h);
      const int64_t row = hidden * size_of(dtype);
      // by pairs of rows: a word of a panel has two
      const int64_t each = in_panels ? 2 : 1, count = hidden_rows.rows;
      auto sums = sum_in_parts<A>((count + each - 1) / each, hidden, [&](int64_t from, int64_t to, A* part) {
        const int64_t begin = from * each, end = std::min(to * each, count);
        char* const into = activated ? bytes(*activated) + (in_panels ? 0 : begin * row) : nullptr;
        kernels<A>().activate_backward(kind, bytes(dh) + begin * row, into, needs[2] ? part : nullptr,
                                       bytes(dh) + begin * row, bytes(h) + begin * row, dtype, end - begin, hidden, begin,
                                       in_panels ? count : 0);
      });
      if (needs[2]) db1 = gradient_of_bias<A>(rows, dtype_for(grad_dtype, w1), sums);
    });
  }
  if (in_panels) {
    dw2 = gradient_by_panels(g, hidden_rows, *activated, shape_of(w2), dtype_for(grad_dtype, w2));
  } else if (needs[3]) {
    dw2 = gradient_of_weight(g, Matrix(*activated), shape_of(w2), dtype_for(grad_dtype, w2));
  }
  activated.reset();  // its memory may serve the next products
  Tensor dw1 = needs[1] ? gradient_of_weight(Matrix(dh), rows, shape_of(w1), dtype_for(grad_dtype, w1)) : nothing(x);
  Tensor dx = needs[0] ? gradient_of_input(Matrix(dh), Matrix(w1), shape_of(x)) : nothing(x);
  Tensor db2 = needs[4] ? gradient_of_bias(g, dtype_for(grad_dtype, w2)) : nothing(x);
  return {dx, dw1, db1 ? *db1 : nothing(x), dw2 ? *dw2 : nothing(x), db2};
}

}  // namespace vk
