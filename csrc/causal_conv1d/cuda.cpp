// Glue of the CUDA convolutions: checks, allocation, dispatch on the dtype, registration.

#include "cuda.h"

#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../common/cuda_glue.h"
#include "../common/direct.h"
#include "../common/scratch.h"

namespace mmvim {
namespace conv {
namespace {

// Parameters as the kernels want them; the copies live as long as this object.
struct Parameters {
  Tensor weight, bias;
  Taps taps;

  Parameters(const Tensor& w, const OptTensor& b, const Tensor& x, int left, bool reverse) {
    const int64_t d = x.size(2);
    TORCH_CHECK_VALUE(w.dim() == 2 && w.size(1) >= 2 && w.size(1) <= 4,
                      "weight must be (d, w) with w from 2 to 4, got shape ", w.sizes());
    check_either(w, "weight", {d, w.size(1)}, x.scalar_type(), x.device());
    weight = w.to(at::kFloat).contiguous();
    taps.weight = weight.const_data_ptr<float>();
    taps.aligned = reinterpret_cast<uintptr_t>(taps.weight) % 16 == 0;
    if (b.has_value()) {
      check_either(*b, "bias", {d}, x.scalar_type(), x.device());
      bias = b->to(at::kFloat).contiguous();
      taps.bias = bias.const_data_ptr<float>();
    }
    taps.left = left;
    taps.reverse = reverse;
  }
};

Parameters parameters(const Tensor& weight, const OptTensor& bias, const Tensor& x,
                      std::string_view mode) {
  const int width = weight.dim() == 2 ? static_cast<int>(weight.size(1)) : 0;
  TORCH_CHECK_VALUE(mode == "causal" || mode == "reverse" || mode == "same",
                    "mode must be 'causal', 'reverse' or 'same', got '", mode, "'");
  const int left = mode == "causal" ? width - 1 : mode == "same" ? (width - 1) / 2 : 0;
  return Parameters(weight, bias, x, left, mode == "reverse");
}

Input input(const Tensor& x, int64_t width, bool silu) {
  Input in;
  in.x = x.const_data_ptr();
  in.stride_b = x.stride(0);
  in.stride_l = x.stride(1);
  in.batch = x.size(0);
  in.length = x.size(1);
  in.channels = x.size(2);
  in.width = static_cast<int>(width);
  in.silu = silu;
  in.vectorized = rows_are_aligned(x);
  return in;
}

State state(const OptTensor& s, Tensor& keep, const Tensor& x, int64_t width, const char* name) {
  State result;
  if (!s.has_value()) return result;
  check_either(*s, name, {x.size(0), x.size(2), width - 1}, x.scalar_type(), x.device());
  keep = s->contiguous();
  result.data = keep.const_data_ptr();
  result.is_float = keep.scalar_type() == at::kFloat;
  return result;
}

OptTensor checked_numbers(const OptTensor& seq_idx, const Tensor& x) {
  check(seq_idx, "seq_idx", {x.size(0), x.size(1)}, at::kInt, x.device());
  return contiguous(seq_idx);
}

auto* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

void launch(DType dtype, const Forward& p) {
  const auto run = [&](auto type) { return launch_forward<type.value>(p, current_stream()); };
  check_launch(by_dtype(dtype, run), p.both ? "bidirectional_conv1d" : "causal_conv1d");
}
void launch(DType dtype, const Backward& p) {
  const auto run = [&](auto type) { return launch_backward<type.value>(p, current_stream()); };
  check_launch(by_dtype(dtype, run),
               p.both ? "bidirectional_conv1d_backward" : "causal_conv1d_backward");
}

void check_input(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.is_cuda(), "x must be (b, l, d) on a CUDA device, got ",
                    x.sizes(), " on ", x.device());
  TORCH_CHECK_VALUE(x.size(1) <= kMaxLength, "x may have at most ", kMaxLength, " steps, got ",
                    x.size(1));
}

Tensor gradient_of(const Tensor& grad, const Tensor& x, const char* name) {
  check(grad, name, x.sizes(), x.scalar_type(), x.device());
  return with_unit_stride(grad);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_in, const Tensor& weight, const OptTensor& bias,
                                   const OptTensor& initial_state, std::string_view mode, bool silu,
                                   bool return_last_state, const OptTensor& seq_idx) {
  check_input(x_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const DType dtype = dtype_of(x_in, "x");
  const Tensor x = with_unit_stride(x_in);
  const Parameters own = parameters(weight, bias, x, mode);
  const int64_t width = weight.size(1);
  Tensor keep;
  Forward p;
  p.in = input(x, width, silu);
  const OptTensor numbers = checked_numbers(seq_idx, x);
  if (numbers.has_value()) p.seq_idx = numbers->const_data_ptr<int32_t>();
  p.taps[0] = own.taps;
  p.initial = state(initial_state, keep, x, width, "initial_state");
  Tensor out = Scratch::empty(x.sizes(), x.options());
  p.out[0] = out.mutable_data_ptr();
  const auto state_options =
      initial_state.has_value() ? x.options().dtype(initial_state->scalar_type()) : x.options();
  Tensor last_state = return_last_state
                          ? at::empty({x.size(0), x.size(2), width - 1}, state_options)
                          : at::empty({0}, state_options);
  if (return_last_state) {
    p.last_state = last_state.mutable_data_ptr();
    p.last_is_float = last_state.scalar_type() == at::kFloat;
  }
  launch(dtype, p);
  return {out, last_state};
}

void both_forward_into(const Tensor& x_in, const Tensor& weight_f, const OptTensor& bias_f,
                       const Tensor& weight_b, const OptTensor& bias_b, bool silu,
                       const Tensor& out_f, const Tensor& out_b) {
  check_input(x_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const DType dtype = dtype_of(x_in, "x");
  const Tensor x = with_unit_stride(x_in);
  const Parameters first = parameters(weight_f, bias_f, x, "causal");
  const Parameters second = parameters(weight_b, bias_b, x, "reverse");
  TORCH_CHECK_VALUE(weight_f.size(1) == weight_b.size(1), "weight_b must be as wide as weight_f (",
                    weight_f.size(1), "), got ", weight_b.size(1));
  Forward p;
  p.in = input(x, weight_f.size(1), silu);
  p.both = true;
  p.taps[0] = first.taps;
  p.taps[1] = second.taps;
  p.out[0] = out_f.mutable_data_ptr();
  p.out[1] = out_b.mutable_data_ptr();
  launch(dtype, p);
}

std::tuple<Tensor, Tensor> both_forward(const Tensor& x, const Tensor& weight_f,
                                        const OptTensor& bias_f, const Tensor& weight_b,
                                        const OptTensor& bias_b, bool silu) {
  Tensor out_f = at::empty(x.sizes(), x.options()), out_b = at::empty(x.sizes(), x.options());
  both_forward_into(x, weight_f, bias_f, weight_b, bias_b, silu, out_f, out_b);
  return {out_f, out_b};
}

// The gradients of one direction's taps, which the kernels fill.
struct OwnedTapGradients {
  Tensor weight, bias;

  OwnedTapGradients(const Tensor& w, const OptTensor& b)
      : weight(Scratch::empty(w.sizes(), w.options())),
        bias(b.has_value() ? Scratch::empty(b->sizes(), b->options())
                           : Scratch::empty({0}, w.options().dtype(at::kFloat))) {}

  TapGradients get() const {
    TapGradients g;
    g.weight = weight.mutable_data_ptr();
    g.weight_type = dtype_of(weight, "weight");
    if (bias.numel() > 0) g.bias = bias.mutable_data_ptr();
    g.bias_type = dtype_of(bias, "bias");
    return g;
  }
};

void run_backward(Backward& p, DType dtype, const Tensor& x) {
  p.slots = backward_slots(p.in, p.both, multiprocessor_count());
  Tensor partial = Scratch::empty({p.both ? 2 : 1, p.slots, p.in.width + 1, x.size(2)},
                                  x.options().dtype(at::kFloat));
  p.partial = partial.mutable_data_ptr<float>();
  launch(dtype, p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_into(
    const Tensor& grad_in, const OptTensor& grad_last_state, const Tensor& x_in,
    const Tensor& weight, const OptTensor& bias, const OptTensor& initial_state,
    std::string_view mode, bool silu, const Tensor& place, const OptTensor& seq_idx) {
  check_input(x_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const DType dtype = dtype_of(x_in, "x");
  const Tensor x = with_unit_stride(x_in);
  const Tensor grad = gradient_of(grad_in, x, "grad_out");
  const Parameters own = parameters(weight, bias, x, mode);
  const int64_t width = weight.size(1);
  Tensor keep_state, keep_grad;
  Backward p;
  p.in = input(x, width, silu);
  p.in.vectorized = p.in.vectorized && rows_are_aligned(grad);
  const OptTensor numbers = checked_numbers(seq_idx, x);
  if (numbers.has_value()) p.seq_idx = numbers->const_data_ptr<int32_t>();
  p.taps[0] = own.taps;
  p.initial = state(initial_state, keep_state, x, width, "initial_state");
  p.grad_last = state(grad_last_state, keep_grad, x, width, "grad_last_state");
  p.grad[0] = grad.const_data_ptr();
  p.grad_stride_b[0] = grad.stride(0);
  p.grad_stride_l[0] = grad.stride(1);
  const Tensor dx = place.defined() ? place : Scratch::empty(x.sizes(), x.options());
  p.dx = dx.mutable_data_ptr();
  p.dx_pitch = dx.stride(1);
  Tensor dinitial = Scratch::empty({0}, x.options().dtype(at::kFloat));
  if (initial_state.has_value()) {
    dinitial = at::empty(initial_state->sizes(), initial_state->options());
    p.dinitial = dinitial.mutable_data_ptr();
  }
  const OwnedTapGradients taps(weight, bias);
  p.dtaps[0] = taps.get();
  run_backward(p, dtype, x);
  return {dx, taps.weight, taps.bias, dinitial};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const OptTensor& grad_last_state, const Tensor& x, const Tensor& weight,
    const OptTensor& bias, const OptTensor& initial_state, std::string_view mode, bool silu,
    const OptTensor& seq_idx) {
  return backward_into(grad, grad_last_state, x, weight, bias, initial_state, mode, silu, {},
                       seq_idx);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> both_backward_into(
    const Tensor& grad_f, const Tensor& grad_b, const Tensor& x_in, const Tensor& weight_f,
    const OptTensor& bias_f, const Tensor& weight_b, const OptTensor& bias_b, bool silu,
    const Tensor& place) {
  check_input(x_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const DType dtype = dtype_of(x_in, "x");
  const Tensor x = with_unit_stride(x_in);
  const Tensor grads[2] = {gradient_of(grad_f, x, "grad_f"), gradient_of(grad_b, x, "grad_b")};
  const Parameters first = parameters(weight_f, bias_f, x, "causal");
  const Parameters second = parameters(weight_b, bias_b, x, "reverse");
  const int64_t width = weight_f.size(1);
  TORCH_CHECK_VALUE(width == weight_b.size(1), "weight_b must be as wide as weight_f (", width,
                    "), got ", weight_b.size(1));
  Backward p;
  p.in = input(x, width, silu);
  p.both = true;
  p.taps[0] = first.taps;
  p.taps[1] = second.taps;
  for (int i = 0; i < 2; ++i) {
    p.in.vectorized = p.in.vectorized && rows_are_aligned(grads[i]);
    p.grad[i] = grads[i].const_data_ptr();
    p.grad_stride_b[i] = grads[i].stride(0);
    p.grad_stride_l[i] = grads[i].stride(1);
  }
  const Tensor dx = place.defined() ? place : Scratch::empty(x.sizes(), x.options());
  p.dx = dx.mutable_data_ptr();
  p.dx_pitch = dx.stride(1);
  const OwnedTapGradients taps_f(weight_f, bias_f), taps_b(weight_b, bias_b);
  p.dtaps[0] = taps_f.get();
  p.dtaps[1] = taps_b.get();
  run_backward(p, dtype, x);
  return {dx, taps_f.weight, taps_f.bias, taps_b.weight, taps_b.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> both_backward(
    const Tensor& grad_f, const Tensor& grad_b, const Tensor& x, const Tensor& weight_f,
    const OptTensor& bias_f, const Tensor& weight_b, const OptTensor& bias_b, bool silu) {
  return both_backward_into(grad_f, grad_b, x, weight_f, bias_f, weight_b, bias_b, silu, {});
}

const bool known = [] {
  direct::enter<forward>(direct::cuda.conv);
  direct::enter<backward_into>(direct::cuda.conv_backward);
  direct::cuda.two_convs = both_forward_into;
  direct::cuda.two_convs_backward = both_backward_into;
  return true;
}();

}  // namespace

TORCH_LIBRARY_IMPL(mmvim, CUDA, m) {
  m.impl("causal_conv1d", forward);
  m.impl("causal_conv1d_backward", backward);
  m.impl("bidirectional_conv1d", both_forward);
  m.impl("bidirectional_conv1d_backward", both_backward);
}

}  // namespace conv
}  // namespace mmvim
