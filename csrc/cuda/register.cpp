// Ties the CUDA ops to their schemas. Another namespace and key are the tests' own, who launch on tensors of the CPU.
#include <Python.h>

#include "shared/register.h"

#if !defined(VITKERNELS_TARGETS)
#define VITKERNELS_TARGETS ""  // such as "sm_80 compute_90"
#endif
#if !defined(VITKERNELS_NAMESPACE)
#define VITKERNELS_NAMESPACE vitkernels_ext
#define VITKERNELS_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(VITKERNELS_NAMESPACE, VITKERNELS_KEY, m) { vk::implement(m); }

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__cuda(void) {
  PyObject* made = PyModule_Create(&module);
  if (made && PyModule_AddStringConstant(made, "TARGETS", VITKERNELS_TARGETS) < 0) return nullptr;
  return made;
}
