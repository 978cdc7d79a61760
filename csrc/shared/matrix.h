// Matrices as products take them.
#pragma once
#include "tensors.h"

namespace vk {

// A tensor of two axes as the kernels see it: where it lies, and its steps in elements.
struct Matrix {
  Tensor tensor;  // whose memory this is
  char* data;
  ScalarType dtype;
  int64_t rows, cols, row, col;
  explicit Matrix(const Tensor& t);  // rows of the last axis; copied only where the leading axes do not make one step
  Matrix transposed() const;
};

// A matrix where it lies, as torch sees it.
Tensor tensor_of(const Matrix& t);

}  // namespace vk
