// The nine discretizations: value and derivative, in one place for CPU and CUDA, forward and
// backward. Plain C++17; no torch and no CUDA header.
//
// With z = delta * A the recurrence is h_t = a h_{t-1} + w0 B_t u_t + w1 B_{t-1} u_{t-1}, and
//   phi1 = (e^z - 1) / z,   phi2 = (phi1 - 1) / z,   phi3 = (phi2 - 1/2) / z.
//
// Everything is a template over a `Math` policy, so that one text serves a float in a CUDA thread
// and a vector register on a CPU:
//   using Scalar = float | double;  using V = the value type, with V+V, V-V, V*V, -V;
//   V    set(Scalar)                broadcast
//   V    fma(V a, V b, V c)         a * b + c
//   V    exp(V), exp2(V)            0 for very negative arguments, never NaN
//   V    reciprocal(V)
//   Mask abs_less(V, Scalar)        |v| < limit, per lane
//   V    select(Mask, V yes, V no)
//   bool all(Mask), any(Mask)
#pragma once

#include "macros.h"

namespace mmvim {

// The methods, in the order of mmvim.ops.DISCRETIZATIONS: enumerator, name, taps, decay.
//   taps   2: w1 is used, and the state carries v = B_{t-1} u_{t-1}
//   decay  kExponential: a = e^z, so that steps together decay by e^(the sum of their z);
//          kOther: by the product of their a
#define MMVIM_FORALL_DISCRETIZATIONS(_)       \
  _(kZoh, "zoh", 1, kExponential)             \
  _(kZohExact, "zoh_exact", 1, kExponential)  \
  _(kFoh, "foh", 1, kExponential)             \
  _(kBilinear, "bilinear", 1, kOther)         \
  _(kPoly, "poly", 1, kExponential)           \
  _(kHighOrder, "highorder", 1, kExponential) \
  _(kRk4, "rk4", 1, kExponential)             \
  _(kFohHold, "foh_hold", 2, kExponential)    \
  _(kTustin, "tustin", 2, kOther)

#define MMVIM_ENUMERATOR(enumerator, name, taps, decay) enumerator,
#define MMVIM_METHOD(enumerator, name, taps, decay) {name, taps, Decay::decay},
#define MMVIM_CASE(enumerator, name, taps, decay) \
  case Discretization::enumerator:                \
    return f(DiscretizationTag<Discretization::enumerator>{});

enum class Discretization : int { MMVIM_FORALL_DISCRETIZATIONS(MMVIM_ENUMERATOR) };
enum class Decay { kExponential, kOther };

struct Method {
  const char* name;
  int taps;
  Decay decay;
};
constexpr Method kMethods[] = {MMVIM_FORALL_DISCRETIZATIONS(MMVIM_METHOD)};

constexpr const Method& method(Discretization d) { return kMethods[static_cast<int>(d)]; }
constexpr bool is_two_tap(Discretization d) { return method(d).taps == 2; }

template <Discretization D>
struct DiscretizationTag {
  static constexpr Discretization value = D;
};

// Calls f(DiscretizationTag<d>{}), which makes a run-time method a template parameter.
template <class F>
inline void with_discretization(Discretization d, F&& f) {
  switch (d) { MMVIM_FORALL_DISCRETIZATIONS(MMVIM_CASE) }
}

#undef MMVIM_ENUMERATOR
#undef MMVIM_METHOD
#undef MMVIM_CASE

namespace detail {

MMVIM_HD constexpr double inverse_factorial(int n) {
  double f = 1.0;
  for (int i = 2; i <= n; ++i) f *= i;
  return 1.0 / f;
}

// phi_K(z) on |z| <= 1. float: relative minimax polynomials with the exact value at 0 (error below
// 3e-8 before rounding); double: the Taylor series (next term below 1e-17).
template <int K, class Scalar>
struct PhiSeries;

template <int K>
struct PhiSeries<K, double> {
  static constexpr int kDegree = 17;
  static MMVIM_HD constexpr double coefficient(int i) { return inverse_factorial(K + i); }
};

template <>
struct PhiSeries<1, float> {
  static constexpr int kDegree = 7;
  static MMVIM_HD constexpr float coefficient(int i) {
    constexpr float c[] = {1.f,
                           0.50000006f,
                           0.166667148f,
                           0.0416662619f,
                           0.00833030976f,
                           0.00138955074f,
                           0.000203702846f,
                           2.47602711e-05f};
    return c[i];
  }
};

template <>
struct PhiSeries<2, float> {
  static constexpr int kDegree = 7;
  static MMVIM_HD constexpr float coefficient(int i) {
    constexpr float c[] = {0.5f,           0.166666672f,    0.0416667163f,  0.00833330955f,
                           0.00138858228f, 0.000198444104f, 2.5333231e-05f, 2.76907053e-06f};
    return c[i];
  }
};

template <>
struct PhiSeries<3, float> {
  static constexpr int kDegree = 6;
  static MMVIM_HD constexpr float coefficient(int i) {
    constexpr float c[] = {0.166666672f,    0.041666694f,    0.00833332632f, 0.0013886533f,
                           0.000198420021f, 2.52821937e-05f, 2.77907475e-06f};
    return c[i];
  }
};

template <>
struct PhiSeries<4, float> {
  static constexpr int kDegree = 6;
  static MMVIM_HD constexpr float coefficient(int i) {
    constexpr float c[] = {0.0416666679f,   0.00833333563f,  0.00138888846f, 0.000198391092f,
                           2.48016986e-05f, 2.79952837e-06f, 2.77871436e-07f};
    return c[i];
  }
};

template <int K, class Math>
MMVIM_HD typename Math::V phi_series(typename Math::V z) {
  using Series = PhiSeries<K, typename Math::Scalar>;
  typename Math::V p = Math::set(Series::coefficient(Series::kDegree));
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = Series::kDegree - 1; i >= 0; --i) {
    p = Math::fma(p, z, Math::set(Series::coefficient(i)));
  }
  return p;
}

// e^z and phi_1..phi_K; with kDerivative also phi_k'(z). phi_k is p[k], its derivative dp[k].
// Near zero the highest function comes from its series and the lower ones by the downward
// recurrence phi_{k-1} = 1/(k-1)! + z phi_k; elsewhere the closed forms lose nothing.
template <int K, bool kDerivative, class Math>
struct Phi {
  using V = typename Math::V;
  using Scalar = typename Math::Scalar;
  V e;
  V p[K + 1];
  V dp[K + 1];

  MMVIM_HD explicit Phi(V z) {
    const auto near_zero = Math::abs_less(z, Scalar(1));
    if (Math::all(near_zero)) {
      series(z);
      return;
    }
    closed(z);
    if (Math::any(near_zero)) {
      Phi s(z, SeriesTag{});
      e = Math::select(near_zero, s.e, e);
      for (int k = 1; k <= K; ++k) {
        p[k] = Math::select(near_zero, s.p[k], p[k]);
        if (kDerivative) dp[k] = Math::select(near_zero, s.dp[k], dp[k]);
      }
    }
  }

 private:
  struct SeriesTag {};
  MMVIM_HD Phi(V z, SeriesTag) { series(z); }

  MMVIM_HD void series(V z) {
    constexpr int kTop = kDerivative ? K + 1 : K;
    V upper = phi_series<kTop, Math>(z);
    if (kDerivative) {
      p[K] = Math::fma(z, upper, Math::set(Scalar(inverse_factorial(K))));
      // phi_k' = phi_k - k phi_{k+1}
      dp[K] = Math::fma(Math::set(Scalar(-K)), upper, p[K]);
    } else {
      p[K] = upper;
    }
    for (int k = K - 1; k >= 1; --k) {
      p[k] = Math::fma(z, p[k + 1], Math::set(Scalar(inverse_factorial(k))));
      if (kDerivative) dp[k] = Math::fma(Math::set(Scalar(-k)), p[k + 1], p[k]);
    }
    e = Math::fma(z, p[1], Math::set(Scalar(1)));
  }

  MMVIM_HD void closed(V z) {
    const V inverse = Math::reciprocal(z);
    e = Math::exp(z);
    p[1] = (e - Math::set(Scalar(1))) * inverse;
    if (kDerivative) dp[1] = (e - p[1]) * inverse;
    for (int k = 2; k <= K; ++k) {
      p[k] = (p[k - 1] - Math::set(Scalar(inverse_factorial(k - 1)))) * inverse;
      // z phi_k = phi_{k-1} - 1/(k-1)!  =>  phi_k' = (phi_{k-1}' - phi_k) / z
      if (kDerivative) dp[k] = (dp[k - 1] - p[k]) * inverse;
    }
  }
};

}  // namespace detail

// Coefficients of one step.
template <class V>
struct Step {
  V a, w0, w1;
};

// Coefficients with their partial derivatives: `_z` by z at fixed delta, `_d` by delta at fixed z.
// A field that a method does not need is left unset (see Rule's flags).
template <class V>
struct StepWithGrad {
  V a, w0, w1;
  V a_z, w0_z, w1_z;
  V w0_d, w1_d;
};

// What the loops over states ask of a method.
template <Discretization D>
struct Traits {
  static constexpr bool kTwoTap = is_two_tap(D);
  static constexpr bool kDecaysExponentially = method(D).decay == Decay::kExponential;
  // w0 is delta itself, independent of A: factor it out of the loop over states.
  static constexpr bool kInputIsDelta = false;
  // Callers pass rate = kRateScale * A, kept per (channel, state), so that a method that needs only
  // e^z spends no multiplication on the change of base.
  static constexpr double kRateScale = 1.0;
};

// Its coefficients: step(delta, rate) and step_with_grad(delta, rate).
template <Discretization D, class Math>
struct Rule;

template <class Math>
struct Rule<Discretization::kZoh, Math> : Traits<Discretization::kZoh> {
  using V = typename Math::V;
  using Scalar = typename Math::Scalar;
  static constexpr bool kInputIsDelta = true;
  static constexpr double kRateScale = 1.4426950408889634074;  // log2(e)

  static MMVIM_HD Step<V> step(V delta, V rate) {
    const V a = Math::exp2(delta * rate);
    return {a, delta, delta};
  }
  static MMVIM_HD StepWithGrad<V> step_with_grad(V delta, V rate) {
    StepWithGrad<V> s;
    s.a = s.a_z = Math::exp2(delta * rate);
    s.w0 = delta;
    return s;
  }
};

template <class Math>
struct Rule<Discretization::kZohExact, Math> : Traits<Discretization::kZohExact> {
  using V = typename Math::V;
  using Scalar = typename Math::Scalar;

  static MMVIM_HD Step<V> step(V delta, V rate) {
    const detail::Phi<1, false, Math> f(delta * rate);
    const V w0 = delta * f.p[1];
    return {f.e, w0, w0};
  }
  static MMVIM_HD StepWithGrad<V> step_with_grad(V delta, V rate) {
    const detail::Phi<1, true, Math> f(delta * rate);
    StepWithGrad<V> s;
    s.a = s.a_z = f.e;
    s.w0 = delta * f.p[1];
    s.w0_z = delta * f.dp[1];
    s.w0_d = f.p[1];
    return s;
  }
};

template <class Math>
struct Rule<Discretization::kFoh, Math> : Traits<Discretization::kFoh> {
  using V = typename Math::V;
  using Scalar = typename Math::Scalar;

  static MMVIM_HD Step<V> step(V delta, V rate) {
    const detail::Phi<2, false, Math> f(delta * rate);
    const V w0 = delta * delta * f.p[2];
    return {f.e, w0, w0};
  }
  static MMVIM_HD StepWithGrad<V> step_with_grad(V delta, V rate) {
    const detail::Phi<2, true, Math> f(delta * rate);
    const V square = delta * delta;
    StepWithGrad<V> s;
    s.a = s.a_z = f.e;
    s.w0 = square * f.p[2];
    s.w0_z = square * f.dp[2];
    s.w0_d = (delta + delta) * f.p[2];
    return s;
  }
};

template <class Math>
struct Rule<Discretization::kBilinear, Math> : Traits<Discretization::kBilinear> {
  using V = typename Math::V;
  using Scalar = typename Math::Scalar;

  // With r = 1 / (1 - z/2): a = 2r - 1 and da/dz = r^2.
  static MMVIM_HD Step<V> step(V delta, V rate) {
    const V r = root(delta * rate);
    const V w0 = delta * r;
    return {r + r - Math::set(Scalar(1)), w0, w0};
  }
  static MMVIM_HD StepWithGrad<V> step_with_grad(V delta, V rate) {
    const V r = root(delta * rate);
    StepWithGrad<V> s;
    s.a = r + r - Math::set(Scalar(1));
    s.a_z = r * r;
    s.w0 = delta * r;
    s.w0_z = Math::set(Scalar(0.5)) * delta * s.a_z;
    s.w0_d = r;
    return s;
  }
  static MMVIM_HD V root(V z) {
    return Math::reciprocal(Math::fma(Math::set(Scalar(-0.5)), z, Math::set(Scalar(1))));
  }
};

template <class Math>
struct Rule<Discretization::kPoly, Math> : Traits<Discretization::kPoly> {
  using V = typename Math::V;
  using Scalar = typename Math::Scalar;

  // w0 = delta (phi1 + delta phi2 / 2)
  static MMVIM_HD Step<V> step(V delta, V rate) {
    const detail::Phi<2, false, Math> f(delta * rate);
    const V half = Math::set(Scalar(0.5)) * delta;
    const V w0 = delta * Math::fma(half, f.p[2], f.p[1]);
    return {f.e, w0, w0};
  }
  static MMVIM_HD StepWithGrad<V> step_with_grad(V delta, V rate) {
    const detail::Phi<2, true, Math> f(delta * rate);
    const V half = Math::set(Scalar(0.5)) * delta;
    StepWithGrad<V> s;
    s.a = s.a_z = f.e;
    s.w0 = delta * Math::fma(half, f.p[2], f.p[1]);
    s.w0_z = delta * Math::fma(half, f.dp[2], f.dp[1]);
    s.w0_d = Math::fma(delta, f.p[2], f.p[1]);
    return s;
  }
};

template <class Math>
struct Rule<Discretization::kHighOrder, Math> : Traits<Discretization::kHighOrder> {
  using V = typename Math::V;
  using Scalar = typename Math::Scalar;

  // w0 = delta (phi1 + delta (phi2 + delta phi3 / 2))
  static MMVIM_HD Step<V> step(V delta, V rate) {
    const detail::Phi<3, false, Math> f(delta * rate);
    const V half = Math::set(Scalar(0.5)) * delta;
    const V w0 = delta * Math::fma(delta, Math::fma(half, f.p[3], f.p[2]), f.p[1]);
    return {f.e, w0, w0};
  }
  static MMVIM_HD StepWithGrad<V> step_with_grad(V delta, V rate) {
    const detail::Phi<3, true, Math> f(delta * rate);
    const V half = Math::set(Scalar(0.5)) * delta;
    StepWithGrad<V> s;
    s.a = s.a_z = f.e;
    s.w0 = delta * Math::fma(delta, Math::fma(half, f.p[3], f.p[2]), f.p[1]);
    s.w0_z = delta * Math::fma(delta, Math::fma(half, f.dp[3], f.dp[2]), f.dp[1]);
    const V tail = Math::fma(Math::set(Scalar(1.5)) * delta, f.p[3], f.p[2] + f.p[2]);
    s.w0_d = Math::fma(delta, tail, f.p[1]);
    return s;
  }
};

template <class Math>
struct Rule<Discretization::kRk4, Math> : Traits<Discretization::kRk4> {
  using V = typename Math::V;
  using Scalar = typename Math::Scalar;

  // w0 = delta (1 + z/2 + z^2/6 + z^3/24)
  static MMVIM_HD V polynomial(V z) {
    V p = Math::fma(Math::set(Scalar(1.0 / 24)), z, Math::set(Scalar(1.0 / 6)));
    p = Math::fma(p, z, Math::set(Scalar(0.5)));
    return Math::fma(p, z, Math::set(Scalar(1)));
  }
  static MMVIM_HD Step<V> step(V delta, V rate) {
    const V z = delta * rate;
    const V w0 = delta * polynomial(z);
    return {Math::exp(z), w0, w0};
  }
  static MMVIM_HD StepWithGrad<V> step_with_grad(V delta, V rate) {
    const V z = delta * rate;
    StepWithGrad<V> s;
    s.a = s.a_z = Math::exp(z);
    s.w0_d = polynomial(z);
    s.w0 = delta * s.w0_d;
    const V slope = Math::fma(Math::set(Scalar(0.125)), z, Math::set(Scalar(1.0 / 3)));
    s.w0_z = delta * Math::fma(slope, z, Math::set(Scalar(0.5)));
    return s;
  }
};

template <class Math>
struct Rule<Discretization::kFohHold, Math> : Traits<Discretization::kFohHold> {
  using V = typename Math::V;
  using Scalar = typename Math::Scalar;

  // w0 = delta phi2, w1 = delta (phi1 - phi2) = delta phi1', which has a form without cancellation.
  static MMVIM_HD Step<V> step(V delta, V rate) {
    const FohHoldPhi<false> f(delta * rate);
    return {f.e, delta * f.p2, delta * f.q};
  }
  static MMVIM_HD StepWithGrad<V> step_with_grad(V delta, V rate) {
    const FohHoldPhi<true> f(delta * rate);
    StepWithGrad<V> s;
    s.a = s.a_z = f.e;
    s.w0 = delta * f.p2;
    s.w1 = delta * f.q;
    s.w0_z = delta * f.dp2;
    s.w1_z = delta * f.dq;
    s.w0_d = f.p2;
    s.w1_d = f.q;
    return s;
  }

 private:
  // phi2, q = phi1 - phi2 and their derivatives.
  template <bool kDerivative>
  struct FohHoldPhi {
    V e, p2, q, dp2, dq;

    MMVIM_HD explicit FohHoldPhi(V z) {
      const auto near_zero = Math::abs_less(z, Scalar(1));
      if (Math::all(near_zero)) {
        series(z);
        return;
      }
      closed(z);
      if (Math::any(near_zero)) {
        FohHoldPhi s;
        s.series(z);
        e = Math::select(near_zero, s.e, e);
        p2 = Math::select(near_zero, s.p2, p2);
        q = Math::select(near_zero, s.q, q);
        if (kDerivative) {
          dp2 = Math::select(near_zero, s.dp2, dp2);
          dq = Math::select(near_zero, s.dq, dq);
        }
      }
    }

   private:
    MMVIM_HD FohHoldPhi() {}

    MMVIM_HD void series(V z) {
      if (kDerivative) {
        const V p3 = detail::phi_series<3, Math>(z);
        p2 = Math::fma(z, p3, Math::set(Scalar(0.5)));
        dp2 = Math::fma(Math::set(Scalar(-2)), p3, p2);
      } else {
        p2 = detail::phi_series<2, Math>(z);
      }
      const V p1 = Math::fma(z, p2, Math::set(Scalar(1)));
      e = Math::fma(z, p1, Math::set(Scalar(1)));
      q = p1 - p2;
      if (kDerivative) dq = q - dp2;
    }

    MMVIM_HD void closed(V z) {
      const V inverse = Math::reciprocal(z);
      e = Math::exp(z);
      const V p1 = (e - Math::set(Scalar(1))) * inverse;
      p2 = (p1 - Math::set(Scalar(1))) * inverse;
      q = (e - p1) * inverse;
      if (kDerivative) {
        dp2 = (q - p2) * inverse;
        dq = (e - q - q) * inverse;
      }
    }
  };
};

template <class Math>
struct Rule<Discretization::kTustin, Math> : Traits<Discretization::kTustin> {
  using V = typename Math::V;
  using Scalar = typename Math::Scalar;

  static MMVIM_HD Step<V> step(V delta, V rate) {
    const V r = Rule<Discretization::kBilinear, Math>::root(delta * rate);
    const V w = Math::set(Scalar(0.5)) * delta * r;
    return {r + r - Math::set(Scalar(1)), w, w};
  }
  static MMVIM_HD StepWithGrad<V> step_with_grad(V delta, V rate) {
    const V r = Rule<Discretization::kBilinear, Math>::root(delta * rate);
    const V half_r = Math::set(Scalar(0.5)) * r;
    StepWithGrad<V> s;
    s.a = r + r - Math::set(Scalar(1));
    s.a_z = r * r;
    s.w0 = s.w1 = delta * half_r;
    s.w0_z = s.w1_z = s.w0 * half_r;
    s.w0_d = s.w1_d = half_r;
    return s;
  }
};

// Chain rule of one (time, channel, state): gradients of the coefficients in, gradients of z and of
// delta (at fixed z) out. The caller adds A * gz + gdelta to ddelta and delta * gz to dA. With
// kInputIsDelta, gdelta is gw0 (the caller may sum it over the states in another way).
template <class R, class Math>
MMVIM_HD void pull_back(const StepWithGrad<typename Math::V>& s, typename Math::V ga,
                        typename Math::V gw0, typename Math::V gw1, typename Math::V* gz,
                        typename Math::V* gdelta) {
  *gz = ga * s.a_z;
  if constexpr (R::kInputIsDelta) {
    *gdelta = gw0;
  } else {
    *gz = Math::fma(gw0, s.w0_z, *gz);
    *gdelta = gw0 * s.w0_d;
  }
  if constexpr (R::kTwoTap) {
    *gz = Math::fma(gw1, s.w1_z, *gz);
    *gdelta = Math::fma(gw1, s.w1_d, *gdelta);
  }
}

}  // namespace mmvim
