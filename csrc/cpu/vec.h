// One set of vector operations, written once on the compiler's vector extensions and compiled for each instruction set
// by isa_*.cpp (which set VK_ISA and VK_VECTOR_BYTES). Nothing here may instantiate a template of the standard library:
// the linker could then keep one instruction set's copy for all.
#include <cstdint>
#include <cstring>

namespace vk {
namespace VK_ISA {

#define VK_INLINE inline __attribute__((always_inline))
#define VK_ALWAYS __attribute__((always_inline))  // on lambdas, after their parameters

template <class A>
struct Lanes {
  typedef A Vec __attribute__((vector_size(VK_VECTOR_BYTES)));
  static constexpr int64_t count = VK_VECTOR_BYTES / sizeof(A);
};
template <class A>
using Vec = typename Lanes<A>::Vec;
typedef int32_t VecI __attribute__((vector_size(VK_VECTOR_BYTES)));
constexpr int kFloats = VK_VECTOR_BYTES / 4;
typedef uint16_t VecH __attribute__((vector_size(VK_VECTOR_BYTES / 2)));
typedef uint8_t VecB __attribute__((vector_size(VK_VECTOR_BYTES / 4)));
typedef uint32_t VecU __attribute__((vector_size(VK_VECTOR_BYTES)));

template <class A>
VK_INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A>
VK_INLINE void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}
// A store that leaves nothing in the caches; p is aligned to a whole vector. Other threads may read it after `end_past_caches`.
VK_INLINE void store_past_caches(float* p, Vec<float> v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<Vec<float>*>(p));
#elif !defined(__x86_64__)
  store(p, v);
#elif VK_VECTOR_BYTES == 64
  __builtin_ia32_movntps512(p, v);
#elif VK_VECTOR_BYTES == 32
  __builtin_ia32_movntps256(p, v);
#else
  __builtin_ia32_movntps(p, v);
#endif
}
VK_INLINE void end_past_caches() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}
template <class A>
VK_INLINE Vec<A> splat(A a) {
  return a - Vec<A>{};
}
template <class A, class F>
VK_INLINE A fold(Vec<A> v, F combine) {  // halves with halves: lane by lane, each step would wait for the one before
  constexpr int64_t count = Lanes<A>::count;
#pragma GCC unroll 4
  for (int64_t half = count / 2; half > 0; half /= 2) {
    Vec<A> other;
#pragma GCC unroll 16
    for (int64_t i = 0; i < count; ++i) other[i] = v[(i + half) % count];
    v = combine(v, other);
  }
  return v[0];
}
template <class A>
VK_INLINE A sum(Vec<A> v) {
  return fold<A>(v, [](Vec<A> a, Vec<A> b) VK_ALWAYS { return a + b; });
}
template <class A>
VK_INLINE A largest(Vec<A> v) {
  return fold<A>(v, [](Vec<A> a, Vec<A> b) VK_ALWAYS { return a > b ? a : b; });
}
template <class A>
VK_INLINE Vec<A> vmax(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

// ---- one body for whole vectors and for what is left of a row: V is Vec<A> or A

template <class V, class A>
VK_INLINE V get(const A* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class A>
VK_INLINE void put(A* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
template <class A, class F>
VK_INLINE void each(int64_t width, F body) {
  int64_t j = 0;
  for (; j + Lanes<A>::count <= width; j += Lanes<A>::count) body(Vec<A>{}, j);
  for (; j < width; ++j) body(A{}, j);
}
template <class A>
struct Sum {  // four sums take turns: in one alone, each addition would wait for the one before
  Vec<A> next{}, second{}, third{}, last{};
  A rest = 0;
  VK_INLINE void add(Vec<A> v) {
    const Vec<A> added = next + v;
    next = second;
    second = third;
    third = last;
    last = added;
  }
  VK_INLINE void add(A v) { rest += v; }
  VK_INLINE A total() const { return sum<A>((next + second) + (third + last)) + rest; }
};
template <class A>
VK_INLINE A row_sum(const A* row, int64_t width) {
  Sum<A> sum;
  each<A>(width, [&](auto lane, int64_t j) VK_ALWAYS { sum.add(get<decltype(lane)>(row + j)); });
  return sum.total();
}

// ---- exp. float: 2^n * polynomial of the rest (Cody and Waite's reduction), 1 ulp or so; NaN stays NaN, -inf gives 0.

VK_INLINE Vec<float> vexp(Vec<float> x) {
  const Vec<float> low = splat(-87.33f), high = splat(88.72f);
  Vec<float> c = x < low ? low : x;
  c = c > high ? high : c;
  const Vec<float> magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const Vec<float> shifted = c * 1.44269504f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (c - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = splat(1.98756915e-4f);
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * r * r + r + 1.f;
  VecI bits = (VecI)p + (((VecI)shifted - (VecI)magic) << 23);
  const Vec<float> value = x < low ? Vec<float>{} : (Vec<float>)bits;
  return x == x ? (x > high ? splat(__builtin_inff()) : value) : x;
}
VK_INLINE Vec<double> vexp(Vec<double> x) {
  for (int64_t i = 0; i < Lanes<double>::count; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// ---- the normal distribution in double: its cumulative function and density at h (float's is in activations.h)

VK_INLINE void normal(Vec<double> h, Vec<double>& cdf, Vec<double>& pdf) {
  for (int64_t i = 0; i < Lanes<double>::count; ++i) {
    cdf[i] = 0.5 * __builtin_erfc(-h[i] * 0.70710678118654752440);
    pdf[i] = __builtin_exp(-0.5 * h[i] * h[i]) * 0.39894228040143267794;
  }
}

// ---- rows of any dtype to and from rows of A

VK_INLINE float from_bf16(uint16_t v) {
  const uint32_t bits = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
VK_INLINE uint16_t to_bf16(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return f == f ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : uint16_t(0x7fc0);
}

VK_INLINE VecU widen(const uint16_t* p) {
  VecU wide;
#pragma GCC unroll 16
  for (int64_t i = 0; i < kFloats; ++i) wide[i] = p[i];  // one widening load, where __builtin_convertvector makes five
  return wide;
}
VK_INLINE Vec<float> from_bf16(const uint16_t* p) { return (Vec<float>)(widen(p) << 16); }
// The floats that bfloat16 has for these, to nearest, ties to even; NaN stays NaN.
VK_INLINE Vec<float> round_bf16(Vec<float> v) {
  VecU bits = (VecU)v;
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return (Vec<float>)(v == v ? bits : VecU{} + 0x7fc00000u);
}
VK_INLINE VecU bf16_bits(Vec<float> v) { return (VecU)round_bf16(v) >> 16; }
VK_INLINE float round_bf16(float v) { return from_bf16(to_bf16(v)); }

// bfloat16 in memory, floats in registers
struct Half {
  uint16_t bits;
};
template <class V>
VK_INLINE V get(const Half* p) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return from_bf16(p->bits);
  } else {
    return from_bf16(&p->bits);
  }
}
// `put` of what `round_bf16` returns
VK_INLINE void put_rounded(Half* p, float v) { p->bits = to_bf16(v); }
VK_INLINE void put_rounded(Half* p, Vec<float> v) {
  const VecH half = __builtin_convertvector((VecU)v >> 16, VecH);
  std::memcpy(p, &half, sizeof half);
}
template <class V>
VK_INLINE void put(Half* p, V v) {
  put_rounded(p, round_bf16(v));
}

template <class T>
VK_INLINE const T* at(const char* p, int64_t i) {
  return reinterpret_cast<const T*>(p) + i;
}

template <class A>
inline void load_row(A* out, const char* in, DType dtype, int64_t step, int64_t count) {
  if (count == 0) return;  // an empty tensor's pointer is null, which memcpy may not be given
  int64_t i = 0;
  switch (dtype) {
    case DType::f32:
      if (step == 1 && sizeof(A) == 4) {
        std::memcpy(out, in, size_t(count) * sizeof(A));
      } else {
        for (; i < count; ++i) out[i] = A(*at<float>(in, i * step));
      }
      break;
    case DType::f64:
      for (; i < count; ++i) out[i] = A(*at<double>(in, i * step));
      break;
    case DType::bf16:
      if (step == 1 && sizeof(A) == 4) {
        for (; i + kFloats <= count; i += kFloats) {
          const Vec<float> values = get<Vec<float>>(at<Half>(in, i));
          std::memcpy(out + i, &values, sizeof values);
        }
      }
      for (; i < count; ++i) out[i] = A(from_bf16(*at<uint16_t>(in, i * step)));
      break;
    case DType::f16:
      for (; i < count; ++i) out[i] = A(*at<_Float16>(in, i * step));
      break;
    case DType::boolean:  // a mask: what may not be seen is -inf
      for (; i < count; ++i) out[i] = *at<uint8_t>(in, i * step) ? A(0) : -A(__builtin_inf());
      break;
    case DType::u8:
      if (step == 1 && sizeof(A) == 4) {
        for (; i + kFloats <= count; i += kFloats) {
          VecB pixels;
          std::memcpy(&pixels, at<uint8_t>(in, i), sizeof pixels);
          const Vec<float> values = __builtin_convertvector(pixels, Vec<float>);
          std::memcpy(out + i, &values, sizeof values);
        }
      }
      for (; i < count; ++i) out[i] = A(*at<uint8_t>(in, i * step));
      break;
  }
}

template <class A>
inline void store_row(char* out, DType dtype, int64_t step, const A* in, int64_t count) {
  if (count == 0) return;
  int64_t i = 0;
  switch (dtype) {
    case DType::f32:
      if (step == 1 && sizeof(A) == 4) {
        std::memcpy(out, in, size_t(count) * sizeof(A));
      } else {
        for (; i < count; ++i) reinterpret_cast<float*>(out)[i * step] = float(in[i]);
      }
      break;
    case DType::f64:
      for (; i < count; ++i) reinterpret_cast<double*>(out)[i * step] = double(in[i]);
      break;
    case DType::bf16:
      if (step == 1 && sizeof(A) == 4) {
        for (; i + kFloats <= count; i += kFloats) {
          Vec<float> v;
          std::memcpy(&v, in + i, sizeof v);
          put(reinterpret_cast<Half*>(out) + i, v);
        }
      }
      for (; i < count; ++i) reinterpret_cast<uint16_t*>(out)[i * step] = to_bf16(float(in[i]));
      break;
    case DType::f16:
      for (; i < count; ++i) reinterpret_cast<_Float16*>(out)[i * step] = _Float16(in[i]);
      break;
    default:
      break;
  }
}

template <class A>
void scale_row(A* row, A factor, A offset, int64_t count) {
  each<A>(count, [&](auto lane, int64_t j) VK_ALWAYS { put(row + j, get<decltype(lane)>(row + j) * factor + offset); });
}

// The row itself where it is a packed row of A already, or a converted copy of it in `buffer`.
template <class A>
VK_INLINE const A* row_of(const Rows& rows, int64_t i, int64_t width, A* buffer) {
  const char* data = rows.data + i * rows.row * size_of(rows.dtype);
  if (rows.dtype == same_dtype<A>() && rows.col == 1) return reinterpret_cast<const A*>(data);
  load_row(buffer, data, rows.dtype, rows.col, width);
  return buffer;
}
// Where a row of results is computed: in place, or in `buffer` until `put_row` converts it.
template <class A>
VK_INLINE A* row_to(const OutRows& rows, int64_t i, A* buffer) {
  if (rows.dtype == same_dtype<A>() && rows.col == 1) {
    return reinterpret_cast<A*>(rows.data) + i * rows.row;
  }
  return buffer;
}
template <class A>
VK_INLINE void put_row(const OutRows& rows, int64_t i, const A* row, int64_t width) {
  char* data = rows.data + i * rows.row * size_of(rows.dtype);
  if (reinterpret_cast<const char*>(row) != data) store_row(data, rows.dtype, rows.col, row, width);
}

// ---- the same for a kernel whose rows all lie in T: A, where others are converted, or Half, where none may be

struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};
template <class AnyRows>
VK_INLINE bool all_half(const AnyRows& rows) {  // or absent
  return !rows.data || (rows.dtype == DType::bf16 && rows.col == 1);
}
template <class T, class A>
VK_INLINE const T* row_in(const Rows& rows, int64_t i, int64_t width, A* buffer) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return row_of(rows, i, width, buffer);
  } else {
    return at<T>(rows.data, i * rows.row);
  }
}
template <class T, class A>
VK_INLINE T* row_out(const OutRows& rows, int64_t i, A* buffer) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return row_to(rows, i, buffer);
  } else {
    return reinterpret_cast<T*>(rows.data) + i * rows.row;
  }
}
template <class A, class T>
VK_INLINE void put_back(const OutRows& rows, int64_t i, const T* row, int64_t width) {
  if constexpr (sizeof(T) == sizeof(A)) put_row(rows, i, row, width);
}

}  // namespace VK_ISA
}  // namespace vk
