// The vendor's matrix products: oneDNN where it is there and the work is worth its overhead, torch's own elsewhere.
#pragma once
#include "tensors.h"

namespace vk {

// what oneDNN multiplies: products of a type, and the products that are gradients of weights (vitkernels/products.py)
enum OneDnn { onednn_f32 = 1, onednn_bf16 = 2, onednn_f32_dw = 4, onednn_bf16_dw = 8 };
int64_t set_onednn(int64_t wanted);  // a set of the above; a negative number asks

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);  // x w^T + b, [M,K] [N,K] -> [M,N]
Tensor gradient_of_input(const Tensor& dy, const Tensor& weight);                          // dy w,      [M,N] [N,K] -> [M,K]
Tensor gradient_of_weight(const Tensor& dy, const Tensor& x);                              // dy^T x,    [M,N] [M,K] -> [N,K]
Tensor gradient_of_bias(const Tensor& dy, ScalarType dtype);                               // column sums of dy

}  // namespace vk
