// A small matrix product for operands that sit in cache, the heart of attention. C is m x n, A is read one number at a
// time (any steps, so that a transposed A costs nothing), B and C are rows padded to whole vectors.

namespace vk {
namespace VK_ISA {

// 24 accumulators of 32 registers on AVX-512, 12 of 16 elsewhere
constexpr int64_t kTileRows = 6;
constexpr int64_t kTileVecs = VK_VECTOR_BYTES == 64 ? 4 : 2;

template <int64_t n>
struct Count {
  static constexpr int64_t value = n;
};

struct Plain {  // how a product's terms are added; product_words.h has another way
  static constexpr int64_t ahead = 0;  // rows of B that are asked for early, where B is not in cache
  template <class V>
  VK_INLINE static V madd(V sum, V a, V b) {
    return sum + a * b;
  }
};

template <class A, int64_t M, int64_t V, class Terms = Plain>
VK_INLINE void matmul_tile(int64_t k, const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t b_row, A* c,
                           int64_t c_row, bool accumulate) {
  constexpr int64_t lanes = Lanes<A>::count;
  Vec<A> acc[M][V];
#pragma GCC unroll 8
  for (int64_t i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < V; ++j) acc[i][j] = Vec<A>{};
  }
  for (int64_t p = 0; p < k; ++p) {
    Vec<A> row[V];
#pragma GCC unroll 4
    for (int64_t j = 0; j < V; ++j) {
      row[j] = load(b + p * b_row + j * lanes);
      if (Terms::ahead > 0) __builtin_prefetch(b + (p + Terms::ahead) * b_row + j * lanes);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < M; ++i) {
      const Vec<A> value = splat(get<A>(a + i * a_row + p * a_col));
#pragma GCC unroll 4
      for (int64_t j = 0; j < V; ++j) acc[i][j] = Terms::madd(acc[i][j], value, row[j]);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < V; ++j) {
      // C is added last: a sum over many blocks errs as each block's sum does, not as one of all their terms
      A* const out = c + i * c_row + j * lanes;
      store(out, accumulate ? acc[i][j] + load(out) : acc[i][j]);
    }
  }
}

// The left operand: number (i, p) at data + i * row + p * col. `tile`: from one tile of rows to the next.
template <class A>
struct Left {
  const A* data;
  int64_t row, col, tile;
};

template <class A, int64_t V, class Terms>
void matmul_columns(int64_t m, int64_t k, Left<A> a, const A* b, int64_t b_row, A* c, int64_t c_row, bool accumulate) {
  const auto tile = [&](auto rows) VK_ALWAYS {
    matmul_tile<A, decltype(rows)::value, V, Terms>(k, a.data, a.row, a.col, b, b_row, c, c_row, accumulate);
  };
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows, a.data += kTileRows * a.row, c += kTileRows * c_row) {
    tile(Count<kTileRows>{});
  }
  switch (m - i) {
    case 1: return tile(Count<1>{});
    case 2: return tile(Count<2>{});
    case 3: return tile(Count<3>{});
    case 4: return tile(Count<4>{});
    case 5: return tile(Count<5>{});
    default: return;
  }
}

// C (+)= A B; n is a multiple of the vector length.
template <class A, class Terms = Plain>
void matmul(int64_t m, int64_t n, int64_t k, Left<A> a, const A* b, int64_t b_row, A* c, int64_t c_row,
            bool accumulate) {
  constexpr int64_t lanes = Lanes<A>::count;
  const int64_t vecs = n / lanes;
  int64_t j = 0;
  for (; j + kTileVecs <= vecs; j += kTileVecs) {
    matmul_columns<A, kTileVecs, Terms>(m, k, a, b + j * lanes, b_row, c + j * lanes, c_row, accumulate);
  }
  b += j * lanes;
  c += j * lanes;
  switch (vecs - j) {
    case 1: return matmul_columns<A, 1, Terms>(m, k, a, b, b_row, c, c_row, accumulate);
    case 2: return matmul_columns<A, 2, Terms>(m, k, a, b, b_row, c, c_row, accumulate);
    case 3: return matmul_columns<A, 3, Terms>(m, k, a, b, b_row, c, c_row, accumulate);
    default: return;
  }
}

}  // namespace VK_ISA
}  // namespace vk
