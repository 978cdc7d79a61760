// What the torch-facing files share: tensors as rows, the accumulation type, threads, scratch memory.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "kernels.h"

namespace vk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

DType dtype_of(const Tensor& t);
ScalarType accumulate_dtype(ScalarType dtype);  // float64 for float64, float32 for all else

// torch's memory on the CPU, without the dispatcher: a call through that costs more than many a kernel here.
// 1: with the dispatcher, where torch poisons memory for tests; 0: without. A negative number asks.
int64_t set_dispatched_memory(int64_t wanted);
Tensor empty_strided(const Shape& shape, const Shape& strides, ScalarType dtype);
Tensor empty(const Shape& shape, ScalarType dtype);
inline Tensor empty(const Tensor& like, const Shape& shape) { return empty(shape, like.scalar_type()); }
inline Tensor nothing(const Tensor& like) { return empty(like, {0}); }
Shape shape_of(const Tensor& t);
// The same memory in another shape, as no view of the other: who gets a result so may write into it.
Tensor reinterpreted(const Tensor& t, const Shape& shape, const Shape& strides);
Tensor reshaped(const Tensor& t, const Shape& shape);  // copied only where it is not packed
Tensor packed(const Tensor& t);  // the tensor itself where it is already
Tensor cast(const Tensor& t, ScalarType dtype);
Tensor heads_last(const Tensor& like);  // an empty [B, H, N, K] laid out as [B, N, H, K]

inline char* bytes(const Tensor& t) { return static_cast<char*>(t.data_ptr()); }

// A tensor read as rows of its last axis; copied only where its leading axes do not make one step.
struct Operand {
  Tensor tensor;
  Rows rows;
  explicit Operand(const Tensor& t);
};
// The same for a result, which is always packed.
OutRows out_rows(const Tensor& t);

// Calls f(float{}) or f(double{}): the type that sums are kept in for this dtype.
template <class F>
auto with_accumulate(ScalarType dtype, F&& f) {
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

// Values of A as `dtype` has them.
template <class A>
void round_to(DType dtype, A* values, int64_t count) {
  if (dtype == same_dtype<A>()) return;
  std::vector<char> rounded(count * size_of(dtype));
  kernels<A>().store(rounded.data(), dtype, 1, values, count);
  kernels<A>().load(values, rounded.data(), dtype, 1, count);
}

// A vector argument in A, where it lies or converted, and rounded to `rounded` where that is another dtype than its own;
// null where the argument is absent.
template <class A>
class Vector {
 public:
  explicit Vector(const std::optional<Tensor>& t, DType rounded = same_dtype<A>()) {
    if (!t) return;
    tensor_ = packed(*t);
    const DType dtype = dtype_of(*tensor_);
    const int64_t count = tensor_->numel();
    if (dtype == same_dtype<A>() && rounded == dtype && count > 0) {
      data_ = reinterpret_cast<const A*>(bytes(*tensor_));
      return;
    }
    values_.resize(std::max<int64_t>(count, 1));
    kernels<A>().load(values_.data(), bytes(*tensor_), dtype, 1, count);
    if (rounded != dtype) round_to(rounded, values_.data(), count);
    data_ = values_.data();
  }
  const A* get() const { return data_; }

 private:
  std::optional<Tensor> tensor_;
  std::vector<A> values_;
  const A* data_ = nullptr;  // of either
};

// Uninitialised memory on its own cache lines.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<A*>(std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(count, 1) * sizeof(A), 64))))) {
    if (!data_) throw std::bad_alloc();
  }
  A* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(A* p) const { std::free(p); }
  };
  std::unique_ptr<A, Free> data_;
};

// f(begin, end) over [0, count), each thread at least `grain`.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count > 0) torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), f);
}

// Column sums of each of `groups` times `rows` rows, kept in a fixed number of parts, each summed by one thread and added
// in order: the result does not depend on how many threads there are. f(begin, end, part) adds rows [begin, end) into
// `part`, which starts at zero. Returns [groups, width].
template <class A, class F>
std::vector<A> sum_in_parts(int64_t groups, int64_t rows, int64_t width, const F& f) {
  constexpr int64_t most_parts = 32, fewest_rows = 16;
  const int64_t most = std::max<int64_t>(most_parts / std::max<int64_t>(groups, 1), 1);
  const int64_t parts = std::clamp<int64_t>(rows / fewest_rows, 1, most);
  std::vector<A> sums(groups * parts * width);
  parallel(groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p / parts * rows, part = p % parts;
      f(first + rows * part / parts, first + rows * (part + 1) / parts, sums.data() + p * width);
    }
  });
  for (int64_t group = 0; group < groups; ++group) {
    A* const sum = sums.data() + group * width;
    const A* const own = sums.data() + group * parts * width;
    if (own != sum) std::copy(own, own + width, sum);
    for (int64_t p = 1; p < parts; ++p) {
      for (int64_t j = 0; j < width; ++j) sum[j] += own[p * width + j];
    }
  }
  sums.resize(groups * width);
  return sums;
}
template <class A, class F>
std::vector<A> sum_in_parts(int64_t rows, int64_t width, const F& f) {
  return sum_in_parts<A>(1, rows, width, f);
}

// A packed tensor of `shape` in `dtype`, filled from A.
template <class A>
Tensor from_values(const Shape& shape, ScalarType dtype, const A* values) {
  Tensor out = empty(shape, dtype);
  kernels<A>().store(bytes(out), dtype_of(out), 1, values, out.numel());
  return out;
}

}  // namespace vk
