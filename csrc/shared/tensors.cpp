#include "products.h"

#include <algorithm>
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

Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "quick_gelu") return Activation::quick_gelu;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(false, "vitkernels: unknown activation '", name, "'");
}

ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Shape packed_strides(const Shape& shape) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1)) strides[i] = stride;
  return strides;
}

Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

Shape with_width(Shape shape, int64_t width) {
  shape.back() = width;
  return shape;
}

Tensor reinterpreted(const Tensor& t, const Shape& shape, const Shape& strides, int64_t offset) {
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), int64_t(shape.size()), shape.data(), strides.data(), offset, &result));
  return Tensor(result);
}

Tensor columns_of(const Tensor& t, int64_t first, int64_t count) {
  const int64_t width = t.size(t.dim() - 1);
  return reinterpreted(t, {width ? t.numel() / width : 0, count}, {width, 1}, first);
}

Tensor reshaped(const Tensor& t, const Shape& shape) { return reinterpreted(packed(t), shape, packed_strides(shape)); }

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor cast(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }

Tensor stacked(const std::vector<Tensor>& parts, ScalarType dtype) {
  Shape shape = shape_of(parts[0]);
  shape[0] = 0;
  for (const Tensor& part : parts) shape[0] += part.size(0);
  Tensor out = empty(parts[0], shape, dtype);
  int64_t row = 0;
  for (const Tensor& part : parts) {
    Tensor rows = torch::stable::narrow(out, 0, row, part.size(0));
    torch::stable::copy_(rows, part);
    row += part.size(0);
  }
  return out;
}

Tensor aten_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor heads_last(const Tensor& like) { return heads_last(like, shape_of(like)); }

Tensor heads_last(const Tensor& like, const Shape& shape) {
  const Shape strides = packed_strides({shape[0], shape[2], shape[1], shape[3]});
  return empty_strided(like, shape, {strides[0], strides[2], strides[1], strides[3]}, like.scalar_type());
}

PatchGrid patch_grid(const Tensor& image, const Tensor& weight, const std::optional<Tensor>& keep) {
  const int64_t rows = weight.size(2), columns = weight.size(3);
  const int64_t down = image.size(2) / rows, across = image.size(3) / columns;
  return {image.size(0), image.size(1), down, across, rows, columns, keep ? keep->size(1) : down * across, nullptr};
}

Tensor flat_weight(const Tensor& weight) {
  return torch::stable::reshape(weight, {weight.size(0), weight.size(1) * weight.size(2) * weight.size(3)});
}

ScalarType wider(ScalarType a, const std::optional<Tensor>& b) {
  if (!b || b->scalar_type() == a) return a;
  if (a == ScalarType::Double || b->scalar_type() == ScalarType::Double) return ScalarType::Double;
  return ScalarType::Float;  // float32 with a half type, or the two half types
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
