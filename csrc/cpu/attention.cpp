// attention, attention_qkv and attention_varlen: the schemas of vitkernels/ops/attention*.py on the CPU. Heads of
// sequences are the unit of work, and those that share k and v together.
#include <cmath>

#include "ops.h"

namespace vk {
namespace {

// One of q, k, v, out and their gradients as [batch, heads, tokens, width], wherever its axes lie in memory.
struct Heads {
  char* data;
  DType dtype;
  int64_t batch, head, token, col;
  char* of(int64_t b, int64_t h) const { return data + (b * batch + h * head) * size_of(dtype); }
  Rows rows(int64_t b, int64_t h) const { return {of(b, h), dtype, token, col}; }
  OutRows out(int64_t b, int64_t h) const { return {of(b, h), dtype, token, col}; }
};

Heads heads_of(const Tensor& t) { return {bytes(t), dtype_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// Third `which` of a packed [B, N, 3 * D], or all of a [B, N, D] (which = 0).
Heads packed_heads(const Tensor& t, int64_t width, int64_t heads, int64_t which) {
  const int64_t col = t.stride(2);
  char* data = bytes(t) + which * heads * width * col * size_of(dtype_of(t));
  return {data, dtype_of(t), t.stride(0), width * col, t.stride(1), col};
}

// Steps of a [B or 1, H or 1, Nq or 1, Nk or 1] mask; 0 along its axes of size 1.
struct Mask {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t step[4] = {};
  explicit Mask(const Maybe& mask) {
    if (!mask) return;
    data = bytes(*mask);
    dtype = dtype_of(*mask);
    for (int i = 0; i < 4; ++i) step[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  }
  Rows rows(int64_t b, int64_t h) const {
    return {data ? data + (b * step[0] + h * step[1]) * size_of(dtype) : nullptr, dtype, step[2], step[3]};
  }
};

// Where the rows of one sequence begin, in what `Heads.of` steps by, and how many there are.
struct Span {
  int64_t q, queries, k, keys;
};

struct Problem {
  std::vector<Span> spans;
  int64_t heads, key_heads, width;
  bool is_causal;
  double scale;
  Heads q, k, v;
  Mask mask;
  int64_t stats_span, stats_head, stats_row;  // steps: of Span.q, of a head, from a largest score to its log-sum
  int64_t group() const { return heads / key_heads; }
  Head head(int64_t span, int64_t h) const {
    const Span& s = spans[span];
    const bool added = mask.data && mask.dtype != DType::boolean, at_once = added || scale == 0;
    const double factor = at_once ? scale : std::copysign(1.0, scale), unit = at_once ? 1.0 : std::abs(scale);
    const int64_t shared = h / group();
    return {s.queries, s.keys, width,     stats_row, h % group(),    group(),           scale,
            factor,    unit,   is_causal, added,     q.rows(s.q, h), k.rows(s.k, shared), v.rows(s.k, shared),
            mask.rows(span, h)};
  }
  int64_t stats_of(int64_t span, int64_t h) const { return spans[span].q * stats_span + h * stats_head; }
  template <class A>
  int64_t scratch(bool backward) const {
    const auto fewer = [](const Span& a, const Span& b) { return a.keys < b.keys; };
    const int64_t longest = std::max_element(spans.begin(), spans.end(), fewer) - spans.begin();
    return kernels<A>().attention_scratch(head(longest, 0), backward);
  }
};

// f(begin, end) over the units [0, parts * times), unit i being part i / times: each thread gets about the same number
// of scores.
template <class F>
void balanced(const std::vector<int64_t>& scores, int64_t times, const F& f) {
  std::vector<int64_t> starts;
  int64_t total = 0;
  for (const int64_t each : scores) {
    for (int64_t i = 0; i < times; ++i, total += each) starts.push_back(total);
  }
  if (starts.empty()) return;
  const auto unit_at = [&](int64_t start) {
    return std::lower_bound(starts.begin(), starts.end(), start) - starts.begin();
  };
  parallel(total, (total - 1) / int64_t(starts.size()) + 1, [&](int64_t begin, int64_t end) {
    const int64_t first = unit_at(begin), last = unit_at(end);
    if (first < last) f(first, last);
  });
}

// Of a span, and what it takes beside: no unit is for nothing, and each has its own place in their sum.
int64_t scores_of(const Span& s) { return s.queries * s.keys + s.queries + s.keys + 1; }

void forward(const Problem& p, const Heads& out, const Tensor& stats) {
  with_accumulate(stats.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    A* stats_data = reinterpret_cast<A*>(bytes(stats));
    std::vector<int64_t> scores;
    for (const Span& span : p.spans) scores.push_back(scores_of(span));
    balanced(scores, p.key_heads, [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(p.scratch<A>(false));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t span = i / p.key_heads, shared = i % p.key_heads;
        for (int64_t h = shared * p.group(); h < (shared + 1) * p.group(); ++h) {
          kernels<A>().attention_forward(p.head(span, h), out.out(p.spans[span].q, h), stats_data + p.stats_of(span, h),
                                         scratch.get());
        }
      }
    });
  });
}

// Returns dmask. Heads that add into the same part of it, or of dk and dv, run one after the other, in order: no
// atomics, and the same bits every time.
Tensor backward(const Problem& p, const Heads& out, const Heads& dout, const Tensor& stats, const Heads& dq,
                const Heads& dk, const Heads& dv, const Maybe& mask, bool needs_mask) {
  return with_accumulate(stats.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Tensor stats_packed = packed(stats);
    const A* stats_data = reinterpret_cast<const A*>(bytes(stats_packed));
    Maybe dmask;
    if (needs_mask) {
      dmask = empty(shape_of(*mask), stats.scalar_type());
      torch::stable::zero_(*dmask);
    }
    const Mask sums(dmask);
    const auto run = [&](int64_t span, int64_t h, A* scratch) {
      const Rows to = sums.rows(span, h);
      const Span& s = p.spans[span];
      const int64_t shared = h / p.group();
      kernels<A>().attention_backward(p.head(span, h), out.rows(s.q, h), dout.rows(s.q, h),
                                      stats_data + p.stats_of(span, h), dq.out(s.q, h), dk.out(s.k, shared),
                                      dv.out(s.k, shared), reinterpret_cast<A*>(const_cast<char*>(to.data)), to.row,
                                      to.col, scratch);
    };
    const int64_t spans = p.spans.size();
    const int64_t parts = needs_mask && mask->size(0) == 1 ? std::min<int64_t>(1, spans) : spans;
    const int64_t head_parts = needs_mask && mask->size(1) == 1 ? std::min<int64_t>(1, p.key_heads) : p.key_heads;
    std::vector<int64_t> scores(parts);
    for (int64_t i = 0; i < spans; ++i) scores[i % parts] += scores_of(p.spans[i]);
    balanced(scores, head_parts, [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(p.scratch<A>(true));
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t span = i / head_parts; span < spans; span += parts) {
          for (int64_t shared = i % head_parts; shared < p.key_heads; shared += head_parts) {
            for (int64_t m = 0; m < p.group(); ++m) run(span, shared * p.group() + m, scratch.get());
          }
        }
      }
    });
    return needs_mask ? cast(*dmask, mask->scalar_type()) : nothing(stats);
  });
}

// Of one length each; q, k and v are given apart, or as parts of one tensor.
Problem problem(int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t key_heads, int64_t width,
                const Heads& q, const Heads& k, const Heads& v, const Maybe& mask, bool is_causal, double scale) {
  std::vector<Span> spans;
  for (int64_t b = 0; b < batch; ++b) spans.push_back({b, queries, b, keys});
  const int64_t stats_head = 2 * queries;
  return {spans, heads,      key_heads,          width,      is_causal, scale, q, k,
          v,     Mask(mask), heads * stats_head, stats_head, queries};
}

Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, bool is_causal, double scale) {
  return problem(q.size(0), q.size(2), k.size(2), q.size(1), k.size(1), q.size(3), heads_of(q), heads_of(k),
                 heads_of(v), mask, is_causal, scale);
}

Problem problem_qkv(const Tensor& qkv, int64_t heads, const Maybe& mask, bool is_causal, double scale) {
  const int64_t width = qkv.size(2) / (3 * heads);
  const auto part = [&](int64_t which) { return packed_heads(qkv, width, heads, which); };
  return problem(qkv.size(0), qkv.size(1), qkv.size(1), heads, heads, width, part(0), part(1), part(2), mask, is_causal,
                 scale);
}

// A tensor [T, H, K], or third `which` of a packed [T, 3, H, K]; what stands for a batch is the first token of a span.
Heads heads_varlen(const Tensor& t, int64_t which = 0) {
  const int64_t head = t.dim() - 2;
  char* data = bytes(t) + (head == 2 ? which * t.stride(1) * size_of(dtype_of(t)) : 0);
  return {data, dtype_of(t), t.stride(0), t.stride(head), t.stride(0), t.stride(head + 1)};
}

Problem problem_varlen(const Tensor& q, const Maybe& k, const Maybe& v, const Tensor& cu_seqlens_q,
                       const Tensor& cu_seqlens_k, bool is_causal, double scale) {
  const Tensor ends_q = packed(cu_seqlens_q), ends_k = packed(cu_seqlens_k);
  const int32_t* const q_at = reinterpret_cast<const int32_t*>(bytes(ends_q));
  const int32_t* const k_at = reinterpret_cast<const int32_t*>(bytes(ends_k));
  std::vector<Span> spans;
  for (int64_t i = 0; i + 1 < ends_q.size(0); ++i) {
    spans.push_back({q_at[i], q_at[i + 1] - q_at[i], k_at[i], k_at[i + 1] - k_at[i]});
  }
  const int64_t tokens = q.size(0), heads = q.size(q.dim() - 2), width = q.size(q.dim() - 1);
  const Heads keys = k ? heads_varlen(*k) : heads_varlen(q, 1), values = v ? heads_varlen(*v) : heads_varlen(q, 2);
  return {spans, heads,  k ? k->size(1) : heads, width,      is_causal, scale, heads_varlen(q), keys,
          values, Mask(Maybe()), 1,              2 * tokens, tokens};
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask,
                                     bool is_causal, double scale) {
  Tensor out = heads_last(q);
  Tensor stats = empty({q.size(0), q.size(1), 2, q.size(2)}, accumulate_dtype(q.scalar_type()));
  forward(problem(q, k, v, mask, is_causal, scale), heads_of(out), stats);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                              const Tensor& v, const Tensor& out, const Tensor& stats,
                                                              const Maybe& mask, bool is_causal, double scale,
                                                              bool needs_mask) {
  Tensor dq = heads_last(q), dk = heads_last(k), dv = heads_last(v);
  Tensor dmask = backward(problem(q, k, v, mask, is_causal, scale), heads_of(out), heads_of(dout), stats, heads_of(dq),
                          heads_of(dk), heads_of(dv), mask, needs_mask);
  return {dq, dk, dv, needs_mask ? dmask : nothing(q)};
}

std::tuple<Tensor, Tensor> attention_qkv(const Tensor& qkv, int64_t num_heads, const Maybe& mask, bool is_causal,
                                         double scale) {
  const Problem p = problem_qkv(qkv, num_heads, mask, is_causal, scale);
  Tensor out = empty(qkv, {qkv.size(0), qkv.size(1), p.heads * p.width});
  Tensor stats = empty({qkv.size(0), p.heads, 2, qkv.size(1)}, accumulate_dtype(qkv.scalar_type()));
  forward(p, packed_heads(out, p.width, p.heads, 0), stats);
  return {out, stats};
}

std::tuple<Tensor, Tensor> attention_qkv_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out,
                                                  const Tensor& stats, int64_t num_heads, const Maybe& mask,
                                                  bool is_causal, double scale, bool needs_mask) {
  const Problem p = problem_qkv(qkv, num_heads, mask, is_causal, scale);
  Tensor dqkv = empty(qkv, shape_of(qkv));
  const auto part = [&](const Tensor& t, int64_t which) { return packed_heads(t, p.width, p.heads, which); };
  Tensor dmask = backward(p, part(out, 0), part(dout, 0), stats, part(dqkv, 0), part(dqkv, 1), part(dqkv, 2), mask,
                          needs_mask);
  return {dqkv, needs_mask ? dmask : nothing(qkv)};
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor& q, const Maybe& k, const Maybe& v,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t, int64_t,
                                            bool is_causal, double scale) {
  const Problem p = problem_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, is_causal, scale);
  Tensor out = empty(q, {q.size(0), p.heads, p.width});
  Tensor stats = empty({p.heads, 2, q.size(0)}, accumulate_dtype(q.scalar_type()));
  forward(p, heads_varlen(out), stats);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward(const Tensor& dout, const Tensor& q, const Maybe& k,
                                                             const Maybe& v, const Tensor& out, const Tensor& stats,
                                                             const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                             int64_t, int64_t, bool is_causal, double scale) {
  const Problem p = problem_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, is_causal, scale);
  Tensor dq = empty(q, shape_of(q));
  Tensor dk = k ? empty(*k, shape_of(*k)) : nothing(q), dv = v ? empty(*v, shape_of(*v)) : nothing(q);
  backward(p, heads_varlen(out), heads_varlen(dout), stats, heads_varlen(dq),
           k ? heads_varlen(dk) : heads_varlen(dq, 1), v ? heads_varlen(dv) : heads_varlen(dq, 2), {}, false);
  return {dq, dk, dv};
}

}  // namespace vk
