// Vectors of one instruction set and the functions on them that the kernels use.
//
// With GCC and Clang a vector is a compiler vector (which also becomes NEON on ARM); elsewhere an
// array with loops that the compiler vectorises. Intrinsics appear only where neither finds the
// instruction. Everything lives in the namespace of the instruction set (see isa.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "macros.h"

#ifndef MMVIM_ISA
#error "compile with -DMMVIM_ISA=portable|avx2|avx512"
#endif

#if defined(__GNUC__) && !defined(MMVIM_NO_VECTOR_EXTENSIONS)
#define MMVIM_VECTOR_EXTENSIONS
#endif

#if defined(__AVX2__) && defined(MMVIM_VECTOR_EXTENSIONS)
#include <immintrin.h>
#define MMVIM_AVX2_INTRINSICS
#if defined(__AVX512F__)
#define MMVIM_AVX512_INTRINSICS
#endif
#endif

#if defined(__AVX512F__)
#define MMVIM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MMVIM_VECTOR_BYTES 32
#else
#define MMVIM_VECTOR_BYTES 16
#endif

namespace mmvim {
namespace MMVIM_ISA {

template <class S>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

#if defined(MMVIM_VECTOR_EXTENSIONS)

template <class S>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(MMVIM_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(MMVIM_VECTOR_BYTES)));
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(MMVIM_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(MMVIM_VECTOR_BYTES)));
};

template <class S>
MMVIM_HD typename Simd<S>::V set1(S x) {
  return x - typename Simd<S>::V{};
}
template <class S>
MMVIM_HD typename Simd<S>::V vector_if(typename Simd<S>::I mask, typename Simd<S>::V yes,
                                       typename Simd<S>::V no) {
  return mask ? yes : no;
}
template <class S>
MMVIM_HD typename Simd<S>::I bits_of(typename Simd<S>::V v) {
  return (typename Simd<S>::I)v;
}
template <class S>
MMVIM_HD typename Simd<S>::V from_bits(typename Simd<S>::I v) {
  return (typename Simd<S>::V)v;
}

#else

template <class S, class Derived>
struct Lanes {
  static constexpr int kWidth = MMVIM_VECTOR_BYTES / sizeof(S);
  S lane[kWidth];
  S operator[](int i) const { return lane[i]; }
#define MMVIM_LANEWISE(op)                                                  \
  friend MMVIM_HD Derived operator op(const Derived& a, const Derived& b) { \
    Derived r;                                                              \
    for (int i = 0; i < kWidth; ++i) r.lane[i] = a.lane[i] op b.lane[i];    \
    return r;                                                               \
  }
  MMVIM_LANEWISE(+)
  MMVIM_LANEWISE(-)
  MMVIM_LANEWISE(*)
#undef MMVIM_LANEWISE
  friend MMVIM_HD Derived& operator+=(Derived& a, const Derived& b) { return a = a + b; }
  friend MMVIM_HD Derived& operator*=(Derived& a, const Derived& b) { return a = a * b; }
};

template <class S>
struct IntVector : Lanes<typename IntOf<S>::type, IntVector<S> > {
  friend MMVIM_HD IntVector operator<<(const IntVector& a, int count) {
    IntVector r;
    for (int i = 0; i < IntVector::kWidth; ++i) {
      using U = std::make_unsigned_t<typename IntOf<S>::type>;
      r.lane[i] = static_cast<typename IntOf<S>::type>(static_cast<U>(a.lane[i]) << count);
    }
    return r;
  }
};

template <class S>
struct FloatVector : Lanes<S, FloatVector<S> > {
  friend MMVIM_HD FloatVector operator/(const FloatVector& a, const FloatVector& b) {
    FloatVector r;
    for (int i = 0; i < FloatVector::kWidth; ++i) r.lane[i] = a.lane[i] / b.lane[i];
    return r;
  }
#define MMVIM_COMPARE(op)                                                                      \
  friend MMVIM_HD IntVector<S> operator op(const FloatVector& a, const FloatVector& b) {       \
    IntVector<S> r;                                                                            \
    for (int i = 0; i < FloatVector::kWidth; ++i) r.lane[i] = a.lane[i] op b.lane[i] ? -1 : 0; \
    return r;                                                                                  \
  }
  MMVIM_COMPARE(<)
  MMVIM_COMPARE(>)
#undef MMVIM_COMPARE
};

template <class S>
struct Simd {
  using V = FloatVector<S>;
  using I = IntVector<S>;
};

template <class S>
MMVIM_HD FloatVector<S> set1(S x) {
  FloatVector<S> r;
  for (int i = 0; i < FloatVector<S>::kWidth; ++i) r.lane[i] = x;
  return r;
}
template <class S>
MMVIM_HD FloatVector<S> vector_if(const IntVector<S>& mask, const FloatVector<S>& yes,
                                  const FloatVector<S>& no) {
  FloatVector<S> r;
  for (int i = 0; i < FloatVector<S>::kWidth; ++i) {
    r.lane[i] = mask.lane[i] ? yes.lane[i] : no.lane[i];
  }
  return r;
}
template <class S>
MMVIM_HD IntVector<S> bits_of(const FloatVector<S>& v) {
  IntVector<S> r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
template <class S>
MMVIM_HD FloatVector<S> from_bits(const IntVector<S>& v) {
  FloatVector<S> r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

#endif

template <class S>
constexpr int kLanes = MMVIM_VECTOR_BYTES / static_cast<int>(sizeof(S));

// Aligned.
template <class S>
MMVIM_HD typename Simd<S>::V load(const S* p) {
  return *reinterpret_cast<const typename Simd<S>::V*>(p);
}
template <class S>
MMVIM_HD void store(S* p, typename Simd<S>::V v) {
  *reinterpret_cast<typename Simd<S>::V*>(p) = v;
}

template <class S>
MMVIM_HD typename Simd<S>::V load_unaligned(const S* p) {
  typename Simd<S>::V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
MMVIM_HD void store_unaligned(S* p, typename Simd<S>::V v) {
  std::memcpy(p, &v, sizeof v);
}

// Brings the line at p, which need not exist, closer.
MMVIM_HD void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#endif
}

// Horizontal sum, as a tree.
template <class S>
MMVIM_HD S sum_lanes(typename Simd<S>::V v) {
  S lane[kLanes<S>];
  std::memcpy(lane, &v, sizeof lane);
  for (int half = kLanes<S> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}
#if defined(MMVIM_AVX2_INTRINSICS)
MMVIM_HD float sum_lanes_128(__m128 q) {
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
template <>
MMVIM_HD float sum_lanes<float>(Simd<float>::V v) {
#if defined(MMVIM_AVX512_INTRINSICS)
  const __m512 w = (__m512)v;
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(w), _mm512_extractf32x8_ps(w, 1));
#else
  const __m256 h = (__m256)v;
#endif
  return sum_lanes_128(_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}
#endif

// The Math policy of common/discretization.h on vectors.
template <class S>
struct VectorMath {
  using Scalar = S;
  using V = typename Simd<S>::V;
  using I = typename Simd<S>::I;

  static MMVIM_HD V set(S x) { return set1<S>(x); }
  static MMVIM_HD V fma(V a, V b, V c) { return a * b + c; }
  static MMVIM_HD V reciprocal(V v) { return set(S(1)) / v; }
  static MMVIM_HD V select(I mask, V yes, V no) { return vector_if<S>(mask, yes, no); }
  // The second operand if either is NaN: a constant in first place lets NaN through.
  static MMVIM_HD V maximum(V a, V b) { return select(a > b, a, b); }
  static MMVIM_HD V minimum(V a, V b) { return select(a < b, a, b); }
  static MMVIM_HD V absolute(V v) { return maximum(v, set(S(0)) - v); }
  static MMVIM_HD I abs_less(V v, S limit) { return absolute(v) < set(limit); }

  static MMVIM_HD bool any(I mask) {
#if defined(MMVIM_AVX512_INTRINSICS)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(MMVIM_AVX2_INTRINSICS)
    return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
    typename IntOf<S>::type lane[kLanes<S>], r = 0;
    std::memcpy(lane, &mask, sizeof lane);
    for (int i = 0; i < kLanes<S>; ++i) r |= lane[i];
    return r != 0;
#endif
  }
  static MMVIM_HD bool all(I mask) {
#if defined(MMVIM_AVX512_INTRINSICS)
    return _mm512_movepi32_mask((__m512i)mask) == 0xffff;
#elif defined(MMVIM_AVX2_INTRINSICS)
    return _mm256_movemask_epi8((__m256i)mask) == -1;
#else
    typename IntOf<S>::type lane[kLanes<S>], r = -1;
    std::memcpy(lane, &mask, sizeof lane);
    for (int i = 0; i < kLanes<S>; ++i) r &= lane[i];
    return r != 0;
#endif
  }

  // 2^x: 2^round(x) through the exponent bits, 2^(x - round(x)) by a polynomial. Results below the
  // smallest normal number are 0 (see FlushDenormals).
  static MMVIM_HD V exp2(V x) {
    V y[1] = {x};
    exp2(y);
    return y[0];
  }
  // The same of several vectors, operation by operation: of one after the other, a processor cannot
  // hold enough in flight to hide how long each chain takes.
  template <int kCount>
  static MMVIM_HD void exp2(V (&x)[kCount]) {
    V f[kCount], n[kCount];
#if defined(MMVIM_AVX512_INTRINSICS)
    if constexpr (std::is_same_v<S, float>) {
      for (int i = 0; i < kCount; ++i) f[i] = (V)_mm512_reduce_ps((__m512)x[i], 0x08);
      for (int i = 0; i < kCount; ++i) n[i] = x[i] - f[i];  // round(x)
      exp2_fraction(f);
      for (int i = 0; i < kCount; ++i) x[i] = (V)_mm512_scalef_ps((__m512)f[i], (__m512)n[i]);
      return;
    }
#endif
    for (int i = 0; i < kCount; ++i) x[i] = clamp(x[i]);
    for (int i = 0; i < kCount; ++i) n[i] = x[i] + set(Poly::kRound);
    for (int i = 0; i < kCount; ++i) f[i] = x[i] - (n[i] - set(Poly::kRound));
    exp2_fraction(f);
    for (int i = 0; i < kCount; ++i) x[i] = f[i] * power(n[i]);
  }

  // e^x, reduced with ln 2 in two parts so that no accuracy is lost for large |x|.
  static MMVIM_HD V exp(V x) {
#if defined(MMVIM_AVX512_INTRINSICS)
    if constexpr (std::is_same_v<S, float>) {
      x = minimum(set(104.f), maximum(set(-104.f), x));
      const V n = (V)_mm512_roundscale_ps((__m512)(x * set(1.44269502f)), 0x08);
      const V r = fma(x, set(1.92596303e-8f), fma(x, set(1.44269502f), set(0.f) - n));
      return (V)_mm512_scalef_ps((__m512)exp2_fraction(r), (__m512)n);
    }
#endif
    const V y = clamp(x * set(S(1.4426950408889634074)));
    const V shifted = y + set(Poly::kRound);
    const V n = shifted - set(Poly::kRound);
    x = minimum(set(Poly::kExpMax), maximum(set(-Poly::kExpMax), x));
    V r = x - n * set(Poly::kLn2High);
    r = r - n * set(Poly::kLn2Low);
    return exp2_fraction(r * set(S(1.4426950408889634074))) * power(shifted);
  }

  static MMVIM_HD V sigmoid(V x) {
    const V d = set(S(1)) + exp(set(S(0)) - x);
#if defined(MMVIM_AVX512_INTRINSICS)
    if constexpr (std::is_same_v<S, float>) {
      // One Newton step is a third of a division; it would make NaN of infinity.
      const V finite = minimum(set(1e38f), d);
      const V r = (V)_mm512_rcp14_ps((__m512)finite);
      return fma(r, fma(set(0) - finite, r, set(1)), r);
    }
#endif
    return reciprocal(d);
  }

  // d silu(x) / dx, given s = sigmoid(x).
  static MMVIM_HD V silu_slope(V x, V s) {
    const V one = set(S(1));
    return s * fma(x, one - s, one);
  }

  // log(1 + e^x), x itself beyond 20 as in torch; `slope` is the derivative.
  static MMVIM_HD V softplus(V x, V* slope) {
    const V e = exp(set(S(0)) - absolute(x));
    const V inverse = reciprocal(set(S(1)) + e);
    const V limit = set(S(20));
    *slope = select(x > limit, set(S(1)), select(x > set(S(0)), inverse, e * inverse));
    return softplus_of(x, e);
  }
  static MMVIM_HD V softplus(V x) { return softplus_of(x, exp(set(S(0)) - absolute(x))); }

 private:
  struct FloatPoly {
    static constexpr float kMin = -127.f, kMax = 128.f, kExpMax = 89.f;
    static constexpr float kRound = 12583039.f;  // 1.5 * 2^23 + 127: the low bits become n + 127
    static constexpr int kShift = 23;
    static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723212e-6f;

    static constexpr int kDegree = 6;
    static MMVIM_HD constexpr float exp2_coefficient(int i) {
      constexpr float c[] = {
          1.f,           0.693147182f,   0.240226477f, 0.0555033237f, 0.00961843692f,
          0.0013398875f, 0.000153533605f};
      return c[i];
    }
    // 0 <= e <= 1
    static MMVIM_HD V log1p(V e) {
      V p = fma(set(-0.00331844389f), e, set(0.0202044565f));
      p = fma(p, e, set(-0.0576642007f));
      p = fma(p, e, set(0.10680531f));
      p = fma(p, e, set(-0.153553814f));
      p = fma(p, e, set(0.196953952f));
      p = fma(p, e, set(-0.249585867f));
      p = fma(p, e, set(0.33330512f));
      p = fma(p, e, set(-0.499999315f));
      return fma(p * e, e, e);
    }
  };

  struct DoublePoly {
    static constexpr double kMin = -1023., kMax = 1024., kExpMax = 710.;
    static constexpr double kRound = 6755399441056767.;  // 1.5 * 2^52 + 1023
    static constexpr int kShift = 52;
    static constexpr double kLn2High = 6.93147180369123816490e-1;
    static constexpr double kLn2Low = 1.90821492927058770002e-10;

    // Taylor series; the next term is below 4e-18.
    static constexpr int kDegree = 13;
    static MMVIM_HD constexpr double exp2_coefficient(int i) {
      constexpr double c[] = {1.0,
                              0.693147180559945309,
                              0.240226506959100712,
                              0.05550410866482158,
                              0.00961812910762847716,
                              0.00133335581464284434,
                              0.0001540353039338161,
                              1.52527338040598403e-5,
                              1.32154867901443095e-6,
                              1.01780860092396997e-7,
                              7.05491162080112333e-9,
                              4.4455382718708115e-10,
                              2.56784359934882051e-11,
                              1.36914888539041289e-12};
      return c[i];
    }
    static MMVIM_HD V log1p(V e) {
      double lane[kLanes<double>];
      std::memcpy(lane, &e, sizeof lane);
      for (double& x : lane) x = std::log1p(x);
      std::memcpy(&e, lane, sizeof lane);
      return e;
    }
  };

  template <class T, class F, class D>
  struct Choose {
    using type = F;
  };
  template <class F, class D>
  struct Choose<double, F, D> {
    using type = D;
  };
  using Poly = typename Choose<S, FloatPoly, DoublePoly>::type;

  static MMVIM_HD V softplus_of(V x, V e) {
    return select(x > set(S(20)), x, maximum(set(S(0)), x) + Poly::log1p(e));
  }

  // 2^f for |f| <= 1/2.
  static MMVIM_HD V exp2_fraction(V f) {
    V p[1] = {f};
    exp2_fraction(p);
    return p[0];
  }
  template <int kCount>
  static MMVIM_HD void exp2_fraction(V (&f)[kCount]) {
    V p[kCount];
    for (int i = 0; i < kCount; ++i) p[i] = set(Poly::exp2_coefficient(Poly::kDegree));
    for (int k = Poly::kDegree - 1; k >= 0; --k) {
      for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], f[i], set(Poly::exp2_coefficient(k)));
    }
    for (int i = 0; i < kCount; ++i) f[i] = p[i];
  }

  static MMVIM_HD V clamp(V x) { return minimum(set(Poly::kMax), maximum(set(Poly::kMin), x)); }
  static MMVIM_HD V power(V shifted) { return from_bits<S>(bits_of<S>(shifted) << Poly::kShift); }
};

#if defined(MMVIM_AVX2_INTRINSICS)
#if defined(MMVIM_AVX512_INTRINSICS)
#define MMVIM_INTRINSIC(name) _mm512_##name##_ps
#define MMVIM_REGISTER __m512
#else
#define MMVIM_INTRINSIC(name) _mm256_##name##_ps
#define MMVIM_REGISTER __m256
#endif
template <>
MMVIM_HD Simd<float>::V VectorMath<float>::maximum(V a, V b) {
  return (V)MMVIM_INTRINSIC(max)((MMVIM_REGISTER)a, (MMVIM_REGISTER)b);
}
template <>
MMVIM_HD Simd<float>::V VectorMath<float>::minimum(V a, V b) {
  return (V)MMVIM_INTRINSIC(min)((MMVIM_REGISTER)a, (MMVIM_REGISTER)b);
}
#undef MMVIM_INTRINSIC
#undef MMVIM_REGISTER
#endif

}  // namespace MMVIM_ISA
}  // namespace mmvim
