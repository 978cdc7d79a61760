// rotary: the schemas of vitkernels/ops/rotary.py on CUDA.
#include "cuda/rotary.cuh"

namespace vk {

struct Rotary {
  int heads, tokens, prefix, width;
  bool half, backward;
  Heads<const char*> x, sin, cos;
  Heads<char*> out;
};

// A block has one token, all its heads, so that sines and cosines which heads share are in its L1. A thread turns 8
// numbers that lie together: four pairs, or the first halves of 8, whose second halves it turns too.
template <bool kAligned>
__global__ void __launch_bounds__(256) rotary_kernel(const __grid_constant__ Rotary a) {
  const int64_t sample = blockIdx.x / a.tokens, token = blockIdx.x % a.tokens, place = token - a.prefix;
  const int span = a.half ? a.width / 2 : a.width, pieces = (span + kLanes - 1) / kLanes;
  for (int i = threadIdx.x; i < a.heads * pieces; i += blockDim.x) {
    const int head = i / pieces, column = i % pieces * kLanes;
    const auto load_part = [&](float(&out)[kLanes], const Heads<const char*>& t, int64_t at, int part) {
      load_floats<kAligned>(out, row_of<Rows>(t, sample, head, at, part * span), 0, column, span);
    };
    const auto store_part = [&](const float(&values)[kLanes], int part) {
      store_floats<kAligned>(row_of<OutRows>(a.out, sample, head, token, part * span), 0, column, span, values);
    };
    TwoParts x, sine, cosine, out;
    const int parts = a.half ? 2 : 1;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (part == parts) break;
      load_part(x[part], a.x, token, part);
      if (place < 0) {
        store_part(x[part], part);
        continue;
      }
      load_part(sine[part], a.sin, place, part);
      load_part(cosine[part], a.cos, place, part);
    }
    if (place < 0) continue;
    turn(out, x, sine, cosine, a.half, a.backward);
    if (a.half) store_part(out[1], 1);
    store_part(out[0], 0);
  }
}

namespace {

Tensor turned(const Tensor& x, const Tensor& sin, const Tensor& cos, int64_t prefix, bool half, bool backward) {
  const int64_t heads = x.size(1), tokens = x.size(2), width = x.size(3), span = half ? width / 2 : width;
  Tensor out = heads_last(x);
  const Rotary a{int(heads), int(tokens), int(prefix), int(width), half, backward,
                 heads_of<const char*>(x), heads_of<const char*>(sin), heads_of<const char*>(cos),
                 heads_of<char*>(out)};
  const bool aligned =
      span % kLanes == 0 && is_aligned(a.x) && is_aligned(a.out) &&
      (tokens == prefix || (is_aligned(a.sin) && is_aligned(a.cos)));  // of no positions nothing is read
  const int64_t work = heads * blocks(span, kLanes);
  const Launches launches("rotary", x, {&sin, &cos});
  launches("rotary_kernel", aligned ? rotary_kernel<true> : rotary_kernel<false>,
           {work > 0 ? x.size(0) * tokens : 0}, dim3(std::min<int64_t>(round_up(work, kWarp), 256)), 0, a);
  return out;
}

}  // namespace

Tensor rotary(const Tensor& x, const Tensor& sin, const Tensor& cos, int64_t prefix, bool half) {
  return turned(x, sin, cos, prefix, half, false);
}

std::tuple<Tensor, Tensor, Tensor> rotary_backward(const Tensor& dout, const Maybe&, const Tensor& sin,
                                                   const Tensor& cos, int64_t prefix, bool half,
                                                   const std::vector<bool>& needs) {
  STD_TORCH_CHECK(!needs[1] && !needs[2], "rotary: the extension has no gradients of sin and cos");
  return {needs[0] ? turned(dout, sin, cos, prefix, half, true) : nothing(dout), nothing(dout), nothing(dout)};
}

}  // namespace vk
