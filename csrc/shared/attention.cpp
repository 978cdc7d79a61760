// attention, attention_qkv, attention_rel_pos and attention_varlen: the schemas of vitkernels/ops/attention*.py, for both
// halves of the extension.
#include "attention.h"

#include <algorithm>
#include <cmath>

namespace vk {

Heads heads_of(const Tensor& t) { return {bytes(t), dtype_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

namespace {

// Third `which` of a packed [B, N, 3 * D], or all of a [B, N, D] (which = 0).
Heads packed_heads(const Tensor& t, int64_t width, int64_t heads, int64_t which) {
  const int64_t col = t.stride(2);
  char* data = bytes(t) + which * heads * width * col * size_of(dtype_of(t));
  return {data, dtype_of(t), t.stride(0), width * col, t.stride(1), col};
}

Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, bool is_causal, double scale) {
  return {q,     q.size(0),   q.size(1),   k.size(1),   q.size(2), k.size(2), q.size(3), is_causal,
          scale, heads_of(q), heads_of(k), heads_of(v), mask,      Mask(mask), {}};
}

Problem problem_qkv(const Tensor& qkv, int64_t heads, const Maybe& mask, bool is_causal, double scale) {
  const int64_t width = qkv.size(2) / (3 * heads);
  const auto part = [&](int64_t which) { return packed_heads(qkv, width, heads, which); };
  return {qkv,   qkv.size(0), heads,   heads,   qkv.size(1), qkv.size(1), width, is_causal,
          scale, part(0),     part(1), part(2), mask,        Mask(mask),  {}};
}

// Third `which` of a packed [B, N, 3, H, K].
Heads packed_heads(const Tensor& t, int64_t which) {
  char* data = bytes(t) + which * t.stride(2) * size_of(dtype_of(t));
  return {data, dtype_of(t), t.stride(0), t.stride(3), t.stride(1), t.stride(4)};
}

Problem problem_rel_pos(const Tensor& q, const Maybe& k, const Maybe& v, const Tensor& rel_h, const Tensor& rel_w,
                        double scale) {
  const int64_t heads = rel_h.size(1), queries = rel_h.size(2), keys = rel_h.size(3) * rel_w.size(3);
  return {q,
          rel_h.size(0),
          heads,
          heads,
          queries,
          keys,
          q.size(q.dim() - 1),
          false,
          scale,
          k ? heads_of(q) : packed_heads(q, 0),
          k ? heads_of(*k) : packed_heads(q, 1),
          v ? heads_of(*v) : packed_heads(q, 2),
          {},
          Mask(Maybe()),
          {},
          Positions{rel_h, rel_w}};
}

// A tensor [T, H, K], or third `which` of a packed [T, 3, H, K].
Heads heads_varlen(const Tensor& t, int64_t which = 0) {
  const int64_t head = t.dim() - 2;
  char* data = bytes(t) + (head == 2 ? which * t.stride(1) * size_of(dtype_of(t)) : 0);
  return {data, dtype_of(t), t.stride(0), t.stride(head), t.stride(0), t.stride(head + 1)};
}

Problem problem_varlen(const Tensor& q, const Maybe& k, const Maybe& v, const Tensor& cu_seqlens_q,
                       const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, bool is_causal,
                       double scale) {
  const int64_t head = q.dim() - 2, heads = q.size(head), width = q.size(head + 1);
  const Heads keys = k ? heads_varlen(*k) : heads_varlen(q, 1), values = v ? heads_varlen(*v) : heads_varlen(q, 2);
  const Ends ends{k ? "cu_seqlens_q" : "cu_seqlens", k ? "cu_seqlens_k" : "cu_seqlens", packed(cu_seqlens_q),
                  packed(cu_seqlens_k),              q.size(0),                         k ? k->size(0) : q.size(0)};
  return {q,         cu_seqlens_q.size(0) - 1, heads, k ? k->size(1) : heads, max_seqlen_q, max_seqlen_k, width,
          is_causal, scale,                    heads_varlen(q), keys,         values,       {},           Mask(Maybe()),
          ends};
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

double score_factor(bool added, double scale) { return added || scale == 0 ? scale : std::copysign(1.0, scale); }

double score_unit(bool added, double scale) { return added || scale == 0 ? 1.0 : std::abs(scale); }

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

std::tuple<Tensor, Tensor> attention_rel_pos(const Tensor& q, const Maybe& k, const Maybe& v, const Tensor& rel_h,
                                             const Tensor& rel_w, double scale) {
  const Problem p = problem_rel_pos(q, k, v, rel_h, rel_w, scale);
  Tensor out = heads_last(q, {p.batch, p.heads, p.queries, p.width}), stats = empty_stats(q, p);
  attend(p, heads_of(out), stats);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_rel_pos_backward(
    const Tensor& dout, const Tensor& q, const Maybe& k, const Maybe& v, const Tensor& out, const Tensor& stats,
    const Tensor& rel_h, const Tensor& rel_w, double scale, bool needs_rel) {
  const Problem p = problem_rel_pos(q, k, v, rel_h, rel_w, scale);
  Tensor dq = k ? heads_last(q) : empty(q, shape_of(q));
  Tensor dk = k ? heads_last(*k) : nothing(q), dv = v ? heads_last(*v) : nothing(q);
  Positions drel{needs_rel ? empty(rel_h, shape_of(rel_h)) : nothing(q),
                 needs_rel ? empty(rel_w, shape_of(rel_w)) : nothing(q)};
  const bool writes_rel = needs_rel && p.keys > 0;
  if (needs_rel && !writes_rel) {  // of an image without keys one may have elements
    torch::stable::zero_(drel.rel_h);
    torch::stable::zero_(drel.rel_w);
  }
  attend_backward(p, heads_of(out), heads_of(dout), stats, k ? heads_of(dq) : packed_heads(dq, 0),
                  k ? heads_of(dk) : packed_heads(dq, 1), v ? heads_of(dv) : packed_heads(dq, 2), false,
                  writes_rel ? std::optional(drel) : std::nullopt);
  return {dq, dk, dv, drel.rel_h, drel.rel_w};
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor& q, const Maybe& k, const Maybe& v,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                            int64_t max_seqlen_q, int64_t max_seqlen_k, bool is_causal, double scale) {
  const Problem p =
      problem_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, scale);
  Tensor out = empty(q, {p.rows(), p.heads, p.width});
  Tensor stats = empty(q, {p.heads, 2, p.rows()}, accumulate_dtype(q.scalar_type()));
  attend(p, heads_varlen(out), stats);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward(const Tensor& dout, const Tensor& q, const Maybe& k,
                                                             const Maybe& v, const Tensor& out, const Tensor& stats,
                                                             const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                             int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                             bool is_causal, double scale) {
  const Problem p =
      problem_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, scale);
  Tensor dq = empty(q, shape_of(q));
  Tensor dk = k ? empty(*k, shape_of(*k)) : nothing(q), dv = v ? empty(*v, shape_of(*v)) : nothing(q);
  attend_backward(p, heads_varlen(out), heads_varlen(dout), stats, heads_varlen(dq),
                  k ? heads_varlen(dk) : heads_varlen(dq, 1), v ? heads_varlen(dv) : heads_varlen(dq, 2), false);
  return {dq, dk, dv};
}

}  // namespace vk
