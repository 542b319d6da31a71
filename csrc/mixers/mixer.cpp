// A mixer as one function each way: matrix products of ATen and the kernels of the other folders,
// strung together. Gradients that meet are accumulated by the product that makes them; with
// `recompute` a layer keeps its input, the low-rank projections, the (sum of the) scans and the
// scans' checkpoints, and backward makes the rest again (compare section 3.3.2 of Gu and Dao,
// arXiv 2312.00752). Casts of parameters, A = -exp(A_log) and what gradients need after the last
// product are one kernel each.
#include <ATen/TensorUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
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
#include "parameters.h"

namespace mmvim {
namespace mixers {
namespace {

using at::IntArrayRef;

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
  kCount = kTaps + 2 * kPerDirection,
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
  int64_t interval;  // between checkpoints; 0: there will be no backward pass

  bool is_half() const { return kind == "half"; }
  int scans() const { return kind == "v1" || kind == "v2" ? 2 : 1; }
  int projections() const { return kind == "v2" ? 2 : 1; }
  std::string_view conv_mode() const { return is_half() ? "same" : reverse ? "reverse" : "causal"; }
};

// A view without a way through the dispatcher.
Tensor view(const Tensor& base, int64_t offset, IntArrayRef sizes, IntArrayRef strides) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), base.dtype());
  impl->set_sizes_and_strides(sizes, strides, base.storage_offset() + offset);
  return Tensor(std::move(impl));
}
Tensor view(const Tensor& base, int64_t offset, IntArrayRef sizes) {
  at::DimVector strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * sizes[i - 1];
  return view(base, offset, sizes, strides);
}
// What ends with the call, and what does not.
Tensor empty(IntArrayRef sizes, const Tensor& like) {
  return Scratch::empty(sizes, like.options());
}
Tensor fresh(IntArrayRef sizes, at::ScalarType type, const Tensor& like) {
  return at::empty(sizes, like.options().dtype(type));
}
Tensor fresh(IntArrayRef sizes, const Tensor& like) { return at::empty(sizes, like.options()); }

// (..., rows, columns) with the last two dimensions exchanged.
Tensor transposed(const Tensor& t) {
  at::DimVector sizes(t.sizes()), strides(t.strides());
  std::swap(sizes[t.dim() - 1], sizes[t.dim() - 2]);
  std::swap(strides[t.dim() - 1], strides[t.dim() - 2]);
  return view(t, 0, sizes, strides);
}
// Columns from `first` on of the last dimension.
Tensor columns(const Tensor& t, int64_t first, int64_t count) {
  at::DimVector sizes(t.sizes());
  sizes.back() = count;
  return view(t, first * t.strides().back(), sizes, t.strides());
}
// (batch, length, d) as (batch * length, d). Length steps over whole rows of one batch entry.
Tensor rows(const Tensor& t) {
  return view(t, 0, {t.size(0) * t.size(1), t.size(2)}, {t.stride(1), t.stride(2)});
}
// One of a stack.
Tensor at_index(const Tensor& stack, int64_t i) {
  return view(stack, i * stack.stride(0), stack.sizes().slice(1), stack.strides().slice(1));
}
// (..., n) as (..., 1, n).
Tensor one_group(const Tensor& t) {
  at::DimVector sizes(t.sizes()), strides(t.strides());
  sizes.insert(sizes.end() - 1, 1);
  strides.insert(strides.end() - 1, strides.back() * t.size(-1));
  return view(t, 0, sizes, strides);
}

void product(const Tensor& out, const Tensor& a, const Tensor& b) {
  at::mm_out(const_cast<Tensor&>(out), a, b);
}
// x w' + bias, for w (out, in).
void linear(const Tensor& out, const Tensor& x, const Tensor& w, const Tensor& bias) {
  if (bias.defined()) {
    at::addmm_out(const_cast<Tensor&>(out), bias, x, transposed(w));
  } else {
    product(out, x, transposed(w));
  }
}
// Of each of a stack; one launch on GPUs.
void products(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (out.is_cuda() && out.size(0) > 1) {
    at::bmm_out(const_cast<Tensor&>(out), a, b);
  } else {
    for (int64_t i = 0; i < out.size(0); ++i) {
      product(at_index(out, i), at_index(a, i), at_index(b, i));
    }
  }
}
// One after the other: cuBLAS has much slower kernels for batches of these shapes.
void add_products(const Tensor& sum, const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < sum.size(0); ++i) at_index(sum, i).addmm_(at_index(a, i), at_index(b, i));
}

// Conversions that are collected, and then made at once.
class Conversions {
 public:
  explicit Conversions(at::ScalarType wide) : is_double_(wide == at::kDouble) {}

  void add(const Tensor& from, const Tensor& to, Conversion conversion = Conversion::kScale,
           double scale = 1, const Tensor& factor = {}) {
    keep_.push_back(from.contiguous());
    Segment& s = segments_.segment[segments_.count++];
    s.from = keep_.back().const_data_ptr();
    s.from_type = dtype_of(from.scalar_type(), "a parameter");
    s.to = to.mutable_data_ptr();
    s.to_type = dtype_of(to.scalar_type(), "a parameter");
    s.count = from.numel();
    s.conversion = conversion;
    s.scale = static_cast<float>(scale);
    if (factor.defined()) s.factor = factor.const_data_ptr();
  }
  void clear(const Tensor& floats) { add(floats, floats, Conversion::kClear); }
  void run(const Tensor& device_of) const {
    if (segments_.count > 0) direct::of(device_of).convert(segments_, is_double_);
  }

 private:
  bool is_double_;
  Segments segments_;
  std::vector<Tensor> keep_;
};

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
  const Tensor x;
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
    const int64_t bytes = activations * element + floats * 4 + (64 << 10);
    return bytes <= kMostScratch ? bytes : 0;
  }

  void project(Activations& a) const {
    a.projected = empty({s.batch, s.length, 2 * s.channels}, x);
    linear(rows(a.projected), rows(x), p.in_weight, p.in_bias);
  }

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

// No autograd and no autocast inside: everything has its dtype.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  c10::OptionalDeviceGuard device;

  explicit Plain(const Tensor& t) : device(t.device()) {}
};

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> forward(const Tensor& x, const Parameters& parameters,
                                                std::string_view kind, bool reverse, double scale,
                                                double bias_scale, std::string_view discretization,
                                                bool recompute, int64_t checkpoint_interval) {
  const Plain plain(x);
  const Options options{
      kind, reverse, scale, bias_scale, discretization, recompute, checkpoint_interval};
  Mixer m(x, parameters, options);
  const Sizes& s = m.s;
  const bool keeps_all = checkpoint_interval > 0 && !recompute;
  Scratch scratch(keeps_all ? 0 : m.scratch_bytes(false), m.x);
  m.p.make(scratch);
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
  const Tensor out = fresh({s.batch, s.length, s.out}, m.x);
  linear(rows(out), rows(mixed), p.out_weight, p.out_bias);
  if (checkpoint_interval == 0) return {out, std::vector<Tensor>()};
  kept.insert(kept.end(), {p.matrices, p.vectors, a.low_rank});
  if (!recompute) {
    kept.insert(kept.end(), {a.projected, a.u, a.delta});
    if (options.scans() == 2) kept.push_back(mixed);
  }
  return {out, kept};
}

namespace {

// Gradients of x and of the parameters, each in the dtype of what it belongs to.
class Gradients {
 public:
  Gradients(const Mixer& m, int64_t needed)
      : m_(m), needed_(needed), conversions_(compute_type(m.x.scalar_type())), all_(1 + kCount) {}

  bool needs(int i) const { return (needed_ >> (1 + i) & 1) != 0; }
  bool needs_x() const { return (needed_ & 1) != 0; }

  void set_x(const Tensor& dx) { all_[0] = dx; }
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
  // Of the weights of the projections: grad' x for each of a stack (and see add_products()).
  void set_stack(Index i, const Tensor& grad, const Tensor& x) {
    for (int k = 0; k < m_.options.projections(); ++k) {
      const int index = Prepared::of(i, k);
      if (!needs(index)) continue;
      const Tensor own = product_for(index);
      product(own, transposed(at_index(grad, k)), at_index(x, k));
      set(index, own);
    }
  }

  // Where a product makes the gradient of a parameter: itself, or what is converted.
  Tensor product_for(int i) const {
    const IntArrayRef sizes = m_.p.sizes(i);
    return m_.p.types[i] == m_.x.scalar_type() ? fresh(sizes, m_.x) : empty(sizes, m_.x);
  }

  std::vector<Tensor> finish() {
    conversions_.run(m_.x);
    for (size_t i = 0; i < all_.size(); ++i) {
      if (!all_[i].defined()) {
        all_[i] = fresh({0}, m_.x);
      } else if (i > 0) {
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
  std::vector<Tensor> all_;

  Tensor make(int i) {
    const auto type = m_.p.types[i], wide = compute_type(m_.x.scalar_type());
    const bool fits = (wide == at::kDouble) == (type == at::kDouble);
    return all_[1 + i] = fresh(m_.p.sizes(i), fits ? type : wide, m_.x);
  }
};

}  // namespace

std::vector<Tensor> backward(const Tensor& grad_out, const Tensor& x, const Parameters& parameters,
                             at::TensorList kept, std::string_view kind, bool reverse, double scale,
                             double bias_scale, std::string_view discretization, bool recompute,
                             int64_t checkpoint_interval, int64_t needed) {
  const Plain plain(x);
  const Options options{
      kind, reverse, scale, bias_scale, discretization, recompute, checkpoint_interval};
  Mixer m(x, parameters, options);
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
          grad_out.size(2) == s.out && grad_out.scalar_type() == x.scalar_type(),
      "grad_out must be like the output, got ", grad_out.sizes(), " ", grad_out.scalar_type());
  size_t next = 0;
  const Tensor scanned = kept[next++], checkpoints_f = kept[next++];
  const Tensor checkpoints_b = two ? kept[next++] : Tensor();
  p.take(kept[next], kept[next + 1]);
  next += 2;
  Activations a;
  a.low_rank = kept[next++].contiguous();
  Tensor mixed;
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
      m.call.gate(a.z(s), scanned, mixed);
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
  const int projections = options.projections();
  const Mixer::Scan f = m.scan(a, 0);
  Tensor du, ddelta, dB, dC, dz;
  Tensor dA[2], dskip[2], ddt_bias[2];
  if (two) {
    const Mixer::Scan b = m.scan(a, 1);
    const int second = m.own(1);
    du = empty({2, s.batch, s.length, d}, m.x);
    ddelta = empty(du.sizes(), m.x);
    dB = empty({2, s.batch, s.length, s.states}, m.x);
    dC = empty(dB.sizes(), m.x);
    direct::ScanPlaces places[2];
    for (int i = 0; i < 2; ++i) {
      places[i] = {at_index(du, i), at_index(ddelta, i), one_group(at_index(dB, i)),
                   one_group(at_index(dC, i))};
    }
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
    dz = std::get<14>(all);
    if (projections == 1) {
      for (Tensor* t : {&du, &ddelta, &dB, &dC}) {
        at_index(*t, 0).add_(at_index(*t, 1));
        *t = Mixer::stack_of(at_index(*t, 0));
      }
      dskip[0].add_(dskip[1]);
      ddt_bias[0].add_(ddt_bias[1]);
    }
  } else {
    const OptTensor gate = half ? OptTensor() : OptTensor(a.z(s));
    const Tensor dscanned = half ? columns(dmixed, 0, d) : dmixed;
    auto all = m.call.scan_backward(dscanned, {}, f.u, f.delta, p.A[0], f.B, f.C, p.skip[0], gate,
                                    p.dt_bias[0], {}, checkpoints_f, true, discretization, reverse,
                                    checkpoint_interval);
    du = Mixer::stack_of(std::get<0>(all));
    ddelta = Mixer::stack_of(std::get<1>(all));
    dA[0] = std::get<2>(all);
    dB = view(std::get<3>(all), 0, {1, s.batch, s.length, s.states});
    dC = view(std::get<4>(all), 0, {1, s.batch, s.length, s.states});
    dskip[0] = std::get<5>(all);
    dz = half ? columns(dmixed, d, d) : std::get<6>(all);
    ddt_bias[0] = std::get<7>(all);
  }
  for (int i = 0; i < options.scans(); ++i) {
    grads.set_multiplied(Prepared::of(kALog, i), dA[i], p.A[i]);
  }
  for (int i = 0; i < projections; ++i) {
    grads.set(Prepared::of(kSkip, i), dskip[i]);
    grads.set(Prepared::of(kDtBias, i), ddt_bias[i], bias_scale);
  }
  a.delta = Tensor();

  // The projections.
  const Tensor ddelta_rows = Mixer::stacked_rows(ddelta);
  const Tensor drank = empty({projections, s.batch, s.length, s.rank}, m.x);
  products(Mixer::stacked_rows(drank), ddelta_rows, p.dt_proj);
  const Tensor dlow_rank = Mixer::stacked_rows(at::cat({drank, dB, dC}, -1));
  grads.set_stack(kDtProj, ddelta_rows, Mixer::stacked_rows(columns(a.low_rank, 0, s.rank)));
  grads.set_stack(kXProj, dlow_rank, Mixer::stacked_rows(m.inputs(a)));
  ddelta = Tensor();
  a.u = Tensor();
  add_products(Mixer::stacked_rows(du), dlow_rank, p.x_proj);

  // The convolutions, and in_proj.
  const Tensor x_rows = rows(m.x);
  const Tensor dweight = grads.needs(kInWeight) ? grads.product_for(kInWeight) : Tensor();
  Tensor dx = grads.needs_x() ? fresh(m.x.sizes(), m.x) : Tensor();
  if (half) {
    const Tensor dall = at::cat({at_index(du, 0), dz}, -1);
    auto [dprojected, dtaps, unused_bias, unused_state] =
        m.call.conv_backward(dall, {}, a.projected, p.taps[0], {}, {}, options.conv_mode(), true);
    for (int i = 0; i < 2; ++i) {
      const int index = Prepared::of(kTaps, i);
      const Tensor own = view(dtaps, i * d * s.width, {d, s.width});
      grads.set_copy(index, own);
    }
    const Tensor grad = rows(dprojected);
    if (dweight.defined()) product(dweight, transposed(grad), x_rows);
    if (p.has(kInBias) && grads.needs(kInBias)) grads.set(kInBias, at::sum(grad, {0}));
    if (dx.defined()) product(rows(dx), grad, p.in_weight);
  } else {
    Tensor dinput;
    if (projections == 2) {
      auto [dinput_, dtaps_f, dbias_f, dtaps_b, dbias_b] =
          m.call.two_convs_backward(at_index(du, 0), at_index(du, 1), a.x(s), p.taps[0],
                                    p.conv_bias[0], p.taps[1], p.conv_bias[1], true);
      dinput = dinput_;
      grads.set(kTaps, dtaps_f);
      grads.set(Prepared::of(kTaps, 1), dtaps_b);
      if (p.has(kConvBias)) grads.set(kConvBias, dbias_f);
      const int other = Prepared::of(kConvBias, 1);
      if (p.has(other)) grads.set(other, dbias_b);
    } else {
      auto [dinput_, dtaps, dbias, unused] = m.call.conv_backward(
          at_index(du, 0), {}, a.x(s), p.taps[0], p.conv_bias[0], {}, options.conv_mode(), true);
      dinput = dinput_;
      grads.set(kTaps, dtaps);
      if (p.has(kConvBias)) grads.set(kConvBias, dbias);
    }
    const Tensor parts[2] = {rows(dinput), rows(dz)};
    Tensor dbias = p.has(kInBias) && grads.needs(kInBias) ? fresh({2 * d}, m.x) : Tensor();
    for (int i = 0; i < 2; ++i) {
      if (dweight.defined()) {
        product(view(dweight, i * d * s.model, {d, s.model}), transposed(parts[i]), x_rows);
      }
      if (dbias.defined()) {
        Tensor part = view(dbias, i * d, {d});
        at::sum_out(part, parts[i], {0});
      }
      if (!dx.defined()) continue;
      const Tensor weight = view(p.in_weight, i * d * s.model, {d, s.model});
      if (i == 0) {
        product(rows(dx), parts[i], weight);
      } else {
        rows(dx).addmm_(parts[i], weight);
      }
    }
    if (dbias.defined()) grads.set(kInBias, dbias);
  }
  if (dweight.defined()) grads.set(kInWeight, dweight);
  if (dx.defined()) grads.set_x(dx);
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
  double scale, bias_scale;
  int64_t interval;
  int64_t present;
  const Parameters* parameters;  // while forward runs
};

class Function : public torch::autograd::Function<Function> {
 public:
  static constexpr bool is_traceable = true;

  // `all`: x and the parameters that there are, of which `call.present` has a bit each.
  static Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList all,
                        const Call& call) {
    ctx->set_materialize_grads(false);
    auto [out, kept] = [&] {
      const at::AutoDispatchBelowADInplaceOrView below;
      return handle<Forward>("mmvim::mixer")
          .call(all[0], *call.parameters, call.kind, call.reverse, call.scale, call.bias_scale,
                call.discretization, call.recompute, call.interval);
    }();
    torch::autograd::variable_list saved(all.begin(), all.end());
    saved.insert(saved.end(), kept.begin(), kept.end());
    ctx->save_for_backward(std::move(saved));
    auto& data = ctx->saved_data;
    data["kind"] = call.kind;
    data["discretization"] = call.discretization;
    data["flags"] = int64_t{call.reverse} + 2 * int64_t{call.recompute};
    data["scale"] = call.scale;
    data["bias_scale"] = call.bias_scale;
    data["interval"] = call.interval;
    data["present"] = call.present;
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    auto& data = ctx->saved_data;
    const int64_t present = data["present"].toInt();
    const auto saved = ctx->get_saved_variables();
    Parameters parameters;
    parameters.reserve(kCount);
    int64_t needed = 0;
    size_t count = 0;
    for (int i = 0; i <= kCount; ++i) {
      const bool here = (present >> i & 1) != 0;
      if (i > 0) parameters.push_back(here ? std::optional<Tensor>(saved[count]) : std::nullopt);
      if (!here) continue;
      if (ctx->needs_input_grad(count)) needed |= int64_t{1} << i;
      ++count;
    }
    torch::autograd::variable_list results(count + 1);
    if (!grads[0].defined()) return results;
    const std::string kind = data["kind"].toStringRef();
    const std::string discretization = data["discretization"].toStringRef();
    const int64_t flags = data["flags"].toInt();
    const at::TensorList kept(saved.data() + count, saved.size() - count);
    const auto run = [&] {
      return handle<Backward>("mmvim::mixer_backward")
          .call(grads[0], saved[0], parameters, kept, kind, (flags & 1) != 0,
                data["scale"].toDouble(), data["bias_scale"].toDouble(), discretization,
                (flags & 2) != 0, data["interval"].toInt(), needed);
    };
    std::vector<Tensor> found;
    if (at::GradMode::is_enabled()) {
      found = run();
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      found = run();
    }
    size_t next = 0;
    for (int i = 0; i <= kCount; ++i) {
      if ((present >> i & 1) == 0) continue;
      if ((needed >> i & 1) != 0) results[next] = std::move(found[i]);
      ++next;
    }
    return results;
  }
};

std::tuple<Tensor, std::vector<Tensor>> differentiable(
    const Tensor& x, const Parameters& parameters, std::string_view kind, bool reverse,
    double scale, double bias_scale, std::string_view discretization, bool recompute,
    int64_t checkpoint_interval) {
  bool wanted = false;
  int64_t present = 1;
  std::vector<Tensor> all;
  if (at::GradMode::is_enabled() && checkpoint_interval > 0) {
    all.reserve(1 + parameters.size());
    all.push_back(x);
    wanted = x.requires_grad();
    for (size_t i = 0; i < parameters.size(); ++i) {
      const std::optional<Tensor> t = parameters.get(i);
      if (!t.has_value()) continue;
      all.push_back(*t);
      present |= int64_t{2} << i;
      wanted = wanted || t->requires_grad();
    }
  }
  if (!wanted) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return handle<Forward>("mmvim::mixer")
        .call(x, parameters, kind, reverse, scale, bias_scale, discretization, recompute,
              checkpoint_interval);
  }
  const Call call{std::string(kind), std::string(discretization), reverse, recompute,  scale,
                  bias_scale,        checkpoint_interval,         present, &parameters};
  return {Function::apply(at::TensorList(all), call), std::vector<Tensor>()};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmvim, Autograd, m) {
  m.impl("mixer", differentiable);
  m.impl("mixer_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace mixers
}  // namespace mmvim
