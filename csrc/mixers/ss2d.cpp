// SS2D as one function each way. Kept for backward are the results of all steps but the SiLU,
// which is made again.
#include "ss2d.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/sum.h>

#include <array>
#include <tuple>

#include "../common/direct.h"
#include "../common/glue.h"
#include "conversions.h"
#include "norm.h"
#include "products.h"

namespace mmvim {
namespace mixers {
namespace ss2d {
namespace {

enum Index : int {
  kInWeight,
  kInBias,
  kConvWeight,
  kConvBias,
  kProjection,
  kStepWeight,
  kStepBias,
  kDecayLog,
  kSkip,
  kNormWeight,
  kNormBias,
  kOutWeight,
  kOutBias,
};
static_assert(kOutBias + 1 == kCount);

using Scan = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptTensor&,
                                        const Tensor&, const Tensor&, const Tensor&,
                                        const OptTensor&, const OptTensor&, IntArrayRef, bool,
                                        std::string_view, int64_t, bool);
using ScanBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const OptTensor&, const Tensor&, const Tensor&,
    const Tensor&, const OptTensor&, const OptTensor&, const Tensor&, IntArrayRef, bool,
    std::string_view, int64_t);

template <class F>
c10::TypedOperatorHandle<F> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

// (batch, height, width, channels) as (batch, channels, height, width).
Tensor channels_first(const Tensor& t) {
  return view(t, 0, {t.size(0), t.size(3), t.size(1), t.size(2)},
              {t.stride(0), t.stride(3), t.stride(1), t.stride(2)});
}
Tensor channels_last(const Tensor& t) { return t.permute({0, 2, 3, 1}).contiguous(); }

class Layer {
 public:
  Layer(const Tensor& x, int64_t height, int64_t width, const Parameters& parameters,
        const Options& options)
      : o_(options),
        wide_(compute_type(options.type)),
        batch_(x.size(0)),
        height_(height),
        width_(width) {
    TORCH_CHECK_VALUE(parameters.size() == kCount, "there must be ", static_cast<int>(kCount),
                      " parameters of SS2D, got ", parameters.size());
    for (int i = 0; i < kCount; ++i) {
      const OptTensor t = parameters.get(i);
      if (!t.has_value()) continue;
      dtype_of(t->scalar_type(), "a parameter");
      given_[i] = *t;
    }
    for (const int i : {kInWeight, kConvWeight, kProjection, kStepWeight, kStepBias, kDecayLog,
                        kSkip, kNormWeight, kNormBias, kOutWeight}) {
      TORCH_CHECK_VALUE(given_[i].defined(), "parameter ", i, " of SS2D is missing");
    }
    const Tensor &steps = given_[kStepWeight], &logs = given_[kDecayLog];
    TORCH_CHECK_VALUE(steps.dim() == 3 && logs.dim() == 2 && given_[kConvWeight].dim() == 4,
                      "parameters of SS2D have wrong shapes");
    const int64_t c = x.size(2), kernel = given_[kConvWeight].size(3);
    k_ = steps.size(0);
    d_ = steps.size(1);
    r_ = steps.size(2);
    n_ = logs.size(1);
    const int64_t columns = r_ + 2 * n_;
    const std::array<std::vector<int64_t>, kCount> sizes{{{d_, c},
                                                          {d_},
                                                          {d_, 1, kernel, kernel},
                                                          {d_},
                                                          {k_, columns, d_},
                                                          {k_, d_, r_},
                                                          {k_, d_},
                                                          {k_ * d_, n_},
                                                          {k_ * d_},
                                                          {d_},
                                                          {d_},
                                                          {c, d_},
                                                          {c}}};
    padding_ = kernel / 2;
    for (int i = 0; i < kCount; ++i) {
      if (given_[i].defined()) check_place(given_[i], "a parameter of SS2D", sizes[i], x.device());
    }
    convert(x);
  }

  Tensor forward(const Tensor& x, std::vector<Tensor>& kept) const {
    const Tensor inner = linear(x, made_[kInWeight], made_[kInBias], true);
    Tensor mixed = channels_last(at::convolution(channels_first(as_map(inner)), made_[kConvWeight],
                                                 bias_of(kConvBias), {1, 1}, {padding_, padding_},
                                                 {1, 1}, false, {0, 0}, d_));
    const Tensor u = o_.gradient ? at::silu(mixed) : at::silu_(mixed);
    const Tensor low = linear(as_rows(u), projection(), {}, true);
    static const auto scan = find<Scan>("mmvim::cross_scan_fused");
    const auto [y, checkpoints] = scan.call(
        u, part(low, 0, r_), made_[kStepWeight], decay(), part(low, r_, n_), part(low, r_ + n_, n_),
        skip(), made_[kStepBias], o_.routes, true, o_.discretization, o_.round_steps, o_.gradient);
    const Tensor whole = as_rows(y);
    const Norm norm = norm_of(whole).forward(o_.gradient);
    if (o_.gradient) {
      kept = {inner, mixed, low, whole, checkpoints, norm.out, norm.first, norm.second};
    }
    return linear(norm.out, made_[kOutWeight], made_[kOutBias], true);
  }

  std::vector<Tensor> backward(const Tensor& grad, const Tensor& x, at::TensorList kept,
                               int64_t needed) {
    const Tensor &inner = kept[0], &mixed = kept[1], &low = kept[2], &y = kept[3],
                 &checkpoints = kept[4];
    const Norm norm{kept[5], kept[6], kept[7]};
    needed_ = needed;
    grads_.resize(1 + kCount);
    Conversions conversions(wide_);

    add_linear(conversions, kOutWeight, grad, norm.out);
    auto [dy, dnorm_weight, dnorm_bias] = norm_of(y).backward(times(grad, made_[kOutWeight]), norm);
    set(kNormWeight, dnorm_weight);
    set(kNormBias, dnorm_bias);

    const Tensor u = at::silu(mixed), A = decay();
    static const auto scan = find<ScanBackward>("mmvim::cross_scan_fused_backward");
    auto [du, dsteps, dstep_weight, dA, dB, dC, dskip, dstep_bias] =
        scan.call(as_map(dy), u, part(low, 0, r_), made_[kStepWeight], A, part(low, r_, n_),
                  part(low, r_ + n_, n_), skip(), made_[kStepBias], checkpoints, o_.routes, true,
                  o_.discretization, o_.round_steps);
    set(kStepWeight, dstep_weight);
    set(kStepBias, dstep_bias);
    set(kSkip, dskip);
    if (needs(kDecayLog)) {  // A = -exp(log)
      const Tensor dlog = at::empty(given_[kDecayLog].sizes(), given_[kDecayLog].options());
      if (is_plain(dlog)) {
        conversions.add(dA, dlog, Conversion::kMultiply, 1, A);
        grads_[1 + kDecayLog] = dlog;
      } else {
        set(kDecayLog, dA.mul(A));
      }
    }
    const Tensor dlow = at::cat({dsteps, dB, dC}, -1).view({batch_, height_ * width_, -1});
    add_weight(conversions, kProjection, dlow, as_rows(u));
    Tensor du_rows = rows(as_rows(du));
    du_rows.addmm_(rows(dlow), projection());

    const Tensor dmixed = at::silu_backward(du, mixed);
    auto [dinner_first, dconv_weight, dconv_bias] = at::convolution_backward(
        channels_first(dmixed), channels_first(as_map(inner)), made_[kConvWeight],
        at::OptionalIntArrayRef(IntArrayRef(&d_, 1)), {1, 1}, {padding_, padding_}, {1, 1}, false,
        {0, 0}, d_, {true, needs(kConvWeight), needs(kConvBias)});
    if (needs(kConvWeight)) convert_gradient(conversions, kConvWeight, dconv_weight.contiguous());
    if (needs(kConvBias)) set(kConvBias, dconv_bias);
    const Tensor dinner = as_rows(channels_last(dinner_first));
    add_linear(conversions, kInWeight, dinner, x);
    if ((needed & 1) != 0) grads_[0] = times(dinner, made_[kInWeight]);
    conversions.run(x);
    return std::move(grads_);
  }

 private:
  bool is_matrix(int i) const { return i <= kProjection || i == kOutWeight || i == kOutBias; }
  // Kernels that convert meet doubles beside doubles alone.
  bool is_plain(const Tensor& t) const {
    return (t.scalar_type() == at::kDouble) == (wide_ == at::kDouble);
  }

  // The parameters in the dtypes in which they are used.
  void convert(const Tensor& x) {
    Conversions conversions(wide_);
    const auto place = [&](const Tensor& t, at::ScalarType type) {
      return at::empty(t.sizes(), x.options().dtype(type));
    };
    for (int i = 0; i < kCount; ++i) {
      const Tensor& t = given_[i];
      if (!t.defined()) continue;
      const auto type =
          is_matrix(i) || (i == kStepWeight && t.scalar_type() == o_.type) ? o_.type : wide_;
      if (i == kDecayLog) {
        made_[i] = place(t, wide_);
        conversions.add(is_plain(t) ? t : t.to(wide_), made_[i], Conversion::kDecay);
      } else if (t.scalar_type() == type || !is_plain(t)) {
        made_[i] = as(t, type).contiguous();
      } else {
        made_[i] = place(t, type);
        conversions.add(t, made_[i]);
      }
    }
    conversions.run(x);
  }

  Tensor as_map(const Tensor& t) const { return view(t, 0, {batch_, height_, width_, t.size(-1)}); }
  Tensor as_rows(const Tensor& t) const {
    return view(t, 0, {batch_, height_ * width_, t.size(-1)});
  }
  // Columns of each route of what x is projected to: (batch, height, width, routes, count).
  Tensor part(const Tensor& low, int64_t first, int64_t count) const {
    const int64_t columns = r_ + 2 * n_, step = k_ * columns;
    return view(low, first, {batch_, height_, width_, k_, count},
                {height_ * width_ * step, width_ * step, step, columns, 1});
  }
  Tensor projection() const { return view(made_[kProjection], 0, {k_ * (r_ + 2 * n_), d_}); }
  Tensor decay() const { return view(made_[kDecayLog], 0, {k_, d_, n_}); }
  Tensor skip() const { return view(made_[kSkip], 0, {k_, d_}); }
  OptTensor bias_of(int i) const { return made_[i].defined() ? OptTensor(made_[i]) : OptTensor(); }
  LayerNorm norm_of(const Tensor& y) const {
    return {y, made_[kNormWeight], made_[kNormBias], o_.eps, o_.type};
  }

  bool needs(int i) const { return (needed_ >> (1 + i) & 1) != 0; }
  void set(int i, const Tensor& grad) {
    if (needs(i)) grads_[1 + i] = as(grad, given_[i].scalar_type()).view(given_[i].sizes());
  }
  void convert_gradient(Conversions& conversions, int i, const Tensor& grad) {
    const Tensor& of = given_[i];
    if (grad.scalar_type() == of.scalar_type() || !is_plain(of)) {
      set(i, grad);
      return;
    }
    grads_[1 + i] = at::empty(of.sizes(), of.options());
    conversions.add(grad, grads_[1 + i]);
  }
  // Of the weight of x w' and, in add_linear, of the bias after it.
  void add_weight(Conversions& conversions, int i, const Tensor& dy, const Tensor& x) {
    if (!needs(i)) return;
    const Tensor grad = at::empty({dy.size(2), x.size(2)}, dy.options());
    product(grad, transposed(rows(dy)), rows(x));
    convert_gradient(conversions, i, grad);
  }
  void add_linear(Conversions& conversions, int i, const Tensor& dy, const Tensor& x) {
    add_weight(conversions, i, dy, x);
    if (needs(i + 1)) {
      grads_[1 + i + 1] = at::sum(rows(dy), IntArrayRef({0}), false, given_[i + 1].scalar_type());
    }
  }
  static Tensor times(const Tensor& dy, const Tensor& weight) {
    const Tensor dx = at::empty({dy.size(0), dy.size(1), weight.size(1)}, dy.options());
    product(rows(dx), rows(dy), weight);
    return dx;
  }

  const Options& o_;
  at::ScalarType wide_;
  int64_t batch_, height_, width_, k_, d_, r_, n_, padding_;
  std::array<Tensor, kCount> given_, made_;
  int64_t needed_ = 0;
  std::vector<Tensor> grads_;
};

}  // namespace

Tensor forward(const Tensor& x, int64_t height, int64_t width, const Parameters& parameters,
               const Options& options, std::vector<Tensor>& kept) {
  return Layer(x, height, width, parameters, options).forward(x, kept);
}

std::vector<Tensor> backward(const Tensor& grad, const Tensor& x, int64_t height, int64_t width,
                             const Parameters& parameters, const Options& options,
                             at::TensorList kept, int64_t needed) {
  return Layer(x, height, width, parameters, options).backward(grad, x, kept, needed);
}

}  // namespace ss2d
}  // namespace mixers
}  // namespace mmvim
