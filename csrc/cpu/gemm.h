// Matrix products: the extension's own, oneDNN's or torch's, whichever this machine runs fastest.
#pragma once
#include <string>

#include "shared/products.h"
#include "tensors.h"

namespace vk {

// Who multiplies, two bits for each kind of product (vitkernels/products.py): float32, bfloat16, and the same for the
// gradients of weights. A negative number asks.
enum class Library { torch, onednn, own };
int64_t set_products(int64_t wanted);

// A tensor of two axes as the kernels see it: where it lies, and its steps in elements.
struct Matrix {
  char* data;
  ScalarType dtype;
  int64_t rows, cols, row, col;
  explicit Matrix(const Tensor& t)
      : data(bytes(t)), dtype(t.scalar_type()), rows(t.size(0)), cols(t.size(1)), row(t.stride(0)), col(t.stride(1)) {}
  Matrix transposed() const {
    Matrix t = *this;
    std::swap(t.rows, t.cols);
    std::swap(t.row, t.col);
    return t;
  }
};

// Whether the extension's own kernel multiplies these two here; for the gradient of a weight or another product.
bool own_product(const Matrix& a, const Matrix& b, bool of_weight = false);
// What is to follow the product, in kernels.h's words; tensors are packed [m, n].
struct Follow {
  Then then = Then::store;
  Activation activation = Activation::gelu;
  const Tensor *pre = nullptr, *activated = nullptr;
  std::vector<float>* sums = nullptr;  // filled with n column sums
  bool activated_in_panels = false;    // `activated` is space_for_panels(m, n)
};
Tensor space_for_panels(const Tensor& like, int64_t k, int64_t n);  // of a B [k, n] in like's dtype
// out = a b + bias, and what follows; where own_product() holds. With `panels`, they are b's and b tells its shape alone.
void multiply(const Tensor& out, const Matrix& a, const Matrix& b, const std::optional<Tensor>& bias,
              const Follow& follow = {}, const Tensor* panels = nullptr);

}  // namespace vk
