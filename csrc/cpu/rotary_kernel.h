// One token of rotary, all its heads: out[i] = x[i] * cos[i] + x[partner of i] * factor[i], where the factor is the
// sine with its sign; it and the cosine are prepared once where all heads share them. A norm stands before the turn.
#include <cmath>

namespace vk {
namespace VK_ISA {

template <class A>
VK_INLINE Vec<A> partners(Vec<A> v) {
  Vec<A> swapped;
  for (int64_t i = 0; i < Lanes<A>::count; ++i) swapped[i] = v[i ^ 1];
  return swapped;
}

// Forward the sine of the number itself, negative for the first of a pair; backward that of its partner, positive.
template <class A>
void rotary_factors(A* factor, const A* sin, int64_t width, bool half, bool backward) {
  const int64_t apart = half ? width / 2 : 1;
  for (int64_t i = 0; i < width; ++i) {
    const bool first = half ? i < apart : i % 2 == 0;
    const int64_t partner = first ? i + apart : i - apart;
    factor[i] = backward ? (first ? sin[partner] : -sin[partner]) : (first ? -sin[i] : sin[i]);
  }
}

// Of a head: what its norm takes away, and 1 over its scale.
template <class A>
VK_INLINE void head_statistics(const Rotary<A>& r, const A* x, A& mean, A& rstd) {
  mean = r.norm == HeadNorm::layer ? row_sum(x, r.width) / A(r.width) : A(0);
  Sum<A> squares;
  each<A>(r.width, [&](auto lane, int64_t j) VK_ALWAYS {
    const auto centred = get<decltype(lane)>(x + j) - mean;
    squares.add(centred * centred);
  });
  rstd = A(1) / A(std::sqrt(squares.total() / A(r.width) + r.eps));
}

template <class A>
void head_norm(const Rotary<A>& r, const A* x, A* out) {
  A mean, rstd;
  head_statistics(r, x, mean, rstd);
  const A *weight = r.weight, *bias = r.bias;
  each<A>(r.width, [&](auto lane, int64_t j) VK_ALWAYS {
    using V = decltype(lane);
    V y = (get<V>(x + j) - mean) * rstd;
    if (weight) y *= get<V>(weight + j);
    put(out + j, bias ? y + get<V>(bias + j) : y);
  });
}

// `g` is the gradient of the norm's result, and becomes that of its input.
template <class A>
void head_norm_backward(const Rotary<A>& r, const A* x, A* g) {
  A mean, rstd;
  head_statistics(r, x, mean, rstd);
  const A* weight = r.weight;
  A *dweight = r.dweight, *dbias = r.dbias;
  Sum<A> sum, along;
  each<A>(r.width, [&](auto lane, int64_t j) VK_ALWAYS {
    using V = decltype(lane);
    const V normed = (get<V>(x + j) - mean) * rstd;
    V value = get<V>(g + j);
    if (dweight) put(dweight + j, get<V>(dweight + j) + value * normed);
    if (dbias) put(dbias + j, get<V>(dbias + j) + value);
    if (weight) value *= get<V>(weight + j);
    put(g + j, value);
    sum.add(value);
    along.add(value * normed);
  });
  const A centre = r.norm == HeadNorm::layer ? sum.total() / A(r.width) : A(0), slope = along.total() / A(r.width);
  each<A>(r.width, [&](auto lane, int64_t j) VK_ALWAYS {
    using V = decltype(lane);
    put(g + j, (get<V>(g + j) - centre - (get<V>(x + j) - mean) * rstd * slope) * rstd);
  });
}

template <class A>
VK_INLINE void turn_head(const Rotary<A>& r, const A* x, const A* cos, const A* factor, A* out) {
  const int64_t width = r.width, middle = width / 2;
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
}

template <class A>
void rotary(const Rotary<A>& r, A* scratch) {
  const int64_t width = r.width;
  A *x_buffer = scratch, *out_buffer = scratch + width, *sin_buffer = scratch + 2 * width;
  A *cos_buffer = scratch + 3 * width, *factor = scratch + 4 * width, *normed = scratch + 5 * width;
  A* input_buffer = scratch + 6 * width;
  const bool norm = r.norm != HeadNorm::none;
  const A* cos = nullptr;
  for (int64_t h = 0; h < r.heads; ++h) {
    const A* x = row_of(r.x, h, width, x_buffer);
    if (norm && !r.backward) {
      head_norm(r, x, normed);
      x = normed;
    }
    if (r.sin.data) {
      if (h == 0 || r.sin.row != 0) {
        rotary_factors(factor, row_of(r.sin, h, width, sin_buffer), width, r.half, r.backward);
      }
      if (h == 0 || r.cos.row != 0) cos = row_of(r.cos, h, width, cos_buffer);
      A* out = norm && r.backward ? normed : row_to(r.out, h, out_buffer);
      turn_head(r, x, cos, factor, out);
      x = out;
    } else if (norm && r.backward) {
      for (int64_t j = 0; j < width; ++j) normed[j] = x[j];
    }
    if (norm && r.backward) {
      head_norm_backward(r, row_of(r.input, h, width, input_buffer), normed);
      x = normed;
    }
    put_row(r.out, h, x, width);
  }
}

}  // namespace VK_ISA
}  // namespace vk
