// Ties the ops to their schemas, which Python defines beside each op; both halves of the extension have all.
#pragma once
#include "box.h"
#include "ops.h"

namespace vk {

// An op's function as a type.
template <auto f>
struct Function {
  static constexpr auto call = f;
};

// f(name, Function<...>{}) for each op that may stand in a stretch of a residual stream.
template <class F>
void each_op(const F& f) {
  f("attention", Function<&attention>{});
  f("attention_backward", Function<&attention_backward>{});
  f("attention_qkv", Function<&attention_qkv>{});
  f("attention_qkv_backward", Function<&attention_qkv_backward>{});
  f("attention_rel_pos", Function<&attention_rel_pos>{});
  f("attention_rel_pos_backward", Function<&attention_rel_pos_backward>{});
  f("attention_varlen", Function<&attention_varlen>{});
  f("attention_varlen_backward", Function<&attention_varlen_backward>{});
  f("linear", Function<&linear_forward>{});
  f("linear_backward", Function<&linear_backward>{});
  f("add_layer_norm", Function<&add_layer_norm>{});
  f("add_layer_norm_backward", Function<&add_layer_norm_backward>{});
  f("add_rms_norm", Function<&add_rms_norm>{});
  f("add_rms_norm_backward", Function<&add_rms_norm_backward>{});
  f("mlp", Function<&mlp>{});
  f("mlp_backward", Function<&mlp_backward>{});
  f("glu_mlp", Function<&glu_mlp>{});
  f("glu_mlp_backward", Function<&glu_mlp_backward>{});
  f("rotary", Function<&rotary>{});
  f("rotary_backward", Function<&rotary_backward>{});
  f("rotary_qkv", Function<&rotary_qkv>{});
  f("rotary_qkv_backward", Function<&rotary_qkv_backward>{});
}

template <class Library>
void implement(Library& m) {
  each_op([&](const char* name, auto function) { m.impl(name, &boxed<decltype(function)::call>); });
  m.impl("patch_embed", &boxed<&patch_embed>);
  m.impl("patch_embed_backward", &boxed<&patch_embed_backward>);
}

}  // namespace vk
