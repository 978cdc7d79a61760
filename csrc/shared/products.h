// Matrix products, by whatever multiplies fastest: each half of the extension has its own.
#pragma once
#include "matrix.h"

namespace vk {

// Results have x's or dy's dtype and the shape asked for, and are packed. Weights and biases of another dtype are rounded
// to x's as they are read; their gradients are rounded to it before they are `dtype`.
Tensor linear(const Matrix& x, const Matrix& weight, const std::optional<Tensor>& bias, const Shape& shape);  // x w^T + b
Tensor gradient_of_input(const Matrix& dy, const Matrix& weight, const Shape& shape);                         // dy w
Tensor gradient_of_weight(const Matrix& dy, const Matrix& x, const Shape& shape, ScalarType dtype);           // dy^T x
Tensor gradient_of_bias(const Matrix& dy, ScalarType dtype);  // column sums of dy

// torch's own linear layer, of one dtype
Tensor aten_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);

}  // namespace vk
