// One step of one state on a GPU.
//
// Where 16-bit results are all that is asked for, or the method is rational, a step comes from e^z
// (or from 1 / (1 - z/2)) and constants of the state alone, in two or three more instructions;
// everything else is discretization.h's. The same formulas, with W1 = delta phi1, W2 = delta^2
// phi2, W3 = delta^3 phi3, closed: W1 = (e^z - 1) / A, W2 = (W1 - delta) / A, W3 = (W2 - delta^2 /
// 2) / A. Their rounding errors relative to delta are those of e^z times up to 1 / (A delta), and
// powers of 1 / A, so they are kept away from small A.
//
// Backward they need the derivative by delta only: W1' = e^z, W2' = W1, W3' = W2; since Wk is
// delta^k times a function of z, A dWk/dA = delta dWk/ddelta - k Wk.
#pragma once

#include "../common/gpu_math.cuh"

namespace mmvim {
namespace scan {

// Critical quick steps lose digits where A is small: they need 16-bit results, and a warp whose A
// all are this large.
constexpr float kSmallestA = 0.5f;

// Constants of a state; what a method does not use costs nothing.
struct StateConstants {
  float rate;  // of the exponent; for the methods' exact steps kRateScale A
  float A;
  float c0, c1, c2;
};

// Step size of a channel, and what goes with it.
struct ChannelStep {
  float delta;
  float inverse;
};

// The coefficients of a step: h_t = a h + w0 drive + w1 (drive before).
struct Weights {
  float w0, w1;
};
// Gradients by delta and by A; the latter times A where quick steps are critical.
struct Pull {
  float delta, A;
};

// A method whose quick steps are worth having specialises this, with kExists = true, by deriving
// from one of the structs in `quick`; any other takes exact steps everywhere.
template <Discretization kMethod>
struct QuickStep {
  static constexpr bool kExists = false;
  static constexpr bool kCritical = false;
  static constexpr bool kNeedsInverse = false;
};

template <class T, Discretization kMethod>
constexpr bool kHasQuickSteps =
    QuickStep<kMethod>::kExists && (sizeof(T) == 2 || !QuickStep<kMethod>::kCritical);

namespace quick {

struct Step {
  static constexpr bool kExists = true;
  static constexpr bool kCritical = false;
  static constexpr bool kNeedsInverse = false;  // of delta, in ChannelStep
};

// Of methods that decay by e^z.
struct Exponential : Step {
  static MMVIM_DEVICE float decay(const ChannelStep& s, const StateConstants& c) {
    return gpu::exp2(s.delta * c.rate);
  }
};

// The same with powers of 1 / A.
struct Critical : Exponential {
  static constexpr bool kCritical = true;
};

// Of methods that decay by 2r - 1, r = 1 / (1 - z/2).
struct Rational : Step {
  static MMVIM_DEVICE StateConstants constants(float A) { return {-0.5f * A, A, 0.f, 0.f, 0.f}; }
  static MMVIM_DEVICE float decay(const ChannelStep& s, const StateConstants& c) {
    return gpu::fused(2.f, gpu::reciprocal(gpu::fused(s.delta, c.rate, 1.f)), -1.f);
  }
  // Of h_t = a h + delta r x: a' = A r^2, (delta r)' = r^2; by A, delta r^2 and delta^2 r^2 / 2.
  static MMVIM_DEVICE Pull pull_sum(float g, float a, float delta, float A, float h, float x) {
    const float r = gpu::fused(0.5f, a, 0.5f);
    const float scaled = r * r * g;
    return {scaled * gpu::fused(h, A, x), scaled * delta * gpu::fused(0.5f * delta, x, h)};
  }
};

}  // namespace quick

template <>
struct QuickStep<Discretization::kZohExact> : quick::Critical {
  static MMVIM_DEVICE StateConstants constants(float A) {
    return {kLog2e * A, A, 1.f / A, 0.f, 0.f};
  }
  static MMVIM_DEVICE Weights weights(float a, const ChannelStep&, const StateConstants& c) {
    return {gpu::fused(a, c.c0, -c.c0), 0.f};
  }
  static MMVIM_DEVICE Pull pull(float g, float a, Weights w, const ChannelStep& s,
                                const StateConstants& c, float h, float drive, float) {
    const float by_delta = g * a * gpu::fused(h, c.A, drive);
    return {by_delta, gpu::fused(s.delta, by_delta, -(g * w.w0) * drive)};
  }
};

template <>
struct QuickStep<Discretization::kFoh> : quick::Critical {
  static MMVIM_DEVICE StateConstants constants(float A) {
    return {kLog2e * A, A, 1.f / A, 1.f / (A * A), 0.f};
  }
  // Closed it would lose everything near z = 0.
  static MMVIM_DEVICE Weights weights(float a, const ChannelStep& s, const StateConstants& c) {
    const float z = s.delta * c.A;
    const float closed = gpu::fused(a, c.c1, gpu::fused(-c.c0, s.delta, -c.c1));
    const float series = s.delta * s.delta * gpu::fused(z, 0.16666667f, 0.5f);
    return {z > -0.04f ? series : closed, 0.f};
  }
  static MMVIM_DEVICE Pull pull(float g, float a, Weights w, const ChannelStep& s,
                                const StateConstants& c, float h, float drive, float) {
    const float g_drive = g * drive;
    const float by_delta = gpu::fused(g * a * c.A, h, g_drive * gpu::fused(a, c.c0, -c.c0));
    return {by_delta, gpu::fused(s.delta, by_delta, -2.f * g_drive * w.w0)};
  }
};

template <>
struct QuickStep<Discretization::kBilinear> : quick::Rational {
  static MMVIM_DEVICE Weights weights(float a, const ChannelStep& s, const StateConstants&) {
    const float half = 0.5f * s.delta;
    return {gpu::fused(half, a, half), 0.f};
  }
  static MMVIM_DEVICE Pull pull(float g, float a, Weights, const ChannelStep& s,
                                const StateConstants& c, float h, float drive, float) {
    return pull_sum(g, a, s.delta, c.A, h, drive);
  }
};

template <>
struct QuickStep<Discretization::kPoly> : quick::Critical {
  // W1 + W2 / 2
  static MMVIM_DEVICE StateConstants constants(float A) {
    const float half = 0.5f / A;
    return {kLog2e * A, A, gpu::fused(half, 1.f / A, 1.f / A), half, 0.f};
  }
  static MMVIM_DEVICE Weights weights(float a, const ChannelStep& s, const StateConstants& c) {
    return {gpu::fused(a, c.c0, gpu::fused(-c.c1, s.delta, -c.c0)), 0.f};
  }
  static MMVIM_DEVICE Pull pull(float g, float a, Weights w, const ChannelStep& s,
                                const StateConstants& c, float h, float drive, float) {
    const float half_w1 = gpu::fused(a, c.c1, -c.c1);
    const float g_drive = g * drive;
    const float by_delta = gpu::fused(g * a * c.A, h, g_drive * (a + half_w1));
    return {by_delta, gpu::fused(s.delta, by_delta, -2.f * g_drive * (w.w0 - half_w1))};
  }
};

template <>
struct QuickStep<Discretization::kHighOrder> : quick::Critical {
  // W1 + W2 + W3 / 2
  static MMVIM_DEVICE StateConstants constants(float A) {
    const float i = 1.f / A;
    return {kLog2e * A, A, i * gpu::fused(i, gpu::fused(0.5f, i, 1.f), 1.f),
            i * gpu::fused(0.5f, i, 1.f), i};
  }
  static MMVIM_DEVICE Weights weights(float a, const ChannelStep& s, const StateConstants& c) {
    const float linear = gpu::fused(-0.25f * s.delta, c.c2, -c.c1);
    return {gpu::fused(a, c.c0, gpu::fused(s.delta, linear, -c.c0)), 0.f};
  }
  static MMVIM_DEVICE Pull pull(float g, float a, Weights w, const ChannelStep& s,
                                const StateConstants& c, float h, float drive, float) {
    const float w1 = gpu::fused(a, c.c2, -c.c2);
    const float w2 = (w1 - s.delta) * c.c2;
    const float w3 = gpu::fused(-0.5f * s.delta, s.delta, w2) * c.c2;
    const float g_drive = g * drive;
    const float by_delta = gpu::fused(g * a * c.A, h, g_drive * gpu::fused(0.5f, w2, a + w1));
    return {by_delta, gpu::fused(s.delta, by_delta, -g_drive * (w.w0 + w2 + w3))};
  }
};

template <>
struct QuickStep<Discretization::kRk4> : quick::Exponential {
  static MMVIM_DEVICE StateConstants constants(float A) { return {kLog2e * A, A, 0.f, 0.f, 0.f}; }
  // delta (1 + z/2 + z^2/6 + z^3/24)
  static MMVIM_DEVICE float polynomial(float z) {
    const float p = gpu::fused(gpu::fused(z, 0.041666668f, 0.16666667f), z, 0.5f);
    return gpu::fused(p, z, 1.f);
  }
  static MMVIM_DEVICE Weights weights(float, const ChannelStep& s, const StateConstants& c) {
    return {s.delta * polynomial(s.delta * c.A), 0.f};
  }
  static MMVIM_DEVICE Pull pull(float g, float a, Weights, const ChannelStep& s,
                                const StateConstants& c, float h, float drive, float) {
    const float z = s.delta * c.A;
    const float slope = gpu::fused(gpu::fused(z, 0.125f, 0.33333333f), z, 0.5f);
    const float by_z = g * gpu::fused(s.delta * drive, slope, a * h);
    return {gpu::fused(c.A, by_z, g * drive * polynomial(z)), s.delta * by_z};
  }
};

template <>
struct QuickStep<Discretization::kFohHold> : quick::Critical {
  static constexpr bool kNeedsInverse = true;

  static MMVIM_DEVICE StateConstants constants(float A) {
    return {kLog2e * A, A, 1.f / A, 0.f, 0.f};
  }
  // w0 = W2 / delta, w1 = W1 - w0
  static MMVIM_DEVICE Weights weights(float a, const ChannelStep& s, const StateConstants& c) {
    const float z = s.delta * c.A;
    const float sum = gpu::fused(a, c.c0, -c.c0);
    const float closed = (sum - s.delta) * (c.c0 * s.inverse);
    const bool near_zero = z > -0.04f;
    const float w0 = near_zero ? s.delta * gpu::fused(z, 0.16666667f, 0.5f) : closed;
    return {w0, near_zero ? s.delta * gpu::fused(z, 0.33333333f, 0.5f) : sum - closed};
  }
  // w0' = w1 / delta, w1' = e^z - w1 / delta
  static MMVIM_DEVICE Pull pull(float g, float a, Weights w, const ChannelStep& s,
                                const StateConstants& c, float h, float drive, float before) {
    const float slope = w.w1 * s.inverse;
    const float inner = gpu::fused(a, before, slope * (drive - before));
    const float by_delta = g * gpu::fused(a * c.A, h, inner);
    const float weighted = gpu::fused(w.w0, drive, w.w1 * before);
    return {by_delta, gpu::fused(s.delta, by_delta, -g * weighted)};
  }
};

template <>
struct QuickStep<Discretization::kTustin> : quick::Rational {
  static MMVIM_DEVICE Weights weights(float a, const ChannelStep& s, const StateConstants&) {
    const float quarter = 0.25f * s.delta;
    const float w = gpu::fused(quarter, a, quarter);
    return {w, w};
  }
  static MMVIM_DEVICE Pull pull(float g, float a, Weights, const ChannelStep& s,
                                const StateConstants& c, float h, float drive, float before) {
    return pull_sum(g, a, s.delta, c.A, h, 0.5f * (drive + before));
  }
};

template <Discretization kMethod>
MMVIM_DEVICE ChannelStep channel_step(float delta) {
  if constexpr (QuickStep<kMethod>::kNeedsInverse) {
    return {delta, gpu::reciprocal(fmaxf(delta, 1e-20f))};
  } else {
    return {delta, 0.f};
  }
}

// Constants for quick or exact steps. States that do not exist have A = 0 and never a drive.
template <Discretization kMethod, bool kQuick>
MMVIM_DEVICE StateConstants state_constants(float A) {
  if constexpr (kQuick) {
    return QuickStep<kMethod>::constants(A == 0.f ? -1.f : A);
  } else {
    return {static_cast<float>(Rule<kMethod, GpuMath>::kRateScale) * A, A, 0.f, 0.f, 0.f};
  }
}

template <Discretization kMethod, bool kQuick>
MMVIM_DEVICE float decay_of(const ChannelStep& s, const StateConstants& c) {
  if constexpr (kQuick) {
    return QuickStep<kMethod>::decay(s, c);
  } else {
    return Rule<kMethod, GpuMath>::step(s.delta, c.rate).a;
  }
}
// Given the decay.
template <Discretization kMethod, bool kQuick>
MMVIM_DEVICE Weights weights_of(float a, const ChannelStep& s, const StateConstants& c) {
  if constexpr (kQuick) {
    return QuickStep<kMethod>::weights(a, s, c);
  } else {
    const auto step = Rule<kMethod, GpuMath>::step(s.delta, c.rate);
    return {step.w0, step.w1};
  }
}

// What a step whose result has the gradient `g` passes to delta and A, and its weights. Quick steps
// take the decay `a` from the way there; exact ones are computed anew, `a` too.
template <Discretization kMethod, bool kQuick>
MMVIM_DEVICE Pull pull_of(float g, float& a, Weights& w, const ChannelStep& s,
                          const StateConstants& c, float h, float x, float B, float v) {
  if constexpr (kQuick) {
    w = weights_of<kMethod, true>(a, s, c);
    return QuickStep<kMethod>::pull(g, a, w, s, c, h, x * B, v);
  } else {
    using R = Rule<kMethod, GpuMath>;
    const auto step = R::step_with_grad(s.delta, c.rate);
    float by_z, by_delta;
    pull_back<R, GpuMath>(step, g * h, g * x * B, g * v, &by_z, &by_delta);
    a = step.a;
    w = {step.w0, step.w1};
    return {gpu::fused(by_z, c.rate, by_delta), by_z * s.delta};
  }
}

// Advances one state and returns its decay; `x` is u, or delta u where the method's input weight is
// delta itself.
template <Discretization kMethod, bool kQuick>
MMVIM_DEVICE float advance_state(float& h, float& v, const ChannelStep& s, const StateConstants& c,
                                 float x, float B) {
  using R = Rule<kMethod, GpuMath>;
  const float drive = x * B;
  const float a = decay_of<kMethod, kQuick>(s, c);
  if constexpr (R::kInputIsDelta) {
    h = gpu::fused(a, h, drive);
    return a;
  }
  const Weights w = weights_of<kMethod, kQuick>(a, s, c);
  h = gpu::fused(w.w0, drive, a * h);
  if constexpr (R::kTwoTap) {
    h = gpu::fused(w.w1, v, h);
    v = drive;
  }
  return a;
}

}  // namespace scan
}  // namespace mmvim
