#include "cuda/column_sums.cuh"

#include "cuda/common.cuh"
#include "shared/products.h"

namespace vk {

// 64 columns a block: 8 threads read one row's 128 bytes of a 16-bit dtype in whole sectors, and 32 rows are on their
// way at once.
constexpr int kTileColumns = 64, kTileRows = 32;
constexpr int64_t kRowsPerPart = 512;  // 16 steps of a block, and enough blocks for the chip at any number of columns
constexpr int64_t kMostParts = 65535;  // along a grid's y

template <bool kAligned>
__global__ void __launch_bounds__(kTileColumns / kLanes* kTileRows)
    column_sums_kernel(const __grid_constant__ ColumnSums a) {
  __shared__ float space[kTileRows][kTileColumns + 1];
  const OutRows& out = a.out[blockIdx.z];
  if (!out.data) return;
  Rows in = a.in;
  in.data += blockIdx.z * a.apart * size_of(in.dtype);
  const int inside = threadIdx.x * kLanes, column = blockIdx.x * kTileColumns + inside;
  const int64_t begin = blockIdx.y * a.rows_per_part, end = min(begin + a.rows_per_part, a.rows);
  float sum[kLanes] = {};
  for (int64_t row = begin + threadIdx.y; row < end; row += kTileRows) {
    float values[kLanes];
    load_floats<kAligned>(values, in, row, column, a.width);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) sum[i] += values[i];
  }
#pragma unroll
  for (int i = 0; i < kLanes; ++i) space[threadIdx.y][inside + i] = sum[i];
  __syncthreads();
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, mine = blockIdx.x * kTileColumns + thread;
  if (thread >= kTileColumns || mine >= a.width) return;
  float total = 0;
#pragma unroll 8
  for (int row = 0; row < kTileRows; ++row) total += space[row][thread];
  store(out.data, out.dtype, blockIdx.y * out.row + mine * out.col, total);
}

// No rows are one part, whose sum is 0.
void column_sums(const Launches& launches, const ColumnSums& a, int matrices) {
  const bool aligned = is_aligned(a.in, a.width) && a.apart % kLanes == 0;
  launches("column_sums_kernel", aligned ? column_sums_kernel<true> : column_sums_kernel<false>,
           {blocks(a.width, kTileColumns), std::max<int64_t>(blocks(a.rows, a.rows_per_part), 1), matrices},
           dim3(kTileColumns / kLanes, kTileRows), 0, a);
}

Tensor column_sums(const Matrix& m, ScalarType dtype) {
  const Launches launches("column_sums", m.tensor);
  const int64_t rows = m.rows, width = m.cols;
  const Rows in{m.data, dtype_of(m.tensor), m.row, m.col};
  Tensor out = empty(m.tensor, {width}, dtype);
  const int64_t each = std::max(kRowsPerPart, blocks(rows, kMostParts)), parts = blocks(rows, each);
  if (parts <= 1) {
    column_sums(launches, {in, 0, rows, std::max<int64_t>(rows, 1), int(width), {out_rows(out)}}, 1);
    return out;
  }
  const Tensor partial = empty(m.tensor, {parts, width}, ScalarType::Float);
  column_sums(launches, {in, 0, rows, each, int(width), {out_rows(partial)}}, 1);
  const Rows sums{bytes(partial), DType::f32, width, 1};
  column_sums(launches, {sums, 0, parts, parts, int(width), {out_rows(out)}}, 1);
  return out;
}

Tensor gradient_of_bias(const Matrix& dy, ScalarType dtype) { return cast(column_sums(dy, dy.dtype), dtype); }

}  // namespace vk
