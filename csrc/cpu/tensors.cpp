#include "tensors.h"

#include <array>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vk {
namespace {

bool dispatched_memory = false;

// New memory comes a page at a time as it is first written, which takes longer than many a pass over it: pages of 2 MiB
// are asked for where the system lends them to who asks. Of what lies within such pages whole, no memory more is used.
Tensor on_large_pages(Tensor t) {
#if defined(__linux__)
  constexpr uintptr_t page = 1 << 21;
  const auto data = reinterpret_cast<uintptr_t>(bytes(t));
  const uintptr_t begin = (data + page - 1) / page * page, end = (data + t.numel() * t.element_size()) / page * page;
  if (end > begin + page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may say no
#endif
  return t;
}

Tensor allocate(const Shape& shape, const Shape& strides, ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if (dispatched_memory) {
    std::array<StableIValue, 6> stack{from(shape),        from(strides),      from(std::make_optional(dtype)),
                                      from(std::nullopt), from(std::nullopt), from(std::nullopt)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_strided", "", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
  }
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(),
                                                         to<int32_t>(from(dtype)), aoti_torch_device_type_cpu(), 0,
                                                         &result));
  return on_large_pages(Tensor(result));
}

}  // namespace

int64_t set_dispatched_memory(int64_t wanted) {
  if (wanted >= 0) dispatched_memory = wanted != 0;
  return dispatched_memory;
}

Tensor empty(const Shape& shape, ScalarType dtype) { return allocate(shape, packed_strides(shape), dtype); }

Tensor empty_strided(const Tensor&, const Shape& shape, const Shape& strides, ScalarType dtype) {
  return allocate(shape, strides, dtype);
}

}  // namespace vk
