#include "tensors.h"

#include <array>

namespace vk {
namespace {

bool dispatched_memory = false;

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
  return Tensor(result);
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
