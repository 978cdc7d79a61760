// Launches: on the device of an op's tensors, on torch's current stream, each one's error raised.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <utility>
#include <vector>

#include "shared/ops.h"

namespace vk {

// Blocks of a launch, not yet cut to what a launch can have.
struct Grid {
  int64_t x, y = 1, z = 1;
};

// One call of an op, for as long as it launches: its device is the current one until then.
class Launches {
 public:
  // `like` tells the device; `tensors` and it are named by their shapes where a launch fails, absent ones may be null
  Launches(const char* op, const Tensor& like, std::initializer_list<const Tensor*> tensors = {});
  ~Launches();
  Launches(const Launches&) = delete;
  Launches& operator=(const Launches&) = delete;

  // kernel<<<grid, block, shared>>>(args...); nothing where the grid is empty. Dynamic shared memory may be all that
  // the device gives a block.
  template <class... Parameters, class... Args>
  void operator()(const char* name, void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared,
                  Args&&... args) const {
    static_assert(sizeof...(Parameters) == sizeof...(Args), "a kernel gets as many arguments as it has parameters");
    launch(name, reinterpret_cast<const void*>(kernel), grid, block, shared,
           std::tuple<std::decay_t<Parameters>...>(std::forward<Args>(args)...),
           std::index_sequence_for<Parameters...>{});
  }

  // How many blocks of a kernel, without dynamic shared memory, the device holds at once.
  template <class... Parameters>
  int64_t at_once(void (*kernel)(Parameters...), unsigned threads) const {
    return at_once(reinterpret_cast<const void*>(kernel), threads);
  }

 private:
  int64_t at_once(const void* kernel, unsigned threads) const;
  template <class Tuple, size_t... index>
  void launch(const char* name, const void* kernel, Grid grid, dim3 block, size_t shared, Tuple&& args,
              std::index_sequence<index...>) const {
    void* pointers[] = {&std::get<index>(args)...};
    launch(name, kernel, grid, block, shared, pointers);
  }
  void launch(const char* name, const void* kernel, Grid grid, dim3 block, size_t shared, void** args) const;
  void check(cudaError_t error, const char* what, Grid grid, dim3 block, size_t shared) const;

  const char* op_;
  std::vector<const Tensor*> tensors_;
  int device_;
  CUDAGuardHandle guard_ = nullptr;
  void* stream_ = nullptr;
};

inline const Tensor* given(const Maybe& t) { return t ? &*t : nullptr; }

inline int64_t blocks(int64_t count, int64_t each) { return (count + each - 1) / each; }

// Whether 8 columns at a time of rows that are `width` wide can be read and written in 16 bytes.
template <class AnyRows>
bool is_aligned(const AnyRows& r, int64_t width) {
  return !r.data || (r.col == 1 && r.row % 8 == 0 && width % 8 == 0 && reinterpret_cast<uintptr_t>(r.data) % 16 == 0);
}

// A vector argument as rows: all the same one, or of [B, D] one a sample; null where it is absent.
inline Rows vector_rows(const Maybe& t) {
  if (!t) return {nullptr, DType::f32, 0, 0};
  return {bytes(*t), dtype_of(*t), t->dim() == 2 ? t->stride(0) : 0, t->stride(t->dim() - 1)};
}

}  // namespace vk
