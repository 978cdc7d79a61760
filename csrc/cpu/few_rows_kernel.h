// Products of few rows, C = A B with an A of a few rows, and of few terms, a sum of a few columns times rows: what a Linear
// and its gradients come to at a few tokens. Their time is that of reading the weight, or of writing its gradient, so that
// is done once and where it lies; product_kernel.h would first pack it. The small operands are packed.
//
// Where B's rows run along its columns, tiles of C are multiplied as ever, below rows of B. Where its columns run along k,
// as those of a Linear's weight do, an element of C is a dot product of two rows in memory: kFloats of them are summed at
// a time, lane by lane, and their lanes then added together.

namespace vk {
namespace VK_ISA {

constexpr int64_t kFewDepth = 64;  // words of k: so much of a panel stays in L1 for all rows
constexpr int64_t kAhead = 8;      // words of k that memory is asked for early
constexpr int64_t kDotRows = 4;    // rows of A are padded to a multiple

// Terms of a B that comes from memory: hardware does not ask early for what lies past a page, or past a part of a row.
template <class W>
struct FromMemory : W {
  static constexpr int64_t ahead = 16;
};

VK_INLINE int64_t whole_vectors(int64_t floats) { return round_up(floats, kFloats); }

// Lane i becomes the sum of sums[i]'s lanes, added in the same order for each.
VK_INLINE Vec<float> add_lanes(Vec<float>* sums) {
#pragma GCC unroll 4
  for (int64_t half = kFloats / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) {
      Vec<float> low, high;
      zip(sums[i], sums[i + half], low, high);
      sums[i] = low + high;
    }
  }
  return sums[0];
}

// Rows of words along k: `whole` vectors where they lie and one more in `last`, zeros past the end.
struct Columns {
  const char* data;
  int64_t step;  // bytes from one to the next
  int64_t whole;
  const float* last;
  int64_t ahead;  // bytes to the row that is asked for early
};

// C[rows, kFloats / rows] of rows of A and columns of B.
template <class W, int64_t rows>
VK_INLINE void dot_tile(const float* a, int64_t a_row, const Columns& b, int64_t first, int64_t live, float* c) {
  constexpr int64_t columns = kFloats / rows;
  Vec<float> sums[kFloats];
  const char* column[columns];
#pragma GCC unroll 16
  for (int64_t j = 0; j < columns; ++j) column[j] = b.data + (first + (j < live ? j : 0)) * b.step;
  const auto add = [&](const float* left, auto right) VK_ALWAYS {
    Vec<float> row[rows];
#pragma GCC unroll 4
    for (int64_t i = 0; i < rows; ++i) row[i] = load(left + i * a_row);
#pragma GCC unroll 16
    for (int64_t j = 0; j < columns; ++j) {
      const Vec<float> words = right(j);
#pragma GCC unroll 4
      for (int64_t i = 0; i < rows; ++i) sums[i * columns + j] = W::madd(sums[i * columns + j], row[i], words);
    }
  };
#pragma GCC unroll 16
  for (int64_t i = 0; i < kFloats; ++i) sums[i] = Vec<float>{};
  for (int64_t v = 0; v < b.whole; ++v) {
    add(a + v * kFloats, [&](int64_t j) VK_ALWAYS {
      if (v % (16 / kFloats) == 0) __builtin_prefetch(at<float>(column[j] + b.ahead, v * kFloats));
      return load(at<float>(column[j], v * kFloats));
    });
  }
  if (b.last) add(a + b.whole * kFloats, [&](int64_t j) VK_ALWAYS { return load(b.last + (first + j) * kFloats); });
  alignas(64) float out[kFloats];
  store(out, add_lanes(sums));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) c[i * kPanel + j] = out[i * columns + j];
  }
}

template <class W, int64_t rows>
VK_INLINE void dot_tiles(const float* a, int64_t a_row, const Columns& b, int64_t count, float* c) {
  constexpr int64_t columns = kFloats / rows;
  for (int64_t j = 0; j < count; j += columns) {
    dot_tile<W, rows>(a, a_row, b, j, count - j, c + j);
  }
}

// The panel of C from column j on, of a B whose columns run along k: kFloats columns at a time, which stay in L1.
template <class W, class S>
void dot_panel(const Product& p, const float* a, int64_t j, int64_t count, float* block, float* space) {
  constexpr int64_t elements = kFloats * per_word<W>;
  const int64_t a_row = whole_vectors(words_of<W>(p.k)), whole = p.k / elements, rest = p.k - whole * elements;
  alignas(64) float last[kFloats * kFloats] = {};
  for (int64_t first = 0; first < count; first += kFloats) {
    const int64_t live = count - first < kFloats ? count - first : kFloats;
    const char* const in = b_at<S>(p, 0, j + first);
    Columns b{in, p.b.col * S::size, whole, rest ? last : nullptr, 0};
    for (int64_t c = 0; c < live; ++c) {
      const char* const column = in + c * b.step;
      if constexpr (W::size != S::size) {
        for (int64_t v = 0; v < whole; ++v) {
          store(space + c * a_row + v * kFloats, load_words<W, S>(column + v * elements * S::size));
        }
      }
      if (rest) store(last + c * kFloats, load_last_words<W, S>(column + whole * elements * S::size, rest));
    }
    if constexpr (W::size != S::size) {
      b.data = reinterpret_cast<const char*>(space);
      b.step = a_row * 4;
    }
    float* const c = block + first;
    int64_t i = 0;
    if constexpr (W::size == S::size) b.ahead = kFloats * b.step;  // what comes next, by the first rows of A
    for (; p.m - i > 2; i += kDotRows, b.ahead = 0) {
      dot_tiles<W, kDotRows>(a + i * a_row, a_row, b, live, c + i * kPanel);
    }
    if (p.m - i == 2) dot_tiles<W, kFloats < 8 ? kDotRows : 2>(a + i * a_row, a_row, b, live, c + i * kPanel);
    if (p.m - i == 1) dot_tiles<W, kFloats < 8 ? kDotRows : 1>(a + i * a_row, a_row, b, live, c + i * kPanel);
  }
}

// The same of a B whose rows are along its columns. Where one tile has all rows of A, B is read where it lies, if its
// numbers are words and fill vectors; else a part of it at a time comes into L1 first, for all tiles.
template <class W, class S>
void row_panel(const Product& p, const float* a, int64_t j, int64_t count, float* block, float* space) {
  const int64_t words = words_of<W>(p.k), a_row = whole_vectors(words), most = even_step(p.m, kTileRows);
  if (W::size == 4 && count % kFloats == 0 && p.m <= kTileRows) {
    for (int64_t k = 0; k < words; k += p.b.rows) {
      const float* const in_place = at<float>(b_at<S>(p, k, j), 0);
      matmul<float, FromMemory<W>>(p.m, count, p.b.rows, {a + k, a_row, 1}, in_place, p.b.row, block, kPanel, k > 0);
    }
    return;
  }
  for (int64_t k = 0; k < words; k += kFewDepth) {
    const int64_t depth = words - k < kFewDepth ? words - k : kFewDepth;
    for (int64_t q = 0; q < depth; ++q) {
      const char* const in = b_at<S>(p, (k + q) * per_word<W>, j);
      const char* const later = in + kAhead * per_word<W> * p.b.row * S::size;
      for (int64_t row = 0; row < per_word<W>; ++row) {
        for (int64_t byte = 0; byte < count * S::size; byte += 64) {
          __builtin_prefetch(later + row * p.b.row * S::size + byte);
        }
      }
      interleave_any<W, S>(space + q * kPanel, kPanel, in, p.b.row, 0, p.k - (k + q) * per_word<W>, count);
      for (int64_t c = count; c < kPanel; ++c) space[q * kPanel + c] = 0;
    }
    for (int64_t i = 0; i < p.m; i += most) {
      const int64_t live = p.m - i < most ? p.m - i : most;
      multiply_rows<W>(live, depth, {a + i * a_row + k, a_row, 1, 0}, space, block + i * kPanel, k > 0);
    }
  }
}

// Rows of A along k as words, zeros past the end; of a multiple of kDotRows rows.
template <class W>
void pack_few_rows(const Product& p, float* packed) {
  const int64_t row = whole_vectors(words_of<W>(p.k));
  for (int64_t i = 0; i < round_up(p.m, kDotRows); ++i) {
    char* const to = reinterpret_cast<char*>(packed + i * row);
    const char* const from = p.a.data + i * p.a.row * W::size;
    const int64_t length = i < p.m ? p.k * W::size : 0;
    if (p.a.col == 1) {
      std::memcpy(to, from, size_t(length));
    } else {
      for (int64_t q = 0; q * W::size < length; ++q) {
        std::memcpy(to + q * W::size, from + q * p.a.col * W::size, W::size);
      }
    }
    std::memset(to + length, 0, size_t(row * 4 - length));
  }
}

template <class W, class S>
void few_rows(const Product& p, const float* a, int64_t first, int64_t last, float* sums, float* scratch) {
  float *spare = scratch, *block = spare + kSpare, *space = block + round_up(p.m, kDotRows) * kPanel;
  for (int64_t i = 0; i < kSpare; ++i) spare[i] = 0;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t columns = panel_columns(p), j = panel * columns, count = p.n - j < columns ? p.n - j : columns;
    if (p.then == Then::gate) {
      dot_panel<W, S>(p, a, j, count, block, space);
      dot_panel<W, S>(p, a, p.n + j, count, block + columns, space);
    } else if (p.b.col == 1) {
      row_panel<W, S>(p, a, j, count, block, space);
    } else {
      dot_panel<W, S>(p, a, j, count, block, space);
    }
    finish_rows<W>(p, 0, p.m, j, count, block, sums, spare);
  }
}

// ---- few terms

// Both operands as rows of words across k, each padded: A's to whole tiles and B's to whole panels.
template <class W>
void pack_few_terms(const Product& p, float* packed) {
  const int64_t words = words_of<W>(p.k), a_row = round_up(p.m, kTileRows);
  const auto pack = [&](float* out, int64_t row, const char* in, int64_t k_step, int64_t step, int64_t count) VK_ALWAYS {
    for (int64_t word = 0; word < words; ++word, out += row) {
      if (step == 1) {
        interleave(W{}, out, in, k_step, word, p.k, count);
      } else {
        for (int64_t i = 0; i < count; ++i) interleave(W{}, out + i, in + i * step * W::size, k_step, word, p.k, 1);
      }
      for (int64_t i = count; i < row; ++i) out[i] = 0;
    }
  };
  pack(packed, a_row, p.a.data, p.a.col, p.a.row, p.m);
  pack(packed + whole_vectors(words * a_row), round_up(p.n, kPanel), p.b.data[0], p.b.row, p.b.col, p.n);
}

// Asks for a later tile of `out`: so few terms are summed sooner than it arrives.
VK_INLINE void prefetch_result(const Product& p, int64_t i, int64_t j, int64_t count) {
  const int64_t size = size_of(p.out_dtype), end = i + kTileRows < p.m ? i + kTileRows : p.m;
  for (; i < end; ++i) {
    const char* const row = p.out + (i * p.n + j) * size;
    for (int64_t byte = 0; byte < count * size; byte += 64) __builtin_prefetch(row + byte, 1);
  }
}

template <class W>
void few_terms(const Product& p, const float* packed, int64_t first, int64_t last) {
  const int64_t words = words_of<W>(p.k), a_row = round_up(p.m, kTileRows), b_row = round_up(p.n, kPanel);
  const float* const b = packed + whole_vectors(words * a_row);
  alignas(64) float block[kTileRows * kPanel];
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t i = tile * kTileRows, rows = p.m - i < kTileRows ? p.m - i : kTileRows;
    for (int64_t j = 0; j < p.n; j += kPanel) {
      const int64_t count = p.n - j < kPanel ? p.n - j : kPanel;
      if (!p.past_caches) prefetch_result(p, i + kTileRows, j, count);
      if (W::size == 4 && count % kFloats == 0 && !p.past_caches) {
        float* const out = reinterpret_cast<float*>(p.out) + i * p.n + j;
        matmul<float, W>(rows, count, words, {packed + i, 1, a_row}, b + j, b_row, out, p.n, false);
      } else {  // rows past the last are zeros of A
        matmul_tile<float, kTileRows, kTileVecs, W>(words, packed + i, 1, a_row, b + j, b_row, block, kPanel, false);
        for (int64_t r = 0; r < rows; ++r) store_result<W>(p, i + r, j, count, block + r * kPanel);
      }
    }
  }
}

// ---- as the table has it

inline FewSizes few_sizes(const Product& p, bool terms) {
  const int64_t words = p.dtype == DType::f32 ? words_of<Singles>(p.k) : words_of<Pairs>(p.k);
  if (terms) {
    const int64_t tiles = (p.m + kTileRows - 1) / kTileRows;
    return {tiles, whole_vectors(words * tiles * kTileRows) + words * round_up(p.n, kPanel), 0};
  }
  const int64_t rows = round_up(p.m, kDotRows), row = whole_vectors(words);
  const bool rows_of_b = p.b.col == 1 && p.then != Then::gate;
  const int64_t space = rows_of_b ? kFewDepth * kPanel : p.dtype == p.b_dtype ? 0 : kFloats * row;
  return {(p.n + panel_columns(p) - 1) / panel_columns(p), rows * row, kSpare + rows * kPanel + space};
}

inline void few_pack(const Product& p, bool terms, float* packed) {
  const auto pack = [&](auto word) {
    terms ? pack_few_terms<decltype(word)>(p, packed) : pack_few_rows<decltype(word)>(p, packed);
  };
  p.dtype == DType::f32 ? pack(Singles{}) : pack(Pairs{});
}

inline void few_product(const Product& p, bool terms, const float* packed, int64_t first, int64_t last, float* sums,
                        float* scratch) {
  with_words(p, [&](auto word, auto source) {
    using W = decltype(word);
    if (terms) return few_terms<W>(p, packed, first, last);
    few_rows<W, decltype(source)>(p, packed, first, last, sums, scratch);
  });
  if (p.past_caches) end_past_caches();
}

}  // namespace VK_ISA
}  // namespace vk
