// rotary_qkv: the schemas of vitkernels/ops/rotary_qkv.py on CUDA, one pass over a packed projection each way.
#include <type_traits>

#include "cuda/column_sums.cuh"
#include "cuda/rotary.cuh"

namespace vk {

struct RotaryQkv {
  int64_t units;  // tokens times `batches`: the heads that a group of threads takes at once
  int heads, batches, tokens, prefix, width;
  int lanes, steps;              // threads a head, a power of two; units that each such group takes
  bool normed, centred, shared;  // a norm; a LayerNorm; sines and cosines are those of all heads
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
__device__ __forceinline__ void store_sums(const RotaryQkv& a, int part, int first, Parts<kParts>& dweight,
                                           Parts<kParts>& dbias) {
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

// Heads of a unit, all of which are on their way at once, as far as two blocks' registers hold them. Backward, where
// sums and a second operand take these, it is one.
constexpr int heads_ahead(bool aligned, int words, bool half, bool backward) {
  return !aligned || backward ? 1 : half || words == 2 ? 2 : 4;
}

// A thread has 8 columns of a head, the same ones of every head that it takes, and of a head in halves also their
// partners: so sines and cosines, and backward the sums of the vectors' gradients, stay in registers. Its neighbours
// have the rest of the head, whose norm is then a sum over a few lanes. A block's heads are all of q, or of k, or of v.
template <bool kAligned, int kWords, bool kHalf, bool kBackward>
__global__ void __launch_bounds__(kThreads, kAligned ? 2 : 1)
    rotary_qkv_kernel(const __grid_constant__ RotaryQkv a) {
  constexpr int kParts = kHalf ? 2 : 1, kAhead = heads_ahead(kAligned, kWords, kHalf, kBackward);
  const int part = blockIdx.y, span = a.width / kParts, first = threadIdx.x % a.lanes * kLanes;
  const bool normed = a.normed && part < 2, turns = a.sin.data && part < 2;
  const int groups = kThreads / a.lanes;
  // of the block's first unit; later ones are few enough for 32 bits
  const int64_t begin = int64_t(blockIdx.x) * groups * a.steps, begin_row = begin / a.batches;
  const int begin_batch = begin % a.batches;
  const int64_t begin_sample = begin_row / a.tokens;
  const int begin_token = begin_row % a.tokens;
  const int mine = min(a.units - begin, int64_t(groups) * a.steps);  // units of the block

  const auto moved = [&](auto heads, int64_t apart) {
    heads.data += part * apart * size_in<kAligned>(heads.dtype);
    return heads;
  };
  const auto x_heads = moved(a.x, a.x_part), input_heads = moved(a.input, a.input_part);
  const auto out_heads = moved(a.out, a.out_part);

  const auto load_vector = [&](Parts<kParts>& values, const Rows& vector, float absent) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) values[p][i] = absent;
      if (normed && vector.data) load_floats<kAligned>(values[p], from_column(vector, p * span), 0, first, span);
    }
  };
  Parts<kParts> dweight = {}, dbias = {};

  for (int step = 0; step < a.steps; ++step) {  // all threads take every step: lanes add to each other's sums
    const int unit = step * groups + threadIdx.x / a.lanes;
    const int row = (begin_batch + unit) / a.batches, batch = (begin_batch + unit) % a.batches;
    const int64_t sample = begin_sample + (begin_token + row) / a.tokens, token = (begin_token + row) % a.tokens;
    const int64_t place = token - a.prefix;
    const bool turned = turns && place >= 0;
    // from which on nothing of a head is read or written
    const auto column_of = [&](int head) { return unit < mine && head < a.heads ? first : span; };
    Loaded<kWords> x_loaded[kAhead][kParts], hat_loaded[kParts];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int head = batch + i * a.batches;
      load_parts<kAligned>(x_loaded[i], x_heads, sample, head, token, column_of(head), span);
    }
    if (kBackward && normed) {
      load_parts<kAligned>(hat_loaded, input_heads, sample, batch, token, column_of(batch), span);
    }
    Parts<kParts> factor, cosine;
    const auto load_positions = [&](int head) {
      Loaded<> sines[kParts], cosines[kParts];
      load_parts<kAligned>(sines, a.sin, sample, head, place, column_of(head), span);
      load_parts<kAligned>(cosines, a.cos, sample, head, place, column_of(head), span);
      to_floats<kAligned>(factor, sines, a.sin.dtype);
      to_floats<kAligned>(cosine, cosines, a.cos.dtype);
      to_factors<kParts>(factor, kBackward);
    };
    if (kAhead > 1 && turned && a.shared) load_positions(batch);

#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int head = batch + i * a.batches, column = column_of(head);
      // f(part, lane), where there is such a column
      const auto each = [&](const auto& f) {
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
#pragma unroll
          for (int lane = 0; lane < kLanes; ++lane) {
            if (is_inside<kAligned>(column, lane, span)) f(p, lane);
          }
        }
      };
      const auto mean_of = [&](const auto& value) {
        float sum = 0;
        each([&](int p, int lane) { sum += value(p, lane); });
        return sum_of_lanes(sum, a.lanes) / a.width;
      };
      // takes the mean away, and divides by the root of the mean square; 1 over it
      const auto normalise = [&](Parts<kParts>& values) {
        const float mean = a.centred ? mean_of([&](int p, int lane) { return values[p][lane]; }) : 0.f;
        each([&](int p, int lane) { values[p][lane] -= mean; });
        const float square = mean_of([&](int p, int lane) { return values[p][lane] * values[p][lane]; });
        const float rstd = 1.f / sqrtf(square + a.eps);
        each([&](int p, int lane) { values[p][lane] *= rstd; });
        return rstd;
      };

      Parts<kParts> x, hat, weight, bias;
      to_floats<kAligned>(x, x_loaded[i], a.x.dtype);
      if (!kBackward && normed) {
        load_vector(weight, a.weight[part], 1);  // at each head, from L1: kept, they would halve the warps at work
        load_vector(bias, a.bias[part], 0);
        normalise(x);
        each([&](int p, int lane) { x[p][lane] = x[p][lane] * weight[p][lane] + bias[p][lane]; });
      }
      if (turned) {
        if (kAhead == 1 || !a.shared) load_positions(head);  // backward as late as this: registers hold no more at once
        turn<kParts>(x, factor, cosine);
      }
      if (kBackward && normed) {
        to_floats<kAligned>(hat, hat_loaded, a.input.dtype);
        const float rstd = normalise(hat);
        each([&](int p, int lane) {
          dweight[p][lane] += x[p][lane] * hat[p][lane];
          dbias[p][lane] += x[p][lane];
        });
        load_vector(weight, a.weight[part], 1);
        each([&](int p, int lane) { x[p][lane] *= weight[p][lane]; });
        const float centre = a.centred ? mean_of([&](int p, int lane) { return x[p][lane]; }) : 0.f;
        const float slope = mean_of([&](int p, int lane) { return x[p][lane] * hat[p][lane]; });
        each([&](int p, int lane) { x[p][lane] = (x[p][lane] - centre - hat[p][lane] * slope) * rstd; });
      }
      if (!a.out.data) continue;
      store_parts<kAligned>(out_heads, sample, head, token, column, span, x);
    }
  }
  if constexpr (kBackward) {
    if (a.sums && part < 2) store_sums<kParts>(a, part, first, dweight, dbias);
  }
}

namespace {

// Heads of a group of threads: enough that a row of partial sums is little beside what it sums.
constexpr int kHeadsOfGroup = 4, kHeadsWithSums = 16;
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
  const int64_t heads = x.size(3), width = x.size(4), rows = x.size(0) * x.size(1);
  const bool half = call.half && call.sin;
  const int64_t span = half ? width / 2 : width;
  RotaryQkv a{};
  a.heads = int(heads);
  a.tokens = int(x.size(1));
  a.prefix = int(call.prefix);
  a.width = int(width);
  for (a.lanes = 1; a.lanes * kLanes < span;) a.lanes *= 2;
  a.normed = call.norm != "none";
  a.centred = call.norm == "layer_norm";
  a.eps = float(call.eps);
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
    a.shared = call.sin->size(1) == 1 && call.cos->size(1) == 1;
    // of no positions nothing is read
    aligned = aligned && (x.size(1) == call.prefix || (is_aligned(a.sin) && is_aligned(a.cos)));
  }
  for (int i = 0; i < 2; ++i) {
    a.weight[i] = vector_rows(call.weights[i]);
    a.bias[i] = vector_rows(call.biases[i]);
    aligned = aligned && is_aligned(a.weight[i], width) && is_aligned(a.bias[i], width);
  }
  const bool narrow = size_of(a.x.dtype) == 2 && (!a.input.data || size_of(a.input.dtype) == 2);
  const int words = aligned && narrow ? 1 : 2, ahead = heads_ahead(aligned, words, half, backward);
  a.batches = int(blocks(heads, ahead));
  a.units = rows * a.batches;
  a.steps = (sums ? kHeadsWithSums : kHeadsOfGroup) / ahead;
  const int64_t parts = blocks(a.units, int64_t(kThreads / a.lanes) * a.steps);
  const Tensor partial = sums ? empty(x, {kSums, parts, width}, ScalarType::Float) : nothing(x);
  if (sums) a.sums = static_cast<float*>(partial.data_ptr());
  const auto kernel = [&](auto half, auto backward) {
    return !aligned     ? rotary_qkv_kernel<false, 2, half, backward>
           : words == 1 ? rotary_qkv_kernel<true, 1, half, backward>
                        : rotary_qkv_kernel<true, 2, half, backward>;
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
