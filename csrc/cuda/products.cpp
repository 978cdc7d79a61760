// Matrix products on CUDA: torch's, that is cuBLAS, which adds a bias in its own epilogue.
#include "shared/products.h"

namespace vk {

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return aten_linear(x, weight, bias);
}

Tensor gradient_of_input(const Tensor& dy, const Tensor& weight) { return torch::stable::matmul(dy, weight); }

Tensor gradient_of_weight(const Tensor& dy, const Tensor& x) { return torch::stable::matmul(transposed(dy), x); }

}  // namespace vk
