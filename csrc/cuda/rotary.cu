// rotary: the schemas of vitkernels/ops/rotary.py on CUDA.
#include <type_traits>

#include "cuda/rotary.cuh"

namespace vk {

struct Rotary {
  int heads, tokens, prefix, width;
  int blocks_per_sample;
  bool backward, shared;  // sines and cosines are those of all heads
  Heads<const char*> x, sin, cos;
  Heads<char*> out;
};

constexpr int kThreads = 256;
constexpr int kHeadsAhead = 4;  // of a thread, on their way at once; half as many where registers hold no more

// A thread turns 8 numbers that lie together, four pairs, or the first halves of 8, whose second halves it turns too:
// the same ones of four heads of a token, so that what heads share is read and made ready once. All of that is on its
// way before the first number is asked for: 64 bytes a thread, 128 in halves, of 16-bit heads. A block is (such eights,
// threads that share a token's heads, tokens of one sample), which takes one division, of 32 bits.
template <bool kAligned, int kWords, bool kHalf>
__global__ void __launch_bounds__(kThreads, kAligned ? 2 : 1) rotary_kernel(const __grid_constant__ Rotary a) {
  constexpr int kParts = kHalf ? 2 : 1, kAhead = !kAligned ? 1 : kHeadsAhead / (kHalf ? kWords : 1);
  const int64_t sample = blockIdx.x / a.blocks_per_sample;
  const int token = blockIdx.x % a.blocks_per_sample * blockDim.z + threadIdx.z, place = token - a.prefix;
  const int span = a.width / kParts;
  if (token >= a.tokens) return;
  for (int column = threadIdx.x * kLanes; column < span; column += blockDim.x * kLanes) {
    Parts<kParts> factor, cosine;
    const auto load_positions = [&](int head) {
      Loaded<> sines[kParts], cosines[kParts];
      load_parts<kAligned>(sines, a.sin, sample, head, place, column, span);
      load_parts<kAligned>(cosines, a.cos, sample, head, place, column, span);
      to_floats<kAligned>(factor, sines, a.sin.dtype);
      to_floats<kAligned>(cosine, cosines, a.cos.dtype);
      to_factors<kParts>(factor, a.backward);
    };
    for (int first = threadIdx.y; first < a.heads; first += blockDim.y * kAhead) {
      Loaded<kWords> loaded[kAhead][kParts];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int head = first + i * blockDim.y;
        load_parts<kAligned>(loaded[i], a.x, sample, head, token, head < a.heads ? column : span, span);
      }
      if (a.shared && place >= 0 && first == threadIdx.y) load_positions(0);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int head = first + i * blockDim.y;
        if (head >= a.heads) break;
        Parts<kParts> x;
        to_floats<kAligned>(x, loaded[i], a.x.dtype);
        if (!a.shared && place >= 0) load_positions(head);
        if (place >= 0) turn<kParts>(x, factor, cosine);  // what stands in front is copied: what is infinite stays so
        store_parts<kAligned>(a.out, sample, head, token, column, span, x);
      }
    }
  }
}

namespace {

Tensor turned(const Tensor& x, const Tensor& sin, const Tensor& cos, int64_t prefix, bool half, bool backward) {
  const int64_t heads = x.size(1), tokens = x.size(2), width = x.size(3), span = half ? width / 2 : width;
  Tensor out = heads_last(x);
  const auto at_most = [](int64_t count, int64_t most) { return std::max<int64_t>(std::min(count, most), 1); };
  const int64_t across = at_most(blocks(span, kLanes), kThreads);
  const int64_t down = at_most(blocks(heads, kHeadsAhead), kThreads / across);
  const int64_t deep = at_most(std::min<int64_t>(tokens, 64), kThreads / (across * down));  // 64: CUDA's most along z
  const int64_t each = blocks(tokens, deep);
  const Rotary a{int(heads), int(tokens), int(prefix), int(width), int(each), backward,
                 sin.size(1) == 1 && cos.size(1) == 1,
                 heads_of<const char*>(x), heads_of<const char*>(sin), heads_of<const char*>(cos),
                 heads_of<char*>(out)};
  const bool aligned =
      span % kLanes == 0 && is_aligned(a.x) && is_aligned(a.out) &&
      (tokens == prefix || (is_aligned(a.sin) && is_aligned(a.cos)));  // of no positions nothing is read
  const auto kernel_of = [&](auto half) {
    return !aligned                  ? rotary_kernel<false, 2, half>
           : size_of(a.x.dtype) == 2 ? rotary_kernel<true, 1, half>
                                     : rotary_kernel<true, 2, half>;
  };
  const Launches launches("rotary", x, {&sin, &cos});
  launches("rotary_kernel", half ? kernel_of(std::true_type()) : kernel_of(std::false_type()),
           {heads * width > 0 ? x.size(0) * each : 0}, dim3(across, down, deep), 0, a);
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
