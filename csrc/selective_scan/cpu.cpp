// Registers the CPU kernels of selective_scan and bidirectional_scan: checks, allocation, dispatch.
#include <torch/library.h>

#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../common/cpu_glue.h"
#include "../common/direct.h"
#include "cpu_kernels.h"

namespace mmvim {
namespace scan {
namespace {

constexpr int64_t kMaxStates = 256;
// Distance of the checkpoints that a backward pass makes for itself if none were saved.
constexpr int64_t kOwnInterval = 64;

// One direction's inputs, checked, and alive as long as the kernels run.
struct Inputs {
  const Tensor &u, &delta, &B, &C;
  Tensor A;
  OptTensor D, delta_bias;
  at::ScalarType type, compute;

  Inputs(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_,
         const Tensor& C_, const OptTensor& D_, const OptTensor& delta_bias_)
      : u(u_), delta(delta_), B(B_), C(C_), A(A_) {
    TORCH_CHECK_VALUE(u.dim() == 3, "u must be (b, l, d), got shape ", u.sizes());
    type = u.scalar_type();
    dtype_of(type, "u");
    compute = compute_type(type);
    const int64_t b = u.size(0), l = u.size(1), d = u.size(2);
    check(u, "u", u.sizes(), type, at::kCPU);
    check(delta, "delta", u.sizes(), type, at::kCPU);
    TORCH_CHECK_VALUE(A.dim() == 2 && A.size(1) <= kMaxStates,
                      "A must be (d, n) with n <= ", kMaxStates, ", got shape ", A.sizes());
    const int64_t n = A.size(1);
    check(A, "A", {d, n}, compute, at::kCPU);
    TORCH_CHECK_VALUE(B.dim() == 4 && B.size(2) > 0 && d % B.size(2) == 0,
                      "B must be (b, l, g, n) with g a divisor of ", d, ", got shape ", B.sizes());
    const int64_t g = B.size(2);
    check(B, "B", {b, l, g, n}, type, at::kCPU);
    check(C, "C", {b, l, g, n}, type, at::kCPU);
    check(D_, "D", {d}, compute, at::kCPU);
    check(delta_bias_, "delta_bias", {d}, compute, at::kCPU);
    A = A.contiguous();
    D = contiguous(D_);
    delta_bias = contiguous(delta_bias_);
  }

  ScanShape shape(std::string_view method, bool delta_softplus) const {
    ScanShape s;
    s.batch = u.size(0);
    s.length = u.size(1);
    s.channels = u.size(2);
    s.states = A.size(1);
    s.groups = B.size(2);
    s.method = method_of(method);
    s.delta_softplus = delta_softplus;
    return s;
  }

  ScanInputs arguments(bool reverse, const Tensor& checkpoints = {}) const {
    ScanInputs in;
    in.u = view(u);
    in.delta = view(delta);
    in.B = grouped(B);
    in.C = grouped(C);
    in.groups = B.size(2);
    in.A = A.const_data_ptr();
    in.D = data(D);
    in.delta_bias = data(delta_bias);
    in.reverse = reverse;
    if (checkpoints.defined()) in.checkpoints = checkpoints.data_ptr();
    return in;
  }

  bool is_double() const { return compute == at::kDouble; }

 private:
  static GroupedView grouped(const Tensor& t) {
    GroupedView g;
    g.view = view(t);
    g.view.stride_d = t.stride(3);
    g.stride_g = t.stride(2);
    return g;
  }
};

std::vector<int64_t> checkpoint_sizes(const ScanShape& s, int64_t interval) {
  TORCH_CHECK_VALUE(interval >= 0, "checkpoint_interval must not be negative, got ", interval);
  if (interval == 0) return {0};
  const int64_t count = (s.length + interval - 1) / interval - 1;
  return {s.batch, count < 0 ? 0 : count, s.channels, s.states};
}

std::vector<int64_t> state_sizes(const ScanShape& s, int64_t parts) {
  return {s.batch, s.channels, parts * s.states};
}

// The numbers of the sequences, checked and contiguous.
OptTensor numbers_of(const OptTensor& seq_idx, const Inputs& in) {
  check(seq_idx, "seq_idx", {in.u.size(0), in.u.size(1)}, at::kInt, at::kCPU);
  return contiguous(seq_idx);
}
const int32_t* integers(const OptTensor& t) {
  return t.has_value() ? t->const_data_ptr<int32_t>() : nullptr;
}

struct InitialState {
  OptTensor state;
  int64_t parts = 0;

  InitialState(const OptTensor& given, const ScanShape& s, at::ScalarType compute) {
    if (!given.has_value()) return;
    parts = s.state_parts() == 2 && given->dim() == 3 && given->size(2) == 2 * s.states ? 2 : 1;
    check(*given, "initial_state", state_sizes(s, parts), compute, at::kCPU);
    state = given->contiguous();
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& u, const Tensor& delta, const Tensor& A,
                                           const Tensor& B, const Tensor& C, const OptTensor& D,
                                           const OptTensor& z, const OptTensor& delta_bias,
                                           const OptTensor& initial_state, bool delta_softplus,
                                           std::string_view discretization, bool reverse,
                                           bool return_last_state, int64_t checkpoint_interval,
                                           const OptTensor& seq_idx) {
  const Inputs in(u, delta, A, B, C, D, delta_bias);
  check(z, "z", u.sizes(), in.type, at::kCPU);
  const OptTensor numbers = numbers_of(seq_idx, in);
  ScanForwardArgs a;
  a.shape = in.shape(discretization, delta_softplus);
  a.shape.seq_idx = integers(numbers);
  const InitialState initial(initial_state, a.shape, in.compute);
  a.initial_state = data(initial.state);
  a.initial_parts = initial.parts;
  a.checkpoint_interval = checkpoint_interval;
  a.z = view(z);
  Tensor out = empty_like(u);
  Tensor checkpoints = empty(checkpoint_sizes(a.shape, checkpoint_interval), in.compute);
  Tensor last_state = empty({0}, in.compute);
  if (return_last_state) {
    last_state = empty(state_sizes(a.shape, a.shape.state_parts()), in.compute);
    a.last_state = last_state.mutable_data_ptr();
  }
  a.out = output(out);
  const ScanInputs inputs = in.arguments(reverse, checkpoints);
  a.inputs = &inputs;
  MMVIM_PER_ISA(scan_forward)(a, in.is_double());
  return {out, last_state, checkpoints};
}

Tensor at_or_empty(const Tensor& place, const Tensor& like) {
  return place.defined() ? place : empty_like(like);
}

// Gradients of one direction.
struct Gradients {
  Tensor u, delta, A, B, C, D, delta_bias;

  Gradients(const Inputs& in, const direct::ScanPlaces& places)
      : u(at_or_empty(places.u, in.u)),
        delta(at_or_empty(places.delta, in.delta)),
        A(empty_like(in.A)),
        B(at_or_empty(places.B, in.B)),
        C(at_or_empty(places.C, in.C)),
        D(empty_like(in.D, in.compute)),
        delta_bias(empty_like(in.delta_bias, in.compute)) {
    if (in.u.size(2) == 0) {
      B.zero_();
      C.zero_();
    }
  }

  ScanGradients outputs(const Inputs& in) const {
    ScanGradients g;
    g.delta = output(delta);
    g.A = A.mutable_data_ptr();
    g.B = output(B);
    g.C = output(C);
    g.D = data_if(in.D, D);
    g.delta_bias = data_if(in.delta_bias, delta_bias);
    return g;
  }
};

// Runs backward from the checkpoints that were saved, or new ones.
void run_backward(ScanBackwardArgs& a, const Tensor& saved, int64_t interval, const Inputs& in,
                  bool reverse, const Gradients& grads) {
  check(saved, "checkpoints", checkpoint_sizes(a.shape, interval), in.compute, at::kCPU);
  a.checkpoint_interval = interval > 0 ? interval : kOwnInterval;
  const Tensor checkpoints = interval > 0
                                 ? saved.contiguous()
                                 : empty(checkpoint_sizes(a.shape, kOwnInterval), in.compute);
  const ScanInputs inputs = in.arguments(reverse, checkpoints);
  if (interval == 0) {
    ScanForwardArgs f;
    f.shape = a.shape;
    f.inputs = &inputs;
    f.initial_state = a.initial_state;
    f.initial_parts = a.initial_parts;
    f.checkpoint_interval = kOwnInterval;
    MMVIM_PER_ISA(scan_forward)(f, in.is_double());
  }
  const ScanGradients gradients = grads.outputs(in);
  a.inputs = &inputs;
  a.gradients = &gradients;
  a.du = output(grads.u);
  MMVIM_PER_ISA(scan_backward)(a, in.is_double());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_into(
    const Tensor& grad_out, const OptTensor& grad_last_state, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const OptTensor& D, const OptTensor& z,
    const OptTensor& delta_bias, const OptTensor& initial_state, const Tensor& checkpoints,
    bool delta_softplus, std::string_view discretization, bool reverse, int64_t checkpoint_interval,
    const direct::ScanPlaces& places, const OptTensor& seq_idx) {
  const Inputs in(u, delta, A, B, C, D, delta_bias);
  check(z, "z", u.sizes(), in.type, at::kCPU);
  check(grad_out, "grad_out", u.sizes(), in.type, at::kCPU);
  const OptTensor numbers = numbers_of(seq_idx, in);
  ScanBackwardArgs a;
  a.shape = in.shape(discretization, delta_softplus);
  a.shape.seq_idx = integers(numbers);
  const InitialState initial(initial_state, a.shape, in.compute);
  check(grad_last_state, "grad_last_state", state_sizes(a.shape, a.shape.state_parts()), in.compute,
        at::kCPU);
  const OptTensor grad_last = contiguous(grad_last_state);
  a.initial_state = data(initial.state);
  a.initial_parts = initial.parts;
  a.grad_out = view(grad_out);
  a.grad_last_state = data(grad_last);
  a.z = view(z);
  const Gradients grads(in, places);
  Tensor dz = z.has_value() ? at_or_empty(places.z, *z) : empty({0}, in.compute);
  if (z.has_value()) a.dz = output(dz);
  Tensor dinitial = empty_like(initial_state, in.compute);
  a.dinitial_state = data_if(initial_state, dinitial);
  run_backward(a, checkpoints, checkpoint_interval, in, reverse, grads);
  return {grads.u, grads.delta, grads.A, grads.B, grads.C, grads.D, dz, grads.delta_bias, dinitial};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const OptTensor& grad_last_state, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const OptTensor& D, const OptTensor& z,
    const OptTensor& delta_bias, const OptTensor& initial_state, const Tensor& checkpoints,
    bool delta_softplus, std::string_view discretization, bool reverse, int64_t checkpoint_interval,
    const OptTensor& seq_idx) {
  return backward_into(grad_out, grad_last_state, u, delta, A, B, C, D, z, delta_bias,
                       initial_state, checkpoints, delta_softplus, discretization, reverse,
                       checkpoint_interval, {}, seq_idx);
}

void check_pair(const Inputs& f, const Inputs& b) {
  TORCH_CHECK_VALUE(b.u.sizes() == f.u.sizes() && b.type == f.type && b.A.sizes() == f.A.sizes(),
                    "both directions must have the same shapes and dtypes, got u ", f.u.sizes(),
                    " ", f.type, " and ", b.u.sizes(), " ", b.type, ", A ", f.A.sizes(), " and ",
                    b.A.sizes());
}

ScanForwardArgs pair_arguments(const Inputs& f, const Inputs& b, std::string_view discretization,
                               bool delta_softplus) {
  check_pair(f, b);
  ScanForwardArgs a;
  a.shape = f.shape(discretization, delta_softplus);
  a.shape.groups = std::lcm(f.B.size(2), b.B.size(2));
  a.directions = 2;
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bidirectional_forward(
    const Tensor& u_f, const Tensor& delta_f, const Tensor& A_f, const Tensor& B_f,
    const Tensor& C_f, const OptTensor& D_f, const OptTensor& delta_bias_f, const Tensor& u_b,
    const Tensor& delta_b, const Tensor& A_b, const Tensor& B_b, const Tensor& C_b,
    const OptTensor& D_b, const OptTensor& delta_bias_b, const OptTensor& z, double scale,
    bool delta_softplus, std::string_view discretization, int64_t checkpoint_interval,
    const OptTensor& seq_idx) {
  const Inputs f(u_f, delta_f, A_f, B_f, C_f, D_f, delta_bias_f);
  const Inputs b(u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b);
  check(z, "z", u_f.sizes(), f.type, at::kCPU);
  const OptTensor numbers = numbers_of(seq_idx, f);
  ScanForwardArgs a = pair_arguments(f, b, discretization, delta_softplus);
  a.shape.seq_idx = integers(numbers);
  a.z = view(z);
  a.scale = scale;
  a.checkpoint_interval = checkpoint_interval;
  Tensor out = empty_like(u_f);
  Tensor pregate = empty({0}, f.type);
  a.out = output(out);
  if (z.has_value() && checkpoint_interval > 0) {
    pregate = empty_like(u_f);
    a.pregate = output(pregate);
  }
  const auto sizes = checkpoint_sizes(a.shape, checkpoint_interval);
  Tensor checkpoints_f = empty(sizes, f.compute), checkpoints_b = empty(sizes, f.compute);
  const ScanInputs inputs[] = {f.arguments(false, checkpoints_f), b.arguments(true, checkpoints_b)};
  a.inputs = inputs;
  MMVIM_PER_ISA(scan_forward)(a, f.is_double());
  return {out, pregate, checkpoints_f, checkpoints_b};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor, Tensor, Tensor>
bidirectional_backward_into(const Tensor& grad_out, const Tensor& u_f, const Tensor& delta_f,
                            const Tensor& A_f, const Tensor& B_f, const Tensor& C_f,
                            const OptTensor& D_f, const OptTensor& delta_bias_f, const Tensor& u_b,
                            const Tensor& delta_b, const Tensor& A_b, const Tensor& B_b,
                            const Tensor& C_b, const OptTensor& D_b, const OptTensor& delta_bias_b,
                            const OptTensor& z, const Tensor& pregate, const Tensor& checkpoints_f,
                            const Tensor& checkpoints_b, double scale, bool delta_softplus,
                            std::string_view discretization, int64_t checkpoint_interval,
                            const direct::ScanPlaces (&places)[2], const OptTensor& seq_idx) {
  const Inputs f(u_f, delta_f, A_f, B_f, C_f, D_f, delta_bias_f);
  const Inputs b(u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b);
  const OptTensor numbers = numbers_of(seq_idx, f);
  check(z, "z", u_f.sizes(), f.type, at::kCPU);
  check(grad_out, "grad_out", u_f.sizes(), f.type, at::kCPU);
  Tensor dz = z.has_value() ? at_or_empty(places[0].z, *z) : empty({0}, f.compute);
  Tensor saved[2] = {checkpoints_f, checkpoints_b};
  int64_t interval = checkpoint_interval;
  if (z.has_value()) {
    Tensor sum = pregate;
    if (interval == 0) {
      // Nothing was kept: run forward again, for the ungated sum and the checkpoints.
      check(pregate, "pregate", {0}, f.type, at::kCPU);
      for (const Tensor& t : saved) check(t, "checkpoints", {0}, f.compute, at::kCPU);
      interval = kOwnInterval;
      ScanForwardArgs again = pair_arguments(f, b, discretization, delta_softplus);
      again.shape.seq_idx = integers(numbers);
      again.checkpoint_interval = interval;
      sum = empty(u_f.sizes(), f.compute);
      again.out = output(sum);
      for (Tensor& t : saved) t = empty(checkpoint_sizes(again.shape, interval), f.compute);
      const ScanInputs inputs[] = {f.arguments(false, saved[0]), b.arguments(true, saved[1])};
      again.inputs = inputs;
      MMVIM_PER_ISA(scan_forward)(again, f.is_double());
    } else {
      check(pregate, "pregate", u_f.sizes(), f.type, at::kCPU);
    }
    GateBackwardArgs gate;
    gate.batch = u_f.size(0);
    gate.length = u_f.size(1);
    gate.channels = u_f.size(2);
    gate.grad_out = view(grad_out);
    gate.pregate = view(sum);
    gate.z = view(z);
    gate.scale = scale;
    gate.dz = output(dz);
    MMVIM_PER_ISA(gate_backward)(gate, f.is_double());
  }
  const auto direction = [&](const Inputs& in, const Tensor& checkpoints, bool reverse) {
    ScanBackwardArgs a;
    a.shape = in.shape(discretization, delta_softplus);
    a.shape.seq_idx = integers(numbers);
    a.grad_out = view(grad_out);
    a.z = view(z);
    a.scale = scale;
    Gradients grads(in, places[reverse]);
    run_backward(a, checkpoints, interval, in, reverse, grads);
    return grads;
  };
  check_pair(f, b);
  const Gradients gf = direction(f, saved[0], false), gb = direction(b, saved[1], true);
  return {gf.u, gf.delta, gf.A, gf.B, gf.C,          gf.D, gf.delta_bias, gb.u, gb.delta,
          gb.A, gb.B,     gb.C, gb.D, gb.delta_bias, dz};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor, Tensor, Tensor>
bidirectional_backward(const Tensor& grad_out, const Tensor& u_f, const Tensor& delta_f,
                       const Tensor& A_f, const Tensor& B_f, const Tensor& C_f,
                       const OptTensor& D_f, const OptTensor& delta_bias_f, const Tensor& u_b,
                       const Tensor& delta_b, const Tensor& A_b, const Tensor& B_b,
                       const Tensor& C_b, const OptTensor& D_b, const OptTensor& delta_bias_b,
                       const OptTensor& z, const Tensor& pregate, const Tensor& checkpoints_f,
                       const Tensor& checkpoints_b, double scale, bool delta_softplus,
                       std::string_view discretization, int64_t checkpoint_interval,
                       const OptTensor& seq_idx) {
  return bidirectional_backward_into(grad_out, u_f, delta_f, A_f, B_f, C_f, D_f, delta_bias_f, u_b,
                                     delta_b, A_b, B_b, C_b, D_b, delta_bias_b, z, pregate,
                                     checkpoints_f, checkpoints_b, scale, delta_softplus,
                                     discretization, checkpoint_interval, {}, seq_idx);
}

const bool known = [] {
  direct::enter<forward>(direct::cpu.scan);
  direct::enter<backward_into>(direct::cpu.scan_backward);
  direct::enter<bidirectional_forward>(direct::cpu.two_scans);
  direct::enter<bidirectional_backward_into>(direct::cpu.two_scans_backward);
  return true;
}();

}  // namespace

TORCH_LIBRARY_IMPL(mmvim, CPU, m) {
  m.impl("selective_scan", forward);
  m.impl("selective_scan_backward", backward);
  m.impl("bidirectional_scan", bidirectional_forward);
  m.impl("bidirectional_scan_backward", bidirectional_backward);
}

}  // namespace scan
}  // namespace mmvim
