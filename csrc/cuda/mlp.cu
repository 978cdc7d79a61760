// mlp: the schemas of vitkernels/ops/mlp.py on CUDA. cuBLAS multiplies, and adds the first bias in its epilogue; one
// pass each way does the rest.
#include "cuda/activations.cuh"
#include "cuda/column_sums.cuh"
#include "cuda/launch.h"
#include "shared/products.h"

namespace vk {

struct ActivationCall {
  int64_t rows, rows_per_part;
  int width;
  Activation kind;
  Rows pre, dout;
  OutRows activated, dpre;  // data null where not wanted; dpre may lie where dout does, activated where pre does
  float* sums;              // of dpre's columns, [parts, width]; null where not wanted
};

template <bool kAligned>
__global__ void __launch_bounds__(kWarp* kTileRows) activate_forward(const __grid_constant__ ActivationCall a) {
  const int column = blockIdx.y * kTileColumns + threadIdx.x * kLanes;
  const int64_t begin = blockIdx.x * a.rows_per_part, end = min(begin + a.rows_per_part, a.rows);
  for (int64_t row = begin + threadIdx.y; row < end; row += kTileRows) {
    float h[kLanes], value[kLanes], slope[kLanes];
    load_floats<kAligned>(h, a.pre, row, column, a.width);
    activate_lanes(a.kind, h, value, slope);
    store_floats<kAligned>(a.activated, row, column, a.width, value);
  }
}

template <bool kAligned>
__global__ void __launch_bounds__(kWarp* kTileRows) activate_backward(const __grid_constant__ ActivationCall a) {
  __shared__ TileSums space;
  const int column = blockIdx.y * kTileColumns + threadIdx.x * kLanes;
  const int64_t begin = blockIdx.x * a.rows_per_part, end = min(begin + a.rows_per_part, a.rows);
  float sum[kLanes] = {};
  for (int64_t row = begin + threadIdx.y; row < end; row += kTileRows) {
    float h[kLanes], d[kLanes], value[kLanes], slope[kLanes];
    const Loaded dout = load_lanes<kAligned>(a.dout, row, column, a.width);
    load_floats<kAligned>(h, a.pre, row, column, a.width);
    to_floats<kAligned>(d, dout, a.dout.dtype);
    activate_lanes(a.kind, h, value, slope);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      d[i] *= slope[i];
      sum[i] += d[i];
    }
    store_floats<kAligned>(a.dpre, row, column, a.width, d);
    if (a.activated.data) store_floats<kAligned>(a.activated, row, column, a.width, value);
  }
  if (a.sums) store_sums(space, sum, a.sums + blockIdx.x * int64_t(a.width), a.width);
}

namespace {

constexpr OutRows kNoOut{nullptr, DType::f32, 0, 0};

void launch(const Launches& launches, ActivationCall& a, bool backward) {
  const bool aligned = is_aligned(a.pre, a.width) && is_aligned(a.dout, a.width) && is_aligned(a.activated, a.width) &&
                       is_aligned(a.dpre, a.width);
  const auto kernel = backward ? (aligned ? activate_backward<true> : activate_backward<false>)
                               : (aligned ? activate_forward<true> : activate_forward<false>);
  launches(backward ? "activate_backward" : "activate_forward", kernel,
           {blocks(a.rows, a.rows_per_part), blocks(a.width, kTileColumns)}, dim3(kWarp, kTileRows), 0, a);
}

}  // namespace

std::tuple<Tensor, Tensor> mlp(const Tensor& x, const Tensor& w1, const Maybe& b1, const Tensor& w2, const Maybe& b2,
                               const std::string& activation, bool save) {
  const Matrix rows(x);
  const Tensor pre = linear(rows, Matrix(w1), b1, with_width(shape_of(x), w1.size(0)));
  const Tensor activated = save ? empty(pre, shape_of(pre)) : pre;  // in place where nothing is to be saved
  const Launches launches("mlp", x, {&w1, &w2});
  ActivationCall a{rows.rows,         kRowsPerPart, int(w1.size(0)),      activation_of(activation),
                   Operand(pre).rows, {},           out_rows(activated), kNoOut,
                   nullptr};
  launch(launches, a, false);
  Tensor y = linear(Matrix(activated), Matrix(w2), b2, with_width(shape_of(x), w2.size(0)));
  return {y, save ? pre : nothing(x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(const Tensor& dy, const Tensor& x, const Tensor& pre,
                                                                const Tensor& w1, const Tensor& w2,
                                                                const std::string& activation,
                                                                const std::vector<bool>& needs, int64_t grad_dtype) {
  const Matrix g(dy);
  Tensor dx = nothing(x), dw1 = nothing(x), db1 = nothing(x), dw2 = nothing(x);
  if (needs[0] || needs[1] || needs[2] || needs[3]) {
    const Tensor h = packed(pre);
    const int64_t hidden = w1.size(0), parts = blocks(g.rows, kRowsPerPart);
    const Tensor dh = gradient_of_input(g, Matrix(w2), {g.rows, hidden});  // becomes the gradient of the pre-activation in place
    const Tensor sums = needs[2] ? empty(x, {parts, hidden}, ScalarType::Float) : nothing(x);
    Tensor activated = needs[3] ? empty(x, shape_of(dh)) : nothing(x);
    const Launches launches("mlp_backward", dy, {&x, &w1, &w2});
    ActivationCall a{g.rows,
                     kRowsPerPart,
                     int(hidden),
                     activation_of(activation),
                     Operand(h).rows,
                     Operand(dh).rows,
                     needs[3] ? out_rows(activated) : kNoOut,
                     out_rows(dh),
                     needs[2] ? static_cast<float*>(sums.data_ptr()) : nullptr};
    launch(launches, a, true);
    if (needs[2]) {
      db1 = empty(x, {hidden});
      const Rows in = Operand(sums).rows;
      column_sums(launches, {in, 0, parts, std::max<int64_t>(parts, 1), int(hidden), {out_rows(db1)}}, 1);
      db1 = cast(db1, dtype_for(grad_dtype, w1));
    }
    if (needs[3]) dw2 = gradient_of_weight(g, Matrix(activated), shape_of(w2), dtype_for(grad_dtype, w2));
    activated = nothing(x);  // its memory may serve the next products
    if (needs[1]) dw1 = gradient_of_weight(Matrix(dh), Matrix(x), shape_of(w1), dtype_for(grad_dtype, w1));
    if (needs[0]) dx = gradient_of_input(Matrix(dh), Matrix(w1), shape_of(x));
  }
  return {dx, dw1, db1, dw2, needs[4] ? gradient_of_bias(g, dtype_for(grad_dtype, w2)) : nothing(x)};
}

}  // namespace vk
