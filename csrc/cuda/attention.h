// What the attention kernels are told of a call, and which kernels there are. Host and device compile this; names and
// meaning are those of vitkernels/ops/attention.py and csrc/cpu.
//
// The kernels are written once, on `Cores` that say what a thread holds of a tile and how two tiles are multiplied:
//   attention_tiles.cuh     tiles of shared memory: copies in and out, masks, scores
//   attention_image.cuh     what relative positions add to scores of an image of keys, and the gradients of it
//   attention_forward.cuh   one block a tile of queries, over all keys
//   attention_backward.cuh  dq by queries, then dk and dv by keys
//   attention_plain.cuh     Cores of float32: products on the ordinary cores
//   attention_tensor.cuh    Cores of float16 and bfloat16: the same on tensor cores
//   attention_{f32,f16,bf16}.cu  the kernels of a dtype, attention_rel_pos_{f32,f16,bf16}.cu those for images;
//   attention_launch.cpp launches them
#pragma once
#include <algorithm>

#include "shared/types.h"

namespace vk {

// One of q, k, v, out and their gradients as [batch, heads, tokens, width]; strides in elements.
struct DeviceHeads {
  char* data;
  int64_t batch, head, token, col;
  bool aligned;  // every row begins at a multiple of 16 bytes, fills whole 16 bytes, and has no gaps
#if defined(__CUDACC__)
  template <class T>
  __device__ T* of(int64_t b, int64_t h) const {
    return reinterpret_cast<T*>(data) + b * batch + h * head;
  }
#endif
};

// A mask [M, H or 1, Nq or 1, Nk or 1], bool or added; strides in elements, 0 along its axes of size 1. Sequence b has
// mask b % M.
struct DeviceMask {
  const char* data;  // null: none
  DType dtype;
  uint32_t masks;
  int64_t batch, head, query, key;
};

// Where the tokens of a sequence begin, in what DeviceHeads.of steps by, and how many there are.
struct Span {
  int32_t q, queries, k, keys;
};

// Keys as an image, row by row: each query adds a number to the scores of each of its rows, and of each of its columns.
struct Image {
  int32_t rows, columns;
  const float *rel_h, *rel_w;  // [B, H, Nq, rows] and [B, H, Nq, columns], packed
  float *drel_h, *drel_w;      // of the same shapes; null where nobody asks for them
};

struct Attention {
  int32_t heads, group, queries, keys, width;  // heads of q, so many of which share one of k and v
  // cu_seqlens [S + 1] of sequences that lie end to end, queries and keys being those of the longest; null: all are
  // of one length
  const int32_t *ends_q, *ends_k;
  bool causal;
  float scale;   // of dq and dk
  float factor;  // score = factor * q k^T + mask
  float unit;    // weight = exp2(unit * (score - largest)) / sum: the unit of score_units times log2(e)
  DeviceHeads q, k, v, out, dout, dq, dk, dv;
  DeviceMask mask;
  float* stats;  // [B, H, 2, Nq], end to end [H, 2, T]
  float* delta;  // [B, H, Nq] or [H, T]: the sum over keys of weight times its gradient
  int64_t rows, stats_span, delta_span;  // Nq or T; strides of Span.q
  float* dscores;                        // [B, H, Nq, Nk]; null where nobody asks for it
  Image image;                           // of attention_rel_pos
#if defined(__CUDACC__)
  __device__ Span span(int b) const {
    if (ends_q == nullptr) return {b, queries, b, keys};
    const int32_t q0 = ends_q[b], k0 = ends_k[b];
    return {q0, ends_q[b + 1] - q0, k0, ends_k[b + 1] - k0};
  }
  // Of the first query of a span and a head: the largest scores, `rows` further on the logs of the sums; delta.
  __device__ float* stats_of(int32_t q, int h) const { return stats + q * stats_span + 2 * h * rows; }
  __device__ float* delta_of(int32_t q, int h) const { return delta + q * delta_span + h * rows; }
#endif
};

// Tiles of up to `most` keys of an image that are neighbours in memory: `down` rows as wide as the image, or `across`
// columns of one row. They go down the image, one part of its columns after the other.
struct ImageTiles {
  static constexpr int kMostDown = 8;  // what is added to rows comes with each tile, and takes shared memory
  int rows, columns, parts, across, down, count;  // tiles of a part
  int inverse;                                    // of across, times 2^16
  VK_BOTH ImageTiles(const Image& image, int most)
      : rows(image.rows),
        columns(image.columns),
        parts((columns + most - 1) / most),
        across((columns + parts - 1) / parts),
        down(parts > 1 ? 1 : std::min(most / columns, int(kMostDown))),
        count((rows + down - 1) / down),
        inverse((1 << 16) / across + 1) {}
  VK_BOTH int total() const { return parts * count; }
  VK_BOTH int begin(int part, int i) const { return i * down * columns + part * across; }
  VK_BOTH int keys(int part, int i) const {
    return std::min(down, rows - i * down) * std::min(across, columns - part * across);
  }
  // Which of its rows a tile's key is in; keys that are not there are in the last one.
  VK_BOTH int row_of(int key) const { return std::min(key * inverse >> 16, down - 1); }
};

constexpr int kWidestHead = 128;

// A kernel whose blocks take tiles of `rows` queries or, of dkdv, keys.
struct AttentionKernel {
  void (*kernel)(const Attention);
  int (*shared)(const Attention&);  // bytes of shared memory
  int rows;
};

// Those of a dtype for heads up to `width` wide.
struct AttentionKernels {
  int width, threads;
  AttentionKernel forward, dq, dkdv;
};

const AttentionKernels& attention_f32(int64_t width);
const AttentionKernels& attention_f16(int64_t width);
const AttentionKernels& attention_bf16(int64_t width);
const AttentionKernels& attention_rel_pos_f32(int64_t width);
const AttentionKernels& attention_rel_pos_f16(int64_t width);
const AttentionKernels& attention_rel_pos_bf16(int64_t width);

}  // namespace vk
