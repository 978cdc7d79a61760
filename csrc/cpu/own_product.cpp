// The extension's own products: who packs what, how threads share it, and what is multiplied at a time.
#include "gemm.h"

namespace vk {

Tensor space_for_panels(const Tensor& like, int64_t k, int64_t n) {
  Product p{};
  p.k = k;
  p.n = n;
  p.dtype = dtype_of(like);
  p.split = true;
  const ProductSizes sizes = kernels<float>().product_sizes(p);
  return empty({sizes.panels * sizes.panel}, ScalarType::Float);
}

namespace {

Parts as_parts(const Parted& b) {
  const Matrix& first = b.parts[0];
  Parts found{{}, first.rows, first.cols, first.row, first.col};
  for (size_t i = 0; i < b.parts.size(); ++i) found.data[i] = b.parts[i].data;
  return found;
}

// Whether a product is the gradient of a large weight. Nothing reads it before the optimizer does: past the caches, what it
// would overwrite is not fetched, and what they hold stays.
bool goes_past_caches(const Product& p) {
  constexpr int64_t fewest = 1 << 15, line = 16;  // elements
  return p.a.col != 1 && p.then == Then::store && p.out_dtype == DType::f32 && p.m * p.n >= fewest && p.n % line == 0 &&
         reinterpret_cast<uintptr_t>(p.out) % (4 * line) == 0;
}

constexpr int64_t kWorthAThread = 1 << 18;  // multiplications

void multiply_few(const Product& p, bool terms, float* sums) {
  const Kernels<float>& kernel = kernels<float>();
  const FewSizes sizes = kernel.few_sizes(p, terms);
  const Buffer<float> packed(sizes.packed);
  kernel.few_pack(p, terms, packed.get());
  const int64_t work = p.m * p.n * p.k / sizes.tasks;
  parallel(sizes.tasks, kWorthAThread / std::max<int64_t>(work, 1), [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch(sizes.scratch);
    kernel.few_product(p, terms, packed.get(), begin, end, sums, scratch.get());
  });
}

// Some terms of a product by panels of B, which may be there. `sums`, [columns] or null, are added to.
void multiply_panels(Product p, int64_t columns, float* sums, float* panels) {
  const Kernels<float>& kernel = kernels<float>();
  const ProductSizes sizes = kernel.product_sizes(p);
  // Rows are cut the same way for any number of threads, for the sake of the sums.
  constexpr int64_t most_parts = 32;
  const int64_t tiles = (p.m + sizes.rows - 1) / sizes.rows, blocks = (tiles + sizes.tiles - 1) / sizes.tiles;
  // Of a few blocks for the matrix unit each panel is made where it is used, in cache, and again for each block. But rows of
  // bfloat16 along k, which take little time to multiply, are read panel beside panel, not each page again for two lines.
  const bool across = sizes.by_tiles && p.dtype == DType::bf16 && p.b.row != 1;
  const bool in_turn = sizes.by_tiles && p.a.col == 1 && !panels && blocks <= 3 && !across;
  int64_t parts = in_turn ? blocks : 1;
  while (parts < most_parts && parts * sizes.tiles < tiles) parts *= 2;
  std::vector<float> own_sums(sums ? parts * columns : 0);
  const auto sums_of = [&](int64_t part) { return sums ? own_sums.data() + part * columns : nullptr; };
  const int64_t threads = torch::stable::get_num_threads();
  if (!panels) p.panel_step = sizes.panel;
  // f(rows, their end, panels, their end, part) for each part of the rows and group of panels
  const auto each_task = [&](int64_t groups, const auto& f) {
    parallel(parts * groups, 1, [&](int64_t begin, int64_t end) {
      const Buffer<float> scratch(sizes.scratch), own(in_turn ? sizes.panel : 1);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task / groups, group = task % groups;
        const int64_t row = tiles * part / parts * sizes.rows, row_end = tiles * (part + 1) / parts * sizes.rows;
        const int64_t first = sizes.panels * group / groups, last = sizes.panels * (group + 1) / groups;
        f(row, std::min(row_end, p.m), first, last, sums_of(part), scratch.get(), own.get());
      }
    });
  };
  if (in_turn) {
    int64_t groups = (threads + parts - 1) / parts;
    while (parts * groups % threads != 0 && groups < threads) ++groups;  // for equal shares
    each_task(std::min(groups, sizes.panels), [&](int64_t row, int64_t row_end, int64_t first, int64_t last, float* to,
                                                  float* scratch, float* own) {
      for (int64_t i = first; i < last; ++i) {
        kernel.product_pack(p, own, i, i + 1);
        kernel.product(p, own, row, row_end, i, i + 1, to, scratch, i > first);
      }
    });
  } else if (parts == 1 && p.a.col == 1 && !panels && !across) {
    // so few rows that each panel is read once, and may stay in cache
    constexpr int64_t cached = 1 << 17;                // floats, half of a usual L2
    const int64_t fair = (sizes.panels + threads - 1) / threads;
    const int64_t some = std::clamp<int64_t>(cached / sizes.panel, 1, fair), tasks = (sizes.panels + some - 1) / some;
    parallel(tasks, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> scratch(sizes.scratch), own(some * sizes.panel);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * some, last = std::min(first + some, sizes.panels);
        kernel.product_pack(p, own.get(), first, last);
        kernel.product(p, own.get(), 0, p.m, first, last, sums_of(0), scratch.get(), false);
      }
    });
  } else {
    std::optional<Tensor> space;
    if (!panels) {
      space = empty({sizes.panels * sizes.panel}, ScalarType::Float);
      panels = reinterpret_cast<float*>(bytes(*space));
      parallel(sizes.panels, 1, [&](int64_t begin, int64_t end) {
        kernel.product_pack(p, panels + begin * p.panel_step, begin, end);
      });
    }
    const int64_t wanted = threads * (p.a.col == 1 && !sizes.by_tiles ? 3 : 1);  // for equal shares
    each_task(std::clamp<int64_t>((wanted + parts - 1) / parts, 1, sizes.panels),
              [&](int64_t row, int64_t row_end, int64_t first, int64_t last, float* to, float* scratch, float*) {
                kernel.product(p, panels + first * p.panel_step, row, row_end, first, last, to, scratch, false);
              });
  }
  if (!sums) return;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t j = 0; j < columns; ++j) sums[j] += own_sums[part * columns + j];
  }
}

// All terms, as many at a time as go best. `panels` are of all terms, or null.
void multiply_terms(const Product& p, int64_t columns, float* sums, float* panels) {
  const ProductSizes sizes = kernels<float>().product_sizes(p);
  std::optional<Tensor> between;
  if (p.dtype == DType::bf16 && p.out_dtype != DType::f32 && sizes.depth < p.k) {
    between = empty({p.m, p.n}, ScalarType::Float);
  }
  for (int64_t begin = 0; begin < p.k; begin += sizes.depth) {
    Product some = p;
    some.begin = begin;
    some.k = std::min(sizes.depth, p.k - begin);
    some.a.data += begin * p.a.col * size_of(p.dtype);
    some.panel_step = sizes.panel;
    some.packed_from = panels ? begin : 0;
    some.add = begin > 0;
    if (p.dtype == DType::bf16 && sizes.depth < p.k) {
      some.between = reinterpret_cast<float*>(between ? bytes(*between) : p.out);
      some.ends = begin + sizes.depth >= p.k;
    }
    some.past_caches = p.past_caches && sizes.depth >= p.k;  // else the next terms read it
    if (begin > 0) some.bias = nullptr;
    multiply_panels(some, columns, sums, panels);
  }
}

}  // namespace

void multiply(Way way, const Tensor& out, const Matrix& a, const Parted& b, const std::optional<Tensor>& bias,
              const Follow& follow, const Tensor* b_panels) {
  const DType dtype = dtype_of(a.tensor);
  const Vector<float> bias_values(bias, dtype);
  const auto data = [](const Tensor* t) { return t ? bytes(*t) : nullptr; };
  bool not_finite = false;
  Product p{a.rows,
            follow.then == Then::gate ? b.cols / 2 : b.cols,
            a.cols,
            dtype,
            dtype_of(b.parts[0].tensor),
            dtype_of(out),
            {a.data, a.row, a.col},
            as_parts(b),
            bias_values.get(),
            follow.then,
            follow.activation,
            bytes(out),
            data(follow.pre),
            data(follow.activated),
            follow.activated_in_panels,
            true,
            &not_finite};
  p.past_caches = goes_past_caches(p);
  const int64_t columns = p.then == Then::gate_backward ? 2 * p.n : p.n;  // of out
  if (follow.sums) follow.sums->assign(columns, 0);
  float* const sums = follow.sums ? follow.sums->data() : nullptr;
  if (way != Way::panels) return multiply_few(p, way == Way::few_terms, sums);
  float* const panels = b_panels ? reinterpret_cast<float*>(bytes(*b_panels)) : nullptr;
  multiply_terms(p, columns, sums, panels);
  if (not_finite && !panels) {  // panels have none but pieces
    p.split = false;
    if (sums) std::fill_n(sums, columns, 0);
    multiply_terms(p, columns, sums, nullptr);
  }
}

}  // namespace vk
