// A small matrix product for operands that sit in cache, the heart of attention. C is m x n, A is read one number at a
// time (any steps, so that a transposed A costs nothing), B and C are rows padded to whole vectors.

namespace vk {
namespace VK_ISA {

// 24 accumulators of 32 registers on AVX-512, 12 of 16 elsewhere
constexpr int64_t kTileRows = 6;
constexpr int64_t kTileVecs = VK_VECTOR_BYTES == 64 ? 4 : 2;

struct Plain {  // how a product's terms are added; product_kernel.h has another way
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
    for (int64_t j = 0; j < V; ++j) row[j] = load(b + p * b_row + j * lanes);
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

template <class A, int64_t V>
void matmul_columns(int64_t m, int64_t k, const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t b_row, A* c,
                    int64_t c_row, bool accumulate) {
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows) {
    matmul_tile<A, kTileRows, V>(k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
  }
  a += i * a_row;
  c += i * c_row;
  switch (m - i) {
    case 1: return matmul_tile<A, 1, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    case 2: return matmul_tile<A, 2, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    case 3: return matmul_tile<A, 3, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    case 4: return matmul_tile<A, 4, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    case 5: return matmul_tile<A, 5, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    default: return;
  }
}

// C (+)= A B; n is a multiple of the vector length.
template <class A>
void matmul(int64_t m, int64_t n, int64_t k, const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t b_row, A* c,
            int64_t c_row, bool accumulate) {
  constexpr int64_t lanes = Lanes<A>::count;
  const int64_t vecs = n / lanes;
  int64_t j = 0;
  for (; j + kTileVecs <= vecs; j += kTileVecs) {
    matmul_columns<A, kTileVecs>(m, k, a, a_row, a_col, b + j * lanes, b_row, c + j * lanes, c_row, accumulate);
  }
  b += j * lanes;
  c += j * lanes;
  switch (vecs - j) {
    case 1: return matmul_columns<A, 1>(m, k, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    case 2: return matmul_columns<A, 2>(m, k, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    case 3: return matmul_columns<A, 3>(m, k, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    default: return;
  }
}

}  // namespace VK_ISA
}  // namespace vk
