// What the torch-facing files of both halves share: tensors as rows, on LibTorch's stable ABI alone.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "patches.h"
#include "types.h"

namespace vk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

DType dtype_of(const Tensor& t);
Activation activation_of(const std::string& name);
ScalarType accumulate_dtype(ScalarType dtype);  // float64 for float64, float32 for all else

Shape packed_strides(const Shape& shape);
// On the device of `like`; each half of the extension has its own way to memory.
Tensor empty_strided(const Tensor& like, const Shape& shape, const Shape& strides, ScalarType dtype);
inline Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return empty_strided(like, shape, packed_strides(shape), dtype);
}
inline Tensor empty(const Tensor& like, const Shape& shape) { return empty(like, shape, like.scalar_type()); }
inline Tensor nothing(const Tensor& like) { return empty(like, {0}); }
Shape shape_of(const Tensor& t);
Shape with_width(Shape shape, int64_t width);  // another last axis
// The same memory, from `offset` elements on, in another shape; as no view of the other: who gets a result so may write
// into it.
Tensor reinterpreted(const Tensor& t, const Shape& shape, const Shape& strides, int64_t offset = 0);
Tensor columns_of(const Tensor& t, int64_t first, int64_t count);  // of packed rows
Tensor reshaped(const Tensor& t, const Shape& shape);  // copied only where it is not packed
Tensor packed(const Tensor& t);  // the tensor itself where it is already
Tensor cast(const Tensor& t, ScalarType dtype);
Tensor stacked(const std::vector<Tensor>& parts, ScalarType dtype);  // a copy, each below the one before; of one width
Tensor heads_last(const Tensor& like);  // an empty [B, H, N, K] laid out as [B, N, H, K]
Tensor heads_last(const Tensor& like, const Shape& shape);

inline char* bytes(const Tensor& t) { return static_cast<char*>(t.data_ptr()); }

// A tensor read as rows of its last axis; copied only where its leading axes do not make one step.
struct Operand {
  Tensor tensor;
  Rows rows;
  explicit Operand(const Tensor& t);
};
// The same for a result, which is always packed.
OutRows out_rows(const Tensor& t);

// Of patch_embed: where patches lie (without `keep`, which is packed first), its weight as [D, C * P * P], and the
// dtype of its tokens after a tensor of another dtype is added.
PatchGrid patch_grid(const Tensor& image, const Tensor& weight, const std::optional<Tensor>& keep);
Tensor flat_weight(const Tensor& weight);
ScalarType wider(ScalarType a, const std::optional<Tensor>& b);

}  // namespace vk
