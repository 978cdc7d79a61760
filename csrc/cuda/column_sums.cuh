// Sums over the rows of matrices, where gradients of parameters end: first of parts of the rows, then of the parts.
#pragma once
#include "cuda/launch.h"
#include "shared/matrix.h"

namespace vk {

constexpr int kMostSums = 4;

// Matrix z of up to four of equal size begins z * apart elements behind the first; its column sums go to out[z], by
// parts: row p of it is the sum of rows [p * rows_per_part, ...). Where out[z].data is null nobody asked for it.
struct ColumnSums {
  Rows in;
  int64_t apart, rows, rows_per_part;
  int width;
  OutRows out[kMostSums];
};

void column_sums(const Launches& launches, const ColumnSums& sums, int matrices);
// Of one matrix, rounded once, to `dtype`.
Tensor column_sums(const Matrix& m, ScalarType dtype);

}  // namespace vk
