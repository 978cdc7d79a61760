// What the attention kernels are told of a call, by value: sizes, strides, factors. Pointers come beside it.
//
// Host and device both compile this; names and meaning are those of vitkernels/ops/attention.py and csrc/cpu.
#pragma once
#include <cstdint>

namespace vk {

// Where q, k, v, out or a gradient lies as [batch, heads, tokens, width]: strides in elements.
struct HeadsAt {
  int64_t batch, head, token, col;
  bool aligned;  // every row begins at a multiple of 16 bytes, fills whole 16 bytes, and has its elements in a row
};

enum class MaskKind : int32_t { none, boolean, f32, f16, bf16 };

// A mask [B or 1, H or 1, Nq or 1, Nk or 1]: strides in elements, 0 along its axes of size 1.
struct MaskAt {
  int64_t batch, head, query, key;
  MaskKind kind;
};

struct Attention {
  int32_t batch, heads, queries, keys, width;
  bool causal;
  float scale;   // of dq and dk
  float factor;  // score = factor * q k^T + mask
  float unit;    // weight = exp2(unit * (score - largest)) / sum: score_units' unit times log2(e)
  MaskAt mask;
  HeadsAt q, k, v, out, dout, dq, dk, dv;
};

constexpr int32_t kWidestHead = 128;

}  // namespace vk
