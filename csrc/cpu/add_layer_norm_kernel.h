// Rows of add_layer_norm: everything about one row happens while it is in L1.
#include <cmath>

namespace vk {
namespace VK_ISA {

// total = x + row_scale * scale * (branch + branch_bias)
template <class A>
VK_INLINE void add_row(A* total, const A* x, const A* branch, const A* branch_bias, const A* scale, A row_scale,
                       int64_t width) {
  if (branch_bias && scale) {
    VK_IVDEP
    for (int64_t j = 0; j < width; ++j) total[j] = x[j] + row_scale * (scale[j] * (branch[j] + branch_bias[j]));
  } else if (branch_bias) {
    VK_IVDEP
    for (int64_t j = 0; j < width; ++j) total[j] = x[j] + row_scale * (branch[j] + branch_bias[j]);
  } else if (scale) {
    VK_IVDEP
    for (int64_t j = 0; j < width; ++j) total[j] = x[j] + row_scale * (scale[j] * branch[j]);
  } else {
    VK_IVDEP
    for (int64_t j = 0; j < width; ++j) total[j] = x[j] + row_scale * branch[j];
  }
}

template <class A>
VK_INLINE A row_sum(const A* row, int64_t width) {
  constexpr int64_t lanes = Lanes<A>::count;
  Vec<A> s0{}, s1{};
  int64_t j = 0;
  for (; j + 2 * lanes <= width; j += 2 * lanes) {
    s0 += load(row + j);
    s1 += load(row + j + lanes);
  }
  A s = sum<A>(s0 + s1);
  for (; j < width; ++j) s += row[j];
  return s;
}

template <class A>
VK_INLINE A row_squares(const A* row, A mean, int64_t width) {
  constexpr int64_t lanes = Lanes<A>::count;
  Vec<A> s0{}, s1{};
  int64_t j = 0;
  for (; j + 2 * lanes <= width; j += 2 * lanes) {
    const Vec<A> d0 = load(row + j) - mean, d1 = load(row + j + lanes) - mean;
    s0 += d0 * d0;
    s1 += d1 * d1;
  }
  A s = sum<A>(s0 + s1);
  for (; j < width; ++j) s += (row[j] - mean) * (row[j] - mean);
  return s;
}

template <class A>
void layer_norm_forward(const LayerNormForward<A>& a, int64_t begin, int64_t end, A* scratch) {
  const int64_t width = a.width;
  A *x_buffer = scratch, *branch_buffer = scratch + width, *total_buffer = scratch + 2 * width;
  A* normed_buffer = scratch + 3 * width;
  for (int64_t i = begin; i < end; ++i) {
    const A* value = row_of(a.x, i, width, x_buffer);
    if (a.branch.data) {
      const A* branch = row_of(a.branch, i, width, branch_buffer);
      const A row_scale = a.row_scale ? a.row_scale[i / a.rows_per_sample] : A(1);
      A* total = row_to(a.total, i, total_buffer);
      add_row(total, value, branch, a.branch_bias, a.scale, row_scale, width);
      put_row(a.total, i, total, width);
      if (total == total_buffer) {  // statistics are those of the sum as it is stored
        const OutRows& out = a.total;
        load_row(total_buffer, out.data + i * out.row * size_of(out.dtype), out.dtype, out.col, width);
      }
      value = total;
    }
    const A mean = row_sum(value, width) / A(width);
    const A rstd = A(1) / A(std::sqrt(row_squares(value, mean, width) / A(width) + A(a.eps)));
    a.mean[i] = mean;
    a.rstd[i] = rstd;
    A* normed = row_to(a.normed, i, normed_buffer);
    if (a.bias) {
      for (int64_t j = 0; j < width; ++j) normed[j] = (value[j] - mean) * rstd * a.weight[j] + a.bias[j];
    } else {
      for (int64_t j = 0; j < width; ++j) normed[j] = (value[j] - mean) * rstd * a.weight[j];
    }
    put_row(a.normed, i, normed, width);
  }
}

template <class A>
void layer_norm_backward(const LayerNormBackward<A>& a, int64_t begin, int64_t end, A* partial, A* drow_scale,
                         A* scratch) {
  constexpr int64_t lanes = Lanes<A>::count;
  const int64_t width = a.width;
  A *total_buffer = scratch, *dy_buffer = scratch + width, *g = scratch + 2 * width, *buffer = scratch + 3 * width;
  A *dweight = partial, *dbias = partial + width, *dbranch_bias = partial + 2 * width, *dscale = partial + 3 * width;
  for (int64_t i = begin; i < end; ++i) {
    if (a.dnormed.data) {
      const A* total = row_of(a.total, i, width, total_buffer);
      const A* dy = row_of(a.dnormed, i, width, dy_buffer);
      const A mean = a.mean[i], rstd = a.rstd[i];
      Vec<A> s0{}, s1{};  // sums of dy * weight and of dy * weight * normalised
      int64_t j = 0;
      for (; j + lanes <= width; j += lanes) {
        const Vec<A> inner = load(dy + j) * load(a.weight + j);
        store(g + j, inner);
        s0 += inner;
        s1 += inner * ((load(total + j) - mean) * rstd);
      }
      A c0 = sum<A>(s0), c1 = sum<A>(s1);
      for (; j < width; ++j) {
        const A inner = g[j] = dy[j] * a.weight[j];
        c0 += inner;
        c1 += inner * ((total[j] - mean) * rstd);
      }
      c0 /= A(width);
      c1 /= A(width);
      if (a.needs_sums[0]) {
        for (j = 0; j < width; ++j) dweight[j] += dy[j] * ((total[j] - mean) * rstd);
      }
      if (a.needs_sums[1]) {
        for (j = 0; j < width; ++j) dbias[j] += dy[j];
      }
      for (j = 0; j < width; ++j) g[j] = (g[j] - c0 - (total[j] - mean) * rstd * c1) * rstd;
    } else {
      for (int64_t j = 0; j < width; ++j) g[j] = 0;
    }
    if (a.dtotal.data) {
      const A* dtotal = row_of(a.dtotal, i, width, dy_buffer);
      for (int64_t j = 0; j < width; ++j) g[j] += dtotal[j];
    }
    if (a.dx.data) put_row(a.dx, i, g, width);

    const A row_scale = a.row_scale ? a.row_scale[i / a.rows_per_sample] : A(1);
    if (a.dbranch.data || a.needs_sums[2]) {
      A* db = a.dbranch.data ? row_to(a.dbranch, i, buffer) : buffer;
      if (a.scale) {
        for (int64_t j = 0; j < width; ++j) db[j] = g[j] * row_scale * a.scale[j];
      } else {
        for (int64_t j = 0; j < width; ++j) db[j] = g[j] * row_scale;
      }
      if (a.needs_sums[2]) {
        for (int64_t j = 0; j < width; ++j) dbranch_bias[j] += db[j];
      }
      if (a.dbranch.data) put_row(a.dbranch, i, db, width);
    }
    if (a.needs_sums[3] || a.needs_row_scale) {
      const A* branch = row_of(a.branch, i, width, total_buffer);
      A* value = buffer;  // branch + branch_bias
      for (int64_t j = 0; j < width; ++j) value[j] = branch[j] + (a.branch_bias ? a.branch_bias[j] : A(0));
      if (a.needs_sums[3]) {
        for (int64_t j = 0; j < width; ++j) dscale[j] += g[j] * row_scale * value[j];
      }
      if (a.needs_row_scale) {
        for (int64_t j = 0; j < width; ++j) value[j] *= g[j] * (a.scale ? a.scale[j] : A(1));
        drow_scale[i] = row_sum(value, width);
      }
    }
  }
}

}  // namespace VK_ISA
}  // namespace vk
