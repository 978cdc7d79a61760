// What the products of one head read: rows of q, k, v and dout, and scores, packed as numbers of type A or, where the
// processor multiplies pairs of bfloat16, as words of two.
//
// A product sums over words (product_words.h), so an operand is wanted with the axis that is summed in its words:
// `along` the width of its rows, or `across` from one row to the next. Of numbers both forms are one.

namespace vk {
namespace VK_ISA {

#if defined(VK_BF16_PAIRS)
constexpr bool kBf16Pairs = true;
#else
constexpr bool kBf16Pairs = false;
#endif

template <class A>
VK_INLINE int64_t padded(int64_t n) {
  return round_up(n, Lanes<A>::count);
}

// [count, width] rows -> [width, padded(count)], zeros in the padding.
template <class A>
void transpose(A* out, const A* in, int64_t in_row, int64_t count, int64_t width) {
  const int64_t out_row = padded<A>(count);
  constexpr int64_t block = 16;
  for (int64_t i0 = 0; i0 < count; i0 += block) {
    const int64_t i1 = i0 + block < count ? i0 + block : count;
    int64_t j = 0;
    if constexpr (kFloats == block && sizeof(A) == 4) {
      for (; j + block <= width && i0 + block <= count; j += block) {
        Vec<float> lanes[kFloats];
#pragma GCC unroll 16
        for (int64_t i = 0; i < block; ++i) lanes[i] = load(in + (i0 + i) * in_row + j);
        transpose_lanes(lanes);
#pragma GCC unroll 16
        for (int64_t i = 0; i < block; ++i) store(out + (j + i) * out_row + i0, lanes[i]);
      }
    }
    for (; j < width; ++j) {
      for (int64_t i = i0; i < i1; ++i) out[j * out_row + i] = in[i * in_row + j];
    }
  }
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t i = count; i < out_row; ++i) out[j * out_row + i] = 0;
  }
}

template <class A>
struct Numbers : Plain {
  static constexpr int64_t queries = 24;  // at a time: a multiple of the product's row tile; with 200 keys, scores stay in L1
  static constexpr bool tiles = false;
  struct Scope {};

  static int64_t words(int64_t n) { return n; }

  // Rows [begin, begin + count), each of `padded(width)`, zeros in the padding.
  static void along(A* out, const Rows& rows, int64_t begin, int64_t count, int64_t width) {
    const int64_t row = padded<A>(width);
    for (int64_t i = 0; i < count; ++i) {
      load_row(out + i * row, rows.data + (begin + i) * rows.row * size_of(rows.dtype), rows.dtype, rows.col, width);
      for (int64_t j = width; j < row; ++j) out[i * row + j] = 0;
    }
  }
  // Rows [0, count).
  static void across(A* out, const Rows& rows, int64_t count, int64_t width) { along(out, rows, 0, count, width); }
  // Both forms of rows [begin, begin + count); the second is returned, in `space` if it needs any.
  static const A* both(A* out, A*, const Rows& rows, int64_t begin, int64_t count, int64_t width) {
    along(out, rows, begin, count, width);
    return out;
  }
  // Both forms of scores [count, row]: `along` into `out`, which may be where they are, `across` in their place.
  static Left<A> scores_along(A*, A* scores, int64_t, int64_t row) { return {scores, row, 1, 0}; }
  static Left<A> scores_across(A* scores, int64_t, int64_t row) { return {scores, 1, row, 0}; }
};

// On the matrix unit whole tiles of words, the last ones zeros.
struct PairWords : Pairs {
  static constexpr int64_t queries = kTiles ? 2 * kTile : 24;  // as above, and even
  static constexpr bool tiles = kTiles;
  static int64_t words(int64_t n) { return round_up((n + 1) / 2, kTiles ? kTile : 1); }

  static void along(float* out, const Rows& rows, int64_t begin, int64_t count, int64_t width) {
    const int64_t row = padded<float>(width);
    for (int64_t i = 0; i < count; ++i) {
      char* const to = reinterpret_cast<char*>(out + i * row);
      const char* const from = rows.data + (begin + i) * rows.row * 2;
      if (rows.col == 1) {
        std::memcpy(to, from, size_t(width) * 2);
      } else {
        for (int64_t j = 0; j < width; ++j) std::memcpy(to + j * 2, from + j * rows.col * 2, 2);
      }
      std::memset(to + width * 2, 0, size_t(row * 4 - width * 2));
    }
  }
  static void across(float* out, const Rows& rows, int64_t count, int64_t width) {
    const int64_t row = padded<float>(width);
    for (int64_t p = 0; p < words(count); ++p, out += row) {
      if (2 * p >= count) {
        for (int64_t j = 0; j < row; ++j) out[j] = 0;
      } else if (rows.col == 1) {
        interleave(Pairs{}, out, rows.data, rows.row, p, count, width);
      } else {
        for (int64_t j = 0; j < width; ++j) {
          interleave(Pairs{}, out + j, rows.data + j * rows.col * 2, rows.row, p, count, 1);
        }
      }
      for (int64_t j = width; j < row; ++j) out[j] = 0;
    }
  }
  static const float* both(float* out, float* space, const Rows& rows, int64_t begin, int64_t count, int64_t width) {
    along(out, rows, begin, count, width);
    across(space, {rows.data + begin * rows.row * 2, rows.dtype, rows.row, rows.col}, count, width);
    return space;
  }
  static Left<float> scores_along(float* out, float* scores, int64_t count, int64_t row) {
    for (int64_t i = 0; i < count; ++i) {
      float *to = out + i * row, *from = scores + i * row;
      if constexpr (kTiles) {
        for (int64_t j = 0; j < row; j += 2 * kFloats) {
          store(to + j / 2, rounded_words(load(from + j), j + kFloats < row ? load(from + j + kFloats) : Vec<float>{}));
        }
      } else {
        store_row(reinterpret_cast<char*>(to), DType::bf16, 1, from, row);
      }
    }
    return {out, row, 1, kTile * row};
  }
  static Left<float> scores_across(float* scores, int64_t count, int64_t row) {
    if constexpr (kTiles) return tiles_across(scores, count, row);
    for (int64_t i = 0; i < count; i += 2) {
      float* const first = scores + i * row;
      for (int64_t j = 0; j < row; j += kFloats) {
        const VecU low = bf16_bits(load(first + j));
        const VecU high = i + 1 < count ? bf16_bits(load(first + row + j)) : VecU{};
        store(first + j, (Vec<float>)(low | (high << 16)));
      }
    }
    return {scores, 1, 2 * row, 0};
  }
  // Up to 32 rows of scores by 16 columns become a tile of 16 rows, one a key, and 16 words of queries, where the first
  // 16 of them were.
  static Left<float> tiles_across(float* scores, int64_t count, int64_t row) {
    for (int64_t j = 0; j < row; j += kFloats) {
      Vec<float> lanes[kFloats];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kFloats; ++i) {
        const float* const first = scores + 2 * i * row + j;
        lanes[i] = (Vec<float>)rounded_pairs(2 * i < count ? load(first) : Vec<float>{},
                                             2 * i + 1 < count ? load(first + row) : Vec<float>{});
      }
      transpose_lanes(lanes);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kFloats; ++i) store(scores + i * row + j, lanes[i]);
    }
    return {scores, row, 1, kTile};
  }
};

}  // namespace VK_ISA
}  // namespace vk
