#include "gemm.h"

#include <array>

// oneDNN's linear layer, exported by libtorch_cpu for compiled models. Weak: a torch without oneDNN still loads us.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t scalars_len, const char** algorithm, AtenTensorHandle* result);

namespace vk {
namespace {

int64_t products = 0;
constexpr int64_t kWorthIt = 1 << 20;  // multiplications from which a call of oneDNN pays: it costs 10 us more than torch's

Library library_for(ScalarType dtype, bool of_weight) {
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16) return Library::torch;
  const int kind = (dtype == ScalarType::BFloat16 ? 1 : 0) + (of_weight ? 2 : 0);
  return Library(products >> (2 * kind) & 3);
}

bool use_onednn(ScalarType dtype, bool of_weight, int64_t work) {
  return aoti_torch_cpu__linear_pointwise && work >= kWorthIt && library_for(dtype, of_weight) == Library::onednn;
}

// Whether a matrix can be read as words along k: bfloat16 comes in pairs there.
bool in_words(const Matrix& t, int64_t k, int64_t k_step, int64_t other_step) {
  if (k_step == 1) return t.dtype == ScalarType::Float || (k % 2 == 0 && other_step % 2 == 0);
  return other_step == 1;
}

Tensor onednn_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const std::optional<Tensor> packed_bias = bias ? std::make_optional(packed(*bias)) : std::nullopt;  // it reads no steps
  AtenTensorHandle bias_handle = bias ? packed_bias->get() : nullptr;
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(
      x.get(), weight.get(), bias ? &bias_handle : nullptr, "none", nullptr, 0, nullptr, &result));
  return Tensor(result);
}

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

int64_t set_products(int64_t wanted) {
  if (wanted >= 0) products = wanted;
  return products;
}

bool own_product(const Matrix& a, const Matrix& b, bool of_weight) {
  return library_for(a.dtype, of_weight) == Library::own && a.rows * a.cols * b.cols > 0 &&
         in_words(a, a.cols, a.col, a.row) && in_words(b, a.cols, b.row, b.col);
}

Tensor space_for_panels(const Tensor& like, int64_t k, int64_t n) {
  Product p{};
  p.k = k;
  p.n = n;
  p.dtype = dtype_of(like);
  return empty(like, {kernels<float>().product_sizes(p).packed}, ScalarType::Float);
}

void multiply(const Tensor& out, const Matrix& a, const Matrix& b, const std::optional<Tensor>& bias,
              const Follow& follow, const Tensor* b_panels) {
  const Vector<float> bias_values(bias);
  const auto data = [](const Tensor* t) { return t ? bytes(*t) : nullptr; };
  const Product p{a.rows,
                  b.cols,
                  a.cols,
                  dtype_of(out),
                  {a.data, a.row, a.col},
                  {b.data, b.row, b.col},
                  bias_values.get(),
                  follow.then,
                  follow.activation,
                  bytes(out),
                  data(follow.pre),
                  data(follow.activated),
                  follow.activated_in_panels};
  const Kernels<float>& kernel = kernels<float>();
  const ProductSizes sizes = kernel.product_sizes(p);
  // Rows are cut the same way for any number of threads, for the sake of the sums.
  constexpr int64_t most_parts = 32;
  const int64_t tiles = (p.m + sizes.rows - 1) / sizes.rows;
  int64_t parts = 1;
  while (parts < most_parts && parts * sizes.tiles < tiles) parts *= 2;
  std::vector<float> sums(follow.sums ? parts * p.n : 0);
  const auto sums_of = [&](int64_t part) { return follow.sums ? sums.data() + part * p.n : nullptr; };
  const int64_t threads = torch::stable::get_num_threads(), panel = sizes.packed / sizes.panels;
  if (parts == 1 && p.a.col == 1 && !b_panels) {  // so few rows that each panel is read once: it need not leave the cache
    constexpr int64_t cached = 1 << 17;           // floats, half of a usual L2
    const int64_t fair = (sizes.panels + threads - 1) / threads;
    const int64_t some = std::clamp<int64_t>(cached / panel, 1, fair), tasks = (sizes.panels + some - 1) / some;
    parallel(tasks, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> scratch(sizes.scratch), panels(some * panel);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * some, last = std::min(first + some, sizes.panels);
        kernel.product_pack(p, panels.get(), first, last);
        kernel.product(p, panels.get(), 0, p.m, first, last, sums_of(0), scratch.get());
      }
    });
  } else {
    const Tensor space = b_panels ? *b_panels : empty(out, {sizes.packed}, ScalarType::Float);
    float* const panels = reinterpret_cast<float*>(bytes(space));
    if (!b_panels) {
      parallel(sizes.panels, 1, [&](int64_t begin, int64_t end) {
        kernel.product_pack(p, panels + begin * panel, begin, end);
      });
    }
    const int64_t wanted = threads * (p.a.col == 1 ? 3 : 1);  // for equal shares
    const int64_t groups = std::clamp<int64_t>((wanted + parts - 1) / parts, 1, sizes.panels);
    parallel(parts * groups, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> scratch(sizes.scratch);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task / groups, group = task % groups;
        const int64_t row = tiles * part / parts * sizes.rows, row_end = tiles * (part + 1) / parts * sizes.rows;
        const int64_t first = sizes.panels * group / groups, last = sizes.panels * (group + 1) / groups;
        kernel.product(p, panels + first * panel, row, std::min(row_end, p.m), first, last, sums_of(part), scratch.get());
      }
    });
  }
  if (!follow.sums) return;
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t j = 0; j < p.n; ++j) sums[j] += sums[part * p.n + j];
  }
  sums.resize(p.n);
  *follow.sums = std::move(sums);
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Matrix a(x), b = Matrix(weight).transposed();
  if (own_product(a, b)) {
    Tensor y = empty(x, {a.rows, b.cols});
    multiply(y, a, b, bias);
    return y;
  }
  return use_onednn(a.dtype, false, a.rows * a.cols * b.cols) ? onednn_linear(x, weight, bias)
                                                              : aten_linear(x, weight, bias);
}

Tensor gradient_of_input(const Tensor& dy, const Tensor& weight) {
  const Matrix a(dy), b(weight);
  if (own_product(a, b)) {
    Tensor dx = empty(dy, {a.rows, b.cols});
    multiply(dx, a, b, std::nullopt);
    return dx;
  }
  return linear(dy, transposed(weight), std::nullopt);
}

Tensor gradient_of_weight(const Tensor& dy, const Tensor& x) {
  const Matrix a = Matrix(dy).transposed(), b(x);
  if (own_product(a, b, true)) {
    Tensor dw = empty(x, {a.rows, b.cols});
    multiply(dw, a, b, std::nullopt);
    return dw;
  }
  if (!use_onednn(a.dtype, true, a.rows * a.cols * b.cols)) return packed(torch::stable::matmul(transposed(dy), x));
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
