#include "gemm.h"

#include <array>

// oneDNN's linear layer, exported by libtorch_cpu for compiled models. Weak: a torch without oneDNN still loads us.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t scalars_len, const char** algorithm, AtenTensorHandle* result);

namespace vk {
namespace {

int64_t onednn = 0;

bool use_onednn(const Tensor& x, int64_t m, int64_t n, int64_t k, OneDnn f32, OneDnn bf16) {
  // its call costs 10 us more than torch's: worth it from about a million multiplications up
  if (!aoti_torch_cpu__linear_pointwise || m * n * k < (1 << 20)) return false;
  return (x.scalar_type() == ScalarType::Float && (onednn & f32)) ||
         (x.scalar_type() == ScalarType::BFloat16 && (onednn & bf16));
}

Tensor onednn_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const std::optional<Tensor> packed_bias = bias ? std::make_optional(packed(*bias)) : std::nullopt;  // it reads no steps
  AtenTensorHandle bias_handle = bias ? packed_bias->get() : nullptr;
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(
      x.get(), weight.get(), bias ? &bias_handle : nullptr, "none", nullptr, 0, nullptr, &result));
  return Tensor(result);
}

Tensor aten_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

template <class T>
void transpose_into(T* out, const T* in, int64_t rows, int64_t columns, int64_t in_row) {
  constexpr int64_t block = 32;  // of both sides at once in L1
  parallel((columns + block - 1) / block, 4, [&](int64_t begin, int64_t end) {
    for (int64_t j0 = begin * block; j0 < std::min(columns, end * block); j0 += block) {
      const int64_t j1 = std::min(columns, j0 + block);
      for (int64_t i0 = 0; i0 < rows; i0 += block) {
        const int64_t i1 = std::min(rows, i0 + block);
        for (int64_t j = j0; j < j1; ++j) {
          for (int64_t i = i0; i < i1; ++i) out[j * rows + i] = in[i * in_row + j];
        }
      }
    }
  });
}

// A packed copy of t^T, for t float32 or bfloat16. Faster than the strided copy that packed() would make.
Tensor packed_transpose(const Tensor& t) {
  const int64_t rows = t.size(0), columns = t.size(1);
  if (t.stride(1) != 1) return packed(transposed(t));
  Tensor out = empty(t, {columns, rows});
  if (t.scalar_type() == ScalarType::Float) {
    transpose_into(reinterpret_cast<float*>(bytes(out)), reinterpret_cast<float*>(bytes(t)), rows, columns, t.stride(0));
  } else {
    transpose_into(reinterpret_cast<uint16_t*>(bytes(out)), reinterpret_cast<uint16_t*>(bytes(t)), rows, columns,
                   t.stride(0));
  }
  return out;
}

}  // namespace

int64_t set_onednn(int64_t wanted) {
  if (wanted >= 0) onednn = wanted;
  return onednn;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const bool vendor = use_onednn(x, x.size(0), weight.size(0), x.size(1), onednn_f32, onednn_bf16);
  return vendor ? onednn_linear(x, weight, bias) : aten_linear(x, weight, bias);
}

Tensor gradient_of_input(const Tensor& dy, const Tensor& weight) {
  return linear(dy, transposed(weight), std::nullopt);
}

Tensor gradient_of_weight(const Tensor& dy, const Tensor& x) {
  if (!use_onednn(x, dy.size(1), x.size(1), x.size(0), onednn_f32_dw, onednn_bf16_dw))
    return packed(torch::stable::matmul(transposed(dy), x));
  // oneDNN wants its first operand packed and takes the second in any order: copy the smaller of the two
  if (dy.size(1) <= x.size(1)) return onednn_linear(packed_transpose(dy), transposed(x), std::nullopt);
  return packed_transpose(onednn_linear(packed_transpose(x), transposed(dy), std::nullopt));
}

Tensor gradient_of_bias(const Tensor& dy, ScalarType dtype) {
  return with_accumulate(dy.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Operand rows(dy);
    const int64_t width = dy.size(1);
    const auto sums = sum_in_parts<A>(dy.size(0), width, [&](int64_t begin, int64_t end, A* part) {
      Buffer<A> row(width);
      const int64_t size = size_of(rows.rows.dtype);
      for (int64_t i = begin; i < end; ++i) {
        kernels<A>().load(row.get(), rows.rows.data + i * rows.rows.row * size, rows.rows.dtype, rows.rows.col, width);
        for (int64_t j = 0; j < width; ++j) part[j] += row.get()[j];
      }
    });
    return from_values<A>(dy, {width}, dtype, sums.data());
  });
}

}  // namespace vk
