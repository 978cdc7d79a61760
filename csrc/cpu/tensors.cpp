#include "tensors.h"

#include <array>

namespace vk {

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Bool: return DType::boolean;
    case ScalarType::Byte: return DType::u8;
    default: STD_TORCH_CHECK(false, "vitkernels: the extension has no kernel for this dtype");
  }
}

ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

namespace {

bool dispatched_memory = false;

Shape packed_strides(const Shape& shape) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1)) strides[i] = stride;
  return strides;
}

}  // namespace

int64_t set_dispatched_memory(int64_t wanted) {
  if (wanted >= 0) dispatched_memory = wanted != 0;
  return dispatched_memory;
}

Tensor empty_strided(const Shape& shape, const Shape& strides, ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if (dispatched_memory) {
    std::array<StableIValue, 6> stack{from(shape),        from(strides),      from(std::make_optional(dtype)),
                                      from(std::nullopt), from(std::nullopt), from(std::nullopt)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_strided", "", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
  }
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(),
                                                         to<int32_t>(from(dtype)), aoti_torch_device_type_cpu(), 0,
                                                         &result));
  return Tensor(result);
}

Tensor empty(const Shape& shape, ScalarType dtype) { return empty_strided(shape, packed_strides(shape), dtype); }

Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

Tensor reinterpreted(const Tensor& t, const Shape& shape, const Shape& strides) {
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), int64_t(shape.size()), shape.data(), strides.data(), 0, &result));
  return Tensor(result);
}

Tensor reshaped(const Tensor& t, const Shape& shape) { return reinterpreted(packed(t), shape, packed_strides(shape)); }

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor cast(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }

Tensor heads_last(const Tensor& like) {
  const Shape shape = shape_of(like), strides = packed_strides({shape[0], shape[2], shape[1], shape[3]});
  return empty_strided(shape, {strides[0], strides[2], strides[1], strides[3]}, like.scalar_type());
}

Operand::Operand(const Tensor& t) : tensor(t) {
  const int64_t last = t.dim() - 1;
  // row r stands at r * step if every leading axis goes on where the one behind it ends
  int64_t step = 0, next = -1;
  bool one_step = true;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (next < 0) step = t.stride(i);
    one_step = one_step && (next < 0 || t.stride(i) == next);
    next = t.stride(i) * t.size(i);
  }
  if (!one_step) {
    tensor = packed(t);
    step = tensor.size(last);
  }
  rows = {bytes(tensor), dtype_of(tensor), step, tensor.stride(last)};
}

OutRows out_rows(const Tensor& t) { return {bytes(t), dtype_of(t), t.size(t.dim() - 1), 1}; }

}  // namespace vk
