// What products multiply: 32-bit words along k, each one float32, or two bfloat16 that a word of A and a word of B multiply
// and add at once; and how words are made of what lies in memory.
//
// The matrix unit has no float32: there, one is the sum of three bfloat16, 8 bits each (Henry, Tang and Heinecke 2019). Of
// the nine products of pieces the six largest are added; the others are below 2^-24 of the whole, where float32 rounds.
// What is not finite has no such pieces, and of elements below 2^-110 the last ones are denormals, which the matrix unit
// takes for zeros.

namespace vk {
namespace VK_ISA {

struct Pairs {
  static constexpr int64_t size = 2, per_word = 2;  // bytes of an element; elements
  static constexpr int64_t pieces = 1;              // words that stand for one
  static constexpr int64_t ahead = 0;               // as Plain has it
  static constexpr bool by_tiles = kTiles;          // multiplied on the matrix unit
  using Scope = TileScope;                          // what a kernel holds while it multiplies
  VK_INLINE static Vec<float> madd(Vec<float> sum, Vec<float> a, Vec<float> b) {
#if defined(VK_BF16_PAIRS)
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const VecU odd = VecU{} + 0xffff0000u;
    sum += (Vec<float>)((VecU)a << 16) * (Vec<float>)((VecU)b << 16);
    return sum + (Vec<float>)((VecU)a & odd) * (Vec<float>)((VecU)b & odd);
#endif
  }
};
struct Singles : Plain {
  static constexpr int64_t size = 4, per_word = 1, pieces = 1;
  static constexpr bool by_tiles = false;
  struct Scope {};
};
#if defined(VK_TILES)
struct Thirds : Singles {
  static constexpr int64_t per_word = 2, pieces = 3;
  static constexpr bool by_tiles = true;
  using Scope = TileScope;
};
#else
using Thirds = Singles;
#endif
template <class W>
constexpr bool by_tiles = W::by_tiles;
template <class W>
constexpr int64_t pieces = W::pieces;

// B in memory: what W's words are made of or, of Pairs, floats to be rounded.
struct Floats {
  static constexpr int64_t size = 4;
};

template <class W>
constexpr int64_t per_word = W::per_word;
template <class W>
VK_INLINE int64_t words_of(int64_t k) {
  return (k + per_word<W> - 1) / per_word<W>;
}

VK_INLINE void zip(Vec<float> a, Vec<float> b, Vec<float>& low, Vec<float>& high) {  // a0 b0 a1 b1 ...
#if defined(__clang__)
  for (int i = 0; i < kFloats; ++i) {
    low[i] = i % 2 ? b[i / 2] : a[i / 2];
    high[i] = i % 2 ? b[(kFloats + i) / 2] : a[(kFloats + i) / 2];
  }
#else
  VecI from{};
  for (int i = 0; i < kFloats; ++i) from[i] = i % 2 * kFloats + i / 2;
  low = __builtin_shuffle(a, b, from);
  high = __builtin_shuffle(a, b, from + kFloats / 2);
#endif
}

VK_INLINE void unzip(Vec<float> a, Vec<float> b, Vec<float>& even, Vec<float>& odd) {  // a0 a2 .. b0 b2 ..
#if defined(__clang__)
  for (int i = 0; i < kFloats; ++i) {
    even[i] = i < kFloats / 2 ? a[2 * i] : b[2 * i - kFloats];
    odd[i] = i < kFloats / 2 ? a[2 * i + 1] : b[2 * i + 1 - kFloats];
  }
#else
  VecI from{};
  for (int i = 0; i < kFloats; ++i) from[i] = 2 * i;
  even = __builtin_shuffle(a, b, from);
  odd = __builtin_shuffle(a, b, from + 1);
#endif
}

// kFloats rows of kFloats words become columns: interleaving the halves does it after log2(kFloats) rounds.
VK_INLINE void transpose_lanes(Vec<float>* rows) {
#pragma GCC unroll 4
  for (int64_t round = 1; round < kFloats; round *= 2) {
    Vec<float> next[kFloats];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kFloats / 2; ++i) zip(rows[i], rows[i + kFloats / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kFloats; ++i) rows[i] = next[i];
  }
}

// Words [p, 0..count) of a matrix whose rows are k and whose columns are packed; past the last k are zeros.
VK_INLINE void interleave(Singles, float* out, const char* in, int64_t k_step, int64_t p, int64_t, int64_t count) {
  const float* const row = at<float>(in, p * k_step);
  each<float>(count, [&](auto lane, int64_t j) VK_ALWAYS { put(out + j, get<decltype(lane)>(row + j)); });
}
VK_INLINE void interleave(Pairs, float* out, const char* in, int64_t k_step, int64_t p, int64_t k, int64_t count) {
  const bool two = 2 * p + 1 < k;
  const uint16_t *first = at<uint16_t>(in, 2 * p * k_step), *second = two ? first + k_step : first;
  const uint32_t mask = two ? 0xffffffffu : 0xffffu;
  int64_t j = 0;
  for (; j + kFloats <= count; j += kFloats) {
    const VecU word = (widen(first + j) | (widen(second + j) << 16)) & mask;
    store(out + j, (Vec<float>)word);
  }
  for (; j < count; ++j) {
    const uint32_t word = (first[j] | uint32_t(second[j]) << 16) & mask;
    std::memcpy(out + j, &word, sizeof word);
  }
}
// The bfloat16 of two, side by side in a word. Where the processor has it in one instruction, that takes denormals for
// zeros, as the products of pairs do there.
VK_INLINE VecU rounded_pairs(Vec<float> first, Vec<float> second) {
#if defined(VK_BF16_PAIRS)
  VecU from{};  // halves i and i + kFloats
  for (uint32_t i = 0; i < kFloats; ++i) from[i] = i | (i + kFloats) << 16;
  return (VecU)_mm512_permutexvar_epi16((__m512i)from, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
  return bf16_bits(first) | (VecU)round_bf16(second);
#endif
}
VK_INLINE void interleave_rounded(float* out, const char* in, int64_t k_step, int64_t p, int64_t k, int64_t count) {
  const bool two = 2 * p + 1 < k;
  const float *first = at<float>(in, 2 * p * k_step), *second = two ? first + k_step : first;
  const uint32_t mask = two ? 0xffffffffu : 0xffffu;
  int64_t j = 0;
  for (; j + kFloats <= count; j += kFloats) {
    store(out + j, (Vec<float>)(rounded_pairs(load(first + j), load(second + j)) & mask));
  }
  for (; j < count; ++j) {
    const uint32_t word = (to_bf16(first[j]) | uint32_t(to_bf16(second[j])) << 16) & mask;
    std::memcpy(out + j, &word, sizeof word);
  }
}
// The pieces of two, side by side in words: the largest first, each `step` vectors after the one before.
VK_INLINE void split(Vec<float> first, Vec<float> second, Vec<float>* words, int64_t step) {
#pragma GCC unroll 3
  for (int64_t piece = 0; piece < 3; ++piece) {
    const VecU word = rounded_pairs(first, second);
    words[piece * step] = (Vec<float>)word;
    first -= (Vec<float>)(word << 16);
    second -= (Vec<float>)(word & 0xffff0000u);
  }
}
VK_INLINE Vec<float> load_up_to(const float* in, int64_t count) {
  if (count >= kFloats) return load(in);
  Vec<float> v{};
  if (count <= 0) return v;
  std::memcpy(&v, in, size_t(count) * 4);
  return v;
}
// Words [p, 0..count) in pieces, from one to the next `step`; zeros past `count`, to whole vectors.
VK_INLINE void interleave_split(float* out, int64_t step, const char* in, int64_t k_step, int64_t p, int64_t k,
                                int64_t count) {
  const float *first = at<float>(in, 2 * p * k_step), *second = first + k_step;
  const bool two = 2 * p + 1 < k;
  for (int64_t j = 0; j < count; j += kFloats) {
    Vec<float> words[3];
    split(load_up_to(first + j, count - j), two ? load_up_to(second + j, count - j) : Vec<float>{}, words, 1);
#pragma GCC unroll 3
    for (int64_t piece = 0; piece < 3; ++piece) store(out + piece * step + j, words[piece]);
  }
}
// Of an operand that lies in S; `step` as above.
template <class W, class S>
VK_INLINE void interleave_any(float* out, int64_t step, const char* in, int64_t k_step, int64_t p, int64_t k,
                              int64_t count) {
  if constexpr (pieces<W> > 1) {
    interleave_split(out, step, in, k_step, p, k, count);
  } else if constexpr (W::size == S::size) {
    interleave(W{}, out, in, k_step, p, k, count);
  } else {
    interleave_rounded(out, in, k_step, p, k, count);
  }
}

// Row k, column j of B, which lies in S.
template <class S>
VK_INLINE const char* b_at(const Product& p, int64_t k, int64_t j) {
  int64_t part = 0;
  k += p.begin;
  for (; k >= p.b.rows; k -= p.b.rows) ++part;
  for (; j >= p.b.cols; j -= p.b.cols) ++part;
  return p.b.data[part] + (k * p.b.row + j * p.b.col) * S::size;
}

// kFloats words of two vectors one behind the other, rounded in the same way.
VK_INLINE Vec<float> rounded_words(Vec<float> first, Vec<float> second) {
#if defined(VK_BF16_PAIRS)
  return (Vec<float>)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  Vec<float> even, odd;
  unzip(round_bf16(first), round_bf16(second), even, odd);
  return (Vec<float>)(((VecU)even >> 16) | (VecU)odd);
#endif
}
// The first kFloats words of a row of S along k.
template <class W, class S>
VK_INLINE Vec<float> load_words(const char* in) {
  const Vec<float> first = load(at<float>(in, 0));
  if constexpr (W::size == S::size) {
    return first;
  } else {
    return rounded_words(first, load(at<float>(in, kFloats)));
  }
}
// The same in pieces, each `step` vectors after the one before.
template <class W, class S>
VK_INLINE void load_pieces(Vec<float>* words, int64_t step, const char* in) {
  if constexpr (pieces<W> > 1) {
    Vec<float> even, odd;
    unzip(load(at<float>(in, 0)), load(at<float>(in, kFloats)), even, odd);
    split(even, odd, words, step);
  } else {
    words[0] = load_words<W, S>(in);
  }
}
// The same of a row's last words; what is past `elements` of them is zeros.
template <class W, class S>
VK_INLINE void load_last_pieces(Vec<float>* words, int64_t step, const char* in, int64_t elements) {
  alignas(64) char row[kFloats * per_word<W> * S::size] = {};
  std::memcpy(row, in, size_t(elements * S::size));
  load_pieces<W, S>(words, step, row);
}
template <class W, class S>
VK_INLINE Vec<float> load_last_words(const char* in, int64_t elements) {
  Vec<float> words;
  load_last_pieces<W, S>(&words, 1, in, elements);
  return words;
}

// f(W{}, S{}): the words that a product multiplies, and what B lies in.
template <class F>
VK_INLINE void with_words(const Product& p, F f) {
  if (p.dtype == DType::f32) return f(Singles{}, Singles{});
  p.b_dtype == DType::f32 ? f(Pairs{}, Floats{}) : f(Pairs{}, Pairs{});
}

// The same of a product by panels: the matrix unit takes float32 in pieces.
template <class F>
VK_INLINE void with_panels(const Product& p, F f) {
  p.dtype == DType::f32 && p.split ? f(Thirds{}, Singles{}) : with_words(p, f);
}

}  // namespace VK_ISA
}  // namespace vk
