// Memory of CUDA's: from torch's allocator, through its dispatcher, which knows the device and the stream.
#include "shared/tensors.h"

#include <array>

namespace vk {

Tensor empty_strided(const Tensor& like, const Shape& shape, const Shape& strides, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(like),         from(shape),        from(strides),     from(std::make_optional(dtype)),
                                    from(std::nullopt), from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace vk
