#include "cpu_tile.h"

namespace mmvim {
namespace MMVIM_ISA {
namespace {

// Where the decay is all that a method needs an exponential for, it is kept between the passes.
template <class R>
constexpr bool kKeepsDecay = R::kInputIsDelta;

// States that advance together where the decay is a bare power of two: as many as the registers
// hold.
#if defined(MMVIM_AVX512_INTRINSICS)
constexpr int kTogether = 4;
#elif defined(MMVIM_VECTOR_EXTENSIONS)
constexpr int kTogether = 2;
#else
constexpr int kTogether = 1;
#endif

// One state per channel, which stays in a register.
template <bool kKeep, class S>
void forward_tile_of_one(const ForwardTile<S>& t) {
  using M = VectorMath<S>;
  using V = typename M::V;
  const V rate = load(t.rate);
  V h = load(t.h);
  for (int64_t i = 0; i < t.steps; ++i) {
    const V delta = load(t.delta + i * t.row);
    const V x = delta * load_unaligned(t.u + i * t.u_row);
    const V a = M::exp2(delta * rate);
    h = M::fma(a, h, x * M::set(t.B[i]));
    if constexpr (kKeep) store(t.a + i * kLanes<S>, a);
    if (t.h_step != 0) store(t.h + (i + 1) * t.h_step, h);
    store(t.y + i * t.row, h * M::set(t.C[i]));
  }
  if (t.h_step == 0) store(t.h, h);
}

template <class S>
void backward_tile_of_one(const BackwardTile<S>& t) {
  using M = VectorMath<S>;
  using V = typename M::V;
  using R = Rule<Discretization::kZoh, M>;
  constexpr int kWidth = kLanes<S>;
  const V rate = load(t.rate) * M::set(S(1.0 / R::kRateScale));
  V dh_after = load(t.dh), dA = load(t.dA);
  for (int64_t i = t.steps - 1; i >= 0; --i) {
    const V delta = load(t.delta + i * t.row), u = load(t.u + i * t.row);
    const V dy = load(t.dy + i * t.row), a = load(t.a + i * kWidth);
    const V dh = M::fma(dy, M::set(t.C[i]), dh_after);
    dh_after = dh * a;
    const V dz = dh_after * load(t.h + i * kWidth), dx = dh * M::set(t.B[i]);
    store(t.dC + i * kWidth, M::fma(dy, load(t.h + (i + 1) * kWidth), load(t.dC + i * kWidth)));
    store(t.dB + i * kWidth, M::fma(dh, delta * u, load(t.dB + i * kWidth)));
    store(t.du + i * t.row, delta * dx);
    store(t.ddelta + i * t.row, M::fma(dz, rate, u * dx));
    dA = M::fma(dz, delta, dA);
  }
  store(t.dh, dh_after);
  store(t.dA, dA);
}

template <Discretization kMethod, bool kKeep, class S>
void forward_tile(const ForwardTile<S>& t) {
  using M = VectorMath<S>;
  using V = typename M::V;
  using R = Rule<kMethod, M>;
  constexpr int kWidth = kLanes<S>;

  if constexpr (R::kInputIsDelta) {
    if (t.states == 1) return forward_tile_of_one<kKeep>(t);
  }
  for (int64_t i = 0; i < t.steps; ++i) {
    const V delta = load(t.delta + i * t.row);
    const V u = load_unaligned(t.u + i * t.u_row);
    const V x = delta * u;
    prefetch(t.u + (i + t.steps) * t.u_row);  // the next tile's
    const S* B = t.B + i * t.states;
    const S* C = t.C + i * t.states;
    const S* before = t.h + i * t.h_step;
    S* after = t.h + (i + 1) * t.h_step;
    V y = M::set(S(0));
    int64_t n = 0;
    if constexpr (R::kInputIsDelta) {
      for (; n + kTogether <= t.states; n += kTogether) {
        V a[kTogether], h[kTogether];
        for (int k = 0; k < kTogether; ++k) a[k] = delta * load(t.rate + (n + k) * kWidth);
        M::exp2(a);
        for (int k = 0; k < kTogether; ++k) {
          const int64_t at = (n + k) * kWidth;
          if constexpr (kKeep) store(t.a + i * t.states * kWidth + at, a[k]);
          h[k] = M::fma(a[k], load(before + at), x * M::set(B[n + k]));
          store(after + at, h[k]);
        }
        for (int k = 0; k < kTogether; ++k) y = M::fma(h[k], M::set(C[n + k]), y);
      }
    }
    for (; n < t.states; ++n) {
      const Step<V> s = R::step(delta, load(t.rate + n * kWidth));
      if constexpr (kKeep) store(t.a + (i * t.states + n) * kWidth, s.a);
      V h = s.a * load(before + n * kWidth);
      if constexpr (R::kInputIsDelta) {
        h = M::fma(x, M::set(B[n]), h);
      } else {
        const V bu = u * M::set(B[n]);
        h = M::fma(s.w0, bu, h);
        if constexpr (R::kTwoTap) {
          h = M::fma(s.w1, load(t.v + n * kWidth), h);
          store(t.v + n * kWidth, bu);
        }
      }
      store(after + n * kWidth, h);
      y = M::fma(h, M::set(C[n]), y);
    }
    store(t.y + i * t.row, y);
  }
}

template <Discretization kMethod, class S>
void backward_tile(const BackwardTile<S>& t) {
  using M = VectorMath<S>;
  using V = typename M::V;
  using R = Rule<kMethod, M>;
  constexpr int kWidth = kLanes<S>;
  const int64_t state_row = t.states * kWidth;

  if constexpr (kKeepsDecay<R>) {
    if (t.states == 1) return backward_tile_of_one(t);
  }
  for (int64_t i = t.steps - 1; i >= 0; --i) {
    const V delta = load(t.delta + i * t.row);
    const V u = load(t.u + i * t.row);
    const V dy = load(t.dy + i * t.row);
    const V x = delta * u;
    const S* B = t.B + i * t.states;
    const S* C = t.C + i * t.states;
    const S* before = t.h + i * state_row;
    const S* after = before + state_row;
    S* dB = t.dB + i * state_row;
    S* dC = t.dC + i * state_row;
    const V u_before = R::kTwoTap && i > 0 ? load(t.u + (i - 1) * t.row) : u;
    V du = M::set(S(0)), sum_z = du, sum_delta = du;
    for (int64_t n = 0; n < t.states; ++n) {
      const int64_t k = n * kWidth;
      const V rate = load(t.rate + k);
      StepWithGrad<V> s;
      if constexpr (kKeepsDecay<R>) {
        s.a = s.a_z = load(t.a + i * state_row + k);
      } else {
        s = R::step_with_grad(delta, rate);
      }
      const V b = M::set(B[n]);
      const V dh = M::fma(dy, M::set(C[n]), load(t.dh + k));
      store(dC + k, M::fma(dy, load(after + k), load(dC + k)));
      store(t.dh + k, dh * s.a);
      const V da = dh * load(before + k);
      V dz, ddelta;
      if constexpr (R::kInputIsDelta) {
        pull_back<R, M>(s, da, dh, dh, &dz, &ddelta);
        du = M::fma(dh, b, du);
        store(dB + k, M::fma(dh, x, load(dB + k)));
      } else {
        const V bu = u * b;
        V dbu = dh * s.w0;
        V dw1 = dh;
        if constexpr (R::kTwoTap) {
          const V v = i > 0 ? u_before * M::set(B[n - t.states]) : load(t.v + k);
          dw1 = dh * v;
          dbu = dbu + load(t.dv + k);
          store(t.dv + k, dh * s.w1);
        }
        pull_back<R, M>(s, da, dh * bu, dw1, &dz, &ddelta);
        sum_delta = sum_delta + ddelta;
        du = M::fma(dbu, b, du);
        store(dB + k, M::fma(dbu, u, load(dB + k)));
      }
      sum_z = M::fma(dz, rate, sum_z);
      store(t.dA + k, M::fma(dz, delta, load(t.dA + k)));
    }
    if constexpr (R::kInputIsDelta) {
      // du holds sum(dh B): w0 = delta gives both gradients from it.
      sum_delta = u * du;
      du = delta * du;
    }
    store(t.du + i * t.row, du);
    store(t.ddelta + i * t.row, M::fma(sum_z, M::set(S(1.0 / R::kRateScale)), sum_delta));
  }
}

}  // namespace

template <class S>
TileKernels<S> tile_kernels(Discretization method) {
  TileKernels<S> kernels{};
  with_discretization(method, [&](auto tag) {
    constexpr Discretization kMethod = decltype(tag)::value;
    using R = Rule<kMethod, VectorMath<S>>;
    kernels = {forward_tile<kMethod, false, S>, forward_tile<kMethod, kKeepsDecay<R>, S>,
               backward_tile<kMethod, S>, R::kRateScale, kKeepsDecay<R>};
  });
  return kernels;
}

template TileKernels<float> tile_kernels<float>(Discretization);
template TileKernels<double> tile_kernels<double>(Discretization);

}  // namespace MMVIM_ISA
}  // namespace mmvim
