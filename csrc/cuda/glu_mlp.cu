// glu_mlp: the schemas of vitkernels/ops/glu_mlp.py on CUDA. cuBLAS multiplies, both projections as one product, and adds
// their bias in its epilogue; one pass each way does the rest. Projections that lie apart are copied side by side first,
// which is little beside the product here; their gradients are products of their own.
#include "cuda/activations.cuh"
#include "cuda/column_sums.cuh"
#include "cuda/launch.h"
#include "shared/products.h"

namespace vk {

struct GateCall {
  int64_t rows;
  int width;  // of the gate and of what it multiplies, which lie side by side
  Activation kind;
  Rows gate, up, dgated;
  OutRows gated, dgate, dup;  // gated.data null where not wanted; it may lie where dgated does
  float* sums;                // of dgate's columns, then dup's, [parts, 2 * width]; null where not wanted
};

template <bool kAligned>
__global__ void __launch_bounds__(kWarp* kTileRows) gate_forward(const __grid_constant__ GateCall a) {
  const int column = blockIdx.y * kTileColumns + threadIdx.x * kLanes;
  const int64_t begin = blockIdx.x * kRowsPerPart, end = min(begin + kRowsPerPart, a.rows);
  for (int64_t row = begin + threadIdx.y; row < end; row += kTileRows) {
    float gate[kLanes], up[kLanes], value[kLanes], slope[kLanes];
    const Loaded later = load_lanes<kAligned>(a.up, row, column, a.width);
    load_floats<kAligned>(gate, a.gate, row, column, a.width);
    to_floats<kAligned>(up, later, a.up.dtype);
    activate_lanes(a.kind, gate, value, slope);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) value[i] *= up[i];
    store_floats<kAligned>(a.gated, row, column, a.width, value);
  }
}

template <bool kAligned>
__global__ void __launch_bounds__(kWarp* kTileRows) gate_backward(const __grid_constant__ GateCall a) {
  __shared__ TileSums spaces[2];
  const int column = blockIdx.y * kTileColumns + threadIdx.x * kLanes;
  const int64_t begin = blockIdx.x * kRowsPerPart, end = min(begin + kRowsPerPart, a.rows);
  float gate_sum[kLanes] = {}, up_sum[kLanes] = {};
  for (int64_t row = begin + threadIdx.y; row < end; row += kTileRows) {
    float gate[kLanes], up[kLanes], d[kLanes], value[kLanes], slope[kLanes];
    const Loaded later = load_lanes<kAligned>(a.up, row, column, a.width);
    const Loaded dgated = load_lanes<kAligned>(a.dgated, row, column, a.width);
    load_floats<kAligned>(gate, a.gate, row, column, a.width);
    to_floats<kAligned>(up, later, a.up.dtype);
    to_floats<kAligned>(d, dgated, a.dgated.dtype);
    activate_lanes(a.kind, gate, value, slope);
    float dgate[kLanes], dup[kLanes], gated[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      dgate[i] = d[i] * up[i] * slope[i];
      dup[i] = d[i] * value[i];
      gated[i] = value[i] * up[i];
      gate_sum[i] += dgate[i];
      up_sum[i] += dup[i];
    }
    store_floats<kAligned>(a.dgate, row, column, a.width, dgate);
    store_floats<kAligned>(a.dup, row, column, a.width, dup);
    if (a.gated.data) store_floats<kAligned>(a.gated, row, column, a.width, gated);
  }
  if (!a.sums) return;
  float* const part = a.sums + blockIdx.x * int64_t(2 * a.width);
  store_sums(spaces[0], gate_sum, part, a.width);
  store_sums(spaces[1], up_sum, part + a.width, a.width);
}

namespace {

constexpr Rows kNoRows{nullptr, DType::f32, 0, 0};
constexpr OutRows kNoOut{nullptr, DType::f32, 0, 0};

// Of packed rows that are two `width` wide, the first (which = 0) or the second.
template <class AnyRows>
AnyRows half_of(const Tensor& t, int64_t width, int64_t which) {
  return {bytes(t) + which * width * size_of(dtype_of(t)), dtype_of(t), 2 * width, 1};
}

void launch(const Launches& launches, const GateCall& a, bool backward) {
  const bool aligned = is_aligned(a.gate, a.width) && is_aligned(a.up, a.width) && is_aligned(a.dgated, a.width) &&
                       is_aligned(a.gated, a.width) && is_aligned(a.dgate, a.width) && is_aligned(a.dup, a.width);
  const auto kernel = backward ? (aligned ? gate_backward<true> : gate_backward<false>)
                               : (aligned ? gate_forward<true> : gate_forward<false>);
  launches(backward ? "gate_backward" : "gate_forward", kernel,
           {blocks(a.rows, kRowsPerPart), blocks(a.width, kTileColumns)}, dim3(kWarp, kTileRows), 0, a);
}

// Gate and up as one, the second below the first.
Tensor both(const Tensor& gate, const Maybe& up, ScalarType dtype) { return up ? stacked({gate, *up}, dtype) : gate; }

// The same of their biases, of which one may be missing: zeros.
Maybe both_biases(const Maybe& gate, const Maybe& up, bool apart, int64_t width) {
  if (!apart || (!gate && !up)) return gate;
  const Tensor& there = gate ? *gate : *up;
  const auto value = [&](const Maybe& each) { return each ? *each : torch::stable::new_zeros(there, {width}); };
  return stacked({value(gate), value(up)}, there.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor> glu_mlp(const Tensor& x, const Tensor& w_gate_up, const Maybe& b_gate_up,
                                   const Maybe& w_up, const Maybe& b_up, const Tensor& w_down, const Maybe& b_down,
                                   const std::string& activation, bool save) {
  const Matrix rows(x);
  const int64_t hidden = w_down.size(1);
  const Shape shape = with_width(shape_of(x), hidden);
  const Matrix weight(both(w_gate_up, w_up, rows.dtype));
  const Maybe bias = both_biases(b_gate_up, b_up, w_up.has_value(), hidden);
  const Tensor pre = linear(rows, weight, bias, with_width(shape, 2 * hidden));
  const Tensor gated = empty(pre, shape);
  const Launches launches("glu_mlp", x, {&w_gate_up, &w_down});
  launch(launches,
         {rows.rows, int(hidden), activation_of(activation), half_of<Rows>(pre, hidden, 0),
          half_of<Rows>(pre, hidden, 1), kNoRows, out_rows(gated), kNoOut, kNoOut, nullptr},
         false);
  Tensor y = linear(Matrix(gated), Matrix(w_down), b_down, with_width(shape, w_down.size(0)));
  return {y, save ? pre : nothing(x)};
}

GluMlpBackward glu_mlp_backward(const Tensor& dy, const Tensor& x, const Tensor& pre, const Tensor& w_gate_up,
                                const Maybe& w_up, const Tensor& w_down, const std::string& activation,
                                const std::vector<bool>& needs, int64_t grad_dtype) {
  const Matrix g(dy);
  Tensor dx = nothing(x), dw_gate_up = nothing(x), db_gate_up = nothing(x), dw_up = nothing(x), db_up = nothing(x);
  Tensor dw_down = nothing(x);
  const bool needs_bias = needs[2] || needs[4], needs_down = needs[5];
  if (needs[0] || needs[1] || needs[3] || needs_bias || needs_down) {
    const Tensor h = packed(pre);
    const int64_t hidden = w_down.size(1), parts = blocks(g.rows, kRowsPerPart);
    Tensor dgated = gradient_of_input(g, Matrix(w_down), {g.rows, hidden});  // becomes what was multiplied, in place
    const Tensor dpre = empty(dgated, {g.rows, 2 * hidden});
    const Tensor sums = needs_bias ? empty(x, {parts, 2 * hidden}, ScalarType::Float) : nothing(x);
    const Launches launches("glu_mlp_backward", dy, {&x, &w_gate_up, &w_down});
    launch(launches,
           {g.rows, int(hidden), activation_of(activation), half_of<Rows>(h, hidden, 0), half_of<Rows>(h, hidden, 1),
            Operand(dgated).rows, needs_down ? out_rows(dgated) : kNoOut, half_of<OutRows>(dpre, hidden, 0),
            half_of<OutRows>(dpre, hidden, 1), needs_bias ? static_cast<float*>(sums.data_ptr()) : nullptr},
           true);
    if (needs_bias) {
      const Tensor db = empty(x, {2 * hidden});
      const Rows in = Operand(sums).rows;
      column_sums(launches, {in, 0, parts, std::max<int64_t>(parts, 1), int(2 * hidden), {out_rows(db)}}, 1);
      const auto half = [&](int64_t first, const Tensor& weight) {
        return stacked({reinterpreted(db, {hidden}, {1}, first)}, dtype_for(grad_dtype, weight));
      };
      if (needs[2]) db_gate_up = w_up ? half(0, w_gate_up) : cast(db, dtype_for(grad_dtype, w_gate_up));
      if (needs[4]) db_up = half(hidden, *w_up);
    }
    if (needs_down) dw_down = gradient_of_weight(g, Matrix(dgated), shape_of(w_down), dtype_for(grad_dtype, w_down));
    dgated = nothing(x);  // its memory may serve the next products
    const auto dweight = [&](const Tensor& dright, const Tensor& weight) {
      return gradient_of_weight(Matrix(dright), Matrix(x), shape_of(weight), dtype_for(grad_dtype, weight));
    };
    if (needs[1]) dw_gate_up = dweight(w_up ? columns_of(dpre, 0, hidden) : dpre, w_gate_up);
    if (needs[3]) dw_up = dweight(columns_of(dpre, hidden, hidden), *w_up);
    if (needs[0]) dx = gradient_of_input(Matrix(dpre), Matrix(both(w_gate_up, w_up, g.dtype)), shape_of(x));
  }
  const Tensor db_down = needs[6] ? gradient_of_bias(g, dtype_for(grad_dtype, w_down)) : nothing(x);
  return {dx, dw_gate_up, db_gate_up, dw_up, db_up, dw_down, db_down};
}

}  // namespace vk
