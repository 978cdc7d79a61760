// Activations and their derivatives over rows, shared/activations.h a vector at a time; and gates, activation(gate) * up.

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
                       DType dtype, int64_t rows, int64_t width, int64_t first, int64_t k) {
  static_assert(kActivationBlock % kPanel == 0);
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
      if (k == 0) {
        if (activated) store_row(activated + at, dtype, 1, value, n);
      } else if constexpr (std::is_same_v<A, float>) {
        for (int64_t c = 0; c < n; c += kPanel) {
          const int64_t count = n - c < kPanel ? n - c : kPanel;
          put_in_panel(Pairs{}, reinterpret_cast<float*>(activated), first + i, k, j + c, count, value + c);
        }
      }
    }
  }
}

// One row of a gate: `value` becomes activation(g) * u, where it may be g. All are in A, padded to whole vectors.
template <class A>
VK_INLINE void gate_row(Activation kind, A* value, const A* g, const A* u, int64_t count) {
  activate_any(kind, value, static_cast<A*>(nullptr), g, count);
  each<A>(count, [&](auto lane, int64_t c) VK_ALWAYS {
    using V = decltype(lane);
    put(value + c, get<V>(value + c) * get<V>(u + c));
  });
}

// Its gradients of g and u, in their places, and activation(g) * u in `d`'s, which was its own gradient; sums are added
// to where not null. `value` and `slope` are scratch.
template <class A>
VK_INLINE void gate_row_backward(Activation kind, A* d, A* g, A* u, A* g_sums, A* u_sums, A* value, A* slope,
                                 int64_t count) {
  activate_any(kind, value, slope, static_cast<const A*>(g), count);
  each<A>(count, [&](auto lane, int64_t c) VK_ALWAYS {
    using V = decltype(lane);
    const V of_out = get<V>(d + c), up = get<V>(u + c), activated = get<V>(value + c);
    const V of_gate = of_out * up * get<V>(slope + c), of_up = of_out * activated;
    put(g + c, of_gate);
    put(u + c, of_up);
    put(d + c, activated * up);
    if (g_sums) {
      put(g_sums + c, get<V>(g_sums + c) + of_gate);
      put(u_sums + c, get<V>(u_sums + c) + of_up);
    }
  });
}

template <class A>
void gate(Activation kind, char* out, const char* pre, DType dtype, int64_t rows, int64_t width) {
  alignas(64) A g[kActivationBlock] = {}, u[kActivationBlock] = {}, value[kActivationBlock];
  const int64_t size = size_of(dtype);
  for (int64_t i = 0; i < rows; ++i, out += width * size, pre += 2 * width * size) {
    for (int64_t j = 0; j < width; j += kActivationBlock) {
      const int64_t n = width - j < kActivationBlock ? width - j : kActivationBlock;
      load_row(g, pre + j * size, dtype, 1, n);
      load_row(u, pre + (width + j) * size, dtype, 1, n);
      gate_row(kind, value, g, u, n);
      store_row(out + j * size, dtype, 1, value, n);
    }
  }
}

template <class A>
void gate_backward(Activation kind, char* dpre, char* activated, A* dbias, const char* dout, const char* pre,
                   DType dtype, int64_t rows, int64_t width) {
  alignas(64) A g[kActivationBlock] = {}, u[kActivationBlock] = {}, d[kActivationBlock];
  alignas(64) A value[kActivationBlock], slope[kActivationBlock];
  const int64_t size = size_of(dtype);
  for (int64_t j = 0; j < width; j += kActivationBlock) {
    const int64_t n = width - j < kActivationBlock ? width - j : kActivationBlock;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (i * width + j) * size, at_gate = (2 * i * width + j) * size, at_up = at_gate + width * size;
      load_row(g, pre + at_gate, dtype, 1, n);
      load_row(u, pre + at_up, dtype, 1, n);
      load_row(d, dout + at, dtype, 1, n);
      A *g_sums = dbias ? dbias + j : nullptr, *u_sums = dbias ? dbias + width + j : nullptr;
      gate_row_backward(kind, d, g, u, g_sums, u_sums, value, slope, n);
      store_row(dpre + at_gate, dtype, 1, g, n);
      store_row(dpre + at_up, dtype, 1, u, n);
      if (activated) store_row(activated + at, dtype, 1, d, n);
    }
  }
}

}  // namespace VK_ISA
}  // namespace vk
