// Rows of add_layer_norm: everything about one row happens while it is in L1. T is what all rows lie in, A or Half;
// rows of anything else are converted to A beforehand, and back behind.
#include <cmath>

namespace vk {
namespace VK_ISA {

// total = x + row_scale * scale * (branch + branch_bias), as T has it and in `value`, which is total where T is A;
// returns its sum. The rows at the steps are fetched meanwhile: two streams read and two written are more than the hardware
// follows.
template <class A, class T>
VK_INLINE A add_branch(const LayerNormForward<A>& a, const A* scale, A row_scale, const T* x, int64_t x_step, const T* branch,
                       int64_t branch_step, T* total, A* value) {
  const A* bias = a.branch_bias;
  Sum<A> sum;
  const auto add = [&](auto added, int64_t j) VK_ALWAYS {
    using V = decltype(added);
    V v = get<V>(x + j) + added;
    if constexpr (sizeof(T) != sizeof(A)) {
      v = round_bf16(v);
      put_rounded(total + j, v);
    }
    put(value + j, v);
    sum.add(v);
    __builtin_prefetch(x + x_step + j);
    __builtin_prefetch(branch + branch_step + j);
  };
  if (!bias && !scale && row_scale == A(1)) {
    each<A>(a.width, [&](auto lane, int64_t j) VK_ALWAYS { add(get<decltype(lane)>(branch + j), j); });
  } else {
    each<A>(a.width, [&](auto lane, int64_t j) VK_ALWAYS {
      using V = decltype(lane);
      V added = get<V>(branch + j);
      if (bias) added += get<V>(bias + j);
      if (scale) added *= get<V>(scale + j);
      add(row_scale * added, j);
    });
  }
  return sum.total();
}

template <class A, class T>
void layer_norm_forward_rows(const LayerNormForward<A>& a, int64_t begin, int64_t end, A* scratch) {
  constexpr bool in_place = sizeof(T) == sizeof(A);  // the sum in A is total's own row, where it lies in A
  const int64_t width = a.width;
  A *x_buffer = scratch, *branch_buffer = scratch + width, *total_buffer = scratch + 2 * width;
  A* normed_buffer = scratch + 3 * width;
  for (int64_t i = begin; i < end; ++i) {
    const A* value;
    A value_sum;
    const int64_t sample = i / a.rows_per_sample;
    if (a.branch.data) {
      const T *x = row_in<T>(a.x, i, width, x_buffer), *branch = row_in<T>(a.branch, i, width, branch_buffer);
      T* total = row_out<T>(a.total, i, total_buffer);
      A* sum = in_place ? reinterpret_cast<A*>(total) : total_buffer;
      const bool last = i + 1 == end;
      const int64_t x_step = last || static_cast<const void*>(x) == x_buffer ? 0 : a.x.row;
      const int64_t branch_step = last || static_cast<const void*>(branch) == branch_buffer ? 0 : a.branch.row;
      const A* scale = a.scale ? a.scale + sample * a.scale_step : nullptr;
      const A row_scale = a.row_scale ? a.row_scale[sample] : A(1);
      value_sum = add_branch<A, T>(a, scale, row_scale, x, x_step, branch, branch_step, total, sum);
      if (in_place && sum == total_buffer) {  // statistics are those of the sum as it is stored
        const OutRows& out = a.total;
        put_row(out, i, sum, width);
        load_row(sum, out.data + i * out.row * size_of(out.dtype), out.dtype, out.col, width);
        value_sum = row_sum(sum, width);
      }
      value = sum;
    } else {
      value = row_of(a.x, i, width, x_buffer);
      value_sum = row_sum(value, width);
    }
    const A mean = a.mean ? value_sum / A(width) : A(0);
    Sum<A> squares;
    each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS {
      const auto centred = get<decltype(lane)>(value + j) - mean;
      squares.add(centred * centred);
    });
    const A rstd = A(1) / A(std::sqrt(squares.total() / A(width) + A(a.eps)));
    if (a.mean) a.mean[i] = mean;
    a.rstd[i] = rstd;
    T* normed = row_out<T>(a.normed, i, normed_buffer);
    const A *weight = a.weight + sample * a.weight_step, *bias = a.bias ? a.bias + sample * a.weight_step : nullptr;
    each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS {
      using V = decltype(lane);
      const V y = (get<V>(value + j) - mean) * rstd * get<V>(weight + j);
      put(normed + j, bias ? y + get<V>(bias + j) : y);
    });
    put_back<A>(a.normed, i, normed, width);
  }
}

template <class A>
void layer_norm_forward(const LayerNormForward<A>& a, int64_t begin, int64_t end, A* scratch) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (all_half(a.x) && all_half(a.branch) && all_half(a.normed))
      return layer_norm_forward_rows<A, Half>(a, begin, end, scratch);
  }
  layer_norm_forward_rows<A, A>(a, begin, end, scratch);
}

// What the norm sends back to one row, beside what comes from above: g = dtotal + (dy * weight - c0 - normalised * c1)
// * rstd, c0 and c1 being means over the row; c0 is 0 without `mean`. It goes to `dx` as T has it and to `g` where that is not null; dweight
// and dbias are added to.
template <class A, class T, bool has_dtotal>
VK_INLINE void norm_gradient(int64_t width, const A* weight, const A* mean_of_row, A rstd, const T* total,
                             const T* dy, const T* dtotal, T* dx, A* g, A* dweight, A* dbias) {
  const A mean = mean_of_row ? *mean_of_row : A(0);
  Sum<A> s0, s1;
  each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS {
    using V = decltype(lane);
    const V product = get<V>(dy + j) * get<V>(weight + j);
    s0.add(product);
    s1.add(product * ((get<V>(total + j) - mean) * rstd));
  });
  const A c0 = mean_of_row ? s0.total() / A(width) : A(0), c1 = s1.total() / A(width);
  each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS {
    using V = decltype(lane);
    const V normalised = (get<V>(total + j) - mean) * rstd, d = get<V>(dy + j);
    put(dweight + j, get<V>(dweight + j) + d * normalised);
    put(dbias + j, get<V>(dbias + j) + d);
    V value = (d * get<V>(weight + j) - c0 - normalised * c1) * rstd;
    if constexpr (has_dtotal) value += get<V>(dtotal + j);
    put(dx + j, value);
    if (g) put(g + j, value);
  });
}

// The gradients of branch and its factors for one row, of the gradient g of total.
template <class A, class T>
VK_INLINE void branch_gradient(const LayerNormBackward<A>& a, int64_t i, const A* g, const T* branch, T* dbranch,
                               A* partial, A* drow_scale) {
  const int64_t width = a.width;
  const int64_t sample = i / a.rows_per_sample;
  const A *bias = a.branch_bias, *scale = a.scale ? a.scale + sample * a.scale_step : nullptr;
  const A row_scale = a.row_scale ? a.row_scale[sample] : A(1);
  A* dbranch_bias = a.needs_branch_bias ? partial + 2 * width : nullptr;
  A* dscale = a.needs_scale ? partial + 3 * width : nullptr;
  each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS {
    using V = decltype(lane);
    V db = get<V>(g + j) * row_scale;
    if (scale) db *= get<V>(scale + j);
    if (dbranch_bias) put(dbranch_bias + j, get<V>(dbranch_bias + j) + db);
    if (dbranch) put(dbranch + j, db);
  });
  if (!dscale && !a.needs_row_scale) return;
  Sum<A> sum;
  each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS {
    using V = decltype(lane);
    V value = get<V>(branch + j);
    if (bias) value += get<V>(bias + j);
    value *= get<V>(g + j);
    if (dscale) put(dscale + j, get<V>(dscale + j) + value * row_scale);
    sum.add(scale ? value * get<V>(scale + j) : value);
  });
  if (a.needs_row_scale) drow_scale[i] = sum.total();
}

template <class A, class T>
void layer_norm_backward_rows(const LayerNormBackward<A>& a, int64_t begin, int64_t end, A* partial, A* drow_scale,
                              A* scratch) {
  const int64_t width = a.width;
  A *total_buffer = scratch, *dy_buffer = scratch + width, *dtotal_buffer = scratch + 2 * width;
  A *dx_buffer = scratch + 3 * width, *g_buffer = scratch + 4 * width, *dbranch_buffer = scratch + 5 * width;
  const bool needs_branch = a.dbranch.data || a.needs_branch_bias || a.needs_scale || a.needs_row_scale;
  A* g = needs_branch ? g_buffer : nullptr;
  for (int64_t i = begin; i < end; ++i) {
    const T* dtotal = a.dtotal.data ? row_in<T>(a.dtotal, i, width, dtotal_buffer) : nullptr;
    T* dx = a.dx.data ? row_out<T>(a.dx, i, dx_buffer) : reinterpret_cast<T*>(dx_buffer);
    if (a.dnormed.data) {
      const T *total = row_in<T>(a.total, i, width, total_buffer), *dy = row_in<T>(a.dnormed, i, width, dy_buffer);
      const A *weight = a.weight + i / a.rows_per_sample * a.weight_step, *mean = a.mean ? a.mean + i : nullptr;
      const auto gradient = [&](auto has_dtotal) VK_ALWAYS {
        norm_gradient<A, T, decltype(has_dtotal)::value>(width, weight, mean, a.rstd[i], total, dy, dtotal, dx, g,
                                                         partial, partial + width);
      };
      dtotal ? gradient(True{}) : gradient(False{});
    } else {
      each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS {
        const auto value = get<decltype(lane)>(dtotal + j);
        put(dx + j, value);
        if (g) put(g + j, value);
      });
    }
    if (a.dx.data) put_back<A>(a.dx, i, dx, width);
    if (needs_branch) {
      const T* branch = a.branch.data ? row_in<T>(a.branch, i, width, total_buffer) : nullptr;
      T* dbranch = a.dbranch.data ? row_out<T>(a.dbranch, i, dbranch_buffer) : nullptr;
      branch_gradient<A, T>(a, i, g, branch, dbranch, partial, drow_scale);
      if (dbranch) put_back<A>(a.dbranch, i, dbranch, width);
    }
  }
}

template <class A>
void layer_norm_backward(const LayerNormBackward<A>& a, int64_t begin, int64_t end, A* partial, A* drow_scale,
                         A* scratch) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (all_half(a.dtotal) && all_half(a.dnormed) && all_half(a.total) && all_half(a.branch) && all_half(a.dx) &&
        all_half(a.dbranch))
      return layer_norm_backward_rows<A, Half>(a, begin, end, partial, drow_scale, scratch);
  }
  layer_norm_backward_rows<A, A>(a, begin, end, partial, drow_scale, scratch);
}

}  // namespace VK_ISA
}  // namespace vk
