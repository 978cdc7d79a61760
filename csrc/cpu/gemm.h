// Matrix products: the extension's own, oneDNN's or torch's, whichever this machine runs fastest.
#pragma once
#include <string>
#include <vector>

#include "shared/products.h"
#include "tensors.h"

namespace vk {

// What of a Linear a product is.
enum class Kind { forward, of_input, of_weight };
// Who multiplies, two bits for each kind of product (vitkernels/products.py): of float32 and of bfloat16, forward, then the
// gradients of inputs and of weights. A negative number asks.
enum class Library { torch, onednn, own };
int64_t set_products(int64_t wanted);

// A matrix in one tensor, or in several of one shape, dtype and layout, below each other or, transposed, side by side.
struct Parted {
  std::vector<Matrix> parts;
  int64_t rows, cols;  // of all
  Parted(const Matrix& whole) : parts{whole}, rows(whole.rows), cols(whole.cols) {}
  explicit Parted(std::vector<Matrix> below);
  Parted transposed() const;
  bool side_by_side() const { return cols != parts[0].cols; }
};
// The weight of a Linear in one tensor or, the rest of its rows, in two; parts that differ in dtype are rounded to `dtype`.
Parted weight_of(const Tensor& first, const std::optional<Tensor>& second, ScalarType dtype);

Tensor linear(const Matrix& x, const Parted& weight, const std::optional<Tensor>& bias, const Shape& shape);
Tensor gradient_of_input(const Matrix& dy, const Parted& weight, const Shape& shape);

// gradient_of_bias of column sums that are there.
template <class A>
Tensor gradient_of_bias(const Matrix& dy, ScalarType dtype, std::vector<A>& sums) {
  const auto width = int64_t(sums.size());
  if (dtype != dy.dtype) round_to(dtype_of(dy.tensor), sums.data(), width);
  return from_values<A>({width}, dtype, sums.data());
}

// How a product is computed: by a library or, by the extension's own kernels, from packed panels of b (product_kernel.h)
// or with few rows or few terms (few_rows_kernel.h).
enum class Way { library, panels, few_rows, few_terms };
Way way_of(const Matrix& a, const Parted& b, Kind kind);
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
void multiply(Way way, const Tensor& out, const Matrix& a, const Parted& b, const std::optional<Tensor>& bias,
              const Follow& follow = {}, const Tensor* panels = nullptr);
// gradient_of_weight where x, of this shape, was written in panels.
Tensor gradient_by_panels(const Matrix& dy, const Matrix& x, const Tensor& panels, const Shape& shape, ScalarType dtype);

}  // namespace vk
