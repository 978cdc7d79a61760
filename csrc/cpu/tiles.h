// Products on the processor's matrix unit (AMX): C += A B of 16 rows of A, 16 words of two bfloat16 along k and 16
// columns of B at once. Words lie as everywhere here (product_words.h), so B's rows of words are read where they are.
//
// All tiles keep their full size: what is past the end of k is zeros, and C has room for the rows past the last.

namespace vk {
namespace VK_ISA {

#if defined(VK_TILES)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif
constexpr int64_t kTile = 16;  // rows, words of k, columns
constexpr int64_t kTileSize = kTile * kTile;

#if defined(VK_TILES)

// This thread's tiles are ours while one is in scope.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } sizes;
    for (int i = 0; i < 8; ++i) {
      sizes.row_bytes[i] = kTile * 4;
      sizes.rows[i] = kTile;
    }
    asm volatile("ldtilecfg %0" ::"m"(sizes));
  }
  ~TileScope() { asm volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// The compiler takes these for steps in order, and knows nothing of what they read: `fence_tiles` comes before a load.
#define VK_TILE_LOAD(tile, from, bytes) asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(bytes))
#define VK_TILE_STORE(tile, to, bytes) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(bytes) : "memory")
#define VK_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::)
#define VK_TILE_DOT(sum, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)
VK_INLINE void fence_tiles() { asm volatile("" ::: "memory"); }

// Where A or B lies, in words: from one row of a tile to the next, from one tile to the next along k, to the next one
// beside it, to the same one's next piece (product_words.h), and to the next pair of tiles beside it.
struct Tiles {
  const float* data;
  int64_t row, along, beside, piece = 0, pair = 2 * beside;
};

// C [32 rows or 16, 32 columns or 16] (+)= A B over `words` of k, a multiple of kTile.
template <int64_t kPieces, bool kTall, bool kWide>
VK_INLINE void multiply_tiles(int64_t words, Tiles a, Tiles b, float* c, int64_t c_row, bool accumulate) {
  const int64_t a_bytes = a.row * 4, b_bytes = b.row * 4, c_bytes = c_row * 4;
  float* const below = c + kTile * c_row;
  fence_tiles();
  if (accumulate) {
    VK_TILE_LOAD(0, c, c_bytes);
    if (kWide) VK_TILE_LOAD(1, c + kTile, c_bytes);
    if (kTall) VK_TILE_LOAD(2, below, c_bytes);
    if (kTall && kWide) VK_TILE_LOAD(3, below + kTile, c_bytes);
  } else {
    VK_TILE_ZERO(0);
    if (kWide) VK_TILE_ZERO(1);
    if (kTall) VK_TILE_ZERO(2);
    if (kTall && kWide) VK_TILE_ZERO(3);
  }
  const auto load_a = [&](int64_t piece) VK_ALWAYS {
    const float* const from = a.data + piece * a.piece;
    VK_TILE_LOAD(4, from, a_bytes);
    if (kTall) VK_TILE_LOAD(5, from + a.beside, a_bytes);
  };
  const auto load_b = [&](int64_t piece) VK_ALWAYS {
    const float* const from = b.data + piece * b.piece;
    VK_TILE_LOAD(6, from, b_bytes);
    if (kWide) VK_TILE_LOAD(7, from + b.beside, b_bytes);
  };
  const auto dot = [&]() VK_ALWAYS {
    VK_TILE_DOT(0, 4, 6);
    if (kWide) VK_TILE_DOT(1, 4, 7);
    if (kTall) VK_TILE_DOT(2, 5, 6);
    if (kTall && kWide) VK_TILE_DOT(3, 5, 7);
  };
  for (int64_t k = 0; k < words; k += kTile, a.data += a.along, b.data += b.along) {
    load_b(0);
    if (kPieces == 3) {  // in an order in which most tiles stay
      load_a(2), dot();
      load_a(1), dot();
    }
    load_a(0), dot();
    if (kPieces == 3) {
      load_b(2), dot();
      load_b(1), dot();
      load_a(1), dot();
    }
  }
  VK_TILE_STORE(0, c, c_bytes);
  if (kWide) VK_TILE_STORE(1, c + kTile, c_bytes);
  if (kTall) VK_TILE_STORE(2, below, c_bytes);
  if (kTall && kWide) VK_TILE_STORE(3, below + kTile, c_bytes);
}

// C [m rows, and those that fill the last tile; n columns, a multiple of kTile] (+)= A B.
template <int64_t kPieces = 1>
VK_INLINE void matmul_by_tiles(int64_t m, int64_t n, int64_t words, Tiles a, const Tiles& b, float* c, int64_t c_row,
                               bool accumulate) {
  const auto rows = [&](auto tall, float* out) VK_ALWAYS {
    constexpr bool kTall = decltype(tall)::value == 2;
    Tiles right = b;
    int64_t j = 0;
    for (; j + 2 * kTile <= n; j += 2 * kTile, right.data += b.pair) {
      multiply_tiles<kPieces, kTall, true>(words, a, right, out + j, c_row, accumulate);
    }
    if (j < n) multiply_tiles<kPieces, kTall, false>(words, a, right, out + j, c_row, accumulate);
  };
  int64_t i = 0;
  for (; i + kTile < m; i += 2 * kTile, a.data += a.pair, c += 2 * kTile * c_row) rows(Count<2>{}, c);
  if (i < m) rows(Count<1>{}, c);
}

#else
struct TileScope {};
#endif

}  // namespace VK_ISA
}  // namespace vk
