// Registers cross_scan on the CPU: routes are directions of the selective scan's kernels, which add
// the outputs.
#include <torch/library.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "../common/cpu_glue.h"
#include "../selective_scan/cpu_kernels.h"
#include "checks.h"

namespace mmvim {
namespace cross {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor with_positions(const Tensor& t) { return has_positions(t) ? t : t.contiguous(); }

View map_view(const Tensor& t, int64_t last) {
  View v;
  v.data = t.const_data_ptr();
  v.dtype = dtype_of(t.scalar_type(), "tensor");
  v.stride_b = t.stride(0);
  v.stride_l = step_of(t);
  v.stride_d = t.stride(last);
  return v;
}
// Of a (b, h, w, k, ...) tensor the part of route `k`.
View route_view(const Tensor& t, int64_t k) {
  View v = map_view(t, 4);
  v.data = static_cast<const char*>(v.data) + k * t.stride(3) * t.element_size();
  return v;
}
Output route_output(const Tensor& t, int64_t k) {
  const int64_t columns = t.size(4);
  Output o;
  o.data = static_cast<char*>(t.mutable_data_ptr()) + k * columns * t.element_size();
  o.dtype = dtype_of(t.scalar_type(), "output");
  o.length = t.size(1) * t.size(2);
  o.pitch = t.size(3) * columns;
  return o;
}
Output map_output(const Tensor& t) {
  Output o;
  o.data = t.mutable_data_ptr();
  o.dtype = dtype_of(t.scalar_type(), "output");
  o.length = t.size(1) * t.size(2);
  o.pitch = t.size(3);
  return o;
}

// Of a contiguous (k, ...) tensor the part of route `k`; null where it is absent.

void* part(const Tensor& t, int64_t k) {
  return static_cast<char*>(t.data_ptr()) + k * t.stride(0) * t.element_size();
}
const void* part(const OptTensor& t, int64_t k) { return t.has_value() ? part(*t, k) : nullptr; }

// The inputs, checked, and alive as long as the kernels run.
struct Inputs {
  Sizes sizes;
  at::ScalarType compute;
  Tensor x, delta, A, B, C;
  OptTensor weight, D, delta_bias;
  ScanShape shape;
  std::vector<int64_t> routes;
  int64_t interval;

  Inputs(const Tensor& x_, const Tensor& delta_, const OptTensor& weight_, const Tensor& A_,
         const Tensor& B_, const Tensor& C_, const OptTensor& D_, const OptTensor& delta_bias_,
         at::IntArrayRef routes_, bool softplus, std::string_view discretization,
         int64_t round_steps)
      : sizes(check_inputs(x_, delta_, weight_, A_, B_, C_, D_, delta_bias_, routes_)),
        compute(compute_type(x_.scalar_type())),
        x(with_positions(x_)),
        delta(with_positions(delta_)),
        A(A_.contiguous()),
        B(with_positions(B_)),
        C(with_positions(C_)),
        D(contiguous(D_)),
        delta_bias(contiguous(delta_bias_)),
        routes(routes_.vec()),
        interval(round_steps) {
    TORCH_CHECK_VALUE(interval > 0, "round_steps must be positive, got ", interval);
    if (weight_.has_value()) weight = weight_->to(compute).contiguous();
    shape.batch = sizes.b;
    shape.length = sizes.length();
    shape.channels = sizes.d;
    shape.states = sizes.n;
    shape.method = method_of(discretization);
    shape.delta_softplus = softplus;
  }

  std::vector<int64_t> checkpoint_sizes() const {
    const int64_t count = (shape.length + interval - 1) / interval - 1;
    return {sizes.k, sizes.b, count < 0 ? 0 : count, sizes.d, sizes.n};
  }

  std::vector<ScanInputs> directions(const Tensor& checkpoints) const {
    std::vector<ScanInputs> all(sizes.k);
    for (int64_t k = 0; k < sizes.k; ++k) {
      ScanInputs& in = all[k];
      in.u = map_view(x, 3);
      in.delta = route_view(delta, k);
      in.B.view = route_view(B, k);
      in.C.view = route_view(C, k);
      in.A = part(A, k);
      in.D = part(D, k);
      in.delta_bias = part(delta_bias, k);
      in.delta_weight = part(weight, k);
      in.rank = sizes.rank;
      in.reverse = routes[k] & 2;
      in.column = routes[k] & 1 ? sizes.h : 0;
      if (checkpoints.numel() > 0) in.checkpoints = part(checkpoints, k);
    }
    return all;
  }

  bool is_double() const { return compute == at::kDouble; }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& delta,
                                   const OptTensor& delta_weight, const Tensor& A, const Tensor& B,
                                   const Tensor& C, const OptTensor& D, const OptTensor& delta_bias,
                                   at::IntArrayRef routes, bool delta_softplus,
                                   std::string_view discretization, int64_t round_steps,
                                   bool keep_checkpoints) {
  const Inputs in(x, delta, delta_weight, A, B, C, D, delta_bias, routes, delta_softplus,
                  discretization, round_steps);
  Tensor out = empty_like(x);
  const Tensor checkpoints =
      keep_checkpoints ? empty(in.checkpoint_sizes(), in.compute) : empty({0}, in.compute);
  const auto inputs = in.directions(checkpoints);
  ScanForwardArgs a;
  a.shape = in.shape;
  a.directions = static_cast<int>(inputs.size());
  a.inputs = inputs.data();
  a.checkpoint_interval = checkpoints.numel() > 0 ? in.interval : 0;
  a.out = map_output(out);
  MMVIM_PER_ISA(scan_forward)(a, in.is_double());
  return {out, checkpoints};
}

Gradients backward(const Tensor& grad_out, const Tensor& x, const Tensor& delta,
                   const OptTensor& delta_weight, const Tensor& A, const Tensor& B, const Tensor& C,
                   const OptTensor& D, const OptTensor& delta_bias, const Tensor& checkpoints,
                   at::IntArrayRef routes, bool delta_softplus, std::string_view discretization,
                   int64_t round_steps) {
  const Inputs in(x, delta, delta_weight, A, B, C, D, delta_bias, routes, delta_softplus,
                  discretization, round_steps);
  check(grad_out, "grad_out", x.sizes(), x.scalar_type(), at::kCPU);
  check(checkpoints, "checkpoints", in.checkpoint_sizes(), in.compute, at::kCPU);
  const Tensor grad = with_positions(grad_out), kept = checkpoints.contiguous();
  Tensor dx = empty_like(x), ddelta = empty_like(delta), dA = empty_like(A), dB = empty_like(B),
         dC = empty_like(C), dD = empty_like(in.D, in.compute),
         dbias = empty_like(in.delta_bias, in.compute), dweight = empty_like(in.weight, in.compute);
  // Of no channels there is no sum.
  for (Tensor* t : {&ddelta, &dB, &dC}) {
    if (in.sizes.d == 0) t->zero_();
  }
  const auto inputs = in.directions(kept);
  std::vector<ScanGradients> gradients(inputs.size());
  for (int64_t k = 0; k < in.sizes.k; ++k) {
    ScanGradients& g = gradients[k];
    g.delta = route_output(ddelta, k);
    g.B = route_output(dB, k);
    g.C = route_output(dC, k);
    g.A = part(dA, k);
    if (in.D.has_value()) g.D = part(dD, k);
    if (in.delta_bias.has_value()) g.delta_bias = part(dbias, k);
    if (in.weight.has_value()) g.delta_weight = part(dweight, k);
  }
  ScanBackwardArgs a;
  a.shape = in.shape;
  a.directions = static_cast<int>(inputs.size());
  a.inputs = inputs.data();
  a.gradients = gradients.data();
  a.checkpoint_interval = in.interval;
  a.grad_out = map_view(grad, 3);
  a.du = map_output(dx);
  MMVIM_PER_ISA(scan_backward)(a, in.is_double());
  if (delta_weight.has_value()) dweight = dweight.to(delta_weight->scalar_type());
  return {dx, ddelta, dweight, dA, dB, dC, dD, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmvim, CPU, m) {
  m.impl("cross_scan_fused", forward);
  m.impl("cross_scan_fused_backward", backward);
}

}  // namespace cross
}  // namespace mmvim
