// One head of attention, tile by tile: kQueries rows of q against kKeys keys at a time, so that scores stay in L2 and
// the N x N matrix never exists. Operands are packed to A once a head (k and v by rows and, where a product wants
// it, transposed), which also takes care of strides and of bfloat16.

namespace vk {
namespace VK_ISA {

constexpr int64_t kQueries = 48;  // a multiple of the product's row tile
constexpr int64_t kKeys = 512;

template <class A>
VK_INLINE int64_t padded(int64_t n) {
  return round_up(n, Lanes<A>::count);
}

template <class A>
struct Scratch {  // hands out pieces of the caller's buffer, each on its own cache line
  A* next;
  A* take(int64_t count) {
    A* piece = next;
    next += round_up(count, 64 / int64_t(sizeof(A)));
    return piece;
  }
};

// Rows [begin, begin + count) as packed rows of `padded(width)`, zeros in the padding.
template <class A>
void pack(A* out, const Rows& rows, int64_t begin, int64_t count, int64_t width) {
  const int64_t row = padded<A>(width);
  for (int64_t i = 0; i < count; ++i) {
    load_row(out + i * row, rows.data + (begin + i) * rows.row * size_of(rows.dtype), rows.dtype, rows.col, width);
    for (int64_t j = width; j < row; ++j) out[i * row + j] = 0;
  }
}

// [count, width] packed rows -> [width, padded(count)], zeros in the padding.
template <class A>
void transpose(A* out, const A* in, int64_t count, int64_t width) {
  const int64_t in_row = padded<A>(width), out_row = padded<A>(count);
  constexpr int64_t block = 16;
  for (int64_t i0 = 0; i0 < count; i0 += block) {
    const int64_t i1 = i0 + block < count ? i0 + block : count;
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t i = i0; i < i1; ++i) out[j * out_row + i] = in[i * in_row + j];
    }
  }
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t i = count; i < out_row; ++i) out[j * out_row + i] = 0;
  }
}

// Which keys a tile of queries sees: [0, keys) or, causal, up to the last query's own.
VK_INLINE int64_t visible(const Head& h, int64_t query_end) {
  return h.causal && query_end < h.keys ? query_end : h.keys;
}

// scores[i, j] = scale * scores[i, j] + mask, and -inf where query i may not see key j. Row i is query q0 + i, column j
// key k0 + j; columns from `keys` on are padding.
template <class A>
void mask_scores(const Head& h, A* scores, int64_t row, int64_t q0, int64_t queries, int64_t k0, int64_t keys,
                 A* mask_row) {
  constexpr int64_t lanes = Lanes<A>::count;
  const A none = -A(__builtin_inf());
  const A scale = A(h.scale);
  for (int64_t i = 0; i < queries; ++i) {
    A* s = scores + i * row;
    if (h.mask.data) {
      if (i == 0 || h.mask.row != 0) {
        const int64_t at = (q0 + i) * h.mask.row + k0 * h.mask.col;
        load_row(mask_row, h.mask.data + at * size_of(h.mask.dtype), h.mask.dtype, h.mask.col, keys);
      }
      for (int64_t j = 0; j < row; j += lanes) store(s + j, load(s + j) * scale + load(mask_row + j));
    } else {
      for (int64_t j = 0; j < row; j += lanes) store(s + j, load(s + j) * scale);
    }
    int64_t seen = keys;
    if (h.causal && q0 + i + 1 - k0 < seen) seen = q0 + i + 1 - k0 > 0 ? q0 + i + 1 - k0 : 0;
    for (int64_t j = seen; j < row; ++j) s[j] = none;
  }
}

template <class A>
int64_t attention_scratch(const Head& h, bool backward) {
  const int64_t width = padded<A>(h.width);
  const int64_t block = padded<A>(h.keys < kKeys ? h.keys : kKeys);
  const int64_t all_keys = round_up(h.keys, kKeys < h.keys ? kKeys : Lanes<A>::count);
  const int64_t tiles = kQueries * (width + block) + 2 * kQueries + block;
  const int64_t lines = 24 * (64 / int64_t(sizeof(A)));  // what rounding each piece to a cache line can add
  if (!backward) return tiles + kQueries * width + 2 * all_keys * width + lines;
  return tiles + kQueries * (2 * width + block) + 6 * all_keys * width + lines;
}

template <class A>
void attention_forward(const Head& h, OutRows out, A* lse, A* buffer) {
  constexpr int64_t lanes = Lanes<A>::count;
  const int64_t width = padded<A>(h.width);
  const int64_t step = h.keys < kKeys ? h.keys : kKeys;
  const int64_t block = padded<A>(step);
  Scratch<A> scratch{buffer};
  const int64_t all_keys = round_up(h.keys, kKeys < h.keys ? kKeys : lanes);
  A* v = scratch.take(all_keys * width);
  A* k_t = scratch.take(all_keys * width);  // [width, block] for each block of keys
  A* q = scratch.take(kQueries * width);
  A* acc = scratch.take(kQueries * width);
  A* scores = scratch.take(kQueries * block);
  A* top = scratch.take(kQueries);
  A* total = scratch.take(kQueries);
  A* mask_row = scratch.take(block);
  for (int64_t j = 0; j < block; ++j) mask_row[j] = 0;

  for (int64_t k0 = 0; k0 < h.keys; k0 += step) {  // v's place holds k until it is transposed
    const int64_t keys = k0 + step < h.keys ? step : h.keys - k0;
    pack(v, h.k, k0, keys, h.width);
    transpose(k_t + k0 * width, v, keys, h.width);
  }
  pack(v, h.v, 0, h.keys, h.width);

  for (int64_t q0 = 0; q0 < h.queries; q0 += kQueries) {
    const int64_t queries = q0 + kQueries < h.queries ? kQueries : h.queries - q0;
    pack(q, h.q, q0, queries, h.width);
    for (int64_t i = 0; i < queries; ++i) {
      top[i] = -A(__builtin_inf());
      total[i] = 0;
    }
    for (int64_t i = 0; i < queries * width; ++i) acc[i] = 0;
    const int64_t end = visible(h, q0 + queries);
    for (int64_t k0 = 0; k0 < end; k0 += step) {
      const int64_t keys = k0 + step < end ? step : end - k0;
      const int64_t row = padded<A>(keys), k_row = padded<A>(k0 + step < h.keys ? step : h.keys - k0);
      matmul(queries, row, h.width, q, width, int64_t(1), k_t + k0 * width, k_row, scores, row, false);
      mask_scores(h, scores, row, q0, queries, k0, keys, mask_row);
      for (int64_t i = 0; i < queries; ++i) {
        A* s = scores + i * row;
        Vec<A> m = splat(top[i]);
        for (int64_t j = 0; j < row; j += lanes) m = vmax<A>(load(s + j), m);
        const A now = largest<A>(m);
        const A base = now == -A(__builtin_inf()) ? A(0) : now;  // a row of -inf alone gives zeros, not NaN
        Vec<A> t{};
        for (int64_t j = 0; j < row; j += lanes) {
          const Vec<A> p = vexp(load(s + j) - base);
          t += p;
          store(s + j, p);
        }
        if (k0 == 0) {
          total[i] = sum<A>(t);
        } else {
          const A shrink = vexp(splat(top[i] - base))[0];
          total[i] = total[i] * shrink + sum<A>(t);
          for (int64_t d = 0; d < width; ++d) acc[i * width + d] *= shrink;
        }
        top[i] = now;
      }
      matmul(queries, width, keys, scores, row, int64_t(1), v + k0 * width, width, acc, width, true);
    }
    for (int64_t i = 0; i < queries; ++i) {
      const bool empty = !(total[i] != 0);  // NaN is not empty
      const A inverse = empty ? A(0) : A(1) / total[i];
      A* row = acc + i * width;
      for (int64_t d = 0; d < width; ++d) row[d] *= inverse;
      put_row(out, q0 + i, row, h.width);
      lse[q0 + i] = empty ? A(__builtin_inf()) : top[i] + A(__builtin_log(double(total[i])));
    }
  }
}

template <class A>
void attention_backward(const Head& h, Rows out, Rows dout, const A* lse, OutRows dq, OutRows dk, OutRows dv, A* dmask,
                        int64_t dmask_row, int64_t dmask_col, A* buffer) {
  constexpr int64_t lanes = Lanes<A>::count;
  const int64_t width = padded<A>(h.width);
  const int64_t step = h.keys < kKeys ? h.keys : kKeys;
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
  A* mask_row = scratch.take(block);
  for (int64_t j = 0; j < block; ++j) mask_row[j] = 0;
  for (int64_t i = 0; i < h.keys * width; ++i) dk_sum[i] = dv_sum[i] = 0;

  for (int64_t k0 = 0; k0 < h.keys; k0 += step) {
    const int64_t keys = k0 + step < h.keys ? step : h.keys - k0;
    pack(k, h.v, k0, keys, h.width);
    transpose(v_t + k0 * width, k, keys, h.width);
    pack(k, h.k, k0, keys, h.width);
    transpose(k_t + k0 * width, k, keys, h.width);
  }
  pack(k, h.k, 0, h.keys, h.width);

  for (int64_t q0 = 0; q0 < h.queries; q0 += kQueries) {
    const int64_t queries = q0 + kQueries < h.queries ? kQueries : h.queries - q0;
    pack(dq_sum, out, q0, queries, h.width);
    pack(g, dout, q0, queries, h.width);
    for (int64_t i = 0; i < queries; ++i) {
      Vec<A> d{};
      for (int64_t j = 0; j < width; j += lanes) d += load(g + i * width + j) * load(dq_sum + i * width + j);
      delta[i] = sum<A>(d);
    }
    pack(q, h.q, q0, queries, h.width);
    const int64_t end = visible(h, q0 + queries);
    for (int64_t k0 = 0; k0 < end; k0 += step) {
      const int64_t keys = k0 + step < end ? step : end - k0;
      const int64_t row = padded<A>(keys), k_row = padded<A>(k0 + step < h.keys ? step : h.keys - k0);
      matmul(queries, row, h.width, q, width, int64_t(1), k_t + k0 * width, k_row, p, row, false);
      mask_scores(h, p, row, q0, queries, k0, keys, mask_row);
      matmul(queries, row, h.width, g, width, int64_t(1), v_t + k0 * width, k_row, ds, row, false);
      for (int64_t i = 0; i < queries; ++i) {
        A *pi = p + i * row, *di = ds + i * row;
        for (int64_t j = 0; j < row; j += lanes) {
          const Vec<A> weight = vexp(load(pi + j) - lse[q0 + i]);
          store(pi + j, weight);
          store(di + j, weight * (load(di + j) - delta[i]));
        }
        if (dmask) {
          A* to = dmask + (q0 + i) * dmask_row + k0 * dmask_col;
          if (dmask_col == 0) {
            to[0] += row_sum(di, row);  // padding is 0
          } else {
            for (int64_t j = 0; j < keys; ++j) to[j * dmask_col] += di[j];
          }
        }
      }
      matmul(keys, width, queries, p, int64_t(1), row, g, width, dv_sum + k0 * width, width, true);
      matmul(keys, width, queries, ds, int64_t(1), row, q, width, dk_sum + k0 * width, width, true);
      matmul(queries, width, keys, ds, row, int64_t(1), k + k0 * width, width, dq_sum, width, k0 != 0);
    }
    for (int64_t i = 0; i < queries; ++i) {
      A* row = dq_sum + i * width;
      for (int64_t d = 0; d < width; ++d) row[d] = end == 0 ? A(0) : row[d] * A(h.scale);
      put_row(dq, q0 + i, row, h.width);
    }
  }
  for (int64_t i = 0; i < h.keys; ++i) {
    A* row = dk_sum + i * width;
    for (int64_t d = 0; d < width; ++d) row[d] *= A(h.scale);
    put_row(dk, i, row, h.width);
    put_row(dv, i, dv_sum + i * width, h.width);
  }
}

}  // namespace VK_ISA
}  // namespace vk
