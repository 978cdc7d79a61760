// linear: the schemas of vitkernels/ops/linear.py, on the products of either half of the extension.
#include "products.h"
#include "ops.h"

namespace vk {

Tensor linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return linear(Matrix(x), Matrix(weight), bias, with_width(shape_of(x), weight.size(0)));
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   const std::vector<bool>& needs, int64_t grad_dtype) {
  const Matrix g(dy);
  const ScalarType dtype = dtype_for(grad_dtype, weight);
  return {
      needs[0] ? gradient_of_input(g, Matrix(weight), shape_of(x)) : nothing(x),
      needs[1] ? gradient_of_weight(g, Matrix(x), shape_of(weight), dtype) : nothing(x),
      needs[2] ? gradient_of_bias(g, dtype) : nothing(x),
  };
}

}  // namespace vk
