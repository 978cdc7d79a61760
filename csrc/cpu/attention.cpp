// attention and attention_qkv: the schemas of vitkernels/ops/attention.py on the CPU. Heads are the unit of work.
#include <cmath>

#include "shared/ops.h"
#include "tensors.h"

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

struct Problem {
  int64_t batch, heads, queries, keys, width;
  bool is_causal;
  double scale;
  Heads q, k, v;
  Mask mask;
  Head head(int64_t b, int64_t h) const {
    const bool added = mask.data && mask.dtype != DType::boolean, at_once = added || scale == 0;
    const double factor = at_once ? scale : std::copysign(1.0, scale), unit = at_once ? 1.0 : std::abs(scale);
    return {queries,   keys,  width,        scale,        factor,       unit,
            is_causal, added, q.rows(b, h), k.rows(b, h), v.rows(b, h), mask.rows(b, h)};
  }
};

void forward(const Problem& p, const Heads& out, const Tensor& stats) {
  with_accumulate(stats.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    A* stats_data = reinterpret_cast<A*>(bytes(stats));
    parallel(p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(kernels<A>().attention_scratch(p.head(0, 0), false));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / p.heads, h = i % p.heads;
        kernels<A>().attention_forward(p.head(b, h), out.out(b, h), stats_data + 2 * i * p.queries, scratch.get());
      }
    });
  });
}

// Returns dmask. Heads that add into the same part of it run one after the other, in order: no atomics, and the same
// bits every time.
Tensor backward(const Problem& p, const Heads& out, const Heads& dout, const Tensor& stats, const Heads& dq,
                const Heads& dk, const Heads& dv, const Maybe& mask, bool needs_mask) {
  return with_accumulate(stats.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Tensor stats_packed = packed(stats);
    const A* stats_data = reinterpret_cast<const A*>(bytes(stats_packed));
    Maybe dmask;
    if (needs_mask) {
      dmask = empty(*mask, shape_of(*mask), stats.scalar_type());
      torch::stable::zero_(*dmask);
    }
    const Mask sums(dmask);
    const auto run = [&](int64_t b, int64_t h, A* scratch) {
      const Rows to = sums.rows(b, h);
      kernels<A>().attention_backward(p.head(b, h), out.rows(b, h), dout.rows(b, h),
                                      stats_data + 2 * (b * p.heads + h) * p.queries, dq.out(b, h), dk.out(b, h),
                                      dv.out(b, h), reinterpret_cast<A*>(const_cast<char*>(to.data)), to.row, to.col,
                                      scratch);
    };
    const int64_t batches = needs_mask ? mask->size(0) : p.batch, heads = needs_mask ? mask->size(1) : p.heads;
    parallel(batches * heads, 1, [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(kernels<A>().attention_scratch(p.head(0, 0), true));
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t b = i / heads; b < p.batch; b += batches) {
          for (int64_t h = i % heads; h < p.heads; h += heads) run(b, h, scratch.get());
        }
      }
    });
    return needs_mask ? cast(*dmask, mask->scalar_type()) : nothing(stats);
  });
}

Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, bool is_causal, double scale) {
  return {q.size(0), q.size(1),   q.size(2),   k.size(2),   q.size(3), is_causal,
          scale,     heads_of(q), heads_of(k), heads_of(v), Mask(mask)};
}

Problem problem_qkv(const Tensor& qkv, int64_t heads, const Maybe& mask, bool is_causal, double scale) {
  const int64_t width = qkv.size(2) / (3 * heads);
  const auto part = [&](int64_t which) { return packed_heads(qkv, width, heads, which); };
  return {qkv.size(0), heads, qkv.size(1), qkv.size(1), width, is_causal, scale, part(0), part(1), part(2), Mask(mask)};
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask,
                                     bool is_causal, double scale) {
  Tensor out = heads_last(q);
  Tensor stats = empty(q, {q.size(0), q.size(1), 2, q.size(2)}, accumulate_dtype(q.scalar_type()));
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
  Tensor out = empty(qkv, {p.batch, p.queries, p.heads * p.width});
  Tensor stats = empty(qkv, {p.batch, p.heads, 2, p.queries}, accumulate_dtype(qkv.scalar_type()));
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

}  // namespace vk
