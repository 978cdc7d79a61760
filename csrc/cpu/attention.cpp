// attention and attention_qkv on the CPU (shared/attention.cpp calls these). Heads are the unit of work.
#include "shared/attention.h"

#include "tensors.h"

namespace vk {
namespace {

Head head_of(const Problem& p, int64_t b, int64_t h) {
  return {p.queries,   p.keys,    p.width,         p.scale,         p.factor(),      p.unit(),
          p.is_causal, p.added(), p.q.rows(b, h), p.k.rows(b, h), p.v.rows(b, h), p.mask.rows(b, h)};
}

}  // namespace

void attend(const Problem& p, const Heads& out, const Tensor& stats) {
  with_accumulate(stats.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    A* stats_data = reinterpret_cast<A*>(bytes(stats));
    parallel(p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(kernels<A>().attention_scratch(head_of(p, 0, 0), false));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / p.heads, h = i % p.heads;
        kernels<A>().attention_forward(head_of(p, b, h), out.out(b, h), stats_data + 2 * i * p.queries, scratch.get());
      }
    });
  });
}

// Heads that add into the same part of the mask's gradient run one after the other, in order: no atomics, and the same
// bits every time.
Tensor attend_backward(const Problem& p, const Heads& out, const Heads& dout, const Tensor& stats, const Heads& dq,
                       const Heads& dk, const Heads& dv, bool needs_mask) {
  const Maybe& mask = p.given_mask;
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
      kernels<A>().attention_backward(head_of(p, b, h), out.rows(b, h), dout.rows(b, h),
                                      stats_data + 2 * (b * p.heads + h) * p.queries, dq.out(b, h), dk.out(b, h),
                                      dv.out(b, h), reinterpret_cast<A*>(const_cast<char*>(to.data)), to.row, to.col,
                                      scratch);
    };
    const int64_t batches = needs_mask ? mask->size(0) : p.batch, heads = needs_mask ? mask->size(1) : p.heads;
    parallel(batches * heads, 1, [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(kernels<A>().attention_scratch(head_of(p, 0, 0), true));
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t b = i / heads; b < p.batch; b += batches) {
          for (int64_t h = i % heads; h < p.heads; h += heads) run(b, h, scratch.get());
        }
      }
    });
    return needs_mask ? cast(*dmask, mask->scalar_type()) : nothing(stats);
  });
}

}  // namespace vk
