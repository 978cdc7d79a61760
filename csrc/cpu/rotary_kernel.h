// One token of rotary, all its heads: out[i] = x[i] * cos[i] + x[partner of i] * factor[i], where the factor is the
// sine with its sign; it and the cosine are prepared once where all heads share them.

namespace vk {
namespace VK_ISA {

template <class A>
VK_INLINE Vec<A> partners(Vec<A> v) {
  Vec<A> swapped;
  for (int64_t i = 0; i < Lanes<A>::count; ++i) swapped[i] = v[i ^ 1];
  return swapped;
}

template <class A>
void rotary_factors(A* factor, const A* sin, int64_t width, bool half, bool backward) {
  for (int64_t i = 0; i < width; ++i) {
    const Pair pair = pair_of(i, width, half);
    factor[i] = sine_factor(pair.first, backward, sin[i], sin[pair.partner]);
  }
}

template <class A>
void rotary(const Rotary& r, A* scratch) {
  const int64_t width = r.width, middle = width / 2;
  A *x_buffer = scratch, *out_buffer = scratch + width, *sin_buffer = scratch + 2 * width;
  A *cos_buffer = scratch + 3 * width, *factor = scratch + 4 * width;
  const A* cos = nullptr;
  for (int64_t h = 0; h < r.heads; ++h) {
    const A* x = row_of(r.x, h, width, x_buffer);
    if (!r.sin.data) {
      put_row(r.out, h, x, width);
      continue;
    }
    if (h == 0 || r.sin.row != 0) rotary_factors(factor, row_of(r.sin, h, width, sin_buffer), width, r.half, r.backward);
    if (h == 0 || r.cos.row != 0) cos = row_of(r.cos, h, width, cos_buffer);
    A* out = row_to(r.out, h, out_buffer);
    const auto turn = [&](int64_t from, int64_t partner, int64_t count) VK_ALWAYS {
      each<A>(count, [&](auto lane, int64_t j) VK_ALWAYS {
        using V = decltype(lane);
        const V other = get<V>(x + partner + j);
        put(out + from + j, get<V>(x + from + j) * get<V>(cos + from + j) + other * get<V>(factor + from + j));
      });
    };
    if (r.half) {
      turn(0, middle, middle);
      turn(middle, 0, middle);
    } else {
      int64_t j = 0;
      for (; j + Lanes<A>::count <= width; j += Lanes<A>::count) {
        const Vec<A> v = load(x + j);
        store(out + j, v * load(cos + j) + partners<A>(v) * load(factor + j));
      }
      for (; j < width; ++j) out[j] = x[j] * cos[j] + x[j ^ 1] * factor[j];
    }
    put_row(r.out, h, out, width);
  }
}

}  // namespace VK_ISA
}  // namespace vk
