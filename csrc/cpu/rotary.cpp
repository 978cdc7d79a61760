// rotary: the schemas of vitkernels/ops/rotary.py on the CPU. Tokens are the unit of work.
#include "shared/ops.h"
#include "tensors.h"

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
  char* of(int64_t b, int64_t n) const { return data + (b * step[0] + n * step[2]) * size_of(dtype); }
  Rows heads(int64_t b, int64_t n) const { return {of(b, n), dtype, step[1], step[3]}; }
  OutRows out_heads(int64_t b, int64_t n) const { return {of(b, n), dtype, step[1], step[3]}; }
};

Tensor turned(const Tensor& x, const Tensor& sin, const Tensor& cos, int64_t prefix, bool half, bool backward) {
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), width = x.size(3);
  Tensor out = heads_last(x);
  const Tokens from(x), to(out), sines(sin), cosines(cos);
  const auto is_double = [](const Tensor& t) { return t.scalar_type() == ScalarType::Double; };
  const bool wide = is_double(x) || is_double(sin) || is_double(cos);
  with_accumulate(wide ? ScalarType::Double : ScalarType::Float, [&](auto zero) {
    using A = decltype(zero);
    parallel(batch * tokens, 16384 / std::max<int64_t>(heads * width, 1), [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(kRotaryScratch * width);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / tokens, n = i % tokens, place = n - prefix;
        const bool has_place = place >= 0;
        kernels<A>().rotary({heads, width, half, backward, from.heads(b, n),
                             has_place ? sines.heads(b, place) : Rows{nullptr, DType::f32, 0, 0},
                             has_place ? cosines.heads(b, place) : Rows{nullptr, DType::f32, 0, 0},
                             to.out_heads(b, n)},
                            scratch.get());
      }
    });
  });
  return out;
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

}  // namespace vk
