// Registers the CPU kernels of causal_conv1d and bidirectional_conv1d.
#include <torch/library.h>

#include <tuple>

#include "../common/cpu_glue.h"
#include "../common/direct.h"
#include "cpu_kernels.h"

namespace mmvim {
namespace conv {
namespace {

// Weight and bias of one filter in the computing type.
struct Filter {
  Tensor weight;
  OptTensor bias;

  Filter(const Tensor& w, const OptTensor& b, const Tensor& x) {
    TORCH_CHECK_VALUE(x.dim() == 3, "x must be (b, l, d), got shape ", x.sizes());
    const int64_t d = x.size(2);
    TORCH_CHECK_VALUE(w.dim() == 2 && w.size(1) >= 2 && w.size(1) <= 4,
                      "weight must be (d, w) with w from 2 to 4, got shape ", w.sizes());
    weight = converted(w, "weight", {d, w.size(1)}, x);
    if (b.has_value()) bias = converted(*b, "bias", {d}, x);
  }

  ConvFilter arguments(int64_t left, bool reverse) const {
    ConvFilter f;
    f.weight = weight.const_data_ptr();
    f.bias = data(bias);
    f.left = left;
    f.reverse = reverse;
    return f;
  }

 private:
  static Tensor converted(const Tensor& t, const char* name, at::IntArrayRef sizes,
                          const Tensor& x) {
    check_either(t, name, sizes, x.scalar_type(), at::kCPU);
    return t.to(compute_type(x.scalar_type())).contiguous();
  }
};

ConvInput input(const Tensor& x, int64_t width, bool silu) {
  dtype_of(x.scalar_type(), "x");
  check(x, "x", x.sizes(), x.scalar_type(), at::kCPU);
  ConvInput in;
  in.batch = x.size(0);
  in.length = x.size(1);
  in.channels = x.size(2);
  in.width = width;
  in.silu = silu;
  in.x = view(x);
  return in;
}

void set_mode(ConvInput& in, const Filter& filter, std::string_view mode, bool has_state) {
  TORCH_CHECK_VALUE(mode == "causal" || mode == "reverse" || mode == "same",
                    "mode must be 'causal', 'reverse' or 'same', got '", mode, "'");
  TORCH_CHECK_VALUE(mode != "same" || !has_state, "mode 'same' has no state");
  const int64_t left = mode == "causal" ? in.width - 1 : mode == "same" ? (in.width - 1) / 2 : 0;
  in.filter[0] = filter.arguments(left, mode == "reverse");
}

// Returns the numbers of the sequences, which have to outlive the call.
OptTensor set_sequences(ConvInput& in, const OptTensor& seq_idx, const Tensor& x) {
  check(seq_idx, "seq_idx", {x.size(0), x.size(1)}, at::kInt, at::kCPU);
  const OptTensor numbers = contiguous(seq_idx);
  if (numbers.has_value()) in.seq_idx = numbers->const_data_ptr<int32_t>();
  return numbers;
}

// A contiguous state, checked: dtype of x or of the computation.
ConvState state(const OptTensor& t, OptTensor& keep, const char* name, const Tensor& x,
                int64_t width) {
  ConvState s;
  if (!t.has_value()) return s;
  check_either(*t, name, {x.size(0), x.size(2), width - 1}, x.scalar_type(), at::kCPU);
  keep = t->contiguous();
  s.data = const_cast<void*>(keep->const_data_ptr());
  s.dtype = dtype_of(keep->scalar_type(), name);
  return s;
}

ConvState state(const Tensor& t) {
  ConvState s;
  s.data = t.mutable_data_ptr();
  s.dtype = dtype_of(t.scalar_type(), "state");
  return s;
}

bool is_double(const Tensor& x) { return x.scalar_type() == at::kDouble; }

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                   const OptTensor& initial_state, std::string_view mode, bool silu,
                                   bool return_last_state, const OptTensor& seq_idx) {
  const Filter filter(weight, bias, x);
  const int64_t width = weight.size(1);
  ConvForwardArgs a;
  a.in = input(x, width, silu);
  const OptTensor numbers = set_sequences(a.in, seq_idx, x);
  set_mode(a.in, filter, mode, initial_state.has_value() || return_last_state);
  OptTensor keep;
  a.in.initial = state(initial_state, keep, "initial_state", x, width);
  Tensor out = empty_like(x);
  a.out[0] = output(out);
  const auto state_type =
      initial_state.has_value() ? initial_state->scalar_type() : x.scalar_type();
  Tensor last_state = empty({0}, state_type);
  if (return_last_state) {
    last_state = empty({x.size(0), x.size(2), width - 1}, state_type);
    a.last = state(last_state);
  }
  MMVIM_PER_ISA(conv_forward)(a, is_double(x));
  return {out, last_state};
}

// Gradients of weight and bias, computed in the computing type.
struct FilterGradient {
  Tensor weight, bias;

  FilterGradient(const Filter& filter, ConvBackwardArgs& a, int index)
      : weight(empty_like(filter.weight)),
        bias(empty_like(filter.bias, filter.weight.scalar_type())) {
    a.dweight[index] = weight.mutable_data_ptr();
    a.dbias[index] = data_if(filter.bias, bias);
  }

  Tensor weight_like(const Tensor& t) const { return weight.to(t.scalar_type()); }
  Tensor bias_like(const OptTensor& t) const {
    return t.has_value() ? bias.to(t->scalar_type()) : bias;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_into(
    const Tensor& grad_out, const OptTensor& grad_last_state, const Tensor& x, const Tensor& weight,
    const OptTensor& bias, const OptTensor& initial_state, std::string_view mode, bool silu,
    const Tensor& place, const OptTensor& seq_idx) {
  const Filter filter(weight, bias, x);
  const int64_t width = weight.size(1);
  ConvBackwardArgs a;
  a.in = input(x, width, silu);
  const OptTensor numbers = set_sequences(a.in, seq_idx, x);
  set_mode(a.in, filter, mode, initial_state.has_value() || grad_last_state.has_value());
  check(grad_out, "grad_out", x.sizes(), x.scalar_type(), at::kCPU);
  OptTensor keep_state, keep_grad;
  a.in.initial = state(initial_state, keep_state, "initial_state", x, width);
  a.grad_last = state(grad_last_state, keep_grad, "grad_last_state", x, width);
  a.grad[0] = view(grad_out);
  const Tensor dx = place.defined() ? place : empty_like(x);
  Tensor dinitial = empty_like(initial_state, compute_type(x.scalar_type()));
  a.dx = output(dx);
  if (initial_state.has_value()) a.dinitial = state(dinitial);
  const FilterGradient grads(filter, a, 0);
  MMVIM_PER_ISA(conv_backward)(a, is_double(x));
  return {dx, grads.weight_like(weight), grads.bias_like(bias), dinitial};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const OptTensor& grad_last_state, const Tensor& x, const Tensor& weight,
    const OptTensor& bias, const OptTensor& initial_state, std::string_view mode, bool silu,
    const OptTensor& seq_idx) {
  return backward_into(grad, grad_last_state, x, weight, bias, initial_state, mode, silu, {},
                       seq_idx);
}

void set_both(ConvInput& in, const Filter& f, const Filter& b) {
  TORCH_CHECK_VALUE(f.weight.size(1) == b.weight.size(1),
                    "weight_f and weight_b must have the same width, got ", f.weight.size(1),
                    " and ", b.weight.size(1));
  in.filters = 2;
  in.filter[0] = f.arguments(in.width - 1, false);
  in.filter[1] = b.arguments(0, true);
}

void both_forward_into(const Tensor& x, const Tensor& weight_f, const OptTensor& bias_f,
                       const Tensor& weight_b, const OptTensor& bias_b, bool silu,
                       const Tensor& out_f, const Tensor& out_b) {
  const Filter f(weight_f, bias_f, x), b(weight_b, bias_b, x);
  ConvForwardArgs a;
  a.in = input(x, weight_f.size(1), silu);
  set_both(a.in, f, b);
  a.out[0] = output(out_f);
  a.out[1] = output(out_b);
  MMVIM_PER_ISA(conv_forward)(a, is_double(x));
}

std::tuple<Tensor, Tensor> both_forward(const Tensor& x, const Tensor& weight_f,
                                        const OptTensor& bias_f, const Tensor& weight_b,
                                        const OptTensor& bias_b, bool silu) {
  Tensor out_f = empty_like(x), out_b = empty_like(x);
  both_forward_into(x, weight_f, bias_f, weight_b, bias_b, silu, out_f, out_b);
  return {out_f, out_b};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> both_backward_into(
    const Tensor& grad_f, const Tensor& grad_b, const Tensor& x, const Tensor& weight_f,
    const OptTensor& bias_f, const Tensor& weight_b, const OptTensor& bias_b, bool silu,
    const Tensor& place) {
  const Filter f(weight_f, bias_f, x), b(weight_b, bias_b, x);
  check(grad_f, "grad_f", x.sizes(), x.scalar_type(), at::kCPU);
  check(grad_b, "grad_b", x.sizes(), x.scalar_type(), at::kCPU);
  ConvBackwardArgs a;
  a.in = input(x, weight_f.size(1), silu);
  set_both(a.in, f, b);
  a.grad[0] = view(grad_f);
  a.grad[1] = view(grad_b);
  const Tensor dx = place.defined() ? place : empty_like(x);
  a.dx = output(dx);
  const FilterGradient gf(f, a, 0), gb(b, a, 1);
  MMVIM_PER_ISA(conv_backward)(a, is_double(x));
  return {dx, gf.weight_like(weight_f), gf.bias_like(bias_f), gb.weight_like(weight_b),
          gb.bias_like(bias_b)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> both_backward(
    const Tensor& grad_f, const Tensor& grad_b, const Tensor& x, const Tensor& weight_f,
    const OptTensor& bias_f, const Tensor& weight_b, const OptTensor& bias_b, bool silu) {
  return both_backward_into(grad_f, grad_b, x, weight_f, bias_f, weight_b, bias_b, silu, {});
}

const bool known = [] {
  direct::enter<forward>(direct::cpu.conv);
  direct::enter<backward_into>(direct::cpu.conv_backward);
  direct::cpu.two_convs = both_forward_into;
  direct::cpu.two_convs_backward = both_backward_into;
  return true;
}();

}  // namespace

TORCH_LIBRARY_IMPL(mmvim, CPU, m) {
  m.impl("causal_conv1d", forward);
  m.impl("causal_conv1d_backward", backward);
  m.impl("bidirectional_conv1d", both_forward);
  m.impl("bidirectional_conv1d_backward", both_backward);
}

}  // namespace conv
}  // namespace mmvim
