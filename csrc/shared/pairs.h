// rotary's pairs: which numbers of a head turn together, and with which sine. VK_ISA and VK_INLINE as in activations.h.
#pragma once
#include "shared/types.h"

namespace vk {
namespace VK_ISA {

struct Pair {
  int64_t partner;
  bool first;  // of the two
};

VK_INLINE Pair pair_of(int64_t i, int64_t width, bool half) {
  const int64_t apart = half ? width / 2 : 1;
  const bool first = half ? i < apart : i % 2 == 0;
  return {first ? i + apart : i - apart, first};
}

// out[i] = x[i] * cos[i] + x[partner] * factor: forward the sine of the number itself, negative for the first of a
// pair; backward that of its partner, positive.
template <class A>
VK_INLINE A sine_factor(bool first, bool backward, A own, A partner) {
  return backward ? (first ? partner : -partner) : (first ? -own : own);
}

}  // namespace VK_ISA
}  // namespace vk
