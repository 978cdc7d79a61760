// Matrix products, by whatever multiplies fastest: each half of the extension has its own.
#pragma once
#include "tensors.h"

namespace vk {

// x w^T + b, [M, K] [N, K] -> [M, N]; and torch's own
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);
Tensor aten_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);
// dy w, [M, N] [N, K] -> [M, K]
Tensor gradient_of_input(const Tensor& dy, const Tensor& weight);
// dy^T x, [M, N] [M, K] -> [N, K]
Tensor gradient_of_weight(const Tensor& dy, const Tensor& x);
// column sums of dy
Tensor gradient_of_bias(const Tensor& dy, ScalarType dtype);

}  // namespace vk
