// attention and attention_qkv: the schemas of vitkernels/ops/attention.py, for both halves of the extension.
#include "attention.h"

#include <algorithm>
#include <cmath>

namespace vk {
namespace {

Heads heads_of(const Tensor& t) { return {bytes(t), dtype_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// Third `which` of a packed [B, N, 3 * D], or all of a [B, N, D] (which = 0).
Heads packed_heads(const Tensor& t, int64_t width, int64_t heads, int64_t which) {
  const int64_t col = t.stride(2);
  char* data = bytes(t) + which * heads * width * col * size_of(dtype_of(t));
  return {data, dtype_of(t), t.stride(0), width * col, t.stride(1), col};
}

Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, bool is_causal, double scale) {
  return {q,     q.size(0),   q.size(1),   k.size(1),   q.size(2), k.size(2), q.size(3), is_causal,
          scale, heads_of(q), heads_of(k), heads_of(v), mask,      Mask(mask)};
}

Problem problem_qkv(const Tensor& qkv, int64_t heads, const Maybe& mask, bool is_causal, double scale) {
  const int64_t width = qkv.size(2) / (3 * heads);
  const auto part = [&](int64_t which) { return packed_heads(qkv, width, heads, which); };
  return {qkv,   qkv.size(0), heads,   heads,   qkv.size(1), qkv.size(1), width, is_causal,
          scale, part(0),     part(1), part(2), mask,        Mask(mask)};
}

Tensor empty_stats(const Tensor& like, const Problem& p) {
  return empty(like, {p.batch, p.heads, 2, p.queries}, accumulate_dtype(like.scalar_type()));
}

}  // namespace

Mask::Mask(const Maybe& mask) {
  if (!mask) return;
  data = bytes(*mask);
  dtype = dtype_of(*mask);
  const auto stride = [&](int64_t axis) { return mask->size(axis) == 1 ? 0 : mask->stride(axis); };
  masks = std::max<int64_t>(mask->size(0), 1);
  batch = stride(0);
  head = stride(1);
  query = stride(2);
  key = stride(3);
}

double score_factor(const Mask& mask, double scale) {
  return mask.added() || scale == 0 ? scale : std::copysign(1.0, scale);
}

double score_unit(const Mask& mask, double scale) { return mask.added() || scale == 0 ? 1.0 : std::abs(scale); }

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask,
                                     bool is_causal, double scale) {
  const Problem p = problem(q, k, v, mask, is_causal, scale);
  Tensor out = heads_last(q), stats = empty_stats(q, p);
  attend(p, heads_of(out), stats);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                              const Tensor& v, const Tensor& out, const Tensor& stats,
                                                              const Maybe& mask, bool is_causal, double scale,
                                                              bool needs_mask) {
  Tensor dq = heads_last(q), dk = heads_last(k), dv = heads_last(v);
  Tensor dmask = attend_backward(problem(q, k, v, mask, is_causal, scale), heads_of(out), heads_of(dout), stats,
                                 heads_of(dq), heads_of(dk), heads_of(dv), needs_mask);
  return {dq, dk, dv, needs_mask ? dmask : nothing(q)};
}

std::tuple<Tensor, Tensor> attention_qkv(const Tensor& qkv, int64_t num_heads, const Maybe& mask, bool is_causal,
                                         double scale) {
  const Problem p = problem_qkv(qkv, num_heads, mask, is_causal, scale);
  Tensor out = empty(qkv, {p.batch, p.queries, p.heads * p.width}), stats = empty_stats(qkv, p);
  attend(p, packed_heads(out, p.width, p.heads, 0), stats);
  return {out, stats};
}

std::tuple<Tensor, Tensor> attention_qkv_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out,
                                                  const Tensor& stats, int64_t num_heads, const Maybe& mask,
                                                  bool is_causal, double scale, bool needs_mask) {
  const Problem p = problem_qkv(qkv, num_heads, mask, is_causal, scale);
  Tensor dqkv = empty(qkv, shape_of(qkv));
  const auto part = [&](const Tensor& t, int64_t which) { return packed_heads(t, p.width, p.heads, which); };
  Tensor dmask = attend_backward(p, part(out, 0), part(dout, 0), stats, part(dqkv, 0), part(dqkv, 1), part(dqkv, 2),
                                 needs_mask);
  return {dqkv, needs_mask ? dmask : nothing(qkv)};
}

}  // namespace vk
