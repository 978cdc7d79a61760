// Activations and their derivatives over rows: shared/activations.h a vector at a time.

namespace vk {
namespace VK_ISA {

constexpr int64_t kActivationBlock = 512;  // values converted at a time: in, out and slope stay in L1

// `count` is any; buffers are padded to whole vectors.
template <class A, Activation kind>
void activate_block(A* value, A* slope, const A* h, int64_t count) {
  constexpr int64_t lanes = Lanes<A>::count;
  for (int64_t i = 0; i < count; i += lanes) {
    Vec<A> v, s;
    activate_one<A, kind>(load(h + i), v, s);
    store(value + i, v);
    if (slope) store(slope + i, s);
  }
}

template <class A>
VK_INLINE void activate_any(Activation kind, A* value, A* slope, const A* h, int64_t count) {
  switch (kind) {
    case Activation::gelu: return activate_block<A, Activation::gelu>(value, slope, h, count);
    case Activation::gelu_tanh: return activate_block<A, Activation::gelu_tanh>(value, slope, h, count);
    case Activation::quick_gelu: return activate_block<A, Activation::quick_gelu>(value, slope, h, count);
    case Activation::relu: return activate_block<A, Activation::relu>(value, slope, h, count);
    case Activation::silu: return activate_block<A, Activation::silu>(value, slope, h, count);
  }
}

template <class A>
void activate(Activation kind, char* out, const char* pre, DType dtype, int64_t count) {
  alignas(64) A h[kActivationBlock] = {}, value[kActivationBlock];
  const int64_t size = size_of(dtype);
  for (int64_t i = 0; i < count; i += kActivationBlock) {
    const int64_t n = count - i < kActivationBlock ? count - i : kActivationBlock;
    load_row(h, pre + i * size, dtype, 1, n);
    activate_any(kind, value, static_cast<A*>(nullptr), h, n);
    store_row(out + i * size, dtype, 1, value, n);
  }
}

template <class A>
void activate_backward(Activation kind, char* dpre, char* activated, A* dbias, const char* dout, const char* pre,
                       DType dtype, int64_t rows, int64_t width) {
  alignas(64) A h[kActivationBlock] = {}, value[kActivationBlock], slope[kActivationBlock], g[kActivationBlock];
  const int64_t size = size_of(dtype);
  for (int64_t j = 0; j < width; j += kActivationBlock) {
    const int64_t n = width - j < kActivationBlock ? width - j : kActivationBlock;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (i * width + j) * size;
      load_row(h, pre + at, dtype, 1, n);
      load_row(g, dout + at, dtype, 1, n);
      activate_any(kind, value, slope, h, n);
      each<A>(n, [&](auto lane, int64_t c) VK_ALWAYS {
        using V = decltype(lane);
        const V d = get<V>(g + c) * get<V>(slope + c);
        put(g + c, d);
        if (dbias) put(dbias + j + c, get<V>(dbias + j + c) + d);
      });
      store_row(dpre + at, dtype, 1, g, n);
      if (activated) store_row(activated + at, dtype, 1, value, n);
    }
  }
}

}  // namespace VK_ISA
}  // namespace vk
