// Registers the CUDA kernels of selective_scan and bidirectional_scan: checks, allocation,
// dispatch.
#include "cuda.h"

#include <ATen/Context.h>
#include <torch/library.h>

#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "../common/cuda_glue.h"
#include "../common/direct.h"
#include "../common/scratch.h"

namespace mmvim {
namespace scan {
namespace {

constexpr int64_t kMaxTotalStates = 256;

// With neighbours in the last dimension, and steps of time within 32 bits.
Tensor with_rows(const Tensor& t) {
  const int64_t step = t.size(1) <= 1 ? 0 : t.stride(1);
  return step < INT32_MIN || step > INT32_MAX ? t.contiguous() : with_unit_stride(t);
}

const float* floats(const OptTensor& t) {
  return t.has_value() ? t->const_data_ptr<float>() : nullptr;
}
Tensor like_or_empty(const OptTensor& t, const Tensor& device_of) {
  if (t.has_value()) return Scratch::empty(t->sizes(), t->options());
  return Scratch::empty({0}, device_of.options().dtype(at::kFloat));
}

// Whether all rows of `t`, from its pointer `data`, start at multiples of `bytes`.
bool rows_start_at(const Tensor& t, const void* data, int bytes) {
  bool all = reinterpret_cast<uintptr_t>(data) % bytes == 0;
  for (int i = 0; i + 1 < t.dim(); ++i) {
    all = all && (t.size(i) <= 1 || t.stride(i) * t.element_size() % bytes == 0);
  }
  return all;
}

// Bytes of the vectors that all rows of `t` consist of, seen from multiples of `unit` channels.
int vector_of(const Tensor& t, int64_t unit) {
  for (const int bytes : {16, 8}) {
    if (rows_start_at(t, t.const_data_ptr(), bytes) &&
        (unit == t.size(2) || unit * t.element_size() % bytes == 0)) {
      return bytes;
    }
  }
  return 0;
}

// One direction's inputs, checked, and alive as long as the kernels are being launched.
struct Inputs {
  Tensor u, delta, A, B, C;
  OptTensor D, delta_bias;
  DType dtype;
  at::ScalarType type;

  Inputs(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_,
         const Tensor& C_, const OptTensor& D_, const OptTensor& delta_bias_) {
    TORCH_CHECK_VALUE(u_.dim() == 3, "u must be (b, l, d), got shape ", u_.sizes());
    dtype = dtype_of(u_, "u");
    type = u_.scalar_type();
    const int64_t b = u_.size(0), l = u_.size(1), d = u_.size(2);
    TORCH_CHECK_VALUE(l <= INT32_MAX && d <= INT32_MAX,
                      "u may have at most 2^31 - 1 steps and "
                      "channels, got shape ",
                      u_.sizes());
    TORCH_CHECK_VALUE(A_.dim() == 2 && A_.size(1) >= 1 && A_.size(1) <= kMaxTotalStates,
                      "A must be (d, n) with 1 <= n <= ", kMaxTotalStates, ", got shape ",
                      A_.sizes());
    const int64_t n = A_.size(1);
    TORCH_CHECK_VALUE(B_.dim() == 4 && B_.size(2) > 0 && d % B_.size(2) == 0,
                      "B must be (b, l, g, n) with g a divisor of ", d, ", got shape ", B_.sizes());
    const int64_t g = B_.size(2);
    check(delta_, "delta", u_.sizes(), type, u_.device());
    check(A_, "A", {d, n}, at::kFloat, u_.device());
    check(B_, "B", {b, l, g, n}, type, u_.device());
    check(C_, "C", {b, l, g, n}, type, u_.device());
    check(D_, "D", {d}, at::kFloat, u_.device());
    check(delta_bias_, "delta_bias", {d}, at::kFloat, u_.device());
    u = with_rows(u_);
    delta = with_rows(delta_);
    A = A_.contiguous();
    B = with_rows(B_);
    C = with_rows(C_);
    D = contiguous(D_);
    delta_bias = contiguous(delta_bias_);
  }

  int64_t states() const { return A.size(1); }
  bool empty() const { return u.numel() == 0; }

  // For the states from `first`.
  Scan scan(bool reverse, int64_t unit, int64_t first) const {
    Scan s;
    s.u = rows(u, unit);
    s.delta = rows(delta, unit);
    s.B = grouped(B, first);
    s.C = grouped(C, first);
    s.A = A.const_data_ptr<float>() + first;
    s.D = floats(D);
    s.delta_bias = floats(delta_bias);
    s.groups = static_cast<int>(B.size(2));
    s.reverse = reverse;
    return s;
  }

  static Rows rows(const Tensor& t, int64_t unit) {
    Rows r;
    r.data = t.const_data_ptr();
    r.stride_b = t.stride(0);
    r.stride_l = static_cast<int>(t.stride(1));
    r.vector = vector_of(t, unit);
    return r;
  }

 private:
  static Rows grouped(const Tensor& t, int64_t first) {
    Rows r;
    r.data = static_cast<const char*>(t.const_data_ptr()) + first * t.element_size();
    r.stride_b = t.stride(0);
    r.stride_l = static_cast<int>(t.stride(1));
    r.stride_g = t.stride(2);
    for (const int bytes : {16, 8, 4}) {
      if (r.vector == 0 && t.size(3) * t.element_size() % 4 == 0 &&
          rows_start_at(t, r.data, bytes)) {
        r.vector = bytes;
      }
    }
    return r;
  }
};

Sizes sizes_of(const Inputs& in, int64_t groups_of_other, bool softplus) {
  Sizes s;
  s.batch = in.u.size(0);
  s.length = static_cast<int>(in.u.size(1));
  s.channels = static_cast<int>(in.u.size(2));
  s.pitch = static_cast<int>(in.states());
  s.units = static_cast<int>(std::lcm(in.B.size(2), groups_of_other));
  s.softplus = softplus;
  return s;
}

std::vector<int64_t> checkpoint_sizes(const Sizes& s, int64_t interval) {
  TORCH_CHECK_VALUE(interval >= 0 && interval <= INT32_MAX,
                    "checkpoint_interval must be 0 to 2^31 - 1, got ", interval);
  if (interval == 0) return {0};
  const int64_t count = s.length == 0 ? 0 : (s.length - 1) / interval;
  return {s.batch, count, s.channels, s.pitch};
}

struct Launcher {
  const char* op;
  DType dtype;
  Discretization method;
  CUstream_st* stream = c10::cuda::getCurrentCUDAStream().stream();

  void operator()(const Plan& plan, const Forward& p) const {
    run([&](auto type) { return launch_forward<type.value>(method, plan, p, stream); });
  }
  void operator()(const Plan& plan, const Backward& p) const {
    run([&](auto type) { return launch_backward<type.value>(method, plan, p, stream); });
  }
  void operator()(const Finish& p) const {
    run([&](auto type) { return launch_finish<type.value>(p, stream); });
  }

 private:
  template <class F>
  void run(F&& launch) const {
    check_launch(by_dtype(dtype, launch), op);
  }
};

// Workspace of chunks.
struct ChunkMemory {
  Tensor state, decay, drive, drive_decay;

  // What only the launches before the last one read lies in `results`, two tensors that the last
  // one fills, if they are large enough.
  ChunkMemory(Chunks& chunks, const Plan& plan, const Sizes& s, int directions, bool drives,
              const Tensor& like, const Tensor* results[2]) {
    if (plan.chunks == 1) return;
    const int64_t size = s.batch * s.channels * s.pitch * plan.chunks * directions;
    const auto allocate = [&](Tensor& memory, const Tensor* result) {
      if (result != nullptr && static_cast<int64_t>(result->nbytes()) >= 4 * size) {
        return static_cast<float*>(result->mutable_data_ptr());
      }
      memory = Scratch::empty({size}, like.options().dtype(at::kFloat));
      return memory.mutable_data_ptr<float>();
    };
    chunks.state = allocate(state, nullptr);
    chunks.decay = allocate(decay, results[0]);
    if (!drives) return;
    chunks.drive = allocate(drive, nullptr);
    chunks.drive_decay = allocate(drive_decay, results[1]);
  }
};

// Everything that does not depend on the part of the states that a launch handles.
struct ForwardCall {
  const Inputs* in[2] = {};
  OptTensor seq_idx;
  int directions = 1;
  bool reverse = false;  // of a single direction
  bool softplus = false;
  OptTensor z, initial_state;
  double scale = 1.0;
  Tensor out, pregate, last_state;  // undefined: not wanted
  Tensor checkpoints[2];
  int64_t interval = 0;

  // A launch for each part of the states and, unless they are joint, each direction; outputs are
  // added in float32 from launch to launch, and the last one scales, gates and rounds.
  void run(const char* op, Discretization method) const {
    const Inputs& first = *in[0];
    const Tensor& like = first.u;
    const int64_t states = first.states();
    Forward p;
    p.size = sizes_of(first, in[directions - 1]->B.size(2), softplus);
    p.size.states = static_cast<int>(std::min<int64_t>(states, kMaxStates));
    const int64_t unit = p.size.channels / p.size.units;
    if (z.has_value()) p.z = Inputs::rows(*z, unit);
    p.scale = static_cast<float>(scale);
    p.interval = static_cast<int>(interval);
    if (seq_idx.has_value()) p.seq_idx = seq_idx->const_data_ptr<int32_t>();
    const Plan plan = plan_forward(p.size, directions, seq_idx.has_value(), multiprocessor_count());
    p.directions = plan.joint == Joint::kNo ? 1 : 2;
    const int64_t limit = kMaxStates;
    const Tensor* results[2] = {out.defined() ? &out : nullptr, nullptr};
    const ChunkMemory workspace(p.chunks, plan, p.size, p.directions, false, like, results);
    const auto scratch = [&] {
      return Scratch::empty(like.sizes(), like.options().dtype(at::kFloat));
    };
    const int64_t parts = (states + limit - 1) / limit;
    const int64_t flags =
        2 * p.size.batch * plan.chunks * blocks_per_group(p.size, 1, plan.channels);
    Tensor sum, meeting, left;
    if (parts > 1 || directions > p.directions) sum = scratch();
    if (p.directions == 2) {
      meeting = scratch();
      p.meeting = meeting.mutable_data_ptr<float>();
      left = Scratch::zeros({parts, flags}, like.options().dtype(at::kInt));
    }
    const Launcher launch{op, first.dtype, method};
    for (int first_direction = 0; first_direction < directions; first_direction += p.directions) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t n = part * limit;
        const bool last_part = part + 1 == parts;
        const bool last_launch = last_part && first_direction + p.directions == directions;
        p.size.states = static_cast<int>(std::min(states - n, limit));
        for (int i = 0; i < p.directions; ++i) {
          const int d = first_direction + i;
          p.scan[i] = in[d]->scan(directions == 2 ? d == 1 : reverse, unit, n);
          if (initial_state.has_value()) {
            const float* state = initial_state->const_data_ptr<float>();
            p.scan[i].initial = state + n;
            p.scan[i].initial_pitch = static_cast<int>(initial_state->size(2));
            if (initial_state->size(2) > states) p.scan[i].initial_drive = state + states + n;
          }
          p.checkpoints[i] = nullptr;
          if (checkpoints[d].defined() && checkpoints[d].numel() > 0) {
            p.checkpoints[i] = checkpoints[d].mutable_data_ptr<float>() + n;
          }
          // The skip connection counts once.
          if (!last_part) p.scan[i].D = nullptr;
        }
        if (last_state.defined()) {
          float* state = last_state.mutable_data_ptr<float>();
          p.last[0] = state + n;
          p.last_pitch = static_cast<int>(last_state.size(2));
          p.last_drive[0] = last_state.size(2) > states ? state + states + n : nullptr;
        }
        if (p.directions == 2) p.left = left.mutable_data_ptr<int>() + part * flags;
        p.sum_in = first_direction == 0 && part == 0 ? nullptr : sum.const_data_ptr<float>();
        p.sum_out = last_launch ? nullptr : sum.mutable_data_ptr<float>();
        p.out = last_launch && out.defined() ? out.mutable_data_ptr() : nullptr;
        p.pregate = last_launch && pregate.defined() ? pregate.mutable_data_ptr() : nullptr;
        launch(plan, p);
      }
    }
  }
};

int64_t state_parts(Discretization method) { return is_two_tap(method) ? 2 : 1; }

OptTensor checked_initial(const OptTensor& state, const Sizes& s, Discretization method,
                          const Tensor& like) {
  if (!state.has_value()) return {};
  const bool with_drive =
      state_parts(method) == 2 && state->dim() == 3 && state->size(2) == 2 * s.pitch;
  check(*state, "initial_state", {s.batch, s.channels, (with_drive ? 2 : 1) * s.pitch}, at::kFloat,
        like.device());
  return state->contiguous();
}

OptTensor checked_gate(const OptTensor& z, const Inputs& in) {
  check(z, "z", in.u.sizes(), in.type, in.u.device());
  return z.has_value() ? OptTensor(with_rows(*z)) : OptTensor();
}

OptTensor checked_numbers(const OptTensor& seq_idx, const Inputs& in) {
  check(seq_idx, "seq_idx", {in.u.size(0), in.u.size(1)}, at::kInt, in.u.device());
  return contiguous(seq_idx);
}

// The state when there is nothing to scan.
void continue_state(Tensor& last, const OptTensor& initial) {
  last.zero_();
  if (initial.has_value()) last.narrow(2, 0, initial->size(2)).copy_(*initial);
}

// What a backward pass will need outlives the call.
Tensor kept(at::IntArrayRef sizes, const at::TensorOptions& options, int64_t interval) {
  return interval > 0 ? at::empty(sizes, options) : Scratch::empty(sizes, options);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& u, const Tensor& delta, const Tensor& A,
                                           const Tensor& B, const Tensor& C, const OptTensor& D,
                                           const OptTensor& z, const OptTensor& delta_bias,
                                           const OptTensor& initial_state, bool delta_softplus,
                                           std::string_view discretization, bool reverse,
                                           bool return_last_state, int64_t checkpoint_interval,
                                           const OptTensor& seq_idx) {
  const c10::cuda::CUDAGuard guard(u.device());
  const Inputs in(u, delta, A, B, C, D, delta_bias);
  const Discretization method = method_of(discretization);
  const Sizes s = sizes_of(in, 1, delta_softplus);
  ForwardCall call;
  call.in[0] = &in;
  call.reverse = reverse;
  call.softplus = delta_softplus;
  call.z = checked_gate(z, in);
  call.initial_state = checked_initial(initial_state, s, method, u);
  call.seq_idx = checked_numbers(seq_idx, in);
  call.interval = checkpoint_interval;
  const auto parameters = u.options().dtype(at::kFloat);
  call.out = kept(u.sizes(), u.options(), checkpoint_interval);
  call.checkpoints[0] =
      kept(checkpoint_sizes(s, checkpoint_interval), parameters, checkpoint_interval);
  if (return_last_state) {
    call.last_state = at::empty({s.batch, s.channels, state_parts(method) * s.pitch}, parameters);
  }
  Tensor last_state = return_last_state ? call.last_state : Scratch::empty({0}, parameters);
  if (!in.empty()) {
    call.run("selective_scan", method);
  } else if (return_last_state) {
    continue_state(last_state, call.initial_state);
  }
  return {call.out, last_state, call.checkpoints[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bidirectional_forward(
    const Tensor& u_f, const Tensor& delta_f, const Tensor& A_f, const Tensor& B_f,
    const Tensor& C_f, const OptTensor& D_f, const OptTensor& delta_bias_f, const Tensor& u_b,
    const Tensor& delta_b, const Tensor& A_b, const Tensor& B_b, const Tensor& C_b,
    const OptTensor& D_b, const OptTensor& delta_bias_b, const OptTensor& z, double scale,
    bool delta_softplus, std::string_view discretization, int64_t checkpoint_interval,
    const OptTensor& seq_idx) {
  const c10::cuda::CUDAGuard guard(u_f.device());
  const Inputs f(u_f, delta_f, A_f, B_f, C_f, D_f, delta_bias_f);
  const Inputs b(u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b);
  check(u_b, "u_b", u_f.sizes(), f.type, u_f.device());
  check(A_b, "A_b", A_f.sizes(), at::kFloat, u_f.device());
  const Discretization method = method_of(discretization);
  const Sizes s = sizes_of(f, b.B.size(2), delta_softplus);
  ForwardCall call;
  call.in[0] = &f;
  call.in[1] = &b;
  call.directions = 2;
  call.softplus = delta_softplus;
  call.seq_idx = checked_numbers(seq_idx, f);
  call.z = checked_gate(z, f);
  call.scale = scale;
  call.interval = checkpoint_interval;
  call.out = Scratch::empty(u_f.sizes(), u_f.options());
  Tensor pregate = kept({0}, u_f.options(), checkpoint_interval);
  if (z.has_value() && checkpoint_interval > 0) {
    call.pregate = pregate = at::empty(u_f.sizes(), u_f.options());
  }
  for (Tensor& t : call.checkpoints) {
    t = kept(checkpoint_sizes(s, checkpoint_interval), u_f.options().dtype(at::kFloat),
             checkpoint_interval);
  }
  if (!f.empty()) call.run("bidirectional_scan", method);
  return {call.out, pregate, call.checkpoints[0], call.checkpoints[1]};
}

Tensor at_or_empty(const Tensor& place, const Tensor& like) {
  return place.defined() ? place : Scratch::empty(like.sizes(), like.options());
}

// Gradients of one direction.
struct Gradients {
  Tensor u, delta, A, B, C, D, delta_bias;

  Gradients(const Inputs& in, const direct::ScanPlaces& places)
      : u(at_or_empty(places.u, in.u)),
        delta(at_or_empty(places.delta, in.u)),
        A(Scratch::empty(in.A.sizes(), in.A.options())),
        B(at_or_empty(places.B, in.B)),
        C(at_or_empty(places.C, in.C)),
        D(like_or_empty(in.D, in.A)),
        delta_bias(like_or_empty(in.delta_bias, in.A)) {}

  void zero() {
    for (Tensor* t : {&u, &delta, &A, &B, &C, &D, &delta_bias}) t->zero_();
  }
};

struct BackwardCall {
  const Inputs* in[2] = {};
  OptTensor seq_idx;
  Gradients* grads[2] = {};
  int directions = 1;
  bool reverse = false;
  bool softplus = false;
  Tensor grad_out;
  OptTensor z, initial_state, grad_last;
  double scale = 1.0;
  Tensor dz, dinitial, pregate;  // undefined: not there
  Tensor zeros;                  // for sums; undefined: to be made
  Tensor checkpoints[2];
  int64_t interval = 0;

  // Runs forward again for what was not kept, or not at the distance that the kernels need.
  void complete(const char* op, Discretization method, const Sizes& s) {
    const bool needs_checkpoints = interval != kInterval && s.length > kInterval;
    const bool needs_pregate = directions == 2 && z.has_value() && !pregate.defined();
    if (!needs_checkpoints && !needs_pregate) return;
    ForwardCall call;
    for (int d = 0; d < directions; ++d) {
      call.in[d] = in[d];
      if (!needs_checkpoints) continue;
      checkpoints[d] = Scratch::empty(checkpoint_sizes(s, kInterval), in[d]->A.options());
      call.checkpoints[d] = checkpoints[d];
    }
    call.directions = directions;
    call.reverse = reverse;
    call.softplus = softplus;
    call.initial_state = initial_state;
    call.interval = kInterval;
    call.seq_idx = seq_idx;
    if (needs_pregate)
      call.pregate = pregate = Scratch::empty(in[0]->u.sizes(), in[0]->u.options());
    call.run(op, method);
  }

  void run(const char* op, Discretization method) {
    const Inputs& first = *in[0];
    const Tensor& like = first.u;
    const auto parameters = like.options().dtype(at::kFloat);
    Backward p;
    p.size = sizes_of(first, in[directions - 1]->B.size(2), softplus);
    complete(op, method, p.size);
    p.directions = directions;
    const int64_t unit = p.size.channels / p.size.units;
    p.grad_out = Inputs::rows(grad_out, unit);
    if (z.has_value()) p.z = Inputs::rows(*z, unit);
    if (pregate.defined()) p.pregate = Inputs::rows(pregate, unit);
    p.scale = static_cast<float>(scale);
    if (dz.defined()) {
      p.dz = dz.mutable_data_ptr();
      p.dz_pitch = static_cast<int>(dz.stride(1));
    }
    const int64_t states = first.states();
    const int64_t limit = kMaxStates;
    p.size.states = static_cast<int>(std::min(states, limit));
    const bool plain = method == Discretization::kZoh && !z.has_value();
    if (seq_idx.has_value()) p.seq_idx = seq_idx->const_data_ptr<int32_t>();
    const Plan plan =
        plan_backward(p.size, directions, plain, seq_idx.has_value(), multiprocessor_count());
    const Tensor* results[2] = {&grads[0]->u, &grads[0]->delta};
    const ChunkMemory workspace(p.chunks, plan, p.size, directions, is_two_tap(method), like,
                                results);

    // Partial sums, and the sums over the parts of the states.
    const bool deterministic = at::globalContext().deterministicAlgorithms();
    const int64_t rows = p.size.batch * plan.chunks;
    Finish finish;
    finish.size = p.size;
    finish.directions = directions;
    finish.rows = rows;
    // Of groups, too, whose rows follow each other.
    const Tensor& dB = grads[0]->B;
    finish.out_pitch = static_cast<int>(dB.stride(dB.size(2) == 1 ? 1 : 2));
    Tensor dBC[2], cleared, dA[2], dD[2], sums[2];
    for (int d = 0; d < directions; ++d) {
      const Tensor& B = in[d]->B;
      const int groups = static_cast<int>(B.size(2));
      const int blocks = blocks_per_group(p.size, groups, plan.channels);
      p.atomic[d] = !deterministic && blocks > 1;
      finish.groups[d] = groups;
      finish.parts[d] = p.atomic[d] ? 1 : blocks;
      const int64_t sizes[] = {finish.parts[d], B.size(0), B.size(1), groups, 2, states};
      if (!p.atomic[d]) {
        dBC[d] = Scratch::empty(sizes, parameters);
      } else if (d == 1 && dBC[0].sizes() == at::IntArrayRef(sizes)) {
        dBC[1] = cleared.select(0, 1);
      } else {
        // For both directions at once, as they most often have equal sizes.
        cleared = zeros;
        if (!cleared.defined()) {
          cleared = at::zeros({directions, sizes[0], sizes[1], sizes[2], sizes[3], 2, states},
                              parameters);
        }
        dBC[d] = cleared.select(0, 0);
      }
      // A block's part of dA takes the place of the gradient that entered its chunk.
      dA[d] = workspace.state.defined() && states <= limit
                  ? workspace.state.view({directions, rows, p.size.channels, states})[d]
                  : Scratch::empty({rows, p.size.channels, states}, parameters);
      dD[d] = Scratch::empty({rows, 2, p.size.channels}, parameters);
      if (states > limit) {
        sums[d] = Scratch::empty({3, like.size(0), like.size(1), like.size(2)}, parameters);
      }
      p.du[d] = grads[d]->u.mutable_data_ptr();
      p.ddelta[d] = grads[d]->delta.mutable_data_ptr();
      p.dD[d] = dD[d].mutable_data_ptr<float>();
      finish.dBC[d] = dBC[d].const_data_ptr<float>();
      finish.dA[d] = dA[d].const_data_ptr<float>();
      finish.dD[d] = dD[d].const_data_ptr<float>();
      finish.out_dB[d] = grads[d]->B.mutable_data_ptr();
      finish.out_dC[d] = grads[d]->C.mutable_data_ptr();
      finish.out_dA[d] = grads[d]->A.mutable_data_ptr<float>();
      if (in[d]->D.has_value()) finish.out_dD[d] = grads[d]->D.mutable_data_ptr<float>();
      if (in[d]->delta_bias.has_value()) {
        finish.out_ddelta_bias[d] = grads[d]->delta_bias.mutable_data_ptr<float>();
      }
    }

    const Launcher launch{op, first.dtype, method};
    for (int64_t n = 0; n < states; n += limit) {
      const bool last_part = n + limit >= states;
      p.size.states = static_cast<int>(std::min(states - n, limit));
      for (int d = 0; d < directions; ++d) {
        p.scan[d] = in[d]->scan(directions == 2 ? d == 1 : reverse, unit, n);
        if (checkpoints[d].defined() && checkpoints[d].numel() > 0) {
          p.checkpoints[d] = checkpoints[d].const_data_ptr<float>() + n;
        }
        if (initial_state.has_value()) {
          const float* state = initial_state->const_data_ptr<float>();
          const bool with_drive = initial_state->size(2) > states;
          p.scan[d].initial = state + n;
          p.scan[d].initial_pitch = static_cast<int>(initial_state->size(2));
          p.dinitial[d] = dinitial.mutable_data_ptr<float>() + n;
          p.dinitial_pitch = p.scan[d].initial_pitch;
          if (with_drive) {
            p.scan[d].initial_drive = state + states + n;
            p.dinitial_drive[d] = dinitial.mutable_data_ptr<float>() + states + n;
          }
        }
        if (grad_last.has_value()) {
          const float* state = grad_last->const_data_ptr<float>();
          p.grad_last[d] = state + n;
          p.grad_last_pitch = static_cast<int>(grad_last->size(2));
          if (grad_last->size(2) > states) p.grad_last_drive[d] = state + states + n;
        }
        p.dBC[d] = dBC[d].mutable_data_ptr<float>() + n;
        p.dA[d] = dA[d].mutable_data_ptr<float>() + n;
        p.sum_in[d] = n == 0 ? nullptr : sums[d].const_data_ptr<float>();
        p.sum_out[d] = last_part ? nullptr : sums[d].mutable_data_ptr<float>();
      }
      launch(plan, p);
    }
    launch(finish);
  }
};

Tensor checked_gradient(const Tensor& grad, const Inputs& in) {
  check(grad, "grad_out", in.u.sizes(), in.type, in.u.device());
  return with_rows(grad);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_into(
    const Tensor& grad_out, const OptTensor& grad_last_state, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const OptTensor& D, const OptTensor& z,
    const OptTensor& delta_bias, const OptTensor& initial_state, const Tensor& checkpoints,
    bool delta_softplus, std::string_view discretization, bool reverse, int64_t checkpoint_interval,
    const direct::ScanPlaces& places, const OptTensor& seq_idx) {
  const c10::cuda::CUDAGuard guard(u.device());
  const Inputs in(u, delta, A, B, C, D, delta_bias);
  const Discretization method = method_of(discretization);
  const Sizes s = sizes_of(in, 1, delta_softplus);
  check(checkpoints, "checkpoints", checkpoint_sizes(s, checkpoint_interval), at::kFloat,
        u.device());
  check(grad_last_state, "grad_last_state", {s.batch, s.channels, state_parts(method) * s.pitch},
        at::kFloat, u.device());
  Gradients grads(in, places);
  BackwardCall call;
  call.in[0] = &in;
  call.grads[0] = &grads;
  call.reverse = reverse;
  call.softplus = delta_softplus;
  call.grad_out = checked_gradient(grad_out, in);
  call.z = checked_gate(z, in);
  call.initial_state = checked_initial(initial_state, s, method, u);
  call.grad_last = contiguous(grad_last_state);
  call.seq_idx = checked_numbers(seq_idx, in);
  call.checkpoints[0] = checkpoints.contiguous();
  call.interval = checkpoint_interval;
  const Tensor dz = z.has_value() ? at_or_empty(places.z, *z) : like_or_empty({}, u);
  if (z.has_value()) call.dz = dz;
  call.zeros = places.sums;
  const Tensor dinitial = like_or_empty(call.initial_state, u);
  call.dinitial = dinitial;
  if (!in.empty()) {
    call.run("selective_scan_backward", method);
  } else {
    grads.zero();
    dinitial.zero_();
    if (initial_state.has_value() && grad_last_state.has_value()) {
      dinitial.copy_(grad_last_state->narrow(2, 0, dinitial.size(2)));
    }
  }
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
  const c10::cuda::CUDAGuard guard(u_f.device());
  const Inputs f(u_f, delta_f, A_f, B_f, C_f, D_f, delta_bias_f);
  const Inputs b(u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b);
  check(u_b, "u_b", u_f.sizes(), f.type, u_f.device());
  check(A_b, "A_b", A_f.sizes(), at::kFloat, u_f.device());
  const Discretization method = method_of(discretization);
  const Sizes s = sizes_of(f, b.B.size(2), delta_softplus);
  Gradients grads_f(f, places[0]), grads_b(b, places[1]);
  BackwardCall call;
  call.in[0] = &f;
  call.in[1] = &b;
  call.grads[0] = &grads_f;
  call.grads[1] = &grads_b;
  call.directions = 2;
  call.softplus = delta_softplus;
  call.grad_out = checked_gradient(grad_out, f);
  call.seq_idx = checked_numbers(seq_idx, f);
  call.z = checked_gate(z, f);
  call.scale = scale;
  call.interval = checkpoint_interval;
  const Tensor* saved[2] = {&checkpoints_f, &checkpoints_b};
  for (int d = 0; d < 2; ++d) {
    check(*saved[d], d == 0 ? "checkpoints_f" : "checkpoints_b",
          checkpoint_sizes(s, checkpoint_interval), at::kFloat, u_f.device());
    call.checkpoints[d] = saved[d]->contiguous();
  }
  const Tensor dz = z.has_value() ? at_or_empty(places[0].z, *z) : like_or_empty({}, u_f);
  call.zeros = places[0].sums;
  if (z.has_value()) {
    call.dz = dz;
    if (pregate.dim() == 3) {
      check(pregate, "pregate", u_f.sizes(), f.type, u_f.device());
      call.pregate = with_rows(pregate);
    }
  }
  if (!f.empty()) {
    call.run("bidirectional_scan_backward", method);
  } else {
    grads_f.zero();
    grads_b.zero();
  }
  const Gradients &gf = grads_f, &gb = grads_b;
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
  direct::enter<forward>(direct::cuda.scan);
  direct::enter<backward_into>(direct::cuda.scan_backward);
  direct::enter<bidirectional_forward>(direct::cuda.two_scans);
  direct::enter<bidirectional_backward_into>(direct::cuda.two_scans_backward);
  return true;
}();

}  // namespace

#ifndef MMVIM_CUDA_KEY
#define MMVIM_CUDA_KEY CUDA
#endif
TORCH_LIBRARY_IMPL(mmvim, MMVIM_CUDA_KEY, m) {
  m.impl("selective_scan", forward);
  m.impl("selective_scan_backward", backward);
  m.impl("bidirectional_scan", bidirectional_forward);
  m.impl("bidirectional_scan_backward", bidirectional_backward);
}

}  // namespace scan
}  // namespace mmvim
