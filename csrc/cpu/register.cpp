// Ties the C++ ops to their schemas, which Python defines beside each op. The module itself is empty.
#include <Python.h>

#include "gemm.h"
#include "program.h"
#include "shared/register.h"

namespace vk {

int64_t configure(const std::string& name, int64_t value) {
  if (name == "isa") return set_isa(value);
  if (name == "products") return set_products(value);
  if (name == "dispatched_memory") return set_dispatched_memory(value);
  STD_TORCH_CHECK(false, "vitkernels: configure knows 'isa', 'products' and 'dispatched_memory', not '", name, "'");
}

}  // namespace vk

STABLE_TORCH_LIBRARY_IMPL(vitkernels_ext, CPU, m) {
  vk::implement(m);
  m.impl("run", &vk::run_program);
}

STABLE_TORCH_LIBRARY_IMPL(vitkernels_ext, CompositeExplicitAutograd, m) {
  m.impl("configure", &vk::boxed<&vk::configure>);
  m.impl("program", &vk::boxed<&vk::make_program>);
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
