#include "matrix.h"

#include <utility>

namespace vk {

Matrix::Matrix(const Tensor& t) : tensor(t), dtype(t.scalar_type()), rows(1) {
  const Operand operand(t);
  const auto sizes = t.sizes();
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
  tensor = operand.tensor;
  data = bytes(tensor);
  cols = sizes[sizes.size() - 1];
  row = rows > 1 ? operand.rows.row : cols;
  col = operand.rows.col;
}

Matrix Matrix::transposed() const {
  Matrix t = *this;
  std::swap(t.rows, t.cols);
  std::swap(t.row, t.col);
  return t;
}

Tensor tensor_of(const Matrix& t) {
  const Tensor& all = t.tensor;
  const bool same = all.dim() == 2 && all.size(0) == t.rows && all.size(1) == t.cols && all.stride(0) == t.row &&
                    all.stride(1) == t.col;
  if (same) return all;
  return reinterpreted(t.tensor, {t.rows, t.cols}, {t.row, t.col});
}

}  // namespace vk
