// Products of whole matrices, C = A B, of float32 or bfloat16, with what follows the product done while C is in cache.
//
// The caller may share B's panels (product_panels.h) among threads. A block of C, block_tiles row tiles by one panel, sums
// in cache over kDepth words of k at a time.

namespace vk {
namespace VK_ISA {

// ---- the product and what follows it

// C [up to kTileRows, kPanel] (+)= A B.
template <class W>
VK_INLINE void multiply_rows(int64_t rows, int64_t k, const Left<float>& a, const float* b, float* c, bool accumulate) {
  const auto tile = [&](auto live) VK_ALWAYS {
    matmul_tile<float, decltype(live)::value, kTileVecs, W>(k, a.data, a.row, a.col, b, kPanel, c, kPanel, accumulate);
  };
  switch (rows) {
    case 1: return tile(Count<1>{});
    case 2: return tile(Count<2>{});
    case 3: return tile(Count<3>{});
    case 4: return tile(Count<4>{});
    case 5: return tile(Count<5>{});
    default: return tile(Count<kTileRows>{});
  }
}

template <class W>
VK_INLINE void multiply_tile(int64_t rows, int64_t k, const Left<float>& a, const float* b, int64_t panel_step, float* c,
                             bool accumulate) {
#if defined(VK_TILES)
  if constexpr (by_tiles<W>) {
    constexpr int64_t kPieces = pieces<W>;
    const Tiles left{a.data, kTile, kPieces * kTileSize, a.tile / 2, kTileSize};
    const Tiles right{b, kTile, kPieces * kPieceStep, kTileSize, kPieceStep, panel_step / (kPanel / kAtOnce)};
    matmul_by_tiles<kPieces>(rows, kPanel, k, left, right, c, kPanel, accumulate);
  } else
#endif
    multiply_rows<W>(rows, k, a, b, c, accumulate);
}

// Asks for the lines that finish_row reads or writes, `length` bytes from column j on: they arrive while the tile is
// multiplied.
VK_INLINE void prefetch_tile(const Product& p, int64_t i, int64_t j, int64_t rows, int64_t size, int64_t length) {
  const int64_t step = p.n * size;
  if (p.then == Then::gate || p.then == Then::gate_backward) {
    char* const wide = p.then == Then::gate ? p.pre : p.out;  // the other one that is two halves wide is read alone
    for (int64_t r = i; r < i + rows; ++r) {
      for (int64_t at = 2 * r * step + j * size, half = 0; half < 2; ++half, at += step) {
        for (int64_t byte = 0; byte < length; byte += 64) {
          if (wide) __builtin_prefetch(wide + at + byte, 1);
          if (p.then == Then::gate_backward) __builtin_prefetch(p.pre + at + byte);
        }
      }
    }
    return;
  }
  const int64_t out_size = size_of(p.out_dtype) / size;  // 2 where out is wider
  for (int64_t r = 0, at = i * step + j * size; r < rows; ++r, at += step) {
    for (int64_t byte = 0; byte < length; byte += 64) {
      __builtin_prefetch(p.out + (at + byte) * out_size, 1);
      if (p.then != Then::store) __builtin_prefetch(p.pre + at + byte, 1);
      if (p.activated && !p.activated_in_panels) __builtin_prefetch(p.activated + at + byte, 1);
    }
  }
}

VK_INLINE void prefetch_rows(const float* from, int64_t step, int64_t rows, int64_t words) {
  for (int64_t r = 0; r < rows; ++r, from += step) {
    for (int64_t word = 0; word < words; word += 16) __builtin_prefetch(from + word);
  }
}

template <class W>
constexpr DType word_dtype = W::size == 4 ? DType::f32 : DType::bf16;

// finish_row of a gate: the row's halves are gates and ups.
template <class W>
VK_INLINE void finish_gate(const Product& p, int64_t i, int64_t j, int64_t count, float* row) {
  constexpr DType dtype = word_dtype<W>;
  for (int64_t half = 0; half < 2; ++half) {
    float* const values = row + half * (kPanel / 2);
    const int64_t column = half * p.n + j;
    each<float>(count, [&](auto lane, int64_t c) VK_ALWAYS {
      using V = decltype(lane);
      V value = get<V>(values + c);
      if (p.bias) value += get<V>(p.bias + column + c);
      put(values + c, W::size == 4 ? value : round_bf16(value));  // gated as it is stored
    });
    if (p.pre) store_row(p.pre + (2 * i * p.n + column) * W::size, dtype, 1, values, count);
  }
  gate_row(p.activation, row, static_cast<const float*>(row), static_cast<const float*>(row + kPanel / 2), count);
  store_row(p.out + (i * p.n + j) * W::size, dtype, 1, row, count);
}

template <class W>
VK_INLINE void finish_gate_backward(const Product& p, int64_t i, int64_t j, int64_t count, float* row, float* sums,
                                    float* spare) {
  constexpr DType dtype = word_dtype<W>;
  const int64_t at = (i * p.n + j) * W::size, at_gate = (2 * i * p.n + j) * W::size, at_up = at_gate + p.n * W::size;
  float *g = spare, *u = spare + kPanel, *value = spare + 2 * kPanel, *slope = spare + 3 * kPanel;
  load_row(g, p.pre + at_gate, dtype, 1, count);
  load_row(u, p.pre + at_up, dtype, 1, count);
  gate_row_backward(p.activation, row, g, u, sums ? sums + j : nullptr, sums ? sums + p.n + j : nullptr, value, slope,
                    count);
  store_row(p.out + at_gate, dtype, 1, g, count);
  store_row(p.out + at_up, dtype, 1, u, count);
  if (p.activated_in_panels) {
    put_in_panel(W{}, reinterpret_cast<float*>(p.activated), i, p.m, j, count, row);
  } else if (p.activated) {
    store_row(p.activated + at, dtype, 1, row, count);
  }
}

// `count` columns from column j on of one row of `out`, where it may be float32 though the product is not.
template <class W>
VK_INLINE void store_result(const Product& p, int64_t i, int64_t j, int64_t count, float* row) {
  if (p.between) {
    float* const kept = p.between + i * p.n + j;
    each<float>(count, [&](auto lane, int64_t c) VK_ALWAYS {
      using V = decltype(lane);
      const V value = p.add ? get<V>(kept + c) + get<V>(row + c) : get<V>(row + c);
      put(p.ends ? row + c : kept + c, value);
    });
    if (!p.ends) return;
  }
  if (p.past_caches) {
    float* const out = reinterpret_cast<float*>(p.out) + i * p.n + j;
    for (int64_t c = 0; c < count; c += kFloats) {
      store_past_caches(out + c, W::size == 4 ? load(row + c) : round_bf16(load(row + c)));
    }
    return;
  }
  if constexpr (W::size != 4) {
    if (p.out_dtype != DType::f32) return store_row(p.out + (i * p.n + j) * W::size, DType::bf16, 1, row, count);
    float* const out = reinterpret_cast<float*>(p.out) + i * p.n + j;
    each<float>(count, [&](auto lane, int64_t c) VK_ALWAYS { put(out + c, round_bf16(get<decltype(lane)>(row + c))); });
  } else {
    float* const out = reinterpret_cast<float*>(p.out) + i * p.n + j;
    if (!p.add) return store_row(p.out + (i * p.n + j) * W::size, DType::f32, 1, row, count);
    each<float>(count, [&](auto lane, int64_t c) VK_ALWAYS {
      using V = decltype(lane);
      put(out + c, get<V>(out + c) + get<V>(row + c));
    });
  }
}

// What follows the product, for `count` columns from column j on of one row. `spare` is kSpare of numbers.
template <class W>
VK_INLINE void finish_row(const Product& p, int64_t i, int64_t j, int64_t count, float* row, float* sums,
                           float* spare) {
  if (p.then == Then::gate) return finish_gate<W>(p, i, j, count, row);
  if (p.then == Then::gate_backward) return finish_gate_backward<W>(p, i, j, count, row, sums, spare);
  const int64_t at = (i * p.n + j) * W::size;
  constexpr DType dtype = word_dtype<W>;
  if (p.bias) {
    each<float>(count, [&](auto lane, int64_t c) VK_ALWAYS {
      using V = decltype(lane);
      put(row + c, get<V>(row + c) + get<V>(p.bias + j + c));
    });
  }
  if (p.then == Then::activate) {
    store_row(p.pre + at, dtype, 1, row, count);
    if (W::size != 4) load_row(row, p.pre + at, dtype, 1, count);  // activated as it is stored
    activate_any(p.activation, row, static_cast<float*>(nullptr), row, count);
  } else if (p.then == Then::activate_backward) {
    float *h = spare, *value = spare + kPanel, *slope = spare + 2 * kPanel;
    load_row(h, p.pre + at, dtype, 1, count);
    activate_any(p.activation, value, slope, h, count);
    each<float>(count, [&](auto lane, int64_t c) VK_ALWAYS {
      using V = decltype(lane);
      const V gradient = get<V>(row + c) * get<V>(slope + c);
      put(row + c, gradient);
      if (sums) put(sums + j + c, get<V>(sums + j + c) + gradient);
    });
    if (p.activated_in_panels) {
      put_in_panel(W{}, reinterpret_cast<float*>(p.activated), i, p.m, j, count, value);
    } else if (p.activated) {
      store_row(p.activated + at, dtype, 1, value, count);
    }
  }
  store_result<W>(p, i, j, count, row);
}

template <class W>
VK_INLINE void finish_rows(const Product& p, int64_t i, int64_t rows, int64_t j, int64_t count, float* c, float* sums,
                           float* spare) {
  if (count == kPanel) {  // known to the compiler
    for (int64_t r = 0; r < rows; ++r) finish_row<W>(p, i + r, j, kPanel, c + r * kPanel, sums, spare);
  } else {
    for (int64_t r = 0; r < rows; ++r) finish_row<W>(p, i + r, j, count, c + r * kPanel, sums, spare);
  }
}

// Whether all of C [rows, kPanel] is.
template <class W>
VK_INLINE bool is_finite(const float* c, int64_t rows) {
  Vec<float> zeros{};
  for (int64_t i = 0; i < rows * kPanel; i += kFloats) zeros += load(c + i) * 0.f;
  return sum<float>(zeros) == 0;
}

// One panel of C below `rows` rows of A; `block` holds the sums between one depth of k and the next.
template <class W>
void product_block(const Product& p, Left<float> a, const float* b, int64_t i, int64_t rows, int64_t j, float* block,
                   float* sums, float* spare) {
  const bool fetch = j == 0 && p.a.col == 1 && !by_tiles<W>;  // what the first panel reads comes from memory
  const int64_t words = whole_words<W>(p.k), most = round_up(even_step(words, kDepth), by_tiles<W> ? kTile : 1);
  const int64_t columns = panel_columns(p), count = p.n - j < columns ? p.n - j : columns;
  for (int64_t k = 0; k < words; k += most) {
    const int64_t depth = words - k < most ? words - k : most;
    const bool last = k + depth == words;
    Left<float> tile = a;
    tile.data += k * a.col;
    for (int64_t r = 0; r < rows; r += tile_rows<W>, tile.data += a.tile) {
      const int64_t live = rows - r < tile_rows<W> ? rows - r : tile_rows<W>;
      float* const c = block + r * kPanel;
      if (last && !p.past_caches) prefetch_tile(p, i + r, j, live, W::size, count * W::size);
      if (fetch) {  // the same rows' next words or, after the last, the next block's first
        const int64_t left = words - k - depth;
        prefetch_rows(tile.data + (last ? rows * a.row - k : depth), a.row, live, last || left > most ? most : left);
      }
      multiply_tile<W>(live, depth, tile, b + in_panel<W>(k, 0, p.k), p.panel_step, c, k > 0);
      if (pieces<W> > 1 && last && !is_finite<W>(c, live)) __atomic_store_n(p.not_finite, true, __ATOMIC_RELAXED);
      if (last) finish_rows<W>(p, i + r, live, j, count, c, sums, spare);
    }
  }
}

template <class W>
void product_rows(const Product& p, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last,
                  float* sums, float* scratch, bool again) {
  [[maybe_unused]] const typename W::Scope scope{};
  const int64_t block_rows = tiles_of_block<W>(p.k) * tile_rows<W>;
  const int64_t most = round_up(even_step(end - begin, block_rows), tile_rows<W>);
  float *spare = scratch, *block = spare + kSpare, *a_tiles = block + block_rows * kPanel;
  for (int64_t j = 0; j < kSpare; ++j) spare[j] = 0;
  for (int64_t i = begin; i < end; i += most) {
    const int64_t rows = end - i < most ? end - i : most;
    const char* a = p.a.data + i * p.a.row * W::size;
    const int64_t row = p.a.row / per_word<W>;
    Left<float> tiles{reinterpret_cast<const float*>(a), row, 1, kTileRows * row};
    if constexpr (by_tiles<W>) {
      if (!again) copy_a<W>(a_tiles, p, a, rows);
      tiles = {a_tiles, kTile, pieces<W> * kTile, tile_rows<W> * panel_words<W>(p.k)};
    } else if (p.a.col != 1) {
      if (!again) pack_tiles<W>(a_tiles, a, p.a.col, p.k, rows);
      tiles = {a_tiles, 1, kTileRows, tile_words<W>(p.k)};
    }
    for (int64_t panel = first; panel < last; ++panel) {
      const float* const b = packed + (panel - first) * p.panel_step + in_panel<W>(p.packed_from / per_word<W>, 0, p.k);
      product_block<W>(p, tiles, b, i, rows, panel * panel_columns(p), block, sums, spare);
    }
  }
}

// ---- as the table has it

template <class W>
ProductSizes sizes_in(const Product& p) {
  const int64_t panels = (p.n + panel_columns(p) - 1) / panel_columns(p);
  const int64_t tiles = tiles_of_block<W>(p.k), rows = tiles * tile_rows<W>;
  const int64_t copied = by_tiles<W>     ? rows * panel_words<W>(p.k)
                         : p.a.col == 1 ? 0
                                        : tiles * tile_words<W>(p.k);
  const bool deep = by_tiles<W> && p.then == Then::store && (pieces<W> > 1 || p.a.col != 1);
  return {tile_rows<W>, tiles, panels, panel_words<W>(p.k) * kPanel, kSpare + rows * kPanel + copied,
          deep && p.k > kTerms<W> ? round_up(even_step(p.k, kTerms<W>), 2 * kTile) : p.k,
          by_tiles<W>};
}
inline ProductSizes product_sizes(const Product& p) {
  ProductSizes sizes;
  with_panels(p, [&](auto word, auto) VK_ALWAYS { sizes = sizes_in<decltype(word)>(p); });
  return sizes;
}

inline void product_pack(const Product& p, float* packed, int64_t first, int64_t last) {
  with_panels(p, [&](auto word, auto source) {
    using W = decltype(word);
    using S = decltype(source);
    if (p.b.row != 1) return pack_rows<W, S>(p, packed, first, last);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t most = panel_columns(p), j = panel * most, columns = p.n - j < most ? p.n - j : most;
      float* const out = packed + (panel - first) * p.panel_step;
      pack_columns<W, S>(out, b_at<S>(p, 0, j), p.b.col, p.k, columns, 0, most);
      if (p.then == Then::gate) {
        pack_columns<W, S>(out, b_at<S>(p, 0, p.n + j), p.b.col, p.k, columns, most, kPanel);
      }
      end_panel<W>(out, p.k);
    }
  });
}

inline void product(const Product& p, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last,
                    float* sums, float* scratch, bool again) {
  with_panels(p, [&](auto word, auto) VK_ALWAYS {
    product_rows<decltype(word)>(p, packed, begin, end, first, last, sums, scratch, again);
  });
  if (p.past_caches) end_past_caches();
}

}  // namespace VK_ISA
}  // namespace vk
