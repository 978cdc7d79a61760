#include "gemm.h"

// What libtorch_cpu exports for compiled models: oneDNN's linear layer, and torch's products without its dispatcher. Weak:
// a torch without oneDNN, or one that has dropped a product, still loads us.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t scalars_len, const char** algorithm, AtenTensorHandle* result);
__attribute__((weak)) AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b);
__attribute__((weak)) AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle bias,
                                                              AtenTensorHandle a, AtenTensorHandle b, double beta,
                                                              double alpha);
}

namespace vk {
namespace {

int64_t products = 0;
// Rows, or terms, up to which the kernels for few are the fastest: of bfloat16 a matrix unit takes more at a time.
constexpr int64_t kFew = 16, kFewPairs = 8;
constexpr int64_t kWidestPanel = 64;  // product_panels.h's kPanel
constexpr int64_t kWorthIt = 1 << 20;  // multiplications from which a call of oneDNN pays: it costs 10 us more than torch's

Library library_for(ScalarType dtype, Kind kind) {
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16) return Library::torch;
  const int place = (dtype == ScalarType::BFloat16 ? 1 : 0) + 2 * int(kind);
  return Library(products >> (2 * place) & 3);
}

// Whether a product is one for the matrix unit, float32 in pieces.
bool for_tiles(const Matrix& a, const Parted& b) {
  Product p{a.rows, b.cols, a.cols, dtype_of(a.tensor)};
  p.split = true;
  return kernels<float>().product_sizes(p).by_tiles;
}

// Whether copying operands of float32, in pieces for a matrix unit, takes longer than multiplying them there gains: it
// depends on how many multiplications each element that is copied has. Measured on one (bench/NOTES.md).
bool narrow(const Matrix& a, const Parted& b, Kind kind) {
  if (a.dtype != ScalarType::Float || a.rows * a.cols * b.cols <= kWorthIt || !for_tiles(a, b)) return false;
  constexpr int64_t shortest = 64, fewest[] = {68, 110, 190};  // the weight's gradient copies both
  return std::min({a.rows, a.cols, b.cols}) <= shortest || a.rows * b.cols < fewest[int(kind)] * (a.rows + b.cols);
}

// Whether bfloat16 has so few rows that the own product wins on a matrix unit: it rounds weights in float32 as it reads
// them, where a library wants a copy. Weights in bfloat16 go the same way, for the sake of the bits; there it is level.
bool has_few_rows(const Matrix& a, const Parted& b, Kind kind) {
  constexpr int64_t most = 200;  // of an image of 224 pixels
  return kind != Kind::of_weight && a.dtype == ScalarType::BFloat16 && a.rows <= most && for_tiles(a, b);
}

bool use_onednn(ScalarType dtype, Kind kind, int64_t work) {
  return aoti_torch_cpu__linear_pointwise && work >= kWorthIt && library_for(dtype, kind) == Library::onednn;
}

// Whether a matrix can be read as words along k: bfloat16 comes in pairs there.
bool in_words(const Matrix& t, int64_t k, int64_t k_step, int64_t other_step) {
  if (k_step == 1) return t.dtype == ScalarType::Float || (k % 2 == 0 && other_step % 2 == 0);
  return other_step == 1;
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

// A packed copy of t^T. Faster, where t is packed, than the copy by strides that torch would make.
Tensor packed_transpose(const Matrix& t) {
  if (t.col != 1) return packed(tensor_of(t.transposed()));
  Tensor out = empty(t.tensor, {t.cols, t.rows});
  if (t.dtype == ScalarType::Float) {
    transpose_into(reinterpret_cast<float*>(bytes(out)), reinterpret_cast<const float*>(t.data), t.rows, t.cols, t.row);
  } else {
    transpose_into(reinterpret_cast<uint16_t*>(bytes(out)), reinterpret_cast<const uint16_t*>(t.data), t.rows, t.cols,
                   t.row);
  }
  return out;
}

Tensor onednn_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const std::optional<Tensor> packed_bias = bias ? std::make_optional(packed(*bias)) : std::nullopt;  // it reads no steps
  AtenTensorHandle bias_handle = bias ? packed_bias->get() : nullptr;
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(
      x.get(), weight.get(), bias ? &bias_handle : nullptr, "none", nullptr, 0, nullptr, &result));
  return Tensor(result);
}

// oneDNN's gradient of a weight, a b with a = dy^T and b = x. It wants its first operand packed and takes the second in any
// order: the smaller of the two is copied.
Tensor onednn_gradient(const Matrix& a, const Matrix& b) {
  if (a.rows <= b.cols) return onednn_linear(packed_transpose(a.transposed()), tensor_of(b.transposed()), std::nullopt);
  return packed_transpose(Matrix(onednn_linear(packed_transpose(b), tensor_of(a), std::nullopt)));
}

Tensor aten_product(const Matrix& a, const Matrix& b, const std::optional<Tensor>& bias, const Shape& shape) {
  if (!aoti_torch_cpu_mm_out || !aoti_torch_cpu_addmm_out) {
    return reshaped(aten_linear(tensor_of(a), tensor_of(b.transposed()), bias), shape);
  }
  Tensor out = empty(a.tensor, shape);
  const Tensor left = tensor_of(a), right = tensor_of(b), rows = reinterpreted(out, {a.rows, b.cols}, {b.cols, 1});
  if (bias) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(rows.get(), bias->get(), left.get(), right.get(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(rows.get(), left.get(), right.get()));
  }
  return out;
}

// The same, of a b in parts: products into columns of the result or, with parts below each other, added up in it.
Tensor aten_products(const Matrix& a, const Parted& b, const std::optional<Tensor>& bias, const Shape& shape) {
  Tensor out = empty(a.tensor, shape);
  const Tensor left = tensor_of(a);
  const int64_t rows = b.parts[0].rows, columns = b.parts[0].cols;
  int64_t at = 0;
  for (const Matrix& part : b.parts) {
    const Tensor right = tensor_of(part);
    if (b.side_by_side()) {
      const Tensor to = reinterpreted(out, {a.rows, columns}, {b.cols, 1}, at);
      if (bias) {
        const Tensor own = reinterpreted(*bias, {columns}, {bias->stride(0)}, at * bias->stride(0));
        TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(to.get(), own.get(), left.get(), right.get(), 1, 1));
      } else {
        TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(to.get(), left.get(), right.get()));
      }
      at += columns;
    } else {
      const Tensor to = reinterpreted(out, {a.rows, columns}, {columns, 1});
      const Tensor from = reinterpreted(left, {a.rows, rows}, {a.row, a.col}, at * a.col);
      if (at > 0) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(to.get(), to.get(), from.get(), right.get(), 1, 1));
      } else {
        TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(to.get(), from.get(), right.get()));
      }
      at += rows;
    }
  }
  return out;
}

// Parts as one matrix of `dtype`.
Matrix joined(const Parted& b, ScalarType dtype) {
  if (b.side_by_side()) return joined(b.transposed(), dtype).transposed();
  std::vector<Tensor> tensors;
  for (const Matrix& part : b.parts) tensors.push_back(tensor_of(part));
  return Matrix(stacked(tensors, dtype));
}

// a b + bias in a's dtype, by a library.
Tensor library_product(const Matrix& a, const Parted& b, const std::optional<Tensor>& bias, const Shape& shape,
                       Kind kind) {
  const ScalarType dtype = a.dtype;
  if (bias && bias->scalar_type() != dtype) return library_product(a, b, cast(*bias, dtype), shape, kind);
  const Matrix& first = b.parts[0];
  const bool onednn = use_onednn(dtype, kind, a.rows * a.cols * b.cols);
  if (b.parts.size() > 1) {
    // A product that is added to another would be rounded in between, oneDNN's lies where it wants, and weights to be
    // rounded are copied in any case.
    const bool in_place = dtype == ScalarType::Float && !onednn && aoti_torch_cpu_mm_out && aoti_torch_cpu_addmm_out;
    if (in_place) return aten_products(a, b, bias, shape);
    return library_product(a, joined(b, dtype), bias, shape, kind);
  }
  if (first.dtype != dtype) return library_product(a, Matrix(cast(tensor_of(first), dtype)), bias, shape, kind);
  if (!onednn) return aten_product(a, first, bias, shape);
  return reshaped(kind == Kind::of_weight ? onednn_gradient(a, first)
                                          : onednn_linear(tensor_of(a), tensor_of(first.transposed()), bias),
                  shape);
}

// What an own product writes that is then cast to `dtype`: it has a's dtype, or float32.
Tensor empty_for_product(const Matrix& a, const Shape& shape, ScalarType dtype) {
  return empty(shape, dtype == ScalarType::Float ? dtype : a.dtype);
}

// The same by whatever is fastest, and then in `dtype`.
Tensor product(const Matrix& a, const Parted& b, const std::optional<Tensor>& bias, const Shape& shape, ScalarType dtype,
               Kind kind) {
  const Way way = way_of(a, b, kind);
  if (way == Way::library) return cast(library_product(a, b, bias, shape, kind), dtype);
  if (b.side_by_side() && b.parts[0].cols % kWidestPanel != 0) {
    return product(a, joined(b, a.dtype), bias, shape, dtype, kind);
  }
  Tensor out = empty_for_product(a, shape, dtype);
  multiply(way, out, a, b, bias);
  return cast(out, dtype);
}

}  // namespace

Parted::Parted(std::vector<Matrix> below)
    : parts(std::move(below)), rows(parts[0].rows * int64_t(parts.size())), cols(parts[0].cols) {}

Parted Parted::transposed() const {
  Parted t = *this;
  for (Matrix& part : t.parts) part = part.transposed();
  std::swap(t.rows, t.cols);
  return t;
}

Parted weight_of(const Tensor& first, const std::optional<Tensor>& second, ScalarType dtype) {
  if (!second) return Matrix(first);
  const ScalarType common = first.scalar_type() == second->scalar_type() ? first.scalar_type() : dtype;
  return Parted({Matrix(packed(cast(first, common))), Matrix(packed(cast(*second, common)))});
}

int64_t set_products(int64_t wanted) {
  if (wanted >= 0) products = wanted;
  return products;
}

Way way_of(const Matrix& a, const Parted& whole, Kind kind) {
  const Matrix& b = whole.parts[0];
  const bool served = a.dtype == ScalarType::Float || a.dtype == ScalarType::BFloat16;
  const bool odd = whole.parts.size() > 1 && !whole.side_by_side() && b.rows % 2;  // words are of two rows
  if (!served || odd || (b.dtype != a.dtype && b.dtype != ScalarType::Float) || a.rows * a.cols * whole.cols == 0) {
    return Way::library;
  }
  const int64_t few = a.dtype == ScalarType::Float ? kFew : kFewPairs;
  if (kind == Kind::of_weight && a.cols <= few) return Way::few_terms;
  if (kind != Kind::of_weight && a.rows <= few && (b.row == 1 || b.col == 1)) return Way::few_rows;
  const bool own = (library_for(a.dtype, kind) == Library::own || has_few_rows(a, whole, kind)) &&
                   !narrow(a, whole, kind) && in_words(a, a.cols, a.col, a.row) && in_words(b, a.cols, b.row, b.col);
  return own ? Way::panels : Way::library;
}

Tensor linear(const Matrix& x, const Parted& weight, const std::optional<Tensor>& bias, const Shape& shape) {
  return product(x, weight.transposed(), bias, shape, x.dtype, Kind::forward);
}
Tensor linear(const Matrix& x, const Matrix& weight, const std::optional<Tensor>& bias, const Shape& shape) {
  return linear(x, Parted(weight), bias, shape);
}

Tensor gradient_of_input(const Matrix& dy, const Parted& weight, const Shape& shape) {
  return product(dy, weight, std::nullopt, shape, dy.dtype, Kind::of_input);
}
Tensor gradient_of_input(const Matrix& dy, const Matrix& weight, const Shape& shape) {
  return gradient_of_input(dy, Parted(weight), shape);
}

Tensor gradient_of_weight(const Matrix& dy, const Matrix& x, const Shape& shape, ScalarType dtype) {
  return product(dy.transposed(), x, std::nullopt, shape, dtype, Kind::of_weight);
}

Tensor gradient_by_panels(const Matrix& dy, const Matrix& x, const Tensor& panels, const Shape& shape,
                          ScalarType dtype) {
  Tensor out = empty_for_product(dy, shape, dtype);
  multiply(Way::panels, out, dy.transposed(), x, std::nullopt, {}, &panels);
  return cast(out, dtype);
}

Tensor gradient_of_bias(const Matrix& dy, ScalarType dtype) {
  return with_accumulate(dy.dtype, [&](auto zero) {
    using A = decltype(zero);
    const DType from = dtype_of(dy.tensor);
    auto sums = sum_in_parts<A>(dy.rows, dy.cols, [&](int64_t begin, int64_t end, A* part) {
      Buffer<A> row(dy.cols);
      for (int64_t i = begin; i < end; ++i) {
        kernels<A>().load(row.get(), dy.data + i * dy.row * size_of(from), from, dy.col, dy.cols);
        for (int64_t j = 0; j < dy.cols; ++j) part[j] += row.get()[j];
      }
    });
    return gradient_of_bias<A>(dy, dtype, sums);
  });
}

}  // namespace vk
