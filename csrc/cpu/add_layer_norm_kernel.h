// Rows of add_layer_norm: everything about one row happens while it is in L1.
#include <cmath>

namespace vk {
namespace VK_ISA {

template <class A>
void layer_norm_forward(const LayerNormForward<A>& a, int64_t begin, int64_t end, A* scratch) {
  const int64_t width = a.width;
  A *x_buffer = scratch, *branch_buffer = scratch + width, *total_buffer = scratch + 2 * width;
  A* normed_buffer = scratch + 3 * width;
  for (int64_t i = begin; i < end; ++i) {
    const A* value = row_of(a.x, i, width, x_buffer);
    if (a.branch.data) {
      const A* x = value;
      const A* branch = row_of(a.branch, i, width, branch_buffer);
      const A row_scale = a.row_scale ? a.row_scale[i / a.rows_per_sample] : A(1);
      A* total = row_to(a.total, i, total_buffer);
      each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS {
        using V = decltype(lane);
        V add = get<V>(branch + j);
        if (a.branch_bias) add += get<V>(a.branch_bias + j);
        if (a.scale) add *= get<V>(a.scale + j);
        put(total + j, get<V>(x + j) + row_scale * add);
      });
      put_row(a.total, i, total, width);
      if (total == total_buffer) {  // statistics are those of the sum as it is stored
        const OutRows& out = a.total;
        load_row(total_buffer, out.data + i * out.row * size_of(out.dtype), out.dtype, out.col, width);
      }
      value = total;
    }
    const A mean = row_sum(value, width) / A(width);
    Sum<A> squares;
    each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS {
      const auto centred = get<decltype(lane)>(value + j) - mean;
      squares.add(centred * centred);
    });
    const A rstd = A(1) / A(std::sqrt(squares.total() / A(width) + A(a.eps)));
    a.mean[i] = mean;
    a.rstd[i] = rstd;
    A* normed = row_to(a.normed, i, normed_buffer);
    each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS {
      using V = decltype(lane);
      const V y = (get<V>(value + j) - mean) * rstd * get<V>(a.weight + j);
      put(normed + j, a.bias ? y + get<V>(a.bias + j) : y);
    });
    put_row(a.normed, i, normed, width);
  }
}

template <class A>
void layer_norm_backward(const LayerNormBackward<A>& a, int64_t begin, int64_t end, A* partial, A* drow_scale,
                         A* scratch) {
  const int64_t width = a.width;
  A *buffer = scratch, *dy_buffer = scratch + width, *dtotal_buffer = scratch + 2 * width, *inner = scratch + 3 * width;
  A *dx_buffer = scratch + 4 * width, *dbranch_buffer = scratch + 5 * width;
  A *dweight = partial, *dbias = partial + width, *dbranch_bias = partial + 2 * width, *dscale = partial + 3 * width;
  for (int64_t i = begin; i < end; ++i) {
    const A *total = nullptr, *dy = nullptr;
    A mean = 0, rstd = 0, c0 = 0, c1 = 0;
    if (a.dnormed.data) {
      total = row_of(a.total, i, width, buffer);
      dy = row_of(a.dnormed, i, width, dy_buffer);
      mean = a.mean[i];
      rstd = a.rstd[i];
      Sum<A> s0, s1;
      each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS {
        using V = decltype(lane);
        const V product = get<V>(dy + j) * get<V>(a.weight + j);
        put(inner + j, product);  // stored, so that it is rounded alike here and below
        s0.add(product);
        s1.add(product * ((get<V>(total + j) - mean) * rstd));
      });
      c0 = s0.total() / A(width);
      c1 = s1.total() / A(width);
    }
    const A* dtotal = a.dtotal.data ? row_of(a.dtotal, i, width, dtotal_buffer) : nullptr;
    const A row_scale = a.row_scale ? a.row_scale[i / a.rows_per_sample] : A(1);
    A* dx = a.dx.data ? row_to(a.dx, i, dx_buffer) : dx_buffer;
    A* dbranch = a.dbranch.data ? row_to(a.dbranch, i, dbranch_buffer) : nullptr;
    each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS {
      using V = decltype(lane);
      V g{};
      if (dy) {
        const V normalised = (get<V>(total + j) - mean) * rstd, d = get<V>(dy + j);
        if (a.needs_sums[0]) put(dweight + j, get<V>(dweight + j) + d * normalised);
        if (a.needs_sums[1]) put(dbias + j, get<V>(dbias + j) + d);
        g = (get<V>(inner + j) - c0 - normalised * c1) * rstd;
      }
      if (dtotal) g += get<V>(dtotal + j);
      put(dx + j, g);
      V db = g * row_scale;
      if (a.scale) db *= get<V>(a.scale + j);
      if (a.needs_sums[2]) put(dbranch_bias + j, get<V>(dbranch_bias + j) + db);
      if (dbranch) put(dbranch + j, db);
    });
    if (a.dx.data) put_row(a.dx, i, dx, width);
    if (dbranch) put_row(a.dbranch, i, dbranch, width);
    if (a.needs_sums[3] || a.needs_row_scale) {
      const A* branch = row_of(a.branch, i, width, buffer);
      Sum<A> sum;
      each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS {
        using V = decltype(lane);
        V value = get<V>(branch + j);
        if (a.branch_bias) value += get<V>(a.branch_bias + j);
        value *= get<V>(dx + j);
        if (a.needs_sums[3]) put(dscale + j, get<V>(dscale + j) + value * row_scale);
        sum.add(a.scale ? value * get<V>(a.scale + j) : value);
      });
      if (a.needs_row_scale) drow_scale[i] = sum.total();
    }
  }
}

}  // namespace VK_ISA
}  // namespace vk
