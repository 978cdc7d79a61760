// Attention on the CPU; shared/attention.cpp has the ops. Heads of sequences are the unit of work, and those that share k
// and v together.
#include "shared/attention.h"

#include "tensors.h"

namespace vk {
namespace {

// Where the rows of one sequence begin, in what `Heads.of` steps by, and how many there are.
struct Span {
  int64_t q, queries, k, keys;
};

// Of an image of `columns` keys a row, what is added to its rows and columns, or the gradients of it; 0: there is none.
struct Image {
  Heads rel_h = {}, rel_w = {};
  int64_t columns = 0;
  explicit Image(const std::optional<Positions>& p) {
    if (!p || p->rel_h.size(3) == 0) return;
    rel_h = heads_of(p->rel_h);
    rel_w = heads_of(p->rel_w);
    columns = p->rel_w.size(3);
  }
  Rows rows(const Heads& rel, int64_t span, int64_t h) const { return columns > 0 ? rel.rows(span, h) : Rows{}; }
  OutRows out(const Heads& rel, int64_t span, int64_t h) const { return columns > 0 ? rel.out(span, h) : OutRows{}; }
};

// A call: the heads of its sequences.
struct Sequences {
  std::vector<Span> spans;
  int64_t heads, key_heads, width;
  bool is_causal, added;
  double scale;
  Heads q, k, v;
  Mask mask;
  int64_t stats_span, stats_head, stats_row;  // steps: of Span.q, of a head, from a largest score to its log-sum
  Image image;  // of sequences of one length
  int64_t group() const { return heads / key_heads; }
  Head head(int64_t span, int64_t h) const {
    const Span& s = spans[span];
    const int64_t shared = h / group();
    return {s.queries,
            s.keys,
            width,
            stats_row,
            h % group(),
            group(),
            scale,
            score_factor(added, scale),
            score_unit(added, scale),
            is_causal,
            mask.added(),
            q.rows(s.q, h),
            k.rows(s.k, shared),
            v.rows(s.k, shared),
            mask.rows(span, h),
            image.rows(image.rel_h, s.q, h),
            image.rows(image.rel_w, s.q, h),
            image.columns};
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

void forward(const Sequences& p, const Heads& out, const Tensor& stats) {
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

// The units of a backward: heads of sequences that add into one part of dmask are one unit, and run one after the other,
// in order: no atomics, and the same bits every time. Where that leaves few, the sequences that share a mask are halved
// again and again, each part with sums of its own; into how many does not depend on the threads.
struct Units {
  int64_t masks, repeats, parts, head_units;
  Units(int64_t spans, int64_t key_heads, const Maybe& mask) {
    constexpr int64_t wanted = 16;
    masks = mask ? mask->size(0) : spans;
    repeats = masks > 0 ? spans / masks : 0;
    head_units = mask && mask->size(1) == 1 ? std::min<int64_t>(1, key_heads) : key_heads;
    for (parts = 1; parts < repeats && 2 * parts <= repeats && parts * masks * head_units < wanted;) parts *= 2;
  }
  // f(span) for the sequences of a part and a mask, in order.
  template <class F>
  void spans_of(int64_t part, int64_t m, const F& f) const {
    for (int64_t r = part * repeats / parts; r < (part + 1) * repeats / parts; ++r) f(r * masks + m);
  }
};

// Returns dmask.
Tensor backward(const Sequences& p, const Heads& out, const Heads& dout, const Tensor& stats, const Heads& dq,
                const Heads& dk, const Heads& dv, const Maybe& mask, bool needs_mask, const Image& drel) {
  return with_accumulate(stats.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Tensor stats_packed = packed(stats);
    const A* stats_data = reinterpret_cast<const A*>(bytes(stats_packed));
    const Units units(p.spans.size(), p.key_heads, needs_mask ? mask : Maybe());
    Maybe dmask;  // of each part
    if (needs_mask) {
      Shape shape = shape_of(*mask);
      shape[0] *= units.parts;
      dmask = empty(shape, stats.scalar_type());
      torch::stable::zero_(*dmask);
    }
    const Mask sums(dmask);
    const auto run = [&](int64_t span, int64_t h, const Rows& to, A* scratch) {
      const Span& s = p.spans[span];
      const int64_t shared = h / p.group();
      kernels<A>().attention_backward(p.head(span, h), out.rows(s.q, h), dout.rows(s.q, h),
                                      stats_data + p.stats_of(span, h), dq.out(s.q, h), dk.out(s.k, shared),
                                      dv.out(s.k, shared), reinterpret_cast<A*>(const_cast<char*>(to.data)), to.row,
                                      to.col, drel.out(drel.rel_h, s.q, h), drel.out(drel.rel_w, s.q, h), scratch);
    };
    std::vector<int64_t> scores(units.parts * units.masks);
    for (int64_t i = 0; i < units.parts * units.masks; ++i) {
      units.spans_of(i / units.masks, i % units.masks, [&](int64_t span) { scores[i] += scores_of(p.spans[span]); });
    }
    balanced(scores, units.head_units, [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(p.scratch<A>(true));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i / units.head_units;
        units.spans_of(at / units.masks, at % units.masks, [&](int64_t span) {
          for (int64_t shared = i % units.head_units; shared < p.key_heads; shared += units.head_units) {
            for (int64_t m = 0; m < p.group(); ++m) {
              const int64_t h = shared * p.group() + m;
              run(span, h, sums.rows(at, h), scratch.get());
            }
          }
        });
      }
    });
    if (!needs_mask) return nothing(stats);
    const int64_t count = mask->numel();
    A* const sum = reinterpret_cast<A*>(bytes(*dmask));
    for (int64_t part = 1; part < units.parts; ++part) {
      for (int64_t j = 0; j < count; ++j) sum[j] += sum[part * count + j];
    }
    return units.parts == 1 ? cast(*dmask, mask->scalar_type())
                            : from_values(shape_of(*mask), mask->scalar_type(), sum);
  });
}

// Compiled graphs do not look at values, and what is wrong here would be read and written.
void check_ends(const char* name, const int32_t* at, int64_t count, int64_t tokens) {
  STD_TORCH_CHECK(at[0] == 0 && at[count - 1] == tokens, "attention_varlen: argument '", name, "' goes from ", at[0],
                  " to ", at[count - 1], "; needs 0 to ", tokens, ", the number of tokens");
  for (int64_t i = 1; i < count; ++i) {
    STD_TORCH_CHECK(at[i - 1] <= at[i], "attention_varlen: argument '", name, "' falls from ", at[i - 1], " to ", at[i],
                    " behind index ", i - 1, "; needs ascending values");
  }
}

std::vector<Span> spans_of(const Problem& p) {
  std::vector<Span> spans;
  if (!p.ends) {
    for (int64_t b = 0; b < p.batch; ++b) spans.push_back({b, p.queries, b, p.keys});
    return spans;
  }
  const int32_t* const q_at = reinterpret_cast<const int32_t*>(bytes(p.ends->q));
  const int32_t* const k_at = reinterpret_cast<const int32_t*>(bytes(p.ends->k));
  check_ends(p.ends->q_name, q_at, p.ends->q.size(0), p.ends->queries);
  check_ends(p.ends->k_name, k_at, p.ends->k.size(0), p.ends->keys);
  for (int64_t i = 0; i < p.batch; ++i) {
    spans.push_back({q_at[i], q_at[i + 1] - q_at[i], k_at[i], k_at[i + 1] - k_at[i]});
  }
  return spans;
}

Sequences sequences(const Problem& p) {
  const int64_t stats_head = 2 * p.rows(), stats_span = p.ends ? 1 : p.heads * stats_head;
  return {spans_of(p), p.heads, p.key_heads, p.width,    p.is_causal, p.added(), p.scale,          p.q, p.k,
          p.v,         p.mask,  stats_span,  stats_head, p.rows(),    Image(p.positions)};
}

}  // namespace

void attend(const Problem& p, const Heads& out, const Tensor& stats) { forward(sequences(p), out, stats); }

Tensor attend_backward(const Problem& p, const Heads& out, const Heads& dout, const Tensor& stats, const Heads& dq,
                       const Heads& dk, const Heads& dv, bool needs_mask, const std::optional<Positions>& drel) {
  return backward(sequences(p), out, dout, stats, dq, dk, dv, p.given_mask, needs_mask, Image(drel));
}

}  // namespace vk
