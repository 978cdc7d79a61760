// Matrix products on CUDA: torch's, that is cuBLAS, which adds a bias in its own epilogue.
#include "shared/products.h"

namespace vk {

Tensor linear(const Matrix& x, const Matrix& weight, const std::optional<Tensor>& bias, const Shape& shape) {
  const auto rounded_bias = bias ? std::make_optional(cast(*bias, x.dtype)) : std::nullopt;
  return reshaped(aten_linear(tensor_of(x), cast(tensor_of(weight), x.dtype), rounded_bias), shape);
}

Tensor gradient_of_input(const Matrix& dy, const Matrix& weight, const Shape& shape) {
  return reshaped(torch::stable::matmul(tensor_of(dy), cast(tensor_of(weight), dy.dtype)), shape);
}

Tensor gradient_of_weight(const Matrix& dy, const Matrix& x, const Shape& shape, ScalarType dtype) {
  return cast(reshaped(torch::stable::matmul(tensor_of(dy.transposed()), tensor_of(x)), shape), dtype);
}

}  // namespace vk
