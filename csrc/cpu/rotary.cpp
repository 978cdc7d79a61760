// rotary and rotary_qkv: the schemas of vitkernels/ops/rotary*.py on the CPU. Tokens are the unit of work.
#include "ops.h"

namespace vk {
namespace {

// [B, H, N, K], wherever its axes lie in memory; steps are 0 along axes of size 1, where one serves all.
struct Tokens {
  char* data;
  DType dtype;
  int64_t step[4];
  explicit Tokens(const Tensor& t) : data(bytes(t)), dtype(dtype_of(t)) {
    for (int i = 0; i < 4; ++i) step[i] = t.size(i) == 1 ? 0 : t.stride(i);
  }
  // Part `part` of a packed [B, N, P, H, K].
  Tokens(const Tensor& t, int64_t part)
      : data(bytes(t) + part * t.stride(2) * size_of(dtype_of(t))),
        dtype(dtype_of(t)),
        step{t.stride(0), t.stride(3), t.stride(1), t.stride(4)} {}
  char* of(int64_t b, int64_t n) const { return data + (b * step[0] + n * step[2]) * size_of(dtype); }
  Rows heads(int64_t b, int64_t n) const { return {of(b, n), dtype, step[1], step[3]}; }
  OutRows out_heads(int64_t b, int64_t n) const { return {of(b, n), dtype, step[1], step[3]}; }
};

constexpr Rows nowhere{nullptr, DType::f32, 0, 0};

bool is_double(const Maybe& t) { return t && t->scalar_type() == ScalarType::Double; }

Tensor turned(const Tensor& x, const Tensor& sin, const Tensor& cos, int64_t prefix, bool half, bool backward) {
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), width = x.size(3);
  Tensor out = heads_last(x);
  const Tokens from(x), to(out), sines(sin), cosines(cos);
  const bool wide = is_double(x) || is_double(sin) || is_double(cos);
  with_accumulate(wide ? ScalarType::Double : ScalarType::Float, [&](auto zero) {
    using A = decltype(zero);
    parallel(batch * tokens, 16384 / std::max<int64_t>(heads * width, 1), [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(kRotaryScratch * width);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / tokens, n = i % tokens, place = n - prefix;
        const bool has_place = place >= 0;
        kernels<A>().rotary({heads, width, half, backward, from.heads(b, n),
                             has_place ? sines.heads(b, place) : nowhere,
                             has_place ? cosines.heads(b, place) : nowhere,
                             to.out_heads(b, n)},
                            scratch.get());
      }
    });
  });
  return out;
}

HeadNorm norm_of(const std::string& name) {
  if (name == "none") return HeadNorm::none;
  return name == "layer_norm" ? HeadNorm::layer : HeadNorm::rms;
}

// What rotary_qkv takes beside the projection.
struct Packed {
  Maybe sin, cos;
  int64_t prefix;
  bool half;
  HeadNorm norm;
  double eps;
  Maybe weights[2], biases[2];  // of q and k
};

// From `x`, what was projected or, with an `input` that was, the gradient that arrives; `sums`, [2, 2, width], gets the
// gradients of q's weight and bias, then k's, where it is asked for.
template <class A>
void turn_packed(const Packed& p, const Tensor& x, const Maybe& input, const Tensor& out, bool backward,
                 std::vector<A>* sums) {
  const int64_t tokens = x.size(1), parts = x.size(2), heads = x.size(3), width = x.size(4), rows = x.size(0) * tokens;
  const Vector<A> weights[2] = {Vector<A>(p.weights[0]), Vector<A>(p.weights[1])};
  const Vector<A> biases[2] = {Vector<A>(p.biases[0]), Vector<A>(p.biases[1])};
  const std::optional<Tokens> sines = p.sin ? std::optional(Tokens(*p.sin)) : std::nullopt;
  const std::optional<Tokens> cosines = p.cos ? std::optional(Tokens(*p.cos)) : std::nullopt;
  const auto run = [&](int64_t begin, int64_t end, A* into) {
    Buffer<A> scratch(kRotaryScratch * width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tokens, n = i % tokens, place = n - p.prefix;
      for (int64_t part = 0; part < parts; ++part) {
        Rotary<A> r{heads, width, p.half, backward, Tokens(x, part).heads(b, n), nowhere, nowhere,
                    Tokens(out, part).out_heads(b, n)};
        if (part < 2) {
          if (sines && place >= 0) r.sin = sines->heads(b, place), r.cos = cosines->heads(b, place);
          r.norm = p.norm;
          r.eps = A(p.eps);
          r.weight = weights[part].get();
          r.bias = biases[part].get();
          if (input) r.input = Tokens(*input, part).heads(b, n);
          if (into) r.dweight = into + 2 * part * width, r.dbias = r.dweight + width;
        }
        kernels<A>().rotary(r, scratch.get());
      }
    }
  };
  if (sums) {
    *sums = sum_in_parts<A>(rows, 4 * width, run);
  } else {
    parallel(rows, 16384 / std::max<int64_t>(parts * heads * width, 1),
             [&](int64_t begin, int64_t end) { run(begin, end, nullptr); });
  }
}

}  // namespace

Tensor rotary(const Tensor& x, const Tensor& sin, const Tensor& cos, int64_t prefix, bool half) {
  return turned(x, sin, cos, prefix, half, false);
}

std::tuple<Tensor, Tensor, Tensor> rotary_backward(const Tensor& dout, const Maybe& x, const Tensor& sin,
                                                   const Tensor& cos, int64_t prefix, bool half,
                                                   const std::vector<bool>& needs) {
  STD_TORCH_CHECK(!needs[1] && !needs[2], "rotary: the extension has no gradients of sin and cos");
  return {needs[0] ? turned(dout, sin, cos, prefix, half, true) : nothing(dout), nothing(dout), nothing(dout)};
}

Tensor rotary_qkv(const Tensor& qkv, const Maybe& sin, const Maybe& cos, int64_t prefix, bool half,
                  const std::string& norm, const Maybe& q_weight, const Maybe& q_bias, const Maybe& k_weight,
                  const Maybe& k_bias, double eps) {
  const Packed p{sin, cos, prefix, half, norm_of(norm), eps, {q_weight, k_weight}, {q_bias, k_bias}};
  const bool wide = is_double(qkv) || is_double(sin) || is_double(cos) || is_double(q_weight) || is_double(q_bias) ||
                    is_double(k_weight) || is_double(k_bias);
  Tensor out = empty(qkv, shape_of(qkv));
  with_accumulate(wide ? ScalarType::Double : ScalarType::Float, [&](auto zero) {
    turn_packed<decltype(zero)>(p, qkv, {}, out, false, nullptr);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rotary_qkv_backward(
    const Tensor& dout, const Maybe& qkv, const Maybe& sin, const Maybe& cos, int64_t prefix, bool half,
    const std::string& norm, const Maybe& q_weight, const Maybe& k_weight, double eps, const std::vector<bool>& needs) {
  const Packed p{sin, cos, prefix, half, norm_of(norm), eps, {q_weight, k_weight}, {}};
  const bool wide = is_double(dout) || is_double(sin) || is_double(cos) || is_double(q_weight) || is_double(k_weight);
  const bool needs_sums = needs[1] || needs[2] || needs[3] || needs[4];
  Tensor dqkv = empty(dout, shape_of(dout));
  return with_accumulate(wide ? ScalarType::Double : ScalarType::Float, [&](auto zero) {
    using A = decltype(zero);
    std::vector<A> sums;
    turn_packed<A>(p, dout, qkv, dqkv, true, needs_sums ? &sums : nullptr);
    const auto gradient = [&](int64_t index) {
      const Maybe& like = index < 2 ? q_weight : k_weight;
      if (!needs[1 + index]) return nothing(dout);
      return from_values<A>(shape_of(*like), like->scalar_type(), sums.data() + index * dout.size(4));
    };
    return std::make_tuple(needs[0] ? dqkv : nothing(dout), gradient(0), gradient(1), gradient(2), gradient(3));
  });
}

}  // namespace vk
