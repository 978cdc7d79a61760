#include "cuda/column_sums.cuh"

#include "cuda/common.cuh"
#include "shared/products.h"

namespace vk {

constexpr int kSumThreads = 256, kSumWarps = kSumThreads / kWarp;
// 64 columns a block: 8 threads read one row's 128 bytes of a 16-bit dtype, a whole line. What has so few rows that
// they make few blocks, partial sums, lies in L2, which gives 64 bytes as well: there a quarter of the columns, and
// four times the blocks.
constexpr int kWideTile = 64, kNarrowTile = 16;
constexpr int64_t kFewBlocks = 128;    // about a chip's multiprocessors
constexpr int kRowsAhead = 4;          // of a thread, on their way at once: 16 KiB a block of 16 bits, 32 of float32
constexpr int64_t kRowsPerPart = 512;  // 4 steps of a block, and enough blocks for the chip at any number of columns
constexpr int64_t kMostParts = 65535;  // along a grid's y

template <bool kAligned, int kColumns>
__global__ void __launch_bounds__(kSumThreads) column_sums_kernel(const __grid_constant__ ColumnSums a) {
  constexpr int kAcross = kColumns / kLanes, kRows = kSumThreads / kAcross, kAhead = kAligned ? kRowsAhead : 1;
  __shared__ float space[kSumWarps][kColumns];
  const OutRows& out = a.out[blockIdx.z];
  if (!out.data) return;
  Rows in = a.in;
  in.data += blockIdx.z * a.apart * size_of(in.dtype);
  const int inside = threadIdx.x % kAcross * kLanes, column = blockIdx.x * kColumns + inside;
  const int64_t begin = blockIdx.y * a.rows_per_part, end = min(begin + a.rows_per_part, a.rows);
  float sum[kLanes] = {};
  for (int64_t row = begin + threadIdx.x / kAcross; row < end; row += kAhead * kRows) {
    Loaded<> loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {  // from `end` on zeros, as from `width` on
      loaded[i] = load_lanes<kAligned>(in, row + i * kRows, row + i * kRows < end ? column : a.width, a.width);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float values[kLanes];
      to_floats<kAligned>(values, loaded[i], in.dtype);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) sum[lane] += values[lane];
    }
  }
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
#pragma unroll
    for (int step = kAcross; step < kWarp; step *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], step);
    if (threadIdx.x % kWarp < kAcross) space[threadIdx.x / kWarp][inside + i] = sum[i];
  }
  __syncthreads();
  const int thread = threadIdx.x, mine = blockIdx.x * kColumns + thread;
  if (thread >= kColumns || mine >= a.width) return;
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < kSumWarps; ++warp) total += space[warp][thread];
  store(out.data, out.dtype, blockIdx.y * out.row + mine * out.col, total);
}

// No rows are one part, whose sum is 0.
void column_sums(const Launches& launches, const ColumnSums& a, int matrices) {
  const bool aligned = is_aligned(a.in, a.width) && a.apart % kLanes == 0;
  const int64_t parts = std::max<int64_t>(blocks(a.rows, a.rows_per_part), 1);
  const bool few = blocks(a.width, kWideTile) * parts * matrices < kFewBlocks;
  const auto kernel = few ? (aligned ? column_sums_kernel<true, kNarrowTile> : column_sums_kernel<false, kNarrowTile>)
                          : (aligned ? column_sums_kernel<true, kWideTile> : column_sums_kernel<false, kWideTile>);
  launches("column_sums_kernel", kernel, {blocks(a.width, few ? kNarrowTile : kWideTile), parts, matrices},
           dim3(kSumThreads), 0, a);
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
