// mlp: the schemas of vitkernels/ops/mlp.py on the CPU. The activation, its derivative and the first bias's gradient
// follow the extension's own product while it is in cache; a library's product is followed by one pass that does them.
#include "gemm.h"
#include "shared/ops.h"

namespace vk {
std::tuple<Tensor, Tensor> mlp(const Tensor& x, const Tensor& w1, const Maybe& b1, const Tensor& w2, const Maybe& b2,
                               const std::string& activation, bool save) {
  const Activation kind = activation_of(activation);
  const Tensor rows = matrix(x);
  const Matrix a(rows), b = Matrix(w1).transposed();
  const bool own = own_product(a, b);
  const Tensor pre = own ? empty(x, {a.rows, b.cols}) : packed(linear(rows, w1, b1));
  const Tensor activated = save ? empty(pre, shape_of(pre)) : pre;  // in place where nothing is to be saved
  if (own) {
    multiply(activated, a, b, b1, {Then::activate, kind, &pre});
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
  Tensor y = reshaped(linear(activated, w2, b2), with_width(shape_of(x), w2.size(0)));
  return {y, save ? reshaped(pre, with_width(shape_of(x), w1.size(0))) : nothing(x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(const Tensor& dy, const Tensor& x, const Tensor& pre,
                                                                const Tensor& w1, const Tensor& w2,
                                                                const std::string& activation,
                                                                const std::vector<bool>& needs) {
  const Activation kind = activation_of(activation);
  const Tensor g = matrix(dy), rows = matrix(x), h = packed(matrix(pre));
  const int64_t hidden = w1.size(0);
  Tensor dx = nothing(x), dw1 = nothing(x), db1 = nothing(x), dw2 = nothing(x);
  const bool needed = needs[0] || needs[1] || needs[2] || needs[3];
  const Matrix a(g), b(w2), hidden_rows(h);
  const bool own = needed && own_product(a, b);
  // dw2 = dy^T activation(h): its right side can be written as the product wants to read it
  const bool in_panels = own && needs[3] && own_product(a.transposed(), hidden_rows, true);
  // becomes the gradient of the pre-activation in place
  const Tensor dh = own ? empty(h, shape_of(h)) : needed ? packed(gradient_of_input(g, w2)) : nothing(x);
  Tensor activated = in_panels ? space_for_panels(h, h.size(0), hidden) : needs[3] ? empty(h, shape_of(h)) : nothing(x);
  if (own) {
    std::vector<float> sums;
    multiply(dh, a, b, std::nullopt,
             {Then::activate_backward, kind, &h, needs[3] ? &activated : nullptr, needs[2] ? &sums : nullptr, in_panels});
    if (needs[2]) db1 = from_values<float>(x, {hidden}, w1.scalar_type(), sums.data());
  } else if (needed) {
    with_accumulate(x.scalar_type(), [&](auto zero) {
      using A = decltype(zero);
      const DType dtype = dtype_of(h);
      const int64_t row = hidden * size_of(dtype);
      const auto sums = sum_in_parts<A>(h.size(0), hidden, [&](int64_t begin, int64_t end, A* part) {
        kernels<A>().activate_backward(kind, bytes(dh) + begin * row, needs[3] ? bytes(activated) + begin * row : nullptr,
                                       needs[2] ? part : nullptr, bytes(dh) + begin * row, bytes(h) + begin * row,
                                       dtype, end - begin, hidden);
      });
      if (needs[2]) db1 = from_values<A>(x, {hidden}, w1.scalar_type(), sums.data());
    });
  }
  if (in_panels) {
    dw2 = empty(w2, {w2.size(0), hidden});
    multiply(dw2, a.transposed(), hidden_rows, std::nullopt, {}, &activated);
  } else if (needs[3]) {
    dw2 = gradient_of_weight(g, activated);
  }
  activated = nothing(x);  // its memory may serve the next products
  if (needs[1]) dw1 = gradient_of_weight(dh, rows);
  if (needs[0]) dx = reshaped(gradient_of_input(dh, w1), shape_of(x));
  return {dx, dw1, db1, dw2, needs[4] ? gradient_of_bias(g, w2.scalar_type()) : nothing(x)};
}

}  // namespace vk
