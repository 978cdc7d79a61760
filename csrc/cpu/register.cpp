// Ties the C++ ops to their schemas, which Python defines beside each op. The module itself is empty.
#include <Python.h>

#include "gemm.h"
#include "ops.h"

namespace vk {

int64_t configure(const std::string& name, int64_t value) {
  if (name == "isa") return set_isa(value);
  if (name == "products") return set_products(value);
  if (name == "dispatched_memory") return set_dispatched_memory(value);
  STD_TORCH_CHECK(false, "vitkernels: configure knows 'isa', 'products' and 'dispatched_memory', not '", name, "'");
}

}  // namespace vk

STABLE_TORCH_LIBRARY_IMPL(vitkernels_ext, CPU, m) {
  m.impl("linear", TORCH_BOX(&vk::linear_forward));
  m.impl("linear_backward", TORCH_BOX(&vk::linear_backward));
  m.impl("add_layer_norm", TORCH_BOX(&vk::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&vk::add_layer_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&vk::add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&vk::add_rms_norm_backward));
  m.impl("attention", TORCH_BOX(&vk::attention));
  m.impl("attention_backward", TORCH_BOX(&vk::attention_backward));
  m.impl("attention_qkv", TORCH_BOX(&vk::attention_qkv));
  m.impl("attention_qkv_backward", TORCH_BOX(&vk::attention_qkv_backward));
  m.impl("glu_mlp", TORCH_BOX(&vk::glu_mlp));
  m.impl("glu_mlp_backward", TORCH_BOX(&vk::glu_mlp_backward));
  m.impl("attention_varlen", TORCH_BOX(&vk::attention_varlen));
  m.impl("attention_varlen_backward", TORCH_BOX(&vk::attention_varlen_backward));
  m.impl("mlp", TORCH_BOX(&vk::mlp));
  m.impl("mlp_backward", TORCH_BOX(&vk::mlp_backward));
  m.impl("patch_embed", TORCH_BOX(&vk::patch_embed));
  m.impl("patch_embed_backward", TORCH_BOX(&vk::patch_embed_backward));
  m.impl("rotary", TORCH_BOX(&vk::rotary));
  m.impl("rotary_backward", TORCH_BOX(&vk::rotary_backward));
  m.impl("rotary_qkv", TORCH_BOX(&vk::rotary_qkv));
  m.impl("rotary_qkv_backward", TORCH_BOX(&vk::rotary_qkv_backward));
}

STABLE_TORCH_LIBRARY_IMPL(vitkernels_ext, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&vk::configure));
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
