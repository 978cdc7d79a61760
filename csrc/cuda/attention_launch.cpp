// Launches the attention kernels: what a call is told of, which kernels serve it, and in which order.
#include "shared/attention.h"

#include "cuda/attention.h"
#include "cuda/launch.h"

namespace vk {
namespace {

constexpr double kLog2E = 1.4426950408889634;

bool is_aligned(const Heads& t, int64_t width) {
  const int64_t size = size_of(t.dtype);
  const int64_t bytes = (width | t.batch | t.head | t.token) * size | reinterpret_cast<intptr_t>(t.data);
  return t.col == 1 && bytes % 16 == 0;
}

DeviceHeads on_device(const Heads& t, int64_t width) {
  return {t.data, t.batch, t.head, t.token, t.col, is_aligned(t, width)};
}

// Without keys nothing is added, and the kernels of images are not asked.
bool has_image(const Problem& p) { return p.positions && p.keys > 0; }

const AttentionKernels& kernels_for(const Problem& p) {
  const bool image = has_image(p);
  switch (p.q.dtype) {
    case DType::bf16: return image ? attention_rel_pos_bf16(p.width) : attention_bf16(p.width);
    case DType::f16: return image ? attention_rel_pos_f16(p.width) : attention_f16(p.width);
    default: return image ? attention_rel_pos_f32(p.width) : attention_f32(p.width);
  }
}

// What is added, and its gradients, as the kernels read and write them: float32, packed.
struct FloatPositions {
  std::optional<Positions> rel, drel;
  FloatPositions(const Problem& p, const std::optional<Positions>& gradients = {}) {
    if (!has_image(p)) return;
    const auto floats = [](const Tensor& t) { return packed(cast(t, ScalarType::Float)); };
    rel = {floats(p.positions->rel_h), floats(p.positions->rel_w)};
    if (gradients) drel = {same_or_float(gradients->rel_h), same_or_float(gradients->rel_w)};
  }
  static Tensor same_or_float(const Tensor& t) {
    return t.scalar_type() == ScalarType::Float ? t : empty(t, shape_of(t), ScalarType::Float);
  }
  Image image() const {
    const auto data = [](const Tensor& t) { return reinterpret_cast<float*>(bytes(t)); };
    if (!rel) return {};
    return {int32_t(rel->rel_h.size(3)),        int32_t(rel->rel_w.size(3)),        data(rel->rel_h), data(rel->rel_w),
            drel ? data(drel->rel_h) : nullptr, drel ? data(drel->rel_w) : nullptr};
  }
  void round_to(Positions gradients) const {
    if (gradients.rel_h.scalar_type() != ScalarType::Float) torch::stable::copy_(gradients.rel_h, drel->rel_h);
    if (gradients.rel_w.scalar_type() != ScalarType::Float) torch::stable::copy_(gradients.rel_w, drel->rel_w);
  }
};

Attention described(const Problem& p, const Tensor& stats, const FloatPositions& positions) {
  Attention a{};
  a.heads = int32_t(p.heads);
  a.group = int32_t(p.heads / std::max<int64_t>(p.key_heads, 1));
  a.queries = int32_t(p.queries);
  a.keys = int32_t(p.keys);
  a.width = int32_t(p.width);
  if (p.ends) {
    a.ends_q = reinterpret_cast<const int32_t*>(bytes(p.ends->q));
    a.ends_k = reinterpret_cast<const int32_t*>(bytes(p.ends->k));
  }
  a.rows = p.rows();
  a.delta_span = p.ends ? 1 : p.heads * p.rows();
  a.stats_span = p.ends ? 1 : 2 * a.delta_span;
  a.causal = p.is_causal;
  a.scale = float(p.scale);
  a.factor = float(score_factor(p.added(), p.scale));
  a.unit = float(score_unit(p.added(), p.scale) * kLog2E);
  a.q = on_device(p.q, p.width);
  a.k = on_device(p.k, p.width);
  a.v = on_device(p.v, p.width);
  a.mask = {p.mask.data,  p.mask.dtype, uint32_t(p.mask.masks), p.mask.batch,
            p.mask.head, p.mask.query, p.mask.key};
  a.stats = reinterpret_cast<float*>(bytes(stats));
  a.image = positions.image();
  return a;
}

// One block for each tile of each head of queries or of keys.
void launch(const Launches& launches, const char* name, const AttentionKernel& kernel, int threads, int64_t heads,
            int64_t tiles, const Attention& a) {
  launches(name, kernel.kernel, {heads * tiles}, dim3(threads), kernel.shared(a), a);
}

// The mask's gradient: the gradients of all scores that an element was added to, those of sequences that it served in
// turn among them.
Tensor sum_to(const Tensor& dscores, const Tensor& mask) {
  const int64_t masks = mask.size(0), turns = masks > 0 ? dscores.size(0) / masks : 1;
  const Shape by_turns{turns, masks, dscores.size(1), dscores.size(2), dscores.size(3)};
  std::vector<int64_t> axes;
  if (turns != 1) axes.push_back(0);
  for (int64_t i = 1; i < 4; ++i) {
    if (mask.size(i) == 1 && dscores.size(i) != 1) axes.push_back(i + 1);
  }
  const Tensor all = reshaped(dscores, by_turns);
  return cast(reshaped(axes.empty() ? all : torch::stable::sum(all, axes, true), shape_of(mask)), mask.scalar_type());
}

}  // namespace

void attend(const Problem& p, const Heads& out, const Tensor& stats) {
  const AttentionKernels& kernels = kernels_for(p);
  const FloatPositions positions(p);
  Attention a = described(p, stats, positions);
  a.out = on_device(out, p.width);
  const Launches launches("attention", p.tensor, {given(p.given_mask)});
  launch(launches, "attention_forward", kernels.forward, kernels.threads, p.batch * p.heads,
         blocks(p.queries, kernels.forward.rows), a);
}

Tensor attend_backward(const Problem& p, const Heads& out, const Heads& dout, const Tensor& stats_, const Heads& dq,
                       const Heads& dk, const Heads& dv, bool needs_mask, const std::optional<Positions>& drel) {
  const AttentionKernels& kernels = kernels_for(p);
  const Tensor stats = packed(stats_), delta = empty(stats, {p.ends ? 1 : p.batch, p.heads, p.rows()});
  const Tensor dscores = needs_mask ? empty(stats, {p.batch, p.heads, p.queries, p.keys}) : nothing(stats);
  const FloatPositions positions(p, drel);
  Attention a = described(p, stats, positions);
  a.out = on_device(out, p.width);
  a.dout = on_device(dout, p.width);
  a.dq = on_device(dq, p.width);
  a.dk = on_device(dk, p.width);
  a.dv = on_device(dv, p.width);
  a.delta = reinterpret_cast<float*>(bytes(delta));
  a.dscores = needs_mask ? reinterpret_cast<float*>(bytes(dscores)) : nullptr;
  const Launches launches("attention_backward", p.tensor, {given(p.given_mask)});
  launch(launches, "attention_dq", kernels.dq, kernels.threads, p.batch * p.heads, blocks(p.queries, kernels.dq.rows),
         a);
  const int64_t key_tiles =
      has_image(p) ? ImageTiles(a.image, kernels.dkdv.rows).total() : blocks(p.keys, kernels.dkdv.rows);
  launch(launches, "attention_dkdv", kernels.dkdv, kernels.threads, p.batch * p.key_heads, key_tiles, a);
  if (drel) positions.round_to(*drel);
  return needs_mask ? sum_to(dscores, *p.given_mask) : nothing(stats);
}

}  // namespace vk
