// How the operands of product_kernel.h lie: panels of B, and A where it is copied.
//
// Operands are rows of words along k. B is packed in panels of kPanel columns. A is read where it lies when its rows run
// along k, and packed tile by tile when its columns do (the gradient of a weight). The matrix unit takes taller tiles,
// whole ones, which it reads fastest one behind the other: A and the panels of B are copied so, and end in zeros.

namespace vk {
namespace VK_ISA {

constexpr int64_t kPanel = kTileVecs * kFloats;
template <class W>
constexpr int64_t tile_rows = by_tiles<W> ? 2 * kTile : kTileRows;
template <class W>
constexpr int64_t block_tiles = by_tiles<W> ? 8 : 20;
constexpr int64_t kBlockWords = 5 << 16;  // of a block of A in pieces: more than half of the L2 that goes with the unit
// Terms at a time on the matrix unit: a block of A of more leaves L2, or has too few rows for what B takes to pass.
template <class W>
constexpr int64_t kTerms = pieces<W> > 1 ? 768 : 1600;
constexpr int64_t kDepth = 384;
constexpr int64_t kSpare = 4 * kPanel;  // what finish_row keeps of an activation
constexpr int64_t kCopied = 8;  // words that pack_tiles copies for each kTileRows: what is too much is overwritten
static_assert(kTileRows % 2 == 0, "a pair of rows lies in one tile");
static_assert(kTileVecs % 2 == 0, "half of a panel is whole vectors");

// Columns of `out` that a panel is for: half of a gate's panel are gates, the other half the ups of the same columns.
VK_INLINE int64_t panel_columns(const Product& p) { return p.then == Then::gate ? kPanel / 2 : kPanel; }

// Along k, with those that fill the last tile.
template <class W>
VK_INLINE int64_t whole_words(int64_t k) {
  return by_tiles<W> ? round_up(words_of<W>(k), kTile) : words_of<W>(k);
}
// Of a panel along k, all pieces of each.
template <class W>
VK_INLINE int64_t panel_words(int64_t k) {
  return whole_words<W>(k) * pieces<W>;
}
// Rows of tiles of A that go through B's panels together.
template <class W>
VK_INLINE int64_t tiles_of_block(int64_t k) {
  if (pieces<W> == 1) return block_tiles<W>;
  const int64_t most = kBlockWords / (tile_rows<W> * panel_words<W>(k));
  return most < 2 ? 2 : most < block_tiles<W> ? most : block_tiles<W>;
}
// Where in a panel [k, kPanel] the first piece of word p of column c stands, c a multiple of kFloats: of words beside one
// another or, for the matrix unit, of tiles. There the columns that are multiplied at a time lie together, in the order in
// which they are read: memory is fetched ahead along it. From one piece to the next it is kPieceStep.
constexpr int64_t kAtOnce = 2 * kTile, kPieceStep = kTile * kAtOnce;
template <class W>
VK_INLINE int64_t in_panel(int64_t p, int64_t c, int64_t k) {
  if (!by_tiles<W>) return p * kPanel + c;
  const int64_t before = c / kAtOnce * whole_words<W>(k) + p / kTile * kTile;
  return before * pieces<W> * kAtOnce + c % kAtOnce / kTile * kTileSize + p % kTile * kTile;
}
// `words` are [pieces, kPanel].
template <class W>
VK_INLINE void put_words(float* panel, int64_t p, int64_t k, const float* words) {
  for (int64_t piece = 0; piece < pieces<W>; ++piece, panel += kPieceStep, words += kPanel) {
    for (int64_t c = 0; c < kPanel; c += kFloats) store(panel + in_panel<W>(p, c, k), load(words + c));
  }
}
// The words of a panel behind the last that B has: zeros.
template <class W>
VK_INLINE void end_panel(float* panel, int64_t k) {
  alignas(64) const float zeros[pieces<W> * kPanel] = {};
  for (int64_t p = words_of<W>(k); p < whole_words<W>(k); ++p) put_words<W>(panel, p, k, zeros);
}

// What each step is where `count` goes in equal steps of at most `most`.
VK_INLINE int64_t even_step(int64_t count, int64_t most) {
  const int64_t steps = (count + most - 1) / most;
  return (count + steps - 1) / steps;
}

// Word p of a panel for the matrix unit, of two rows in memory.
template <class W, class S>
VK_INLINE void pack_word(float* panel, int64_t p, int64_t k, const char* in, int64_t k_step, int64_t columns) {
  const bool two = 2 * p + 1 < k;
#pragma GCC unroll 4
  for (int64_t c = 0; c < kPanel; c += kFloats) {
    Vec<float> words[pieces<W>];
    const int64_t count = columns - c < kFloats ? columns - c : kFloats;
    if constexpr (S::size != 4) {
      words[0] = Vec<float>{};
      if (count > 0) interleave(W{}, reinterpret_cast<float*>(words), in + c * S::size, k_step, 0, two ? 2 : 1, count);
    } else {
      const float* const first = at<float>(in, c);
      const Vec<float> low = load_up_to(first, count), high = two ? load_up_to(first + k_step, count) : Vec<float>{};
      if constexpr (pieces<W> > 1) {
        split(low, high, words, 1);
      } else {
        words[0] = (Vec<float>)rounded_pairs(low, high);
      }
    }
    float* const to = panel + in_panel<W>(p, c, k);
#pragma GCC unroll 3
    for (int64_t piece = 0; piece < pieces<W>; ++piece) store(to + piece * kPieceStep, words[piece]);
  }
}

// Panels [first, last) of a B whose rows are packed: [panel][words][kPanel], zeros past the last column. Some rows at a
// time, so that memory is read along them.
template <class W, class S>
void pack_rows(const Product& p, float* packed, int64_t first, int64_t last) {
  constexpr int64_t at_once = 16;
  const int64_t words = words_of<W>(p.k);
  for (int64_t begin = 0; begin < words; begin += at_once) {
    const int64_t end = begin + at_once < words ? begin + at_once : words;
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t j = panel * kPanel, columns = p.n - j < kPanel ? p.n - j : kPanel;
      for (int64_t k = begin; k < end; ++k) {
        const char* const in = b_at<S>(p, k * per_word<W>, j);
        const char* const later = in + at_once * per_word<W> * p.b.row * S::size;
        for (int64_t q = 0; q < per_word<W>; ++q) {
          for (int64_t byte = 0; byte < columns * S::size; byte += 64) {
            __builtin_prefetch(later + q * p.b.row * S::size + byte);
          }
        }
        float* const to = packed + (panel - first) * p.panel_step;
        if constexpr (by_tiles<W>) {
          pack_word<W, S>(to, k, p.k, in, p.b.row, columns);
        } else {
          float* const out = to + k * kPanel;
          interleave_any<W, S>(out, kPanel, in, p.b.row, 0, p.k - k * per_word<W>, columns);
          for (int64_t c = columns; c < kPanel; ++c) out[c] = 0;
        }
      }
    }
  }
  for (int64_t panel = first; panel < last; ++panel) {
    end_panel<W>(packed + (panel - first) * p.panel_step, p.k);
  }
}

// Columns [from, to) of one panel, whole vectors of them, of a B whose columns run along k; past `columns` are zeros.
template <class W, class S>
void pack_columns(float* out, const char* in, int64_t column_step, int64_t k, int64_t columns, int64_t from = 0,
                  int64_t to = kPanel) {
  constexpr int64_t elements = kFloats * per_word<W>;
  for (int64_t j0 = from; j0 < to; j0 += kFloats) {
    const auto transpose = [&](int64_t p, int64_t words, auto load_some) VK_ALWAYS {
      Vec<float> lanes[pieces<W> * kFloats] = {};
#pragma GCC unroll 16
      for (int64_t j = 0; j < kFloats; ++j) {
        const int64_t column = j0 - from + j;
        if (column < columns) load_some(lanes + j, in + (column * column_step + p) * S::size);
      }
      float* words_to = out + in_panel<W>(p / per_word<W>, j0, k);
#pragma GCC unroll 3
      for (int64_t piece = 0; piece < pieces<W>; ++piece, words_to += kPieceStep) {
        transpose_lanes(lanes + piece * kFloats);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kFloats; ++i) {
          if (i < words) store(words_to + i * (by_tiles<W> ? kTile : kPanel), lanes[piece * kFloats + i]);
        }
      }
    };
    int64_t p = 0;
    for (; p + elements <= k; p += elements) {
      transpose(p, kFloats, [&](Vec<float>* to, const char* row) VK_ALWAYS { load_pieces<W, S>(to, kFloats, row); });
    }
    if (p < k) {
      transpose(p, words_of<W>(k - p), [&](Vec<float>* to, const char* row) VK_ALWAYS {
        load_last_pieces<W, S>(to, kFloats, row, k - p);
      });
    }
  }
}

// Row tiles of an A whose columns are packed, [tiles][words][kTileRows].
template <class W>
VK_INLINE int64_t tile_words(int64_t k) {
  return words_of<W>(k) * kTileRows + kCopied;
}
template <class W>
void pack_tiles(float* out, const char* in, int64_t k_step, int64_t k, int64_t rows) {
  alignas(64) float line[block_tiles<W> * tile_rows<W> + kCopied] = {};
  const int64_t words = words_of<W>(k), step = tile_words<W>(k);
  for (int64_t p = 0; p < words; ++p) {
    for (int64_t byte = 0; byte < rows * W::size; byte += 64) {
      for (int64_t q = 0; q < per_word<W>; ++q) {
        __builtin_prefetch(in + ((p + 8) * per_word<W> + q) * k_step * W::size + byte);
      }
    }
    interleave(W{}, line, in, k_step, p, k, rows);
    float* tile = out + p * kTileRows;
    for (int64_t i = 0; i < rows; i += kTileRows, tile += step) std::memcpy(tile, line + i, kCopied * sizeof(float));
  }
}

// A for the matrix unit, [tiles of rows][tiles of words][pieces]: `load_some(to, q, i)` gives the pieces of words q to
// q + kTile of row i or, `kAcross`, of word q of rows i to i + kTile; what it leaves are zeros.
template <class W, bool kAcross, class F>
VK_INLINE void copy_tiles(float* out, int64_t rows, int64_t words, F load_some) {
  const int64_t across = (rows + kTile - 1) / kTile, along = words / kTile;
  for (int64_t at = 0; at < across * along; ++at) {  // in the order in which memory is read
    const int64_t i = (kAcross ? at % across : at / along) * kTile, p = (kAcross ? at / across : at % along) * kTile;
    float* to = out + (i * along + p) * kTile * pieces<W>;
    Vec<float> lanes[pieces<W> * kTile] = {};
#pragma GCC unroll 16
    for (int64_t q = 0; q < kTile; ++q) kAcross ? load_some(lanes + q, p + q, i) : load_some(lanes + q, p, i + q);
#pragma GCC unroll 3
    for (int64_t piece = 0; piece < pieces<W>; ++piece, to += kTileSize) {
      if (kAcross) transpose_lanes(lanes + piece * kTile);
#pragma GCC unroll 16
      for (int64_t q = 0; q < kTile; ++q) store(to + q * kTile, lanes[piece * kTile + q]);
    }
  }
}
template <class W>
void copy_a(float* out, const Product& p, const char* a, int64_t rows) {
  const int64_t words = whole_words<W>(p.k);
  if (p.a.col == 1) {
    return copy_tiles<W, false>(out, rows, words, [&](Vec<float>* to, int64_t q, int64_t i) VK_ALWAYS {
      const char* const from = a + (i * p.a.row + 2 * q) * W::size;
      if (i >= rows || 2 * q >= p.k) return;
      for (int64_t byte = 0; byte < 32 * W::size; byte += 64) __builtin_prefetch(from + 4 * p.a.row * W::size + byte);
      if (2 * (q + kTile) <= p.k) return load_pieces<W, W>(to, kTile, from);
      load_last_pieces<W, W>(to, kTile, from, p.k - 2 * q);
    });
  }
  copy_tiles<W, true>(out, rows, words, [&](Vec<float>* to, int64_t q, int64_t i) VK_ALWAYS {
    alignas(64) float line[pieces<W> * kTile] = {};
    const char* const from = a + i * W::size;
    if (2 * q >= p.k) return;
    if (i + kTile <= rows) {
      interleave_any<W, W>(line, kTile, from, p.a.col, q, p.k, kTile);
    } else {
      interleave_any<W, W>(line, kTile, from, p.a.col, q, p.k, rows - i);
    }
#pragma GCC unroll 3
    for (int64_t piece = 0; piece < pieces<W>; ++piece) to[piece * kTile] = load(line + piece * kTile);
  });
}

// One of two bfloat16 of each word; the even row's comes first.
VK_INLINE void put_half(float* out, bool odd, VecU bits) {
  store(out, (Vec<float>)(odd ? (VecU)load(out) | (bits << 16) : bits));
}

// Row k of a B, `count` columns from column j on, into B's panels; `rows` is how many it has.
VK_INLINE void put_in_panel(Singles, float* panels, int64_t k, int64_t rows, int64_t j, int64_t count, float* row) {
  using W = Thirds;  // in which panels hold float32
  float* const panel = panels + j / kPanel * panel_words<W>(rows) * kPanel;
  if (k + 1 == rows) end_panel<W>(panel, rows);
  for (int64_t c = count; c < kPanel; ++c) row[c] = 0;
  for (int64_t c = 0; c < kPanel; c += kFloats) {
    float* const out = panel + in_panel<W>(k / per_word<W>, c, rows);
    if constexpr (pieces<W> == 1) {
      store(out, load(row + c));
    } else {
      Vec<float> words[3];
      split(load(row + c), Vec<float>{}, words, 1);
#pragma GCC unroll 3
      for (int64_t piece = 0; piece < 3; ++piece) put_half(out + piece * kPieceStep, k % 2, (VecU)words[piece]);
    }
  }
}
VK_INLINE void put_in_panel(Pairs, float* panels, int64_t k, int64_t rows, int64_t j, int64_t count, float* row) {
  float* const panel = panels + j / kPanel * panel_words<Pairs>(rows) * kPanel;
  if (k + 1 == rows) end_panel<Pairs>(panel, rows);
  for (int64_t c = count; c < kPanel; ++c) row[c] = 0;
  for (int64_t c = 0; c < kPanel; c += kFloats) {
    put_half(panel + in_panel<Pairs>(k / 2, c, rows), k % 2, bf16_bits(load(row + c)));
  }
}

}  // namespace VK_ISA
}  // namespace vk
