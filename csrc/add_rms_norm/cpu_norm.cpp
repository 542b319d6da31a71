#include <initializer_list>

#include "../common/cpu_rows.h"
#include "cpu_kernels.h"

namespace mmvim {
namespace MMVIM_ISA {
namespace {

constexpr int64_t kRows = 16;

template <class S>
void load_line(S* dst, const View& view, int64_t row, int64_t channels, int64_t padded) {
  load_padded(dst, view, 0, row, 0, static_cast<int>(channels), static_cast<int>(padded));
}

template <class S>
void put_line(const Output& out, int64_t row, const S* src, int64_t channels) {
  if (out.data == nullptr) return;
  store_row(out.at(0, row, 0), out.dtype, src, static_cast<int>(channels));
}

// Multiplies a line by the factor of its sample.
template <class Args, class S>
void keep_share(const Args& a, int64_t row, S* line, int64_t padded) {
  if (a.keep == nullptr) return;
  const auto share = VectorMath<S>::set(static_cast<const S*>(a.keep)[row / a.sample]);
  for (int64_t c = 0; c < padded; c += kLanes<S>) store(line + c, load(line + c) * share);
}

// Sum of products of two lines, in eight chains.
template <class S>
S dot(const S* a, const S* b, int64_t padded) {
  using M = VectorMath<S>;
  typename M::V sum[8];
  for (auto& s : sum) s = M::set(S(0));
  int64_t c = 0;
  for (; c + 8 * kLanes<S> <= padded; c += 8 * kLanes<S>) {
    for (int i = 0; i < 8; ++i) {
      sum[i] = M::fma(load(a + c + i * kLanes<S>), load(b + c + i * kLanes<S>), sum[i]);
    }
  }
  for (; c < padded; c += kLanes<S>) sum[0] = M::fma(load(a + c), load(b + c), sum[0]);
  for (int half = 4; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sum[i] = sum[i] + sum[i + half];
  }
  return sum_lanes<S>(sum[0]);
}

template <class S>
void forward(const NormForwardArgs& a) {
  using M = VectorMath<S>;
  const int64_t padded = round_up<S>(a.channels);
  parallel(divide_up(a.rows, kRows), [&](int64_t begin, int64_t end) {
    Arena arena;
    S *r = nullptr, *line = nullptr, *weight = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      for (S** p : {&r, &line, &weight}) *p = arena.take<S>(padded);
      if (pass == 0) arena.reserve();
    }
    fill(weight, S(0), padded);
    std::memcpy(weight, a.weight, a.channels * sizeof(S));
    for (int64_t row = begin * kRows; row < smaller(end * kRows, a.rows); ++row) {
      load_line(r, a.x, row, a.channels, padded);
      keep_share(a, row, r, padded);
      if (a.residual.data != nullptr) {
        load_line(line, a.residual, row, a.channels, padded);
        for (int64_t c = 0; c < padded; c += kLanes<S>) store(r + c, load(r + c) + load(line + c));
      }
      put_line(a.residual_out, row, r, a.channels);
      const S mean = dot(r, r, padded) / S(a.channels);
      const S rstd = S(1) / std::sqrt(mean + S(a.eps));
      static_cast<S*>(a.rstd)[row] = rstd;
      for (int64_t c = 0; c < padded; c += kLanes<S>) {
        store(r + c, load(r + c) * M::set(rstd) * load(weight + c));
      }
      put_line(a.out, row, r, a.channels);
    }
  });
}

// With n = r * rstd and g = grad_out * weight: dr = rstd (g - n mean(g n)) + grad_residual_out.
// dweight is summed per chunk of rows and the chunks in order: the cut depends on the shape alone.
template <class S>
void backward(const NormBackwardArgs& a) {
  using M = VectorMath<S>;
  using V = typename M::V;
  const int64_t padded = round_up<S>(a.channels);
  const int64_t chunk = larger(kRows, divide_up(a.rows, 256)), chunks = divide_up(a.rows, chunk);
  Arena sums;
  sums.take<S>(chunks * padded);
  sums.reserve();
  S* partial = sums.take<S>(chunks * padded);
  parallel(chunks, [&](int64_t begin, int64_t end) {
    Arena arena;
    S *g = nullptr, *n = nullptr, *line = nullptr, *weight = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      for (S** p : {&g, &n, &line, &weight}) *p = arena.take<S>(padded);
      if (pass == 0) arena.reserve();
    }
    fill(weight, S(0), padded);
    std::memcpy(weight, a.weight, a.channels * sizeof(S));
    for (int64_t k = begin; k < end; ++k) {
      S* sum = partial + k * padded;
      fill(sum, S(0), padded);
      for (int64_t row = k * chunk; row < smaller((k + 1) * chunk, a.rows); ++row) {
        const S rstd = static_cast<const S*>(a.rstd)[row];
        load_line(g, a.grad_out, row, a.channels, padded);
        load_line(n, a.residual_out, row, a.channels, padded);
        for (int64_t c = 0; c < padded; c += kLanes<S>) {
          const V normed = load(n + c) * M::set(rstd), grad = load(g + c);
          store(n + c, normed);
          store(sum + c, M::fma(grad, normed, load(sum + c)));
          store(g + c, grad * load(weight + c));
        }
        const V mean = M::set(dot(g, n, padded) / S(a.channels));
        const bool has_grad = a.grad_residual_out.data != nullptr;
        if (has_grad) load_line(line, a.grad_residual_out, row, a.channels, padded);
        for (int64_t c = 0; c < padded; c += kLanes<S>) {
          const V dr = (load(g + c) - load(n + c) * mean) * M::set(rstd);
          store(g + c, has_grad ? dr + load(line + c) : dr);
        }
        put_line(a.dresidual, row, g, a.channels);
        keep_share(a, row, g, padded);
        put_line(a.dx, row, g, a.channels);
      }
    }
  });
  S* dweight = static_cast<S*>(a.dweight);
  fill(dweight, S(0), a.channels);
  for (int64_t k = 0; k < chunks; ++k) {
    for (int64_t c = 0; c < a.channels; ++c) dweight[c] += partial[k * padded + c];
  }
}

}  // namespace

void norm_forward(const NormForwardArgs& args, bool is_double) {
  is_double ? forward<double>(args) : forward<float>(args);
}

void norm_backward(const NormBackwardArgs& args, bool is_double) {
  is_double ? backward<double>(args) : backward<float>(args);
}

}  // namespace MMVIM_ISA
}  // namespace mmvim
