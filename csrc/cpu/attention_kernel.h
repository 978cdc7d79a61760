// One head of attention, tile by tile: a few rows of q against kKeys keys at a time, so that scores stay in L2 and
// the N x N matrix never exists. What its products read is attention_operands.h's business.

namespace vk {
namespace VK_ISA {

constexpr int64_t kQueries = PairWords::queries > 24 ? PairWords::queries : 24;  // the most, of any form of operands
constexpr int64_t kKeys = 512;    // even

template <class A>
struct Scratch {  // hands out pieces of the caller's buffer, each on its own cache line
  A* next;
  A* take(int64_t count) {
    A* piece = next;
    next += round_up(count, 64 / int64_t(sizeof(A)));
    return piece;
  }
};

// Which keys a tile of queries sees: [0, keys) or, causal, up to the last query's own.
VK_INLINE int64_t visible(const Head& h, int64_t query_end) {
  return h.causal && query_end < h.keys ? query_end : h.keys;
}

// Of an image of keys (Head.rel_h): what a query adds to the scores of each column, then of each row. Behind the columns
// there is space: whole vectors are read and written, and what lies past a row's end is nobody's.
template <class A>
VK_INLINE int64_t positions(const Head& h) {
  return h.columns > 0 ? padded<A>(h.columns) + Lanes<A>::count + h.keys / h.columns : 0;
}
template <class A>
VK_INLINE A* of_rows(const Head& h, A* rel) {
  return rel + padded<A>(h.columns) + Lanes<A>::count;
}

template <class A>
void load_positions(const Head& h, A* rel, int64_t begin, int64_t count) {
  const auto load_one = [&](A* to, const Rows& rows, int64_t i, int64_t width) VK_ALWAYS {
    load_row(to, rows.data + i * rows.row * size_of(rows.dtype), rows.dtype, rows.col, width);
  };
  for (int64_t i = begin; i < begin + count; ++i, rel += positions<A>(h)) {
    load_one(rel, h.rel_w, i, h.columns);
    load_one(of_rows(h, rel), h.rel_h, i, h.keys / h.columns);
  }
}

// f(j, y, x, count) for the pieces of the image's rows that keys [k0, k0 + keys) are, key k0 + j standing at (y, x).
template <class F>
VK_INLINE void each_piece(const Head& h, int64_t k0, int64_t keys, F f) {
  int64_t y = k0 / h.columns, x = k0 % h.columns;
  for (int64_t j = 0; j < keys; ++y, x = 0) {
    const int64_t count = h.columns - x < keys - j ? h.columns - x : keys - j;
    f(j, y, x, count);
    j += count;
  }
}

// What a query adds to the scores of keys [k0, k0 + keys); a piece's last vector reaches into the next one's place.
template <class A>
VK_INLINE void add_positions(const Head& h, A* out, A* rel, int64_t k0, int64_t keys) {
  each_piece(h, k0, keys, [&](int64_t j, int64_t y, int64_t x, int64_t count) VK_ALWAYS {
    const A of_row = of_rows(h, rel)[y];
    for (int64_t i = 0; i < count; i += Lanes<A>::count) store(out + j + i, load(rel + x + i) + of_row);
  });
}

// drel += sums of a query's ds over the rows and over the columns.
template <class A>
VK_INLINE void sum_positions(const Head& h, A* drel, const A* ds, int64_t k0, int64_t keys) {
  constexpr int64_t lanes = Lanes<A>::count;
  Vec<A> lane;
  for (int64_t i = 0; i < lanes; ++i) lane[i] = A(i);
  each_piece(h, k0, keys, [&](int64_t j, int64_t y, int64_t x, int64_t count) VK_ALWAYS {
    Vec<A> total{};
    for (int64_t i = 0; i < count; i += lanes) {
      Vec<A> d = load(ds + j + i);
      if (i + lanes > count) d = lane < A(count - i) ? d : Vec<A>{};
      total += d;
      store(drel + x + i, load(drel + x + i) + d);
    }
    of_rows(h, drel)[y] += sum<A>(total);
  });
}

// scores[i, j] = factor * scores[i, j] + mask, and -inf where query i may not see key j. Row i is query q0 + i, column j
// key k0 + j; columns from `keys` on are padding. `rel` has the queries' positions.
template <class A>
void mask_scores(const Head& h, A* scores, int64_t row, int64_t q0, int64_t queries, int64_t k0, int64_t keys,
                 A* mask_row, A* rel) {
  constexpr int64_t lanes = Lanes<A>::count;
  const A none = -A(__builtin_inf());
  const A factor = A(h.factor);
  for (int64_t i = 0; i < queries; ++i) {
    A* s = scores + i * row;
    if (h.columns > 0) {
      add_positions(h, mask_row, rel + i * positions<A>(h), k0, keys);
    } else if (h.mask.data && (i == 0 || h.mask.row != 0)) {
      const int64_t at = (q0 + i) * h.mask.row + k0 * h.mask.col;
      load_row(mask_row, h.mask.data + at * size_of(h.mask.dtype), h.mask.dtype, h.mask.col, keys);
    }
    if (h.columns > 0 || h.mask.data) {
      for (int64_t j = 0; j < row; j += lanes) store(s + j, load(s + j) * factor + load(mask_row + j));
    } else if (factor != 1) {
      for (int64_t j = 0; j < row; j += lanes) store(s + j, load(s + j) * factor);
    }
    int64_t seen = keys;
    if (h.causal && q0 + i + 1 - k0 < seen) seen = q0 + i + 1 - k0 > 0 ? q0 + i + 1 - k0 : 0;
    for (int64_t j = seen; j < row; ++j) s[j] = none;
  }
}

template <class A>
int64_t attention_scratch(const Head& h, bool backward) {
  constexpr int64_t lanes = Lanes<A>::count;
  const int64_t width = padded<A>(h.width);
  const int64_t block = padded<A>(h.keys < kKeys ? h.keys : kKeys);
  const int64_t all_keys = round_up(h.keys, kKeys < h.keys ? kKeys : Lanes<A>::count);
  const int64_t tiles = kQueries * (width + block + (backward ? 2 : 1) * positions<A>(h)) + 2 * kQueries + block + lanes;
  const int64_t lines = 26 * (64 / int64_t(sizeof(A)));  // what rounding each piece to a cache line can add
  if (!backward) return tiles + kQueries * width + 2 * all_keys * width + lines;
  return tiles + kQueries * (4 * width + 2 * block) + 6 * all_keys * width + lines;
}

// C (+)= A B of operands in the form W.
template <class A, class W>
VK_INLINE void multiply(int64_t m, int64_t n, int64_t words, Left<A> a, const A* b, int64_t b_row, A* c, int64_t c_row,
                        bool accumulate) {
#if defined(VK_TILES)
  if constexpr (W::tiles) {
    const Tiles left{a.data, a.row, kTile, a.tile}, right{b, b_row, kTile * b_row, kTile};
    return matmul_by_tiles(m, n, words, left, right, c, c_row, accumulate);
  }
#endif
  matmul<A, W>(m, n, words, a, b, b_row, c, c_row, accumulate);
}
// Rows of `width` as its left operand.
template <class A>
VK_INLINE Left<A> rows_of(const A* data, int64_t width) {
  return {data, width, 1, kTile * width};
}

template <class A>
VK_INLINE A dot(const A* a, const A* b, int64_t count) {  // of whole vectors
  Vec<A> d{};
  for (int64_t j = 0; j < count; j += Lanes<A>::count) d += load(a + j) * load(b + j);
  return sum<A>(d);
}

// W is the form of the operands.
template <class A, class W>
void head_forward(const Head& h, OutRows out, A* stats, A* buffer) {
  [[maybe_unused]] const typename W::Scope scope{};
  constexpr int64_t lanes = Lanes<A>::count;
  const A unit = A(h.unit);
  const int64_t width = padded<A>(h.width), words = W::words(h.width);
  const int64_t step = h.keys < kKeys ? h.keys : kKeys;
  const int64_t block = padded<A>(step);
  Scratch<A> scratch{buffer};
  const int64_t all_keys = round_up(h.keys, kKeys < h.keys ? kKeys : lanes);
  A* v = scratch.take(all_keys * width);
  A* k_t = scratch.take(all_keys * width);  // [words, block] for each block of keys
  A* q = scratch.take(kQueries * width);
  A* acc = scratch.take(kQueries * width);
  A* scores = scratch.take(kQueries * block);
  A* top = scratch.take(kQueries);
  A* total = scratch.take(kQueries);
  A* mask_row = scratch.take(block + lanes);
  A* rel = scratch.take(kQueries * positions<A>(h));
  for (int64_t j = 0; j < block + lanes; ++j) mask_row[j] = 0;

  if (h.member == 0) {
    for (int64_t k0 = 0; k0 < h.keys; k0 += step) {  // v's place holds k until it is transposed
      const int64_t keys = k0 + step < h.keys ? step : h.keys - k0;
      W::along(v, h.k, k0, keys, h.width);
      transpose(k_t + k0 * width, v, width, keys, words);
    }
    W::across(v, h.v, h.keys, h.width);
  }

  for (int64_t q0 = 0; q0 < h.queries; q0 += W::queries) {
    const int64_t queries = q0 + W::queries < h.queries ? W::queries : h.queries - q0;
    W::along(q, h.q, q0, queries, h.width);
    if (h.columns > 0) load_positions(h, rel, q0, queries);
    for (int64_t i = 0; i < queries; ++i) {
      top[i] = -A(__builtin_inf());
      total[i] = 0;
    }
    for (int64_t i = 0; i < queries * width; ++i) acc[i] = 0;
    const int64_t end = visible(h, q0 + queries);
    for (int64_t k0 = 0; k0 < end; k0 += step) {
      const int64_t keys = k0 + step < end ? step : end - k0;
      const int64_t row = padded<A>(keys), k_row = padded<A>(k0 + step < h.keys ? step : h.keys - k0);
      multiply<A, W>(queries, row, words, rows_of(q, width), k_t + k0 * width, k_row, scores, row, false);
      mask_scores(h, scores, row, q0, queries, k0, keys, mask_row, rel);
      for (int64_t i = 0; i < queries; ++i) {
        A* s = scores + i * row;
        Vec<A> m = splat(top[i]);
        for (int64_t j = 0; j < row; j += lanes) m = vmax<A>(load(s + j), m);
        const A now = largest<A>(m);
        const A base = now == -A(__builtin_inf()) ? A(0) : now;  // a row of -inf alone gives zeros, not NaN
        Vec<A> t{};
        for (int64_t j = 0; j < row; j += lanes) {
          const Vec<A> p = vexp((load(s + j) - base) * unit);
          t += p;
          store(s + j, p);
        }
        if (k0 == 0) {
          total[i] = sum<A>(t);
        } else {
          const A shrink = vexp(splat((top[i] - base) * unit))[0];
          total[i] = total[i] * shrink + sum<A>(t);
          for (int64_t d = 0; d < width; ++d) acc[i * width + d] *= shrink;
        }
        top[i] = now;
      }
      const Left<A> p = W::scores_along(scores, scores, queries, row);
      multiply<A, W>(queries, width, W::words(keys), p, v + W::words(k0) * width, width, acc, width, true);
    }
    for (int64_t i = 0; i < queries; ++i) {
      const bool empty = !(total[i] != 0);  // NaN is not empty
      const A inverse = empty ? A(0) : A(1) / total[i];
      A* row = acc + i * width;
      for (int64_t d = 0; d < width; ++d) row[d] *= inverse;
      put_row(out, q0 + i, row, h.width);
      stats[q0 + i] = empty ? A(0) : top[i];
      stats[h.stats_row + q0 + i] = empty ? A(__builtin_inf()) : A(__builtin_log(double(total[i])));
    }
  }
}

template <class A, class W>
void head_backward(const Head& h, Rows out, Rows dout, const A* stats, OutRows dq, OutRows dk, OutRows dv, A* dmask,
                   int64_t dmask_row, int64_t dmask_col, OutRows drel_h, OutRows drel_w, A* buffer) {
  [[maybe_unused]] const typename W::Scope scope{};
  constexpr int64_t lanes = Lanes<A>::count;
  const A unit = A(h.unit);
  const int64_t width = padded<A>(h.width), words = W::words(h.width);
  const bool one_block = h.keys <= kKeys;
  const int64_t step = one_block ? h.keys : kKeys;
  const int64_t block = padded<A>(step);
  Scratch<A> scratch{buffer};
  const int64_t all_keys = round_up(h.keys, kKeys < h.keys ? kKeys : lanes);
  A* k = scratch.take(all_keys * width);
  A* k_t = scratch.take(all_keys * width);
  A* v_t = scratch.take(all_keys * width);
  A* dk_sum = scratch.take(all_keys * width);
  A* dv_sum = scratch.take(all_keys * width);
  A* q = scratch.take(kQueries * width);
  A* g = scratch.take(kQueries * width);
  A* dq_sum = scratch.take(kQueries * width);
  A* p = scratch.take(kQueries * block);
  A* ds = scratch.take(kQueries * block);
  A* delta = scratch.take(kQueries);
  A* mask_row = scratch.take(block + lanes);
  A* q_space = scratch.take(kQueries * width);
  A* g_space = scratch.take(kQueries * width);
  A* ds_space = scratch.take(kQueries * block);
  A* rel = scratch.take(kQueries * positions<A>(h));
  A* drel = scratch.take(kQueries * positions<A>(h));
  for (int64_t j = 0; j < block + lanes; ++j) mask_row[j] = 0;
  if (h.member == 0) {
    for (int64_t i = 0; i < h.keys * width; ++i) dk_sum[i] = dv_sum[i] = 0;
    for (int64_t k0 = 0; k0 < h.keys; k0 += step) {
      const int64_t keys = k0 + step < h.keys ? step : h.keys - k0;
      W::along(k, h.v, k0, keys, h.width);
      transpose(v_t + k0 * width, k, width, keys, words);
      W::along(k, h.k, k0, keys, h.width);
      transpose(k_t + k0 * width, k, width, keys, words);
    }
    W::across(k, h.k, h.keys, h.width);
  }

  for (int64_t q0 = 0; q0 < h.queries; q0 += W::queries) {
    const int64_t queries = q0 + W::queries < h.queries ? W::queries : h.queries - q0;
    if (!one_block) {  // delta = sum over keys of p * dp, which is dout * out
      Numbers<A>::along(dq_sum, out, q0, queries, h.width);
      Numbers<A>::along(g, dout, q0, queries, h.width);
      for (int64_t i = 0; i < queries; ++i) delta[i] = dot(g + i * width, dq_sum + i * width, width);
    }
    if (h.columns > 0) load_positions(h, rel, q0, queries);
    for (int64_t i = 0; i < queries * positions<A>(h); ++i) drel[i] = 0;
    const A* g_across = W::both(g, g_space, dout, q0, queries, h.width);
    const A* q_across = W::both(q, q_space, h.q, q0, queries, h.width);
    const int64_t end = visible(h, q0 + queries);
    for (int64_t k0 = 0; k0 < end; k0 += step) {
      const int64_t keys = k0 + step < end ? step : end - k0;
      const int64_t row = padded<A>(keys), k_row = padded<A>(k0 + step < h.keys ? step : h.keys - k0);
      multiply<A, W>(queries, row, words, rows_of(q, width), k_t + k0 * width, k_row, p, row, false);
      mask_scores(h, p, row, q0, queries, k0, keys, mask_row, rel);
      multiply<A, W>(queries, row, words, rows_of(g, width), v_t + k0 * width, k_row, ds, row, false);
      for (int64_t i = 0; i < queries; ++i) {
        A *pi = p + i * row, *di = ds + i * row;
        // the difference first: beside huge scores the log of the sum would be rounded away
        const A largest = stats[q0 + i], log_sum = stats[h.stats_row + q0 + i];
        for (int64_t j = 0; j < row; j += lanes) store(pi + j, vexp((load(pi + j) - largest) * unit - log_sum));
        if (one_block) delta[i] = dot(pi, di, row);
        for (int64_t j = 0; j < row; j += lanes) store(di + j, load(pi + j) * (load(di + j) - delta[i]));
        if (drel_h.data) sum_positions(h, drel + i * positions<A>(h), di, k0, keys);
        if (dmask) {
          A* to = dmask + (q0 + i) * dmask_row + k0 * dmask_col;
          if (dmask_col == 0) {
            to[0] += row_sum(di, row);  // padding is 0
          } else if (dmask_col == 1) {
            each<A>(keys, [&](auto lane, int64_t j) VK_ALWAYS {
              using V = decltype(lane);
              put(to + j, get<V>(to + j) + get<V>(di + j));
            });
          } else {
            for (int64_t j = 0; j < keys; ++j) to[j * dmask_col] += di[j];
          }
        }
      }
      const Left<A> ds_along = W::scores_along(ds_space, ds, queries, row);
      multiply<A, W>(queries, width, W::words(keys), ds_along, k + W::words(k0) * width, width, dq_sum, width, k0 != 0);
      const Left<A> p_t = W::scores_across(p, queries, row), ds_t = W::scores_across(ds, queries, row);
      multiply<A, W>(keys, width, W::words(queries), p_t, g_across, width, dv_sum + k0 * width, width, true);
      multiply<A, W>(keys, width, W::words(queries), ds_t, q_across, width, dk_sum + k0 * width, width, true);
    }
    for (int64_t i = 0; i < queries; ++i) {
      A* row = dq_sum + i * width;
      for (int64_t d = 0; d < width; ++d) row[d] = end == 0 ? A(0) : row[d] * A(h.scale);
      put_row(dq, q0 + i, row, h.width);
      if (drel_h.data) {
        A* const sums = drel + i * positions<A>(h);
        put_row(drel_w, q0 + i, sums, h.columns);
        put_row(drel_h, q0 + i, of_rows(h, sums), h.keys / h.columns);
      }
    }
  }
  if (h.member + 1 < h.group) return;
  for (int64_t i = 0; i < h.keys; ++i) {
    A* row = dk_sum + i * width;
    for (int64_t d = 0; d < width; ++d) row[d] *= A(h.scale);
    put_row(dk, i, row, h.width);
    put_row(dv, i, dv_sum + i * width, h.width);
  }
}

// Pairs round the weights. A learned mask's gradient is a sum of terms that cancel, and would show it where delta comes of
// the rounded output, past one block of keys, and where the terms cancel wholly, in a mask that is the same for all keys.
VK_INLINE bool in_pairs(const Head& h) {
  if (h.added && (h.keys > kKeys || h.mask.col == 0)) return false;
  return h.q.dtype == DType::bf16 && h.k.dtype == DType::bf16 && h.v.dtype == DType::bf16;
}

template <class A>
void attention_forward(const Head& h, OutRows out, A* stats, A* buffer) {
  if constexpr (kBf16Pairs && sizeof(A) == 4) {
    if (in_pairs(h)) return head_forward<A, PairWords>(h, out, stats, buffer);
  }
  head_forward<A, Numbers<A>>(h, out, stats, buffer);
}

template <class A>
void attention_backward(const Head& h, Rows out, Rows dout, const A* stats, OutRows dq, OutRows dk, OutRows dv,
                        A* dmask, int64_t dmask_row, int64_t dmask_col, OutRows drel_h, OutRows drel_w, A* buffer) {
  if constexpr (kBf16Pairs && sizeof(A) == 4) {
    if (in_pairs(h) && dout.dtype == DType::bf16) {
      return head_backward<A, PairWords>(h, out, dout, stats, dq, dk, dv, dmask, dmask_row, dmask_col, drel_h, drel_w,
                                         buffer);
    }
  }
  head_backward<A, Numbers<A>>(h, out, dout, stats, dq, dk, dv, dmask, dmask_row, dmask_col, drel_h, drel_w, buffer);
}

}  // namespace VK_ISA
}  // namespace vk
