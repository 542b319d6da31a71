// The residual branch of a block as one function each way: x + keep * gamma * body(layer_norm(x)),
// where the body is attention, an MLP, a mixer or SS2D. Kept for backward are the norm's result and
// statistics and what the body needs; a GELU is made again.
#include <ATen/ops/_addmm_activation.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "../common/direct.h"
#include "../common/glue.h"
#include "conversions.h"
#include "mixer.h"
#include "norm.h"
#include "plain.h"
#include "products.h"
#include "ss2d.h"

namespace mmvim {
namespace mixers {
namespace branch {
namespace {

// Order of the parameters. Mixers have their own ones instead of the two linear layers.
enum Index : int { kNormWeight, kNormBias, kGamma, kBody, kLinears = 4 };

struct Options {
  std::string_view kind;  // "attention", "mlp", "mixer" or "ss2d"
  at::ScalarType type;    // of the branch
  int64_t heads;
  double eps;
  // Of a mixer.
  double bias_scale;
  std::string_view discretization;
  bool recompute;  // of a mixer its convolution and parameters, of an MLP all between the layers
  bool gelu_in_product;  // where there will be no backward pass, by the tanh formula
  // Of SS2D: the routes, as cross_scan_fused knows them, and its steps of a round.
  IntArrayRef routes;
  int64_t round_steps;
  double inner_eps;  // of the norm behind the scans
  int64_t interval;  // 0: there will be no backward pass

  bool is_mixer() const { return kind == "mixer"; }
  bool is_ss2d() const { return kind == "ss2d"; }
  ss2d::Options of_ss2d() const {
    return {type, routes, discretization, round_steps, inner_eps, interval > 0};
  }
  bool is_attention() const { return kind == "attention"; }
};

// Kernels of scaled dot-product attention by torch's numbers (sdp::SDPBackend).
enum Attention : int64_t { kMath = 0, kFlash = 1, kEfficient = 2, kCudnn = 3 };

// (batch, length, 3 * channels) as queries, keys and values (batch, heads, length, channels).
std::array<Tensor, 3> parts_of(const Tensor& qkv, int64_t heads) {
  const int64_t batch = qkv.size(0), length = qkv.size(1), d = qkv.size(2) / 3 / heads;
  std::array<Tensor, 3> parts;
  for (int64_t i = 0; i < 3; ++i) {
    parts[i] =
        view(qkv, i * heads * d, {batch, heads, length, d}, {qkv.stride(0), d, qkv.stride(1), 1});
  }
  return parts;
}

// What attention makes, and what its backward pass needs besides.
struct Attended {
  int64_t backend;
  Tensor out;  // (batch, heads, length, channels)
  Tensor statistics, seed, offset;
};

Attended attend(const Tensor& qkv, int64_t heads, bool gradient) {
  const auto [q, k, v] = parts_of(qkv, heads);
  Attended a;
  a.backend = at::_fused_sdp_choice(q, k, v);
  if (a.backend < 0) at::scaled_dot_product_attention(q, k, v);  // says why there is none
  if (a.backend == kFlash && !q.is_cuda()) {
    std::tie(a.out, a.statistics) = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v);
  } else if (a.backend == kFlash) {
    auto all = at::_scaled_dot_product_flash_attention(q, k, v);
    a.out = std::get<0>(all);
    a.statistics = std::get<1>(all);
    a.seed = std::get<6>(all);
    a.offset = std::get<7>(all);
  } else if (a.backend == kEfficient) {
    std::tie(a.out, a.statistics, a.seed, a.offset) =
        at::_scaled_dot_product_efficient_attention(q, k, v, {}, gradient);
  } else if (a.backend == kCudnn) {
    auto all = at::_scaled_dot_product_cudnn_attention(q, k, v, {}, gradient);
    a.out = std::get<0>(all);
    a.statistics = std::get<1>(all);
    a.seed = std::get<6>(all);
    a.offset = std::get<7>(all);
  } else {
    a.backend = kMath;
    std::tie(a.out, a.statistics) = at::_scaled_dot_product_attention_math(q, k, v);
  }
  return a;
}

// Of queries, keys and values, as they lie in the result of their projection.
Tensor attend_backward(const Tensor& grad, const Tensor& qkv, int64_t heads, const Attended& a) {
  const auto [q, k, v] = parts_of(qkv, heads);
  Tensor dq, dk, dv;
  const int64_t length = q.size(2);
  if (a.backend == kFlash && !q.is_cuda()) {
    std::tie(dq, dk, dv) = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, a.out, a.statistics, 0.0, false);
  } else if (a.backend == kFlash) {
    std::tie(dq, dk, dv) = at::_scaled_dot_product_flash_attention_backward(
        grad, q, k, v, a.out, a.statistics, {}, {}, length, length, 0.0, false, a.seed, a.offset);
  } else if (a.backend == kEfficient) {
    Tensor unused;
    std::tie(dq, dk, dv, unused) = at::_scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, {}, a.out, a.statistics, a.seed, a.offset, 0.0, {true, true, true, false});
  } else if (a.backend == kCudnn) {
    std::tie(dq, dk, dv) = at::_scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, a.out, a.statistics, a.seed, a.offset, {}, {}, {}, length, length, 0.0,
        false);
  } else {
    const Tensor& weights = a.statistics;
    const auto type = weights.scalar_type();
    const Tensor dout = as(grad, type);
    dv = at::matmul(transposed(weights), dout);
    const Tensor dscores =
        at::_softmax_backward_data(at::matmul(dout, transposed(as(v, type))), weights, -1, type)
            .mul_(1 / std::sqrt(static_cast<double>(q.size(3))));
    dq = at::matmul(dscores, as(k, type));
    dk = at::matmul(transposed(dscores), as(q, type));
  }
  const Tensor grads = at::stack({dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)}, 2);
  return as(grads, qkv.scalar_type()).reshape(qkv.sizes());
}

// What a branch reads, in either pass.
class Branch {
 public:
  const Options& options;
  Tensor x;             // (batch, length, channels)
  at::ScalarType wide;  // of the arithmetic
  Tensor norm_weight, norm_bias;
  OptTensor gamma;
  std::array<Tensor, kLinears> given,
      linears;      // weights and biases: as given, in the branch's dtype
  Parameters body;  // of a mixer

  Branch(const Tensor& x_in, const Parameters& parameters, const Options& options_in)
      : options(options_in), wide(compute_type(options.type)) {
    TORCH_CHECK_VALUE(x_in.dim() >= 2 && x_in.size(-1) > 0,
                      "x must be (batch, ..., channels), got ", x_in.sizes());
    dtype_of(x_in.scalar_type(), "x");
    dtype_of(options.type, "the branch");
    const Tensor whole = x_in.contiguous();
    const int64_t channels = whole.size(-1);
    x = view(whole, 0,
             {whole.size(0), c10::multiply_integers(whole.sizes().slice(1)) / channels, channels});
    const bool own = options.is_mixer() || options.is_ss2d();
    TORCH_CHECK_VALUE(options.kind == "attention" || options.kind == "mlp" || own,
                      "kind must be 'attention', 'mlp', 'mixer' or 'ss2d', got '", options.kind,
                      "'");
    TORCH_CHECK_VALUE(!options.is_ss2d() || x_in.dim() == 4,
                      "x must be (batch, height, width, channels), got ", x_in.sizes());
    TORCH_CHECK_VALUE(own ? parameters.size() >= kBody : parameters.size() == kBody + kLinears,
                      "there must be ", static_cast<int>(kBody + kLinears), " parameters, got ",
                      parameters.size());
    const auto take = [&](int i, IntArrayRef sizes) {
      const OptTensor t = parameters.get(i);
      TORCH_CHECK_VALUE(t.has_value(), "parameter ", i, " is missing");
      dtype_of(t->scalar_type(), "a parameter");
      check_place(*t, "a parameter", sizes, x.device());
      return *t;
    };
    norm_weight = as(take(kNormWeight, {channels}), wide);
    norm_bias = as(take(kNormBias, {channels}), wide);
    if (parameters.get(kGamma).has_value()) gamma = take(kGamma, {channels});
    if (own) {
      for (size_t i = kBody; i < parameters.size(); ++i) body.push_back(parameters.get(i));
      return;
    }
    const bool attention = options.is_attention();
    TORCH_CHECK_VALUE(!attention || (options.heads > 0 && channels % options.heads == 0),
                      "heads must divide the ", channels, " channels, got ", options.heads);
    const OptTensor first = parameters.get(kBody);
    const int64_t hidden = attention ? 3 * channels : first.has_value() ? first->size(0) : 0;
    given = {take(kBody, {hidden, channels}), take(kBody + 1, {hidden}),
             take(kBody + 2, {channels, attention ? channels : hidden}),
             take(kBody + 3, {channels})};
  }

  // Makes `linears`: one array, which is the result, holds what has another dtype as given.
  Tensor prepare(Tensor made = {}) {
    Conversions conversions(wide);
    const bool convert = !made.defined();
    if (convert) {
      int64_t count = 0;
      for (const Tensor& t : given) count += is_converted(t) ? padded(t.numel()) : 0;
      made = at::empty({count}, x.options().dtype(options.type));
    }
    int64_t next = 0;
    for (int i = 0; i < kLinears; ++i) {
      if (!is_converted(given[i])) {
        linears[i] = as(given[i], options.type).contiguous();
        continue;
      }
      linears[i] = view(made, next, given[i].sizes());
      next += padded(given[i].numel());
      if (convert) conversions.add(given[i], linears[i]);
    }
    conversions.run(x);
    return made;
  }

  // Whether the conversion between the branch's dtype and that of a parameter is one of those made
  // at once: kernels meet doubles beside doubles alone.
  bool is_converted(const Tensor& t) const {
    return t.scalar_type() != options.type && t.scalar_type() != at::kDouble && wide != at::kDouble;
  }

  LayerNorm norm() const { return {x, norm_weight, norm_bias, options.eps, options.type}; }

 private:
  static int64_t padded(int64_t count) { return (count + 7) / 8 * 8; }
};

// What backward needs besides the inputs.
struct Kept {
  Norm norm;
  Tensor scaled;  // what gamma multiplies, if there is one
  Tensor made;    // by prepare()
  Tensor hidden;  // of an MLP before the GELU; of attention queries, keys and values
  Attended attended;
  std::vector<Tensor> of_mixer;
};

Tensor factors_of(const Tensor& keep, const Tensor& x) {
  check_place(keep.flatten(), "keep", {x.size(0)}, x.device());
  return view(keep, 0, {x.size(0), 1, 1});
}

// What comes after the norm of an x of these sizes.
Tensor body_of(Branch& b, IntArrayRef sizes, const Tensor& normed, Kept& kept) {
  const Options& options = b.options;
  const bool gradient = options.interval > 0;
  Tensor out;
  if (options.is_mixer()) {
    auto [mixed, unused, of_mixer] =
        mixers::forward(normed, {}, {}, b.body, "half", false, 1.0, options.bias_scale,
                        options.discretization, options.recompute, 0.0, false, options.interval);
    out = mixed;
    kept.of_mixer = std::move(of_mixer);
  } else if (options.is_ss2d()) {
    out = ss2d::forward(normed, sizes[1], sizes[2], b.body, options.of_ss2d(), kept.of_mixer);
  } else {
    // Those of MLPs are most of a model: backward converts them again.
    const Tensor made = b.prepare();
    if (options.is_attention()) kept.made = made;
    Tensor inner;
    if (options.is_attention()) {
      kept.hidden = linear(normed, b.linears[0], b.linears[1], true);
      kept.attended = attend(kept.hidden, options.heads, gradient);
      inner = kept.attended.out.transpose(1, 2).reshape(normed.sizes());
    } else if (!gradient && options.gelu_in_product && normed.is_cuda() && b.wide != options.type &&
               normed.numel() > 0) {
      inner = at::_addmm_activation(b.linears[1], rows(normed), transposed(b.linears[0]), 1, 1,
                                    /*use_gelu=*/true);
      inner = view(inner, 0, {normed.size(0), normed.size(1), inner.size(1)});
    } else {
      Tensor hidden = linear(normed, b.linears[0], b.linears[1], true);
      const bool is_kept = gradient && !options.recompute;
      inner = is_kept ? at::gelu(hidden) : at::gelu_(hidden);
      if (is_kept) kept.hidden = hidden;
    }
    out = linear(inner, b.linears[2], b.linears[3], true);
  }
  return out;
}

Tensor forward(const Tensor& x, const OptTensor& keep, const Parameters& parameters,
               const Options& options, Kept& kept) {
  const Plain plain(x);
  Branch b(x, parameters, options);
  kept.norm = b.norm().forward(options.interval > 0);
  Tensor out = body_of(b, x.sizes(), kept.norm.out, kept);
  if (b.gamma.has_value()) {
    kept.scaled = out;
    out = at::mul(out, *b.gamma);
  }
  const bool same = out.scalar_type() == b.x.scalar_type();
  if (!keep.has_value()) {
    out = same ? out.add_(b.x) : at::add(b.x, out);
  } else {
    const Tensor factors = factors_of(*keep, b.x);
    out = same ? at::addcmul(b.x, out, factors) : at::add(b.x, at::mul(out, factors));
  }
  return x.dim() == 3 ? out : view(out, 0, x.sizes());
}

// Blocks of SS2D and, with `mlp`, an MLP, without gradients: each sum is made by the norm behind
// it.
Tensor run_blocks(const Tensor& x, const Parameters& parameters, bool mlp, at::ScalarType type,
                  double eps, std::string_view discretization, bool gelu_in_product,
                  IntArrayRef routes, int64_t round_steps, double inner_eps) {
  const Plain plain(x);
  const size_t step = kBody - 1 + ss2d::kCount + (mlp ? kBody - 1 + kLinears : 0);
  TORCH_CHECK_VALUE(parameters.size() > 0 && parameters.size() % step == 0, "there must be ", step,
                    " parameters of each block, got ", parameters.size());
  Tensor stream = x, added;
  for (size_t next = 0; next < parameters.size();) {
    const bool first = next % step == 0;
    const Options options{
        first ? "ss2d" : "mlp", type,   0,           eps,       1.0, discretization, false,
        gelu_in_product,        routes, round_steps, inner_eps, 0};
    Parameters own;
    for (int i = 0; i < kGamma; ++i) own.push_back(parameters.get(next++));
    own.push_back(std::nullopt);
    for (int64_t i = 0; i < (first ? ss2d::kCount : kLinears); ++i) {
      own.push_back(parameters.get(next++));
    }
    Branch b(stream, own, options);
    Tensor normed;
    if (added.defined()) {
      Tensor sum;
      std::tie(normed, sum) = b.norm().forward(added);
      stream = view(sum, 0, x.sizes());
    } else {
      normed = b.norm().forward(false).out;
    }
    Kept unused;
    added = body_of(b, x.sizes(), normed, unused);
  }
  return at::add(stream, view(added, 0, x.sizes()));
}

// Bits of `needed` and of what there is: x, the factors, the parameters.
constexpr int kX = 0, kKeep = 1, kFirst = 2;

// Gradients by those bits.
std::vector<Tensor> backward(const Tensor& grad_in, const Tensor& x, const OptTensor& keep,
                             const Parameters& parameters, const Options& options, const Kept& kept,
                             int64_t needed) {
  const Plain plain(x);
  Branch b(x, parameters, options);
  const auto needs = [&](int i) { return (needed >> i & 1) != 0; };
  std::vector<Tensor> grads(kFirst + parameters.size());
  const Tensor grad = view(grad_in.contiguous(), 0, b.x.sizes());
  if (needs(kX)) grads[kX] = grad;
  if ((needed >> kFirst) == 0 && !needs(kX)) return grads;

  Tensor dout = keep.has_value() ? at::mul(grad, factors_of(*keep, b.x)) : grad;
  if (b.gamma.has_value()) {
    if (needs(kFirst + kGamma)) {
      const auto type = b.gamma->scalar_type();
      grads[kFirst + kGamma] =
          as(at::sum(at::mul(dout, kept.scaled), at::IntArrayRef({0, 1})), type);
    }
    dout = at::mul(dout, *b.gamma);
  }
  dout = as(dout, options.type);

  const bool further = needs(kX) || needs(kFirst + kNormWeight) || needs(kFirst + kNormBias);
  const Tensor& normed = kept.norm.out;
  Tensor dnormed;
  if (options.is_mixer() || options.is_ss2d()) {
    const int64_t of_mixer = (needed >> (kFirst + kBody)) << 1 | int64_t{further};
    std::vector<Tensor> found =
        options.is_ss2d()
            ? ss2d::backward(dout, normed, x.size(1), x.size(2), b.body, options.of_ss2d(),
                             kept.of_mixer, of_mixer)
            : mixers::backward(dout, {}, normed, {}, {}, b.body, kept.of_mixer, "half", false, 1.0,
                               options.bias_scale, options.discretization, options.recompute, 0.0,
                               false, options.interval, {}, of_mixer);
    dnormed = found[0];
    for (size_t i = 0; i < b.body.size(); ++i) {
      if (needs(kFirst + kBody + i)) grads[kFirst + kBody + i] = found[1 + i];
    }
  } else {
    b.prepare(kept.made);
    Conversions conversions(b.wide);
    // Of a linear layer.
    const auto add_parameters = [&](int layer, const Tensor& dy, const Tensor& input) {
      const int weight = 2 * layer, bias = weight + 1;
      if (needs(kFirst + kBody + weight)) {
        const Tensor& of = b.given[weight];
        Tensor dweight = at::empty(of.sizes(), b.x.options().dtype(options.type));
        product(dweight, transposed(rows(dy)), rows(input));
        if (b.is_converted(of)) {
          const Tensor converted = at::empty(of.sizes(), of.options());
          conversions.add(dweight, converted);
          dweight = converted;
        }
        grads[kFirst + kBody + weight] = as(dweight, of.scalar_type());
      }
      if (needs(kFirst + kBody + bias)) {
        grads[kFirst + kBody + bias] = at::sum(rows(dy), {0}, false, b.given[bias].scalar_type());
      }
    };
    const auto input_gradient = [&](int layer, const Tensor& dy) {
      const Tensor& weight = b.linears[2 * layer];
      const Tensor dx = at::empty({dy.size(0), dy.size(1), weight.size(1)}, dy.options());
      product(rows(dx), rows(dy), weight);
      return dx;
    };
    const bool first = further || needs(kFirst + kBody) || needs(kFirst + kBody + 1);
    Tensor dhidden;
    if (options.is_attention()) {
      add_parameters(1, dout, kept.attended.out.transpose(1, 2).reshape(normed.sizes()));
      if (first) {
        const Tensor dinner = input_gradient(1, dout)
                                  .view({dout.size(0), dout.size(1), options.heads, -1})
                                  .transpose(1, 2);
        dhidden = attend_backward(dinner, kept.hidden, options.heads, kept.attended);
      }
    } else {
      const bool needed_again = needs(kFirst + kBody + 2);
      Tensor hidden = kept.hidden;
      if (!hidden.defined() && (needed_again || first)) {
        hidden = linear(normed, b.linears[0], b.linears[1], true);
      }
      add_parameters(1, dout, needed_again ? at::gelu(hidden) : Tensor());
      if (first) dhidden = at::gelu_backward(input_gradient(1, dout), hidden);
    }
    if (first) add_parameters(0, dhidden, normed);
    if (further) dnormed = input_gradient(0, dhidden);
    conversions.run(b.x);
  }
  if (!further) return grads;

  auto [dx, dweight, dbias] = b.norm().backward(dnormed, kept.norm, needs(kX) ? grad : Tensor());
  if (needs(kFirst + kNormWeight)) {
    grads[kFirst + kNormWeight] = as(dweight, parameters.get(kNormWeight)->scalar_type());
  }
  if (needs(kFirst + kNormBias)) {
    grads[kFirst + kNormBias] = as(dbias, parameters.get(kNormBias)->scalar_type());
  }
  if (needs(kX)) grads[kX] = view(as(dx, x.scalar_type()), 0, x.sizes());
  return grads;
}

// What autograd is told besides tensors, and the tensors while forward runs.
struct Call {
  Options options;
  int64_t present;
  const Tensor& x;
  const OptTensor& keep;
  const Parameters& parameters;
};

class Function : public torch::autograd::Function<Function> {
 public:
  static constexpr bool is_traceable = true;

  // `all`: the inputs that there are, of which `call.present` has a bit each.
  static Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList all,
                        const Call& call) {
    const Options& o = call.options;
    Kept kept;
    const Tensor out = branch::forward(call.x, call.keep, call.parameters, o, kept);
    torch::autograd::variable_list saved(all.begin(), all.end());
    for (const Tensor* t : places(kept)) saved.push_back(*t);
    saved.insert(saved.end(), kept.of_mixer.begin(), kept.of_mixer.end());
    ctx->save_for_backward(std::move(saved));
    auto& data = ctx->saved_data;
    data["strings"] = std::vector<std::string>{std::string(o.kind), std::string(o.discretization)};
    data["numbers"] = std::vector<double>{o.eps, o.bias_scale, o.inner_eps};
    data["routes"] = o.routes.vec();
    data["integers"] = std::vector<int64_t>{call.present,
                                            static_cast<int64_t>(call.parameters.size()),
                                            o.heads,
                                            int64_t{o.recompute},
                                            o.interval,
                                            static_cast<int64_t>(o.type),
                                            kept.attended.backend,
                                            o.round_steps};
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    auto& data = ctx->saved_data;
    const auto strings = data["strings"].toListRef();
    const auto numbers = data["numbers"].toDoubleVector();
    const auto integers = data["integers"].toIntVector(), routes = data["routes"].toIntVector();
    const Options options{strings[0].toStringView(),
                          static_cast<at::ScalarType>(integers[5]),
                          integers[2],
                          numbers[0],
                          numbers[1],
                          strings[1].toStringView(),
                          integers[3] != 0,
                          false,
                          routes,
                          integers[7],
                          numbers[2],
                          integers[4]};
    const auto saved = ctx->get_saved_variables();
    const int64_t present = integers[0], count = integers[1];
    Parameters parameters;
    parameters.reserve(count);
    OptTensor keep;
    int64_t needed = 0;
    size_t next = 0;
    for (int i = 0; i < kFirst + count; ++i) {
      if ((present >> i & 1) == 0) {
        if (i >= kFirst) parameters.push_back(std::nullopt);
        continue;
      }
      if (i != kKeep && ctx->needs_input_grad(next)) needed |= int64_t{1} << i;
      if (i >= kFirst) parameters.push_back(saved[next]);
      if (i == kKeep) keep = saved[next];
      ++next;
    }
    // One more, for what is not a tensor.
    torch::autograd::variable_list results(next + 1);
    if (!grads[0].defined()) return results;
    Kept kept;
    kept.attended.backend = integers[6];
    for (Tensor* t : places(kept)) *t = saved[next++];
    kept.of_mixer.assign(saved.begin() + static_cast<int64_t>(next), saved.end());
    const std::vector<Tensor> found =
        branch::backward(grads[0], saved[0], keep, parameters, options, kept, needed);
    next = 0;
    for (int i = 0; i < kFirst + count; ++i) {
      if ((present >> i & 1) != 0) results[next++] = found[i];
    }
    return at::GradMode::is_enabled() ? not_differentiable(std::move(results)) : results;
  }

 private:
  static std::array<Tensor*, 10> places(Kept& k) {
    return {&k.norm.out,      &k.norm.first,     &k.norm.second,  &k.scaled,
            &k.made,          &k.hidden,         &k.attended.out, &k.attended.statistics,
            &k.attended.seed, &k.attended.offset};
  }

  static torch::autograd::variable_list not_differentiable(torch::autograd::variable_list all) {
    for (Tensor& t : all) {
      if (t.defined()) t = t.detach().requires_grad_();
    }
    const auto count = static_cast<int64_t>(all.size());
    return std::make_shared<torch::autograd::DelayedError>(
               "mmvim::branch cannot be differentiated a second time", count)
        ->apply(std::move(all));
  }
};

Tensor run(const Tensor& x, const OptTensor& keep, const Parameters& parameters,
           std::string_view kind, at::ScalarType type, int64_t heads, double eps, double bias_scale,
           std::string_view discretization, bool recompute, bool gelu_in_product,
           IntArrayRef routes, int64_t round_steps, double inner_eps,
           int64_t /*checkpoint_interval*/) {
  Kept kept;
  const Options options{kind,       type,           heads,     eps,
                        bias_scale, discretization, recompute, gelu_in_product,
                        routes,     round_steps,    inner_eps, 0};
  return branch::forward(x, keep, parameters, options, kept);
}

Tensor differentiable(const Tensor& x, const OptTensor& keep, const Parameters& parameters,
                      std::string_view kind, at::ScalarType type, int64_t heads, double eps,
                      double bias_scale, std::string_view discretization, bool recompute,
                      bool gelu_in_product, IntArrayRef routes, int64_t round_steps,
                      double inner_eps, int64_t checkpoint_interval) {
  std::vector<Tensor> all{x};
  bool wanted = x.requires_grad();
  int64_t present = int64_t{1} << kX;
  const auto add = [&](int bit, const OptTensor& t) {
    if (!t.has_value()) return;
    all.push_back(*t);
    present |= int64_t{1} << bit;
    wanted = wanted || t->requires_grad();
  };
  add(kKeep, keep);
  for (size_t i = 0; i < parameters.size(); ++i) {
    add(kFirst + static_cast<int>(i), parameters.get(i));
  }
  const bool gradient = wanted && at::GradMode::is_enabled();
  const Options options{kind,       type,           heads,     eps,
                        bias_scale, discretization, recompute, gelu_in_product,
                        routes,     round_steps,    inner_eps, gradient ? checkpoint_interval : 0};
  if (!gradient) {
    check_no_tangents(x, parameters);
    Kept kept;
    return branch::forward(x, keep, parameters, options, kept);
  }
  return Function::apply(at::TensorList(all), Call{options, present, x, keep, parameters});
}

}  // namespace
}  // namespace branch

TORCH_LIBRARY_IMPL(mmvim, CPU, m) {
  m.impl("branch", branch::run);
  m.impl("ss2d_blocks", branch::run_blocks);
}
TORCH_LIBRARY_IMPL(mmvim, CUDA, m) {
  m.impl("branch", branch::run);
  m.impl("ss2d_blocks", branch::run_blocks);
}
TORCH_LIBRARY_IMPL(mmvim, Autograd, m) {
  m.impl("branch", branch::differentiable);
  m.impl("ss2d_blocks", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace mixers
}  // namespace mmvim
