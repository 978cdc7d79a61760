// Matrix products: the extension's own, oneDNN's or torch's, whichever this machine runs fastest.
#pragma once
#include <string>

#include "tensors.h"

namespace vk {

// Who multiplies, two bits for each kind of product (vitkernels/products.py): float32, bfloat16, and the same for the
// gradients of weights. A negative number asks.
enum class Library { torch, onednn, own };
int64_t set_products(int64_t wanted);

// A tensor of two axes as the kernels see it: where it lies, and its steps in elements.
struct Matrix {
  Tensor tensor;  // whose memory this is
  char* data;
  ScalarType dtype;
  int64_t rows, cols, row, col;
  explicit Matrix(const Tensor& t);  // rows of the last axis; copied only where the leading axes do not make one step
  Matrix transposed() const;
};

// Results have x's or dy's dtype and the shape asked for, and are packed. Weights and biases of another dtype are rounded
// to x's as they are read; their gradients are rounded to it before they are `dtype`.
Tensor linear(const Matrix& x, const Matrix& weight, const std::optional<Tensor>& bias, const Shape& shape);  // x w^T + b
Tensor gradient_of_input(const Matrix& dy, const Matrix& weight, const Shape& shape);                         // dy w
Tensor gradient_of_weight(const Matrix& dy, const Matrix& x, const Shape& shape, ScalarType dtype);           // dy^T x
Tensor gradient_of_bias(const Matrix& dy, ScalarType dtype);  // column sums of dy
template <class A>
Tensor gradient_of_bias(const Matrix& dy, ScalarType dtype, std::vector<A>& sums) {  // of sums that are there
  const auto width = int64_t(sums.size());
  if (dtype != dy.dtype) round_to(dtype_of(dy.tensor), sums.data(), width);
  return from_values<A>({width}, dtype, sums.data());
}

// How a product is computed: by a library or, by the extension's own kernels, from packed panels of b (product_kernel.h)
// or with few rows or few terms (few_rows_kernel.h).
enum class Way { library, panels, few_rows, few_terms };
Way way_of(const Matrix& a, const Matrix& b, bool of_weight = false);  // for the gradient of a weight or another product
// What is to follow the product, in kernels.h's words; tensors are packed [m, n].
struct Follow {
  Then then = Then::store;
  Activation activation = Activation::gelu;
  const Tensor *pre = nullptr, *activated = nullptr;  // absent or packed
  std::vector<float>* sums = nullptr;  // filled with the column sums of out
  bool activated_in_panels = false;    // `activated` is space_for_panels(m, n)
};
Tensor space_for_panels(const Tensor& like, int64_t k, int64_t n);  // of a B [k, n] in like's dtype
// out = a b + bias, and what follows, in a way that is the extension's own and of a's dtype. With `panels`, they are b's
// and b tells its shape alone.
void multiply(Way way, const Tensor& out, const Matrix& a, const Matrix& b, const std::optional<Tensor>& bias,
              const Follow& follow = {}, const Tensor* panels = nullptr);

// What mlp and glu_mlp share.
Activation activation_of(const std::string& name);
inline Shape with_width(Shape shape, int64_t width) {
  shape.back() = width;
  return shape;
}

}  // namespace vk
