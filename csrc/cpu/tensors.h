// What the torch-facing files of the CPU share beside shared/tensors.h: memory, vectors of parameters, threads, scratch.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"
#include "shared/tensors.h"

namespace vk {

// torch's memory on the CPU, without the dispatcher: a call through that costs more than many a kernel here.
// 1: with the dispatcher, where torch poisons memory for tests; 0: without. A negative number asks.
int64_t set_dispatched_memory(int64_t wanted);
Tensor empty(const Shape& shape, ScalarType dtype);

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

// Uninitialised memory on its own cache lines; on the stack where it is little, since malloc takes longer than a kernel does
// on few rows. Under AddressSanitizer, which knows where each of malloc's blocks ends, never.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const auto size = size_t(round_up(std::max<int64_t>(count, 1) * sizeof(A), 64));
    if (size > sizeof(little_)) {
      heap_.reset(static_cast<A*>(std::aligned_alloc(64, size)));
      if (!heap_) throw std::bad_alloc();
    }
  }
  Buffer(Buffer&&) = delete;
  A* get() const { return heap_ ? heap_.get() : const_cast<A*>(reinterpret_cast<const A*>(little_)); }

 private:
  struct Free {
    void operator()(A* p) const { std::free(p); }
  };
#if defined(__SANITIZE_ADDRESS__)
  alignas(64) char little_[1];
#else
  alignas(64) char little_[1 << 15];
#endif
  std::unique_ptr<A, Free> heap_;
};

// f(begin, end) over [0, count), each thread at least `grain`.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  if (count <= grain) return f(0, count);  // as torch would, which takes longer to say so
  torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), f);
}

// Column sums of each of `groups` times `rows` rows, kept in a fixed number of parts, each summed by one thread and
// added in order: the result does not depend on how many threads there are. f(begin, end, part) adds rows [begin, end)
// into `part`, which starts at zero. Returns [groups, width].
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
