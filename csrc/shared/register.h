// Ties the ops to their schemas, which Python defines beside each op; both halves of the extension have all.
#pragma once
#include "ops.h"

namespace vk {

template <class Library>
void implement(Library& m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_qkv", TORCH_BOX(&attention_qkv));
  m.impl("attention_qkv_backward", TORCH_BOX(&attention_qkv_backward));
  m.impl("attention_rel_pos", TORCH_BOX(&attention_rel_pos));
  m.impl("attention_rel_pos_backward", TORCH_BOX(&attention_rel_pos_backward));
  m.impl("attention_varlen", TORCH_BOX(&attention_varlen));
  m.impl("attention_varlen_backward", TORCH_BOX(&attention_varlen_backward));
  m.impl("linear", TORCH_BOX(&linear_forward));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
  m.impl("mlp", TORCH_BOX(&mlp));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward));
  m.impl("glu_mlp", TORCH_BOX(&glu_mlp));
  m.impl("glu_mlp_backward", TORCH_BOX(&glu_mlp_backward));
  m.impl("patch_embed", TORCH_BOX(&patch_embed));
  m.impl("patch_embed_backward", TORCH_BOX(&patch_embed_backward));
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary_backward", TORCH_BOX(&rotary_backward));
  m.impl("rotary_qkv", TORCH_BOX(&rotary_qkv));
  m.impl("rotary_qkv_backward", TORCH_BOX(&rotary_qkv_backward));
}

}  // namespace vk
