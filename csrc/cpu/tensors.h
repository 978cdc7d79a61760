// What the torch-facing files of the CPU share beside shared/tensors.h: vectors of parameters, threads, scratch memory.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"
#include "shared/tensors.h"

namespace vk {

// Calls f(float{}) or f(double{}): the type that sums are kept in for this dtype.
template <class F>
auto with_accumulate(ScalarType dtype, F&& f) {
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

// A vector argument in A, where it lies or converted; null where the argument is absent.
template <class A>
class Vector {
 public:
  explicit Vector(const std::optional<Tensor>& t) {
    if (!t) return;
    tensor_ = packed(*t);
    if (dtype_of(*tensor_) == same_dtype<A>() && tensor_->numel() > 0) {
      data_ = reinterpret_cast<const A*>(bytes(*tensor_));
      return;
    }
    values_.resize(std::max<int64_t>(t->numel(), 1));
    kernels<A>().load(values_.data(), bytes(*tensor_), dtype_of(*tensor_), 1, tensor_->numel());
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

// Column sums kept in a fixed number of parts, each summed by one thread and added in order: the result does not
// depend on how many threads there are. f(begin, end, part) adds rows [begin, end) into `part`, which starts at zero.
template <class A, class F>
std::vector<A> sum_in_parts(int64_t rows, int64_t width, const F& f) {
  constexpr int64_t most_parts = 32, fewest_rows = 16;
  const int64_t parts = std::clamp<int64_t>(rows / fewest_rows, 1, most_parts);
  std::vector<A> sums(parts * width);
  parallel(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) f(rows * p / parts, rows * (p + 1) / parts, sums.data() + p * width);
  });
  for (int64_t p = 1; p < parts; ++p) {
    for (int64_t j = 0; j < width; ++j) sums[j] += sums[p * width + j];
  }
  sums.resize(width);
  return sums;
}

// A packed tensor of `shape` in `dtype`, filled from A.
template <class A>
Tensor from_values(const Tensor& like, const Shape& shape, ScalarType dtype, const A* values) {
  Tensor out = empty(like, shape, dtype);
  kernels<A>().store(bytes(out), dtype_of(out), 1, values, out.numel());
  return out;
}

}  // namespace vk
