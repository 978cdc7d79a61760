// rotary_qkv: the schemas of vitkernels/ops/rotary_qkv.py on CUDA, one pass over a packed projection each way.
#include <type_traits>

#include "cuda/column_sums.cuh"
#include "cuda/rotary.cuh"

namespace vk {

struct RotaryQkv {
  int64_t items;  // heads of tokens
  int heads, tokens, prefix, width;
  int lanes, steps;     // threads a head, a power of two; items that each such group takes
  bool normed, centred;  // a norm; a LayerNorm
  float eps;
  Heads<const char*> x, input, sin, cos;  // forward x is what was projected; backward the gradient that arrives
  Heads<char*> out;                       // sin.data null: nothing turns; out.data null: not wanted
  int64_t x_part, input_part, out_part;   // elements from q to k, and from k to v
  Rows weight[2], bias[2];                // of q and k; data null: ones, zeros
  float* sums;  // of the gradients of weight and bias, [q and k, weight and bias, blocks, width]; null where not wanted
};

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kWidestRotaryHead = 256;  // 32 lanes of 8 columns: a head's norm is a sum within a warp

__device__ __forceinline__ float sum_of_lanes(float value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// Rows that begin at column `from`.
__device__ __forceinline__ Rows from_column(Rows r, int from) {
  r.data += from * r.col * size_of(r.dtype);
  return r;
}

// Of a block's heads, one row of partial sums: over the groups of a warp first, then over the warps.
template <int kParts>
__device__ __forceinline__ void store_sums(const RotaryQkv& a, int part, int first, TwoParts& dweight,
                                           TwoParts& dbias) {
  __shared__ float space[kWarps][2][kWidestRotaryHead];
  const int span = a.width / kParts;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      for (int step = a.lanes; step < kWarp; step *= 2) {
        dweight[p][i] += __shfl_xor_sync(~0u, dweight[p][i], step);
        dbias[p][i] += __shfl_xor_sync(~0u, dbias[p][i], step);
      }
      if (threadIdx.x % kWarp >= a.lanes || first + i >= span) continue;
      space[threadIdx.x / kWarp][0][p * span + first + i] = dweight[p][i];
      space[threadIdx.x / kWarp][1][p * span + first + i] = dbias[p][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * a.width; i += kThreads) {
    const int vector = i / a.width, column = i % a.width;
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += space[warp][vector][column];
    a.sums[(int64_t(2 * part + vector) * gridDim.x + blockIdx.x) * a.width + column] = total;
  }
}

// A thread has 8 columns of a head, the same ones of every head that it takes, and of a head in halves also their
// partners: so weights and biases, and backward the sums of their gradients, stay in registers. Its neighbours have the
// rest of the head, whose norm is then a sum over a few lanes. All heads of a block are of q, or of k, or of v.
template <bool kAligned, bool kHalf, bool kBackward>
__global__ void __launch_bounds__(kThreads, kHalf || kBackward ? 2 : 3)
    rotary_qkv_kernel(const __grid_constant__ RotaryQkv a) {
  constexpr int kParts = kHalf ? 2 : 1;
  const int part = blockIdx.y, span = a.width / kParts, first = threadIdx.x % a.lanes * kLanes;
  const bool normed = a.normed && part < 2, turns = a.sin.data && part < 2;
  const int groups = kThreads / a.lanes;
  // of the block's first item; later ones are few enough for 32 bits
  const int64_t begin = int64_t(blockIdx.x) * groups * a.steps, begin_row = begin / a.heads;
  const int begin_head = begin % a.heads;
  const int64_t begin_sample = begin_row / a.tokens;
  const int begin_token = begin_row % a.tokens;
  const int mine = min(a.items - begin, int64_t(groups) * a.steps);  // items of the block

  const auto moved = [&](auto heads, int64_t apart) {
    heads.data += part * apart * size_of(heads.dtype);
    return heads;
  };
  const auto x_heads = moved(a.x, a.x_part), input_heads = moved(a.input, a.input_part);
  const auto out_heads = moved(a.out, a.out_part);

  const auto load_vector = [&](TwoParts& values, const Rows& vector, float absent) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) values[p][i] = absent;
      if (normed && vector.data) load_floats<kAligned>(values[p], from_column(vector, p * span), 0, first, span);
    }
  };
  TwoParts weight, bias, dweight = {}, dbias = {};
  if (!kBackward) {
    load_vector(weight, a.weight[part], 1);
    load_vector(bias, a.bias[part], 0);
  }

  for (int step = 0; step < a.steps; ++step) {  // all threads take every step: lanes add to each other's sums
    const int item = step * groups + threadIdx.x / a.lanes;
    const int column = item < mine ? first : span;  // from which on nothing is read or written
    const int row = (begin_head + item) / a.heads, head = (begin_head + item) % a.heads;
    const int64_t sample = begin_sample + (begin_token + row) / a.tokens, token = (begin_token + row) % a.tokens;
    const int64_t place = token - a.prefix;
    const auto load_parts = [&](TwoParts& values, const Heads<const char*>& t, int64_t at, int column) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        load_floats<kAligned>(values[p], row_of<Rows>(t, sample, head, at, p * span), 0, column, span);
      }
    };
    // f(part, lane), where there is such a column
    const auto each = [&](const auto& f) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          if (column + i < span) f(p, i);
        }
      }
    };
    const auto mean_of = [&](const auto& value) {
      float sum = 0;
      each([&](int p, int i) { sum += value(p, i); });
      return sum_of_lanes(sum, a.lanes) / a.width;
    };
    // takes the mean away, and divides by the root of the mean square; 1 over it
    const auto normalise = [&](TwoParts& values) {
      const float mean = a.centred ? mean_of([&](int p, int i) { return values[p][i]; }) : 0.f;
      each([&](int p, int i) { values[p][i] -= mean; });
      const float rstd = 1.f / sqrtf(mean_of([&](int p, int i) { return values[p][i] * values[p][i]; }) + a.eps);
      each([&](int p, int i) { values[p][i] *= rstd; });
      return rstd;
    };

    TwoParts x, hat;
    load_parts(x, x_heads, token, column);
    if (kBackward && normed) load_parts(hat, input_heads, token, column);
    if (!kBackward && normed) {
      normalise(x);
      each([&](int p, int i) { x[p][i] = x[p][i] * weight[p][i] + bias[p][i]; });
    }
    if (turns && place >= 0) {
      TwoParts sine, cosine, turned;
      load_parts(sine, a.sin, place, column);
      load_parts(cosine, a.cos, place, column);
      turn(turned, x, sine, cosine, kHalf, kBackward);
      each([&](int p, int i) { x[p][i] = turned[p][i]; });
    }
    if (kBackward && normed) {
      const float rstd = normalise(hat);
      each([&](int p, int i) {
        dweight[p][i] += x[p][i] * hat[p][i];
        dbias[p][i] += x[p][i];
      });
      load_vector(weight, a.weight[part], 1);  // at each step: kept, it would halve the blocks at work
      each([&](int p, int i) { x[p][i] *= weight[p][i]; });
      const float centre = a.centred ? mean_of([&](int p, int i) { return x[p][i]; }) : 0.f;
      const float slope = mean_of([&](int p, int i) { return x[p][i] * hat[p][i]; });
      each([&](int p, int i) { x[p][i] = (x[p][i] - centre - hat[p][i] * slope) * rstd; });
    }
    if (!a.out.data) continue;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      store_floats<kAligned>(row_of<OutRows>(out_heads, sample, head, token, p * span), 0, column, span, x[p]);
    }
  }
  if constexpr (kBackward) {
    if (a.sums && part < 2) store_sums<kParts>(a, part, first, dweight, dbias);
  }
}

namespace {

// Items of a group of threads: enough that a row of partial sums is little beside what it sums.
constexpr int kSteps = 4, kStepsWithSums = 16;
constexpr int kSums = 4;

struct Call {
  Maybe sin, cos;
  int64_t prefix;
  bool half;
  std::string norm;
  double eps;
  Maybe weights[2], biases[2];  // of q and k
};

template <class Pointer>
Heads<Pointer> packed_heads(const Tensor& t) {
  return heads_of<Pointer>(t, 0, 3, 1, 4);
}

// From `x`, what was projected or, with an `input` that was, the gradient that arrives, to `out`; the partial sums of the
// vectors' gradients where they are asked for.
Tensor launch(const Launches& launches, const Call& call, const Tensor& x, const Maybe& input, const Maybe& out,
              bool backward, bool sums) {
  const int64_t heads = x.size(3), width = x.size(4), items = x.size(0) * x.size(1) * heads;
  const bool half = call.half && call.sin;
  const int64_t span = half ? width / 2 : width;
  RotaryQkv a{};
  a.items = items;
  a.heads = int(heads);
  a.tokens = int(x.size(1));
  a.prefix = int(call.prefix);
  a.width = int(width);
  for (a.lanes = 1; a.lanes * kLanes < span;) a.lanes *= 2;
  a.steps = sums ? kStepsWithSums : kSteps;
  a.normed = call.norm != "none";
  a.centred = call.norm == "layer_norm";
  a.eps = float(call.eps);
  const int64_t parts = blocks(items, int64_t(kThreads / a.lanes) * a.steps);
  Tensor partial = sums ? empty(x, {kSums, parts, width}, ScalarType::Float) : nothing(x);
  if (sums) a.sums = static_cast<float*>(partial.data_ptr());

  bool aligned = span % kLanes == 0;
  const auto add_packed = [&](auto& to, int64_t& apart, const Maybe& t) {
    if (!t) return;
    to = packed_heads<decltype(to.data)>(*t);
    apart = t->size(2) == 1 ? 0 : t->stride(2);
    aligned = aligned && is_aligned(to) && apart % kLanes == 0;
  };
  add_packed(a.x, a.x_part, x);
  add_packed(a.input, a.input_part, a.normed ? input : Maybe());
  add_packed(a.out, a.out_part, out);
  if (call.sin) {
    a.sin = heads_of<const char*>(*call.sin);
    a.cos = heads_of<const char*>(*call.cos);
    // of no positions nothing is read
    aligned = aligned && (x.size(1) == call.prefix || (is_aligned(a.sin) && is_aligned(a.cos)));
  }
  for (int i = 0; i < 2; ++i) {
    a.weight[i] = vector_rows(call.weights[i]);
    a.bias[i] = vector_rows(call.biases[i]);
    aligned = aligned && is_aligned(a.weight[i], width) && is_aligned(a.bias[i], width);
  }
  const auto kernel = [&](auto half, auto backward) {
    return aligned ? rotary_qkv_kernel<true, half, backward> : rotary_qkv_kernel<false, half, backward>;
  };
  using std::true_type, std::false_type;
  launches("rotary_qkv_kernel",
           half ? (backward ? kernel(true_type(), true_type()) : kernel(true_type(), false_type()))
                : (backward ? kernel(false_type(), true_type()) : kernel(false_type(), false_type())),
           {parts, x.size(2)}, dim3(kThreads), 0, a);
  return partial;
}

}  // namespace

Tensor rotary_qkv(const Tensor& qkv, const Maybe& sin, const Maybe& cos, int64_t prefix, bool half,
                  const std::string& norm, const Maybe& q_weight, const Maybe& q_bias, const Maybe& k_weight,
                  const Maybe& k_bias, double eps) {
  const Call call{sin, cos, prefix, half, norm, eps, {q_weight, k_weight}, {q_bias, k_bias}};
  Tensor out = empty(qkv, shape_of(qkv));
  launch(Launches("rotary_qkv", qkv, {given(sin)}), call, qkv, {}, out, false, false);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rotary_qkv_backward(
    const Tensor& dout, const Maybe& qkv, const Maybe& sin, const Maybe& cos, int64_t prefix, bool half,
    const std::string& norm, const Maybe& q_weight, const Maybe& k_weight, double eps, const std::vector<bool>& needs) {
  const Call call{sin, cos, prefix, half, norm, eps, {q_weight, k_weight}, {}};
  const bool sums = needs[1] || needs[2] || needs[3] || needs[4];
  Tensor dqkv = needs[0] ? empty(dout, shape_of(dout)) : nothing(dout);
  const Launches launches("rotary_qkv_backward", dout, {given(sin)});
  const Tensor partial = launch(launches, call, dout, qkv, needs[0] ? Maybe(dqkv) : Maybe(), true, sums);
  Tensor vectors[] = {nothing(dout), nothing(dout), nothing(dout), nothing(dout)};
  if (sums) {
    const int64_t parts = partial.size(1), width = partial.size(2);
    const Rows in{bytes(partial), DType::f32, width, 1};
    ColumnSums columns{in, parts * width, parts, std::max<int64_t>(parts, 1), int(width), {}};
    for (int i = 0; i < kSums; ++i) {
      if (!needs[1 + i]) continue;
      vectors[i] = empty(dout, {width}, (i < 2 ? q_weight : k_weight)->scalar_type());
      columns.out[i] = out_rows(vectors[i]);
    }
    column_sums(launches, columns, kSums);
  }
  return {dqkv, vectors[0], vectors[1], vectors[2], vectors[3]};
}

}  // namespace vk
