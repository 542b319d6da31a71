// A mixer as one function each way: matrix products of ATen and the kernels of the other folders,
// strung together. Gradients that meet are accumulated by the product that makes them; with
// `recompute` a layer keeps its input, the low-rank projections, the (sum of the) scans and the
// scans' checkpoints, and backward makes the rest again (compare section 3.3.2 of Gu and Dao,
// arXiv 2312.00752). Casts of parameters, A = -exp(A_log) and what gradients need after the last
// product are one kernel each.
#include <ATen/TensorUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <vector>

#include "mixer.h"

#include "../common/direct.h"
#include "../common/glue.h"
#include "../common/scratch.h"
#include "conversions.h"
#include "parameters.h"
#include "plain.h"
#include "products.h"

namespace mmvim {
namespace mixers {
namespace {

// Order of the parameters; those from kTaps on once for each direction.
enum Index : int {
  kInWeight,
  kInBias,
  kOutWeight,
  kOutBias,
  kTaps,
  kConvBias,
  kXProj,
  kDtProj,
  kDtBias,
  kALog,
  kSkip,
  kPerDirection = kSkip + 1 - kTaps,
  kNorm = kTaps + 2 * kPerDirection,
  kCount,
};

// Numbers that the scans' blocks find cleared.
constexpr int64_t kFlags = 4096;
// Calls that work on more memory than this take it piece by piece, and give it back as early.
constexpr int64_t kMostScratch = 64 << 20;

// What a mixer is told besides tensors.
struct Options {
  // "one": a single direction; "v1": two that share all but A; "v2": two with their own
  // parameters; "half": half of the channels are scanned, and the second direction's taps are
  // those of the other half.
  std::string_view kind;
  bool reverse;  // the convolution, and the scan of "one"
  double scale;  // of the sum of two directions
  double bias_scale;
  std::string_view discretization;
  bool recompute;
  double eps;  // of the norm
  bool residual_in_fp32;
  int64_t interval;  // between checkpoints; 0: there will be no backward pass

  bool is_half() const { return kind == "half"; }
  int scans() const { return kind == "v1" || kind == "v2" ? 2 : 1; }
  int projections() const { return kind == "v2" ? 2 : 1; }
  std::string_view conv_mode() const { return is_half() ? "same" : reverse ? "reverse" : "causal"; }
};

// What ends with the call, and what does not.
Tensor empty(IntArrayRef sizes, const Tensor& like) {
  return Scratch::empty(sizes, like.options());
}
Tensor fresh(IntArrayRef sizes, at::ScalarType type, const Tensor& like) {
  return at::empty(sizes, like.options().dtype(type));
}
Tensor fresh(IntArrayRef sizes, const Tensor& like) { return at::empty(sizes, like.options()); }

// Columns from `first` on of the last dimension.
Tensor columns(const Tensor& t, int64_t first, int64_t count) {
  at::DimVector sizes(t.sizes());
  sizes.back() = count;
  return view(t, first * t.strides().back(), sizes, t.strides());
}
// (..., n) as (..., 1, n).
Tensor one_group(const Tensor& t) {
  at::DimVector sizes(t.sizes()), strides(t.strides());
  sizes.insert(sizes.end() - 1, 1);
  strides.insert(strides.end() - 1, strides.back() * t.size(-1));
  return view(t, 0, sizes, strides);
}

struct Sizes {
  int64_t batch, length, model, channels, out, rank, states, width;
  int64_t tokens() const { return batch * length; }
  int64_t low_rank() const { return rank + 2 * states; }
};

// The parameters of a layer as the arithmetic wants them: matrices in the dtype of the
// activations, the rest in the computing type, and A for its logarithm. What has another dtype as
// given, and what lies side by side, lies in two arrays, `matrices` and `vectors`.
class Prepared {
 public:
  Tensor in_weight, in_bias, out_weight, out_bias;
  Tensor taps[2], x_proj, dt_proj, A[2];  // of the projections: stacks
  OptTensor conv_bias[2], dt_bias[2], skip[2];
  Tensor matrices, vectors;
  Sizes size;

  Prepared(const Tensor& x, const Parameters& given, const Options& options)
      : type_(x.scalar_type()), wide_(compute_type(type_)), options_(options) {
    dtype_of(type_, "x");
    TORCH_CHECK_VALUE(x.dim() == 3, "x must be (batch, length, channels), got ", x.sizes());
    TORCH_CHECK_VALUE(options.kind == "one" || options.kind == "v1" || options.kind == "v2" ||
                          options.kind == "half",
                      "kind must be 'one', 'v1', 'v2' or 'half', got '", options.kind, "'");
    TORCH_CHECK_VALUE(given.size() == kCount, "there must be ", static_cast<int>(kCount),
                      " parameters (None for what is absent), got ", given.size());
    for (int i = 0; i < kCount; ++i) {
      const std::optional<Tensor> t = given.get(i);
      if (!t.has_value()) continue;
      TORCH_CHECK_VALUE(t->device() == x.device() && t->layout() == at::kStrided, "parameter ", i,
                        " must be a strided tensor on ", x.device(), ", got ", t->layout(), " on ",
                        t->device());
      dtype_of(t->scalar_type(), "a parameter");
      types[i] = t->scalar_type();
      // Kernels meet doubles beside doubles alone.
      const bool fits = (wide_ == at::kDouble) == (t->scalar_type() == at::kDouble);
      given_[i] = (fits ? *t : t->to(wide_)).contiguous();
      shapes[i] = t->sizes();
      // Taps have the shape of a convolution's weight.
      if ((i == kTaps || i == of(kTaps, 1)) && t->dim() == 3 && t->size(1) == 1) {
        given_[i] = view(given_[i], 0, {t->size(0), t->size(2)});
      }
    }
    check(x);
  }

  // As given.
  std::array<at::ScalarType, kCount> types{};
  std::array<at::DimVector, kCount> shapes;
  bool has(int i) const { return given_[i].defined(); }
  // Of the norm, in the computing type.
  Tensor norm() const { return given_[kNorm].to(wide_); }
  IntArrayRef sizes(int i) const { return given_[i].sizes(); }
  // Index of a parameter of a direction.
  static constexpr int of(Index i, int direction) { return i + direction * kPerDirection; }

  // Converts, one kernel.
  void make(Scratch& scratch) {
    Conversions conversions(wide_);
    place(nullptr);
    const auto options = given_[kInWeight].options();
    const auto make_array = [&](int64_t count, at::ScalarType type) {
      return options_.interval > 0 ? at::empty({count}, options.dtype(type))
                                   : Scratch::empty({count}, options.dtype(type));
    };
    matrices = make_array(matrices_, type_);
    vectors = make_array(vectors_, wide_);
    place(&conversions);
    if (Scratch::in_force()) {
      const Tensor zeros = scratch.zeros_to_make(kFlags);
      if (zeros.defined()) conversions.clear(zeros);
    }
    conversions.run(vectors);
  }
  // What make() left.
  void take(const Tensor& matrices_given, const Tensor& vectors_given) {
    place(nullptr);
    TORCH_CHECK_VALUE(matrices_given.numel() == matrices_ && vectors_given.numel() == vectors_ &&
                          matrices_given.scalar_type() == type_ &&
                          vectors_given.scalar_type() == wide_ && matrices_given.is_contiguous() &&
                          vectors_given.is_contiguous(),
                      "the prepared parameters do not belong to these parameters");
    matrices = matrices_given;
    vectors = vectors_given;
    place(nullptr);
  }

 private:
  at::ScalarType type_, wide_;
  const Options& options_;
  std::array<Tensor, kCount> given_;
  int64_t matrices_ = 0, vectors_ = 0;

  void expect(int i, const char* name, IntArrayRef wanted, bool optional = false) const {
    if (optional && !has(i)) return;
    TORCH_CHECK_VALUE(has(i) && sizes(i) == wanted, name, " must have shape ", wanted, ", got ",
                      has(i) ? c10::str(sizes(i)) : "None");
  }

  void check(const Tensor& x) {
    for (const int i :
         {+kInWeight, +kOutWeight, +kTaps, +kXProj, +kDtProj, +kDtBias, +kALog, +kSkip}) {
      TORCH_CHECK_VALUE(has(i), "parameter ", i, " is missing");
    }
    for (const int i : {+kInWeight, +kOutWeight, +kTaps, +kXProj, +kDtProj, +kALog}) {
      TORCH_CHECK_VALUE(given_[i].dim() == 2, "parameter ", i, " must be a matrix, got ", sizes(i));
    }
    const bool half = options_.is_half();
    Sizes& s = size;
    s.batch = x.size(0);
    s.length = x.size(1);
    s.model = x.size(2);
    s.channels = sizes(kXProj)[1];
    s.out = sizes(kOutWeight)[0];
    s.rank = sizes(kDtProj)[1];
    s.states = sizes(kALog)[1];
    s.width = sizes(kTaps)[1];
    const int64_t d = s.channels;
    expect(kInWeight, "in_weight", {2 * d, s.model});
    expect(kInBias, "in_bias", {2 * d}, true);
    expect(kOutWeight, "out_weight", {s.out, half ? 2 * d : d});
    expect(kOutBias, "out_bias", {s.out}, true);
    for (int i = 0; i < 2; ++i) {
      const bool all = i < options_.projections();
      if (all || half) expect(of(kTaps, i), "taps", {d, s.width});
      if (all || options_.kind == "v1") expect(of(kALog, i), "a_log", {d, s.states});
      if (!all) continue;
      expect(of(kConvBias, i), "conv_bias", {d}, true);
      expect(of(kXProj, i), "x_proj", {s.low_rank(), d});
      expect(of(kDtProj, i), "dt_proj", {d, s.rank});
      expect(of(kDtBias, i), "dt_bias", {d});
      expect(of(kSkip, i), "skip", {d});
    }
    TORCH_CHECK_VALUE(!half || !has(kConvBias), "kind 'half' has no conv_bias");
    expect(kNorm, "norm", {s.model}, true);
  }

  // Next place in an array: starts at multiples of 16 bytes.
  Tensor next(bool matrix, IntArrayRef sizes) {
    const Tensor& base = matrix ? matrices : vectors;
    int64_t& cursor = matrix ? matrices_ : vectors_;
    const int64_t begin = cursor, count = c10::multiply_integers(sizes);
    cursor += (count + 7) / 8 * 8;
    return base.defined() ? view(base, begin, sizes) : Tensor();
  }

  Tensor single(int i, bool matrix, Conversions* conversions, double scale = 1) {
    if (!has(i)) return {};
    if (given_[i].scalar_type() == (matrix ? type_ : wide_) && scale == 1) return given_[i];
    const Tensor to = next(matrix, sizes(i));
    if (conversions != nullptr) conversions->add(given_[i], to, Conversion::kScale, scale);
    return to;
  }

  Tensor stack(Index i, int count, bool matrix, Conversions* conversions,
               Conversion conversion = Conversion::kScale) {
    if (conversion == Conversion::kScale && count == 1 &&
        given_[i].scalar_type() == (matrix ? type_ : wide_)) {
      return view(given_[i], 0, {1, sizes(i)[0], sizes(i)[1]});
    }
    const Tensor to = next(matrix, {count, sizes(i)[0], sizes(i)[1]});
    if (conversions != nullptr) {
      for (int k = 0; k < count; ++k) {
        conversions->add(given_[of(i, k)], at_index(to, k), conversion);
      }
    }
    return to;
  }

  // The fake kernel in mmvim/ops/mixer.py adds up the same sizes.
  void place(Conversions* conversions) {
    matrices_ = vectors_ = 0;
    in_weight = single(kInWeight, true, conversions);
    in_bias = single(kInBias, true, conversions);
    out_weight = single(kOutWeight, true, conversions);
    out_bias = single(kOutBias, true, conversions);
    const int count = options_.projections();
    x_proj = stack(kXProj, count, true, conversions);
    dt_proj = stack(kDtProj, count, true, conversions);
    const Tensor decays = stack(kALog, options_.scans(), false, conversions, Conversion::kDecay);
    if (options_.is_half()) {
      const Tensor both = stack(kTaps, 2, false, conversions);
      if (both.defined()) taps[0] = view(both, 0, {2 * size.channels, size.width});
    }
    for (int i = 0; i < count; ++i) {
      if (!options_.is_half()) taps[i] = single(of(kTaps, i), false, conversions);
      const Tensor bias = single(of(kConvBias, i), false, conversions);
      if (bias.defined()) conv_bias[i] = bias;
      dt_bias[i] = single(of(kDtBias, i), false, conversions, options_.bias_scale);
      skip[i] = single(of(kSkip, i), false, conversions);
    }
    if (!decays.defined()) return;
    for (int i = 0; i < options_.scans(); ++i) A[i] = at_index(decays, i);
  }
};

// Activations that both passes make.
struct Activations {
  Tensor projected;  // (b, l, 2d)
  Tensor u;          // (directions, b, l, d), or all channels of "half", (1, b, l, 2d)
  Tensor low_rank;   // (directions, b, l, r + 2n)
  Tensor delta;      // (directions, b, l, d)

  Tensor x(const Sizes& s) const { return columns(projected, 0, s.channels); }
  Tensor z(const Sizes& s) const { return columns(projected, s.channels, s.channels); }
};

class Mixer {
 public:
  Mixer(const Tensor& x_in, const Parameters& given, const Options& options_in)
      : options(options_in),
        x(x_in.contiguous()),
        p(x, given, options),
        s(p.size),
        call(direct::of(x)) {
    TORCH_CHECK(call.convert != nullptr, "mmvim::mixer has no kernels for ", x.device());
  }

  const Options& options;
  Tensor x;  // what in_proj reads
  Prepared p;
  const Sizes& s;
  const direct::Functions& call;

  // About what a call needs, on a GPU; 0 if it is too much.
  int64_t scratch_bytes(bool is_backward) const {
    if (!x.is_cuda()) return 0;
    const int64_t scans = options.scans(), d = s.channels, element = x.element_size();
    const int64_t directions = options.projections();
    int64_t activations = s.tokens() * ((4 + 2 * directions) * d + directions * s.low_rank());
    int64_t floats = s.tokens() * 2 * d + kFlags;
    if (is_backward) {
      activations += s.tokens() * ((8 + 2 * scans) * d + 3 * scans * s.low_rank());
      activations += 4 * d * (s.model + s.out) + 4 * directions * d * s.low_rank();
      floats = 2 * scans * d * (s.batch + 2) * (s.states + 4) + 64 * d * (s.width + 1);
    } else {
      activations += 3 * d * s.model + d * s.out + 4 * directions * d * s.low_rank();
      floats += scans * d * (s.states + 8);
    }
    if (p.has(kNorm)) {
      activations += s.tokens() * s.model;
      floats += s.tokens() + (is_backward ? 1024 * s.model : 0);
    }
    const int64_t bytes = activations * element + floats * 4 + (64 << 10);
    return bytes <= kMostScratch ? bytes : 0;
  }

  // The norm of x, kept * x + residual being the stream.
  Tensor add_norm(const OptTensor& residual_in, const OptTensor& keep, Tensor& rstd) {
    const auto type = x.scalar_type(), wide = compute_type(type);
    OptTensor residual = residual_in;
    if (residual.has_value() && residual->scalar_type() != type) residual = residual->to(wide);
    const auto make = [&](IntArrayRef sizes, at::ScalarType t) {
      return options.interval > 0 ? fresh(sizes, t, x)
                                  : Scratch::empty(sizes, x.options().dtype(t));
    };
    const Tensor normed = make(x.sizes(), type);
    rstd = make({s.batch, s.length}, wide);
    const Tensor stream =
        call.norm(x, residual, p.norm(), options.eps, options.residual_in_fp32, keep, normed, rstd);
    x = normed;
    return stream;
  }

  void project(Activations& a) const { a.projected = linear(x, p.in_weight, p.in_bias, false); }

  void convolve(Activations& a) const {
    if (options.is_half()) {
      const Tensor all =
          std::get<0>(call.conv(a.projected, p.taps[0], {}, {}, options.conv_mode(), true, false));
      a.u = stack_of(all);
    } else if (options.projections() == 1) {
      a.u = stack_of(std::get<0>(
          call.conv(a.x(s), p.taps[0], p.conv_bias[0], {}, options.conv_mode(), true, false)));
    } else {
      a.u = empty({2, s.batch, s.length, s.channels}, x);
      call.two_convs(a.x(s), p.taps[0], p.conv_bias[0], p.taps[1], p.conv_bias[1], true,
                     at_index(a.u, 0), at_index(a.u, 1));
    }
  }

  void make_low_rank(Activations& a) const {
    const int64_t sizes[] = {options.projections(), s.batch, s.length, s.low_rank()};
    a.low_rank = options.interval > 0 ? fresh(sizes, x) : empty(sizes, x);
    products(stacked_rows(a.low_rank), stacked_rows(inputs(a)), transposed(p.x_proj));
  }

  void make_delta(Activations& a) const {
    a.delta = empty({options.projections(), s.batch, s.length, s.channels}, x);
    products(stacked_rows(a.delta), stacked_rows(columns(a.low_rank, 0, s.rank)),
             transposed(p.dt_proj));
  }

  // Inputs of the scans: (directions, b, l, d).
  Tensor inputs(const Activations& a) const { return columns(a.u, 0, s.channels); }
  // The half that is not scanned.
  Tensor other_half(const Activations& a) const {
    return columns(at_index(a.u, 0), s.channels, s.channels);
  }

  struct Scan {
    Tensor u, delta, B, C;
  };
  Scan scan(const Activations& a, int direction) const {
    const int i = options.projections() == 1 ? 0 : direction;
    const Tensor low_rank = at_index(a.low_rank, i);
    return {at_index(inputs(a), i), at_index(a.delta, i),
            one_group(columns(low_rank, s.rank, s.states)),
            one_group(columns(low_rank, s.rank + s.states, s.states))};
  }
  int own(int direction) const { return options.projections() == 1 ? 0 : direction; }

  static Tensor stack_of(const Tensor& t) {
    at::DimVector sizes(t.sizes());
    sizes.insert(sizes.begin(), 1);
    return view(t, 0, sizes);
  }
  // (directions, b, l, k) as (directions, b * l, k).
  static Tensor stacked_rows(const Tensor& t) {
    return view(t, 0, {t.size(0), t.size(1) * t.size(2), t.size(3)},
                {t.stride(0), t.stride(2), t.stride(3)});
  }
};

}  // namespace

std::tuple<Tensor, Tensor, std::vector<Tensor>> forward(
    const Tensor& x, const OptTensor& residual, const OptTensor& keep, const Parameters& parameters,
    std::string_view kind, bool reverse, double scale, double bias_scale,
    std::string_view discretization, bool recompute, double eps, bool residual_in_fp32,
    int64_t checkpoint_interval) {
  const Plain plain(x);
  const Options options{kind,       reverse,          scale,
                        bias_scale, discretization,   recompute,
                        eps,        residual_in_fp32, checkpoint_interval};
  Mixer m(x, parameters, options);
  const bool has_norm = m.p.has(kNorm);
  TORCH_CHECK_VALUE(has_norm || (!residual.has_value() && !keep.has_value()),
                    "residual and keep are for a mixer with a norm");
  const Sizes& s = m.s;
  const bool keeps_all = checkpoint_interval > 0 && !recompute;
  Scratch scratch(keeps_all ? 0 : m.scratch_bytes(false), m.x);
  m.p.make(scratch);
  Tensor rstd;
  const Tensor stream = has_norm ? m.add_norm(residual, keep, rstd) : fresh({0}, m.x);
  Activations a;
  m.project(a);
  m.convolve(a);
  m.make_low_rank(a);
  m.make_delta(a);
  const Prepared& p = m.p;
  std::vector<Tensor> kept;
  Tensor mixed;  // what out_proj reads
  const Mixer::Scan f = m.scan(a, 0);
  if (options.scans() == 2) {
    const Mixer::Scan b = m.scan(a, 1);
    const int second = m.own(1);
    auto [out, pregate, checkpoints_f, checkpoints_b] =
        m.call.two_scans(f.u, f.delta, p.A[0], f.B, f.C, p.skip[0], p.dt_bias[0], b.u, b.delta,
                         p.A[1], b.B, b.C, p.skip[second], p.dt_bias[second], a.z(s), scale, true,
                         discretization, checkpoint_interval);
    mixed = out;
    kept = {pregate, checkpoints_f, checkpoints_b};
  } else {
    const OptTensor gate = options.is_half() ? OptTensor() : OptTensor(a.z(s));
    auto [out, last, checkpoints] =
        m.call.scan(f.u, f.delta, p.A[0], f.B, f.C, p.skip[0], gate, p.dt_bias[0], {}, true,
                    discretization, reverse, false, checkpoint_interval);
    kept = {out, checkpoints};
    mixed = options.is_half() ? at::cat({out, m.other_half(a)}, -1) : out;
  }
  const Tensor out = linear(mixed, p.out_weight, p.out_bias, true);
  if (checkpoint_interval == 0) return {out, stream, std::vector<Tensor>()};
  kept.insert(kept.end(), {p.matrices, p.vectors, a.low_rank});
  if (!recompute) {
    kept.insert(kept.end(), {a.projected, a.u, a.delta});
    if (options.scans() == 2) kept.push_back(mixed);
  }
  if (has_norm) kept.insert(kept.end(), {m.x, rstd});
  return {out, stream, kept};
}

namespace {

// Gradients of x, of the parameters and of the residual, each in the dtype of what it belongs to.
// Those of the parameters are one allocation.
class Gradients {
 public:
  Gradients(const Mixer& m, int64_t needed)
      : m_(m),
        needed_(needed),
        conversions_(compute_type(m.x.scalar_type())),
        memory_(m.x),
        all_(2 + kCount) {
    for (int i = 0; i < kCount; ++i) {
      if (m_.p.has(i) && needs(i)) memory_.expect(m_.p.sizes(i), type_of(i));
    }
  }

  bool needs(int i) const { return (needed_ >> (1 + i) & 1) != 0; }
  bool needs_x() const { return (needed_ & 1) != 0; }
  bool needs_residual() const { return needs(kCount); }

  void set_x(const Tensor& dx) { all_[0] = dx; }
  void set_residual(const Tensor& dresidual) { all_[1 + kCount] = dresidual; }
  void set(int i, const Tensor& gradient, double scale = 1) {
    if (!needs(i)) return;
    if (gradient.scalar_type() == m_.p.types[i] && scale == 1 && !Scratch::owns(gradient)) {
      all_[1 + i] = gradient;
    } else {
      conversions_.add(gradient, make(i), Conversion::kScale, scale);
    }
  }
  void set_copy(int i, const Tensor& gradient) {
    if (needs(i)) conversions_.add(gradient, make(i));
  }
  void set_multiplied(int i, const Tensor& gradient, const Tensor& factor) {
    if (needs(i)) conversions_.add(gradient, make(i), Conversion::kMultiply, 1, factor);
  }
  // Of the weights of the projections: grad' x for each of a stack.
  void set_stack(Index i, const Tensor& grad, const Tensor& x) {
    const int other = Prepared::of(i, 1);
    if (are_batched(x) && needs(i) && needs(other)) {
      const IntArrayRef sizes = m_.p.sizes(i);
      const Tensor both = empty({2, sizes[0], sizes[1]}, m_.x);
      products(both, transposed(grad), x);
      set_copy(i, at_index(both, 0));
      set_copy(other, at_index(both, 1));
      return;
    }
    for (int k = 0; k < m_.options.projections(); ++k) {
      const int index = Prepared::of(i, k);
      if (!needs(index)) continue;
      const Tensor own = product_for(index);
      product(own, transposed(at_index(grad, k)), at_index(x, k));
      set(index, own);
    }
  }

  // Where a product makes the gradient of a parameter: itself, or what is converted.
  Tensor product_for(int i) {
    const auto type = m_.x.scalar_type();
    const IntArrayRef sizes = m_.p.sizes(i);
    return m_.p.types[i] == type ? memory_.take(sizes, type) : empty(sizes, m_.x);
  }

  std::vector<Tensor> finish() {
    conversions_.run(m_.x);
    for (size_t i = 0; i < all_.size(); ++i) {
      if (!all_[i].defined()) {
        all_[i] = fresh({0}, m_.x);
      } else if (i > 0 && i <= kCount) {
        const IntArrayRef shape = m_.p.shapes[i - 1];
        if (all_[i].sizes() != shape) all_[i] = view(all_[i], 0, shape);
        const auto type = m_.p.types[i - 1];
        if (all_[i].scalar_type() != type) all_[i] = all_[i].to(type);
      }
    }
    return std::move(all_);
  }

 private:
  const Mixer& m_;
  int64_t needed_;
  Conversions conversions_;
  Neighbours memory_;
  std::vector<Tensor> all_;

  // As kernels make it.
  at::ScalarType type_of(int i) const {
    const auto type = m_.p.types[i], wide = compute_type(m_.x.scalar_type());
    return (wide == at::kDouble) == (type == at::kDouble) ? type : wide;
  }
  Tensor make(int i) { return all_[1 + i] = memory_.take(m_.p.sizes(i), type_of(i)); }
};

}  // namespace

std::vector<Tensor> backward(const Tensor& grad_out, const OptTensor& grad_stream,
                             const OptTensor& x, const OptTensor& stream, const OptTensor& keep,
                             const Parameters& parameters, at::TensorList kept,
                             std::string_view kind, bool reverse, double scale, double bias_scale,
                             std::string_view discretization, bool recompute, double eps,
                             bool residual_in_fp32, int64_t checkpoint_interval,
                             std::optional<at::ScalarType> residual_type, int64_t needed) {
  const Plain plain(grad_out);
  const Options options{kind,       reverse,          scale,
                        bias_scale, discretization,   recompute,
                        eps,        residual_in_fp32, checkpoint_interval};
  TORCH_CHECK_VALUE(x.has_value() != stream.has_value() && (x.has_value() || kept.size() >= 2),
                    "mixer_backward needs x, or with a norm the stream");
  const bool has_norm = stream.has_value();
  Mixer m(has_norm ? kept[kept.size() - 2] : *x, parameters, options);
  const Tensor rstd = has_norm ? kept.back() : Tensor();
  if (has_norm) kept = kept.slice(0, kept.size() - 2);
  TORCH_CHECK_VALUE(has_norm == m.p.has(kNorm),
                    "mixer_backward: x and the norm exclude each other");
  const Sizes& s = m.s;
  Prepared& p = m.p;
  const Scratch scratch(m.scratch_bytes(true), m.x);
  Gradients grads(m, needed);
  const bool half = options.is_half(), two = options.scans() == 2;
  const size_t count = (two ? 6 : 5) + (recompute ? 0 : two ? 4 : 3);
  TORCH_CHECK_VALUE(kept.size() == count && checkpoint_interval > 0,
                    "mixer_backward needs what mixer kept: ", count, " tensors, got ", kept.size());
  TORCH_CHECK_VALUE(
      grad_out.dim() == 3 && grad_out.size(0) == s.batch && grad_out.size(1) == s.length &&
          grad_out.size(2) == s.out && grad_out.scalar_type() == m.x.scalar_type(),
      "grad_out must be like the output, got ", grad_out.sizes(), " ", grad_out.scalar_type());
  size_t next = 0;
  const Tensor scanned = kept[next++], checkpoints_f = kept[next++];
  const Tensor checkpoints_b = two ? kept[next++] : Tensor();
  p.take(kept[next], kept[next + 1]);
  next += 2;
  Activations a;
  a.low_rank = kept[next++].contiguous();
  Tensor mixed, zeros;
  if (recompute) {
    m.project(a);
  } else {
    a.projected = kept[next].contiguous();
    a.u = kept[next + 1].contiguous();
    a.delta = kept[next + 2].contiguous();
    next += 3;
    if (two) mixed = kept[next];
  }
  const Tensor dy = rows(grad_out.contiguous());

  // What made the output.
  const int64_t d = s.channels;
  if (recompute && half) m.convolve(a);
  if (grads.needs(kOutWeight)) {
    double left = 1;
    if (half) {
      mixed = at::cat({scanned, m.other_half(a)}, -1);
    } else if (!two) {
      mixed = scanned;
    } else if (recompute) {
      mixed = empty({s.batch, s.length, s.channels}, m.x);
      if (m.x.is_cuda()) {
        zeros = Scratch::empty({2, 1, s.batch, s.length, 1, 2, s.states},
                               m.x.options().dtype(at::kFloat));
      }
      m.call.gate(a.z(s), scanned, mixed, zeros);
      left = scale;
    }
    const Tensor dweight = grads.product_for(kOutWeight);
    product(dweight, transposed(dy), rows(mixed));
    grads.set(kOutWeight, dweight, left);
  }
  mixed = Tensor();
  if (p.has(kOutBias) && grads.needs(kOutBias)) grads.set(kOutBias, at::sum(dy, {0}));
  if ((needed & ~(int64_t{2} << kOutWeight) & ~(int64_t{2} << kOutBias)) == 0) {
    return grads.finish();
  }

  // The scans.
  if (recompute) {
    if (!half) m.convolve(a);
    m.make_delta(a);
  }
  const Tensor dmixed = empty({s.batch, s.length, half ? 2 * d : d}, m.x);
  product(rows(dmixed), dy, p.out_weight);
  const int projections = options.projections(), scans = options.scans();
  const Mixer::Scan f = m.scan(a, 0);
  const Tensor du = empty({scans, s.batch, s.length, d}, m.x);
  Tensor ddelta = empty(du.sizes(), m.x);
  const Tensor dlow_rank = empty({scans, s.batch, s.length, s.low_rank()}, m.x);
  // Of in_proj; with "half", before the convolution.
  const Tensor dprojected = empty({s.batch, s.length, 2 * d}, m.x);
  const auto gradient_of = [&](int64_t first, int64_t count) {
    return columns(dlow_rank, first, count);
  };
  direct::ScanPlaces places[2];
  for (int i = 0; i < scans; ++i) {
    places[i] = {at_index(du, i), at_index(ddelta, i),
                 one_group(at_index(gradient_of(s.rank, s.states), i)),
                 one_group(at_index(gradient_of(s.rank + s.states, s.states), i))};
  }
  places[0].z = columns(dprojected, d, d);
  places[0].sums = zeros;
  Tensor dA[2], dskip[2], ddt_bias[2];
  if (two) {
    const Mixer::Scan b = m.scan(a, 1);
    const int second = m.own(1);
    auto all = m.call.two_scans_backward(
        dmixed, f.u, f.delta, p.A[0], f.B, f.C, p.skip[0], p.dt_bias[0], b.u, b.delta, p.A[1], b.B,
        b.C, p.skip[second], p.dt_bias[second], a.z(s), scanned, checkpoints_f, checkpoints_b,
        scale, true, discretization, checkpoint_interval, places);
    dA[0] = std::get<2>(all);
    dskip[0] = std::get<5>(all);
    ddt_bias[0] = std::get<6>(all);
    dA[1] = std::get<9>(all);
    dskip[1] = std::get<12>(all);
    ddt_bias[1] = std::get<13>(all);
    if (projections == 1) {
      for (const Tensor& t : {du, ddelta, gradient_of(s.rank, 2 * s.states)}) {
        at_index(t, 0).add_(at_index(t, 1));
      }
      dskip[0].add_(dskip[1]);
      ddt_bias[0].add_(ddt_bias[1]);
    }
  } else {
    const OptTensor gate = half ? OptTensor() : OptTensor(a.z(s));
    const Tensor dscanned = half ? columns(dmixed, 0, d) : dmixed;
    auto all = m.call.scan_backward(dscanned, {}, f.u, f.delta, p.A[0], f.B, f.C, p.skip[0], gate,
                                    p.dt_bias[0], {}, checkpoints_f, true, discretization, reverse,
                                    checkpoint_interval, places[0]);
    dA[0] = std::get<2>(all);
    dskip[0] = std::get<5>(all);
    ddt_bias[0] = std::get<7>(all);
  }
  for (int i = 0; i < scans; ++i) {
    grads.set_multiplied(Prepared::of(kALog, i), dA[i], p.A[i]);
  }
  for (int i = 0; i < projections; ++i) {
    grads.set(Prepared::of(kSkip, i), dskip[i]);
    grads.set(Prepared::of(kDtBias, i), ddt_bias[i], bias_scale);
  }
  a.delta = Tensor();

  for (direct::ScanPlaces& place : places) place = {};

  // The projections.
  const auto own_rows = [&](const Tensor& t) {
    return Mixer::stacked_rows(
        view(t, 0, {projections, s.batch, s.length, t.size(3)}, t.strides()));
  };
  const Tensor dlow_rank_rows = own_rows(dlow_rank);
  products(own_rows(gradient_of(0, s.rank)), own_rows(ddelta), p.dt_proj);
  grads.set_stack(kDtProj, own_rows(ddelta), Mixer::stacked_rows(columns(a.low_rank, 0, s.rank)));
  grads.set_stack(kXProj, dlow_rank_rows, Mixer::stacked_rows(m.inputs(a)));
  ddelta = Tensor();
  a.u = Tensor();
  if (half) {
    Tensor sum = rows(columns(dmixed, 0, d));
    at::addmm_out(sum, rows(at_index(du, 0)), at_index(dlow_rank_rows, 0), at_index(p.x_proj, 0));
  } else {
    add_products(own_rows(du), dlow_rank_rows, p.x_proj);
  }

  // The convolutions, and in_proj.
  if (half) {
    auto [unused_dx, dtaps, unused_bias, unused_state] = m.call.conv_backward(
        dmixed, {}, a.projected, p.taps[0], {}, {}, options.conv_mode(), true, dprojected);
    for (int i = 0; i < 2; ++i) {
      grads.set_copy(Prepared::of(kTaps, i), view(dtaps, i * d * s.width, {d, s.width}));
    }
  } else if (projections == 2) {
    auto [unused_dx, dtaps_f, dbias_f, dtaps_b, dbias_b] = m.call.two_convs_backward(
        at_index(du, 0), at_index(du, 1), a.x(s), p.taps[0], p.conv_bias[0], p.taps[1],
        p.conv_bias[1], true, columns(dprojected, 0, d));
    grads.set(kTaps, dtaps_f);
    grads.set(Prepared::of(kTaps, 1), dtaps_b);
    if (p.has(kConvBias)) grads.set(kConvBias, dbias_f);
    const int other = Prepared::of(kConvBias, 1);
    if (p.has(other)) grads.set(other, dbias_b);
  } else {
    auto [unused_dx, dtaps, dbias, unused_state] =
        m.call.conv_backward(at_index(du, 0), {}, a.x(s), p.taps[0], p.conv_bias[0], {},
                             options.conv_mode(), true, columns(dprojected, 0, d));
    grads.set(kTaps, dtaps);
    if (p.has(kConvBias)) grads.set(kConvBias, dbias);
  }
  const Tensor grad = rows(dprojected);
  if (grads.needs(kInWeight)) {
    const Tensor dweight = grads.product_for(kInWeight);
    product(dweight, transposed(grad), rows(m.x));
    grads.set(kInWeight, dweight);
  }
  if (p.has(kInBias) && grads.needs(kInBias)) grads.set(kInBias, at::sum(grad, {0}));
  const bool before_norm = has_norm && (grads.needs_residual() || grads.needs(kNorm));
  if (!grads.needs_x() && !before_norm) return grads.finish();
  const Tensor dx = has_norm ? empty(m.x.sizes(), m.x) : fresh(m.x.sizes(), m.x);
  product(rows(dx), grad, p.in_weight);
  if (!has_norm) {
    grads.set_x(dx);
    return grads.finish();
  }

  // The norm. Its inputs have one gradient, but for their dtypes and the factors of x.
  const auto type = m.x.scalar_type(), wide = compute_type(type);
  const auto other_type = !residual_type.has_value() || *residual_type == type ? type : wide;
  const bool separate = residual_type.has_value() && (keep.has_value() || other_type != type);
  auto [dinput, dresidual, dnorm] = m.call.norm_backward(dx, grad_stream, *stream, p.norm(), rstd,
                                                         separate, type, other_type, keep);
  grads.set(kNorm, dnorm);
  if (grads.needs_x()) grads.set_x(dinput);
  if (!residual_type.has_value() || !grads.needs_residual()) return grads.finish();
  // One gradient is enough where both are equal.
  if (separate || *residual_type != type || !grads.needs_x()) {
    grads.set_residual((separate ? dresidual : dinput).to(*residual_type));
  }
  return grads.finish();
}

namespace {

using Forward = decltype(forward);
using Backward = decltype(backward);

template <class F>
const c10::TypedOperatorHandle<F>& handle(const char* name) {
  static const auto found = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
  return found;
}

struct Call {
  std::string kind, discretization;
  bool reverse, recompute;
  double scale, bias_scale, eps;
  bool residual_in_fp32;
  int64_t interval;
  int64_t present;
  // While forward runs.
  const Tensor* x;
  const OptTensor *residual, *keep;
  const Parameters* parameters;

  std::tuple<Tensor, Tensor, std::vector<Tensor>> run() const {
    const at::AutoDispatchBelowADInplaceOrView below;
    return handle<Forward>("mmvim::mixer")
        .call(*x, *residual, *keep, *parameters, kind, reverse, scale, bias_scale, discretization,
              recompute, eps, residual_in_fp32, interval);
  }
};

// Bits of what an autograd node may have as inputs: x, the parameters, the residual, the factors.
constexpr int kResidualBit = 1 + kCount, kKeepBit = 2 + kCount;

class Function : public torch::autograd::Function<Function> {
 public:
  static constexpr bool is_traceable = true;

  // `all`: the inputs that there are, of which `call.present` has a bit each.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                at::TensorList all, const Call& call) {
    ctx->set_materialize_grads(false);
    auto [out, stream, kept] = call.run();
    const bool has_norm = (call.present >> (1 + kNorm) & 1) != 0;
    // Saved are the inputs (but x and the residual of a norm, which backward does not need), the
    // stream and what was kept.
    torch::autograd::variable_list saved;
    saved.reserve(all.size() + kept.size() + 1);
    size_t next = 0;
    for (int i = 0; i <= kKeepBit; ++i) {
      if ((call.present >> i & 1) == 0) continue;
      const bool is_needed = i == kResidualBit ? false : i > 0 || !has_norm;
      if (is_needed) saved.push_back(all[next]);
      ++next;
    }
    if (has_norm) saved.push_back(stream);
    saved.insert(saved.end(), kept.begin(), kept.end());
    ctx->save_for_backward(std::move(saved));
    auto& data = ctx->saved_data;
    data["kind"] = call.kind;
    data["discretization"] = call.discretization;
    data["flags"] =
        int64_t{call.reverse} + 2 * int64_t{call.recompute} + 4 * int64_t{call.residual_in_fp32};
    data["numbers"] = std::vector<double>{call.scale, call.bias_scale, call.eps};
    data["interval"] = call.interval;
    data["present"] = call.present;
    if (call.residual->has_value()) {
      data["residual"] = static_cast<int64_t>((*call.residual)->scalar_type());
    }
    if (has_norm) return {out, stream};
    return {out};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    auto& data = ctx->saved_data;
    const int64_t present = data["present"].toInt();
    const auto is_present = [&](int i) { return (present >> i & 1) != 0; };
    const bool has_norm = is_present(1 + kNorm);
    const auto saved = ctx->get_saved_variables();
    Parameters parameters;
    parameters.reserve(kCount);
    OptTensor x, keep, stream;
    int64_t needed = 0;
    size_t count = 0, next = 0;
    for (int i = 0; i <= kKeepBit; ++i) {
      const bool is_parameter = i > 0 && i <= kCount;
      if (!is_present(i)) {
        if (is_parameter) parameters.push_back(std::nullopt);
        continue;
      }
      if (i != kKeepBit && ctx->needs_input_grad(count)) needed |= int64_t{1} << i;
      ++count;
      if (is_parameter) {
        parameters.push_back(saved[next++]);
      } else if (i == 0 && !has_norm) {
        x = saved[next++];
      } else if (i == kKeepBit) {
        keep = saved[next++];
      }
    }
    if (has_norm) stream = saved[next++];
    // One more, for what is not a tensor.
    torch::autograd::variable_list results(count + 1);
    const OptTensor grad_stream =
        has_norm && grads[1].defined() ? OptTensor(grads[1]) : OptTensor();
    if (!grads[0].defined() && !grad_stream.has_value()) return results;
    const at::TensorList kept(saved.data() + next, saved.size() - next);
    Tensor grad_out = grads[0];
    if (!grad_out.defined()) {
      const Tensor& normed = kept[kept.size() - 2];
      const int64_t channels = parameters.get(kOutWeight)->size(0);
      grad_out = at::zeros({normed.size(0), normed.size(1), channels}, normed.options());
    }
    const std::string kind = data["kind"].toStringRef();
    const std::string discretization = data["discretization"].toStringRef();
    const int64_t flags = data["flags"].toInt();
    const auto numbers = data["numbers"].toDoubleVector();
    std::optional<at::ScalarType> residual_type;
    if (is_present(kResidualBit)) {
      residual_type = static_cast<at::ScalarType>(data["residual"].toInt());
    }
    const auto run = [&] {
      return handle<Backward>("mmvim::mixer_backward")
          .call(grad_out, grad_stream, x, stream, keep, parameters, kept, kind, (flags & 1) != 0,
                numbers[0], numbers[1], discretization, (flags & 2) != 0, numbers[2],
                (flags & 4) != 0, data["interval"].toInt(), residual_type, needed);
    };
    std::vector<Tensor> found;
    if (at::GradMode::is_enabled()) {
      found = run();
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      found = run();
    }
    // Where the gradients of x and of the residual are equal, there is one.
    Tensor& of_residual = found[kResidualBit];
    if ((needed & 1) != 0 && of_residual.dim() == 1) of_residual = found[0];
    next = 0;
    for (int i = 0; i <= kKeepBit; ++i) {
      if (!is_present(i)) continue;
      if ((needed >> i & 1) != 0) results[next] = found[i];
      ++next;
    }
    return results;
  }
};

std::tuple<Tensor, Tensor, std::vector<Tensor>> differentiable(
    const Tensor& x, const OptTensor& residual, const OptTensor& keep, const Parameters& parameters,
    std::string_view kind, bool reverse, double scale, double bias_scale,
    std::string_view discretization, bool recompute, double eps, bool residual_in_fp32,
    int64_t checkpoint_interval) {
  bool wanted = false;
  int64_t present = 0;
  std::vector<Tensor> all;
  if (at::GradMode::is_enabled() && checkpoint_interval > 0) {
    all.reserve(3 + parameters.size());
    const auto add = [&](int bit, const OptTensor& t) {
      if (!t.has_value()) return;
      all.push_back(*t);
      present |= int64_t{1} << bit;
      wanted = wanted || t->requires_grad();
    };
    add(0, x);
    for (size_t i = 0; i < parameters.size(); ++i) {
      add(1 + static_cast<int>(i), parameters.get(i));
    }
    add(kResidualBit, residual);
    add(kKeepBit, keep);
  }
  const Call call{std::string(kind),
                  std::string(discretization),
                  reverse,
                  recompute,
                  scale,
                  bias_scale,
                  eps,
                  residual_in_fp32,
                  checkpoint_interval,
                  present,
                  &x,
                  &residual,
                  &keep,
                  &parameters};
  if (!wanted) {
    check_no_tangents(x, parameters);
    check_no_tangent(residual);
    return call.run();
  }
  const auto results = Function::apply(at::TensorList(all), call);
  const bool has_norm = results.size() == 2;
  return {results[0], has_norm ? results[1] : fresh({0}, results[0]), std::vector<Tensor>()};
}

// Blocks one after the other. Each has a node of its own: what it keeps ends with its backward
// pass.
std::tuple<Tensor, Tensor> stack(const Tensor& x, const OptTensor& residual, const OptTensor& keep,
                                 const Parameters& parameters, std::string_view kind, bool reverse,
                                 double scale, double bias_scale, std::string_view discretization,
                                 bool recompute, double eps, bool residual_in_fp32,
                                 int64_t checkpoint_interval) {
  const auto layers = static_cast<int64_t>(parameters.size() / kCount);
  TORCH_CHECK_VALUE(layers > 0 && parameters.size() % kCount == 0, "there must be ",
                    static_cast<int>(kCount), " parameters for each layer, got ",
                    parameters.size());
  TORCH_CHECK_VALUE(!keep.has_value() || (keep->dim() == 2 && keep->size(0) == layers - 1),
                    "keep must have a row for each layer but the first of ", layers, ", got ",
                    keep.has_value() ? c10::str(keep->sizes()) : "None");
  Tensor hidden = x;
  OptTensor stream = residual;
  for (int64_t layer = 0; layer < layers; ++layer) {
    bool wanted = hidden.requires_grad() || (stream.has_value() && stream->requires_grad());
    Parameters own;
    own.reserve(kCount);
    for (int64_t i = layer * kCount; i < (layer + 1) * kCount; ++i) {
      own.push_back(parameters.get(i));
      const OptTensor& t = own.get(own.size() - 1);
      wanted = wanted || (t.has_value() && t->requires_grad());
    }
    TORCH_CHECK_VALUE(own.get(kNorm).has_value(), "layer ", layer, " lacks the norm");
    const OptTensor factors =
        layer > 0 && keep.has_value() ? OptTensor(keep->select(0, layer - 1)) : OptTensor();
    const int64_t interval = wanted && at::GradMode::is_enabled() ? checkpoint_interval : 0;
    auto [out, sum, unused] =
        handle<Forward>("mmvim::mixer")
            .call(hidden, stream, factors, own, kind, reverse, scale, bias_scale, discretization,
                  recompute, eps, residual_in_fp32, interval);
    hidden = out;
    stream = sum;
  }
  return {hidden, *stream};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmvim, CompositeImplicitAutograd, m) { m.impl("mixer_stack", stack); }

TORCH_LIBRARY_IMPL(mmvim, Autograd, m) {
  m.impl("mixer", differentiable);
  m.impl("mixer_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace mixers
}  // namespace mmvim
