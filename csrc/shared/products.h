// Matrix products, by whatever multiplies fastest: each half of the extension has its own.
#pragma once
#include "tensors.h"

namespace vk {

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);  // x w^T + b, [M,K] [N,K] -> [M,N]
Tensor gradient_of_input(const Tensor& dy, const Tensor& weight);                          // dy w,      [M,N] [N,K] -> [M,K]
Tensor gradient_of_weight(const Tensor& dy, const Tensor& x);                              // dy^T x,    [M,N] [M,K] -> [N,K]
Tensor gradient_of_bias(const Tensor& dy, ScalarType dtype);                               // column sums of dy
Tensor aten_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);  // torch's, as `linear`

}  // namespace vk
