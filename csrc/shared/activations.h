// Activations and their derivatives, recomputed from the pre-activation: of a number or of a vector of them, V, whose
// elements are A. Who includes this gives VK_ISA, a namespace of its own for what it compiles; VK_INLINE; and there,
// declared before, vexp(V), and for double normal(V, V& cdf, V& pdf).
#pragma once
#include "shared/types.h"

namespace vk {
namespace VK_ISA {

// The normal distribution: its cumulative function and density at h, which share one exponential.
// tail(h) = t * P(t) * exp(-h^2 / 2), t = 1 / (1 + 0.305 |h|); P fitted to 1e-7 relative on [0, 14].
template <class V>
VK_INLINE void float_normal(V h, V& cdf, V& pdf) {
  const V size = h < 0.f ? -h : h;
  const V e = vexp(h * h * -0.5f);
  const V t = 1.f / (size * 0.305f + 1.f);
  V p = t * 0.03669828809f - 0.1529847158f;
  p = p * t + 0.1857109442f;
  p = p * t - 0.03797151466f;
  p = p * t + 0.1210189255f;
  p = p * t + 0.1034216948f;
  p = p * t + 0.1224666829f;
  p = p * t + 0.1216397416f;
  const V tail = p * t * e;
  cdf = h < 0.f ? tail : 1.f - tail;
  pdf = e * 0.398942280f;
}

// gate = sigmoid(z), so that the activation is h * gate and its slope gate + h * gate * (1 - gate) * dz
template <class A, class V, class D>
VK_INLINE void gated(V h, V z, D dz, V& value, V& slope) {
  const V gate = A(1) / (A(1) + vexp(-z));
  value = h * gate;
  slope = gate + value * (A(1) - gate) * dz;
}

template <class A, Activation kind, class V>
VK_INLINE void activate_one(V h, V& value, V& slope) {
  if constexpr (kind == Activation::gelu) {
    V cdf, pdf;
    if constexpr (sizeof(A) == sizeof(float)) {
      float_normal(h, cdf, pdf);
    } else {
      normal(h, cdf, pdf);
    }
    value = h * cdf;
    slope = cdf + h * pdf;
  } else if constexpr (kind == Activation::gelu_tanh) {  // 0.5 * (1 + tanh(u)) = sigmoid(2 u)
    const A root = A(1.5957691216057307117), cubic = A(0.044715);
    gated<A>(h, root * h * (A(1) + cubic * h * h), root * (A(1) + 3 * cubic * h * h), value, slope);
  } else if constexpr (kind == Activation::quick_gelu) {
    gated<A>(h, A(1.702) * h, A(1.702), value, slope);
  } else if constexpr (kind == Activation::silu) {
    gated<A>(h, h, A(1), value, slope);
  } else {
    value = h < A(0) ? V{} : h;  // NaN stays NaN
    slope = h > A(0) ? V{} + A(1) : V{};
  }
}

}  // namespace VK_ISA
}  // namespace vk
