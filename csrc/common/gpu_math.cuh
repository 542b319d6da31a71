// Scalar functions of the kernels.
#pragma once

#include "discretization.h"
#include "gpu.cuh"

namespace mmvim {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The Math policy of discretization.h: float, with the special function unit.
struct GpuMath {
  using Scalar = float;
  using V = float;
  using Mask = bool;
  static MMVIM_DEVICE V set(Scalar x) { return x; }
  static MMVIM_DEVICE V fma(V a, V b, V c) { return gpu::fused(a, b, c); }
  static MMVIM_DEVICE V exp(V x) { return gpu::exp2(x * kLog2e); }
  static MMVIM_DEVICE V exp2(V x) { return gpu::exp2(x); }
  static MMVIM_DEVICE V reciprocal(V x) { return gpu::reciprocal(x); }
  static MMVIM_DEVICE Mask abs_less(V x, Scalar limit) { return fabsf(x) < limit; }
  static MMVIM_DEVICE V select(Mask m, V yes, V no) { return m ? yes : no; }
  static MMVIM_DEVICE bool all(Mask m) { return m; }
  static MMVIM_DEVICE bool any(Mask m) { return m; }
};

// log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x|. The logarithm of the special function unit
// drops the low bits of e: exact results come from the series of artanh, others from a short one
// where e is small.
template <bool kExact>
MMVIM_DEVICE float softplus(float x) {
  const float e = gpu::exp2(-kLog2e * fabsf(x));
  const float upper = fmaxf(x, 0.f);
  if (kExact) {
    const float s = e * gpu::reciprocal(2.f + e);
    const float square = s * s;
    float p = gpu::fused(square, 0.15384616f, 0.18181819f);
    p = gpu::fused(square, p, 0.22222222f);
    p = gpu::fused(square, p, 0.2857143f);
    p = gpu::fused(square, p, 0.4f);
    p = gpu::fused(square, p, 0.6666667f);
    p = gpu::fused(square, p, 2.f);
    return gpu::fused(s, p, upper);
  }
  const float small = gpu::fused(e * e, -0.5f, e);
  return upper + (e < 0.00390625f ? small : kLn2 * gpu::log2(1.f + e));
}

// d softplus(x) / dx = 1 - e^(-softplus(x)). Exact enough for gradients of float parameters, which
// are sums of these.
MMVIM_DEVICE float softplus_slope(float y) {
  float series = gpu::fused(y, 0.0001984127f, -0.0013888889f);
  series = gpu::fused(y, series, 0.0083333333f);
  series = gpu::fused(y, series, -0.041666668f);
  series = gpu::fused(y, series, 0.16666667f);
  series = gpu::fused(y, series, -0.5f);
  series = gpu::fused(y * y, series, y);
  return y < 0.5f ? series : 1.f - gpu::exp2(-kLog2e * y);
}

MMVIM_DEVICE float logistic(float x) { return gpu::reciprocal(1.f + gpu::exp2(-kLog2e * x)); }

}  // namespace mmvim
