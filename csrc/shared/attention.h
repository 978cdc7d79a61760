// A call of attention as both halves of the extension see it: heads, wherever they lie in q, k and v or in a packed
// projection, a mask or positions, and what scores are made with.
#pragma once
#include "shared/ops.h"

namespace vk {

// One of q, k, v, out and their gradients as [batch, heads, tokens, width], wherever its axes lie in memory; strides in
// elements.
struct Heads {
  char* data;
  DType dtype;
  int64_t batch, head, token, col;
  char* of(int64_t b, int64_t h) const { return data + (b * batch + h * head) * size_of(dtype); }
  Rows rows(int64_t b, int64_t h) const { return {of(b, h), dtype, token, col}; }
  OutRows out(int64_t b, int64_t h) const { return {of(b, h), dtype, token, col}; }
};

// A [M, H or 1, Nq or 1, Nk or 1] mask; strides are 0 along its axes of size 1. M divides B, and sequence b has mask b % M.
struct Mask {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t masks = 1, batch = 0, head = 0, query = 0, key = 0;
  explicit Mask(const Maybe& mask);
  bool added() const { return data && dtype != DType::boolean; }
  Rows rows(int64_t b, int64_t h) const {
    return {data ? data + (b % masks * batch + h * head) * size_of(dtype) : nullptr, dtype, query, key};
  }
};

// score_units of vitkernels/ops/attention.py, of a call that adds to scores or not
double score_factor(bool added, double scale);
double score_unit(bool added, double scale);

// [B, H, N, K]
Heads heads_of(const Tensor& t);

// Of keys that are an image: what each query adds to the scores of its rows, [B, H, Nq, Kh], and of its columns,
// [B, H, Nq, Kw], or the gradients of that.
struct Positions {
  Tensor rel_h, rel_w;
};

// Where sequences that lie end to end begin: a token of one is reached by the stride of a batch.
struct Ends {
  const char *q_name, *k_name;
  Tensor q, k;            // cu_seqlens, [S + 1] int32, packed
  int64_t queries, keys;  // tokens of all sequences
};

struct Problem {
  const Tensor& tensor;  // q, or the packed projection
  int64_t batch, heads, key_heads, queries, keys, width;  // so many heads of q, and of k and v
  bool is_causal;
  double scale;
  Heads q, k, v;
  Maybe given_mask;
  Mask mask;                 // where it lies
  std::optional<Ends> ends;  // where it is there, queries and keys are those of the longest sequence
  std::optional<Positions> positions = {};
  bool added() const { return mask.added() || positions; }
  int64_t rows() const { return ends ? ends->queries : queries; }  // of stats
};

// What each half has of its own: writes `out` and stats [B, H, 2, Nq], of sequences end to end [H, 2, T].
void attend(const Problem& p, const Heads& out, const Tensor& stats);
// Writes dq, dk and dv, and the gradients of positions into `drel`, packed, where it is given; returns the mask's gradient,
// or a tensor of no elements where it is not needed.
Tensor attend_backward(const Problem& p, const Heads& out, const Heads& dout, const Tensor& stats, const Heads& dq,
                       const Heads& dk, const Heads& dv, bool needs_mask, const std::optional<Positions>& drel = {});

}  // namespace vk
