// Registers the CUDA kernels of cross_scan: checks, allocation, how maps are cut, and the products
// that lead from step sizes back to their low rank.
#include "cuda.h"

#include <ATen/ops/as_strided.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>

#include "../common/cuda_glue.h"
#include "checks.h"

namespace mmvim {
namespace cross {
namespace {

// What the kernels are made and tested for.
constexpr int64_t kMaxStates = 4;
constexpr int64_t kMaxRank = 128;

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What a block may have of the shared memory of a multiprocessor, and what is not asked for on GPUs
// that were not found out.
int64_t shared_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return std::max(bytes, 48 * 1024);
}

const float* floats(const OptTensor& t) {
  return t.has_value() ? t->const_data_ptr<float>() : nullptr;
}

// At a multiple of four elements.
Tensor with_fours(const Tensor& t) {
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return address % (4 * t.element_size()) == 0 ? t : t.clone();
}

// One step from position to position, and neighbours in the last dimension.
Tensor with_positions(const Tensor& t) {
  const bool small = std::abs(t.stride(2)) <= INT32_MAX && std::abs(t.stride(3)) <= INT32_MAX;
  const bool unit = t.size(4) <= 1 || t.stride(4) == 1;
  return has_positions(t) && small && unit ? t : t.contiguous();
}

// Whether rows of `count` elements are made of pairs of 16 bits at multiples of 4 bytes.
bool has_words(const Tensor& t) {
  bool even = t.element_size() == 2 && t.size(-1) % 2 == 0 &&
              reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 4 == 0;
  for (int i = 0; i + 1 < t.dim(); ++i) even = even && (t.size(i) <= 1 || t.stride(i) % 2 == 0);
  return even;
}

Columns columns(const Tensor& t) {
  Columns c;
  c.data = t.const_data_ptr();
  c.stride_b = t.stride(0);
  c.stride = static_cast<int>(step_of(t));
  c.stride_k = static_cast<int>(t.stride(3));
  c.words = has_words(t);
  return c;
}

// The inputs, checked, and alive as long as the kernels are being launched.
struct Inputs {
  Tensor x, delta, A, B, C;
  OptTensor weight, D, delta_bias;
  DType dtype;
  Discretization method;
  Problem problem;

  Inputs(const Tensor& x_, const Tensor& delta_, const OptTensor& weight_, const Tensor& A_,
         const Tensor& B_, const Tensor& C_, const OptTensor& D_, const OptTensor& delta_bias_,
         at::IntArrayRef routes, bool softplus, std::string_view discretization,
         int64_t round_steps)
      : dtype(dtype_of(x_, "x")), method(method_of(discretization)) {
    const auto [b, h, w, d, k, n, rank] =
        check_inputs(x_, delta_, weight_, A_, B_, C_, D_, delta_bias_, routes);
    TORCH_CHECK_VALUE(k <= kMaxRoutes, "the CUDA kernels take up to ", kMaxRoutes, " routes, got ",
                      k);
    TORCH_CHECK_VALUE(h * w * d <= INT32_MAX, "a map may have at most 2^31 - 1 values, got ",
                      x_.sizes());
    TORCH_CHECK_VALUE(!is_two_tap(method), "no CUDA kernel for discretization ", discretization);
    TORCH_CHECK_VALUE(n <= kMaxStates, "A: the CUDA kernels take up to ", kMaxStates,
                      " states, got ", n);
    TORCH_CHECK_VALUE(rank <= kMaxRank, "delta_weight: the CUDA kernels take ranks up to ",
                      kMaxRank, ", got ", rank);
    x = x_.contiguous();
    delta = with_positions(delta_);
    A = A_.contiguous();
    B = with_positions(B_);
    C = with_positions(C_);
    weight = contiguous(weight_);
    D = contiguous(D_);
    delta_bias = contiguous(delta_bias_);

    Problem& p = problem;
    p.batch = b;
    p.height = static_cast<int>(h);
    p.width = static_cast<int>(w);
    p.length = static_cast<int>(h * w);
    p.channels = static_cast<int>(d);
    p.states = static_cast<int>(n);
    p.rank = static_cast<int>(rank);
    p.routes = static_cast<int>(k);
    for (int64_t i = 0; i < k; ++i) {
      p.route[i] = static_cast<uint8_t>(routes[i]);
    }
    p.softplus = softplus;
    p.x = x.const_data_ptr();
    p.delta = columns(delta);
    p.B = columns(B);
    p.C = columns(C);
    if (weight.has_value()) {
      p.weight = weight->const_data_ptr();
      p.weight_is_float = weight->scalar_type() == at::kFloat;
    }
    p.A = A.const_data_ptr<float>();
    p.D = floats(D);
    p.delta_bias = floats(delta_bias);
    p.pairs = d % 2 == 0 && reinterpret_cast<uintptr_t>(p.x) % 8 == 0;
    // The kernels of one state read the columns of Δ, B and C as pairs of 16 bits, and four
    // channels at a time.
    p.element = static_cast<int>(x.element_size());
    p.one = method == Discretization::kZoh && n == 1 && softplus && rank > 0 && d % 4 == 0 &&
            (rank % 2 == 0 || dtype == DType::kFloat);
    if (p.one && !empty()) {
      x = with_fours(x);
      p.x = x.const_data_ptr();
      if (!are_joined() || !starts_with_words(delta)) {
        delta = at::cat({delta, B, C}, -1);
        p.delta = columns(delta);
      }
      set_division(h, p.magic_height, p.shift_height);
      set_division(w, p.magic_width, p.shift_width);
      p.slots = static_cast<int>((p.length + (h - 1) / 4 + 2) / 2 * 2);
    }
    // Rounds of equal length, the same in both passes.
    const int64_t most = round_steps / kWarpSteps;
    TORCH_CHECK_VALUE(
        round_steps % kWarpSteps == 0 && most >= 1 && most <= (p.one ? kMaxWarps : kMaxWarpsOfMany),
        "round_steps must be a multiple of ", kWarpSteps, " up to ",
        (p.one ? kMaxWarps : kMaxWarpsOfMany) * kWarpSteps, ", got ", round_steps);
    const int64_t warps = (p.length + kWarpSteps - 1) / kWarpSteps;
    p.rounds = static_cast<int>((warps + most - 1) / most);
    p.warps = static_cast<int>((warps + p.rounds - 1) / std::max(p.rounds, 1));
  }

  // Whether delta, B and C are the columns of one buffer.
  bool are_joined() const {
    const auto follows = [](const Tensor& a, const Tensor& b) {
      bool so = static_cast<const char*>(a.const_data_ptr()) + a.size(4) * a.element_size() ==
                b.const_data_ptr();
      for (int i = 0; i < 4; ++i) so = so && (a.size(i) <= 1 || a.stride(i) == b.stride(i));
      return so;
    };
    return follows(delta, B) && follows(B, C);
  }
  static bool starts_with_words(const Tensor& t) {
    bool so = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 4 == 0;
    for (int i = 0; i < 4; ++i) {
      so = so && (t.size(i) <= 1 || t.stride(i) * t.element_size() % 4 == 0);
    }
    return so;
  }
  // t / divisor is t * magic >> shift for 0 <= t < 2^31.
  static void set_division(int64_t divisor, uint32_t& magic, int& shift) {
    int bits = 0;
    while ((int64_t{1} << bits) < divisor) ++bits;
    shift = 31 + bits;
    magic = static_cast<uint32_t>((uint64_t{1} << shift) / divisor + 1);
  }

  bool empty() const { return x.numel() == 0; }
  int64_t groups() const { return (problem.channels + kGroup - 1) / kGroup; }
  std::vector<int64_t> checkpoint_sizes() const {
    const Problem& p = problem;
    return {p.routes, p.batch, std::max(p.rounds - 1, 0), p.channels, p.states};
  }
  Tensor new_floats(at::IntArrayRef sizes) const {
    return at::empty(sizes, x.options().dtype(at::kFloat));
  }

  // Where the sums lie, and how many blocks share a route.
  void plan(bool backward) {
    Problem& p = problem;
    p.chunks = 1;
    p.chunk_rounds = p.rounds;
    p.whole = true;
    p.first_route = 0;
    p.last_route = p.routes;
    const int64_t limit = shared_limit();
    const int64_t blocks = p.batch * groups();
    const int64_t wanted = 2 * multiprocessor_count();
    // A route for a launch pays only where a block for all of them would leave the GPU idle.
    const bool idle = p.rounds > 1 && blocks * 8 <= wanted;
    if (shared_bytes(p, backward) <= limit && !idle) return;
    p.whole = false;
    p.chunks = static_cast<int>(
        std::min<int64_t>(p.rounds, std::max<int64_t>(1, (wanted + blocks - 1) / blocks)));
    p.chunk_rounds = (p.rounds + p.chunks - 1) / p.chunks;
    p.chunks = (p.rounds + p.chunk_rounds - 1) / p.chunk_rounds;
    const int64_t needed = shared_bytes(p, backward);
    TORCH_CHECK_VALUE(needed <= limit, "round_steps: rounds of ", p.warps * kWarpSteps,
                      " steps take ", needed, " bytes of shared memory, this GPU has ", limit);
  }

  // Workspace of a plan.
  std::tuple<Tensor, Tensor> memory() {
    Problem& p = problem;
    Tensor local, sum;
    if (p.chunks > 1) {
      local = new_floats({2, p.routes, p.chunks, p.batch, p.channels, p.states});
      p.local = local.mutable_data_ptr<float>();
    }
    if (!p.whole && p.routes > 1) {
      sum = new_floats({p.batch, p.length, p.channels});
      p.sum = sum.mutable_data_ptr<float>();
    }
    return {local, sum};
  }
};

auto* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// All launches of a pass.
template <class Pass>
void run(const Inputs& in, Pass& p, const char* name) {
  Problem& q = p.problem;
  q.first_route = 0;
  q.last_route = q.routes;
  check_launch(by_dtype(in.dtype,
                        [&](auto type) {
                          int error = 0;
                          if (q.chunks > 1) {
                            error = launch_local<type.value>(in.method, p, current_stream());
                          }
                          const int step = q.whole ? q.routes : 1;
                          for (int k = 0; k < q.routes && error == 0; k += step) {
                            q.first_route = k;
                            q.last_route = k + step;
                            if constexpr (std::is_same_v<Pass, Forward>) {
                              error = launch_forward<type.value>(in.method, p, current_stream());
                            } else {
                              error = launch_backward<type.value>(in.method, p, current_stream());
                            }
                          }
                          return error;
                        }),
               name);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& delta,
                                   const OptTensor& delta_weight, const Tensor& A, const Tensor& B,
                                   const Tensor& C, const OptTensor& D, const OptTensor& delta_bias,
                                   at::IntArrayRef routes, bool delta_softplus,
                                   std::string_view discretization, int64_t round_steps,
                                   bool keep_checkpoints) {
  const c10::cuda::CUDAGuard guard(x.device());
  Inputs in(x, delta, delta_weight, A, B, C, D, delta_bias, routes, delta_softplus, discretization,
            round_steps);
  Tensor out = at::empty(x.sizes(), x.options());
  Tensor checkpoints = keep_checkpoints ? in.new_floats(in.checkpoint_sizes()) : in.new_floats({0});
  if (in.empty()) return {out, checkpoints};
  in.plan(false);
  const auto memory = in.memory();
  Forward p;
  p.problem = in.problem;
  p.out = out.mutable_data_ptr();
  if (checkpoints.numel() > 0) p.checkpoints = checkpoints.mutable_data_ptr<float>();
  run(in, p, "cross_scan");
  return {out, checkpoints};
}

// The rows of a (b, h, w, k, r) tensor as a matrix of which column k * stride(3) + r counts:
// without a copy where the memory between the columns is the tensor's own or a neighbour's.
Tensor as_matrix(const Tensor& t, int64_t tokens) {
  const int64_t step = step_of(t), k = t.size(3), apart = t.stride(3), r = t.size(4);
  const bool joined = (t.size(0) <= 1 || t.stride(0) == t.size(1) * t.size(2) * step) && k > 1 &&
                      apart >= r && step >= (k - 1) * apart + r;
  if (!joined) return t.reshape({tokens, k * r});
  const int64_t end = t.storage_offset() + (tokens - 1) * step + k * apart;
  const bool all =
      step >= k * apart && end * t.element_size() <= static_cast<int64_t>(t.storage().nbytes());
  return at::as_strided(t, {tokens, all ? k * apart : (k - 1) * apart + r}, {step, 1});
}

Gradients backward(const Tensor& grad_out, const Tensor& x, const Tensor& delta,
                   const OptTensor& delta_weight, const Tensor& A, const Tensor& B, const Tensor& C,
                   const OptTensor& D, const OptTensor& delta_bias, const Tensor& checkpoints_in,
                   at::IntArrayRef routes, bool delta_softplus, std::string_view discretization,
                   int64_t round_steps) {
  const c10::cuda::CUDAGuard guard(x.device());
  Inputs in(x, delta, delta_weight, A, B, C, D, delta_bias, routes, delta_softplus, discretization,
            round_steps);
  check(grad_out, "grad_out", x.sizes(), x.scalar_type(), x.device());
  const auto fresh = [&](const OptTensor& t) {
    return t.has_value() ? at::empty(t->sizes(), t->options()) : in.new_floats({0});
  };
  const auto zeros = [&](const OptTensor& t) {
    return t.has_value() ? at::zeros_like(*t, at::MemoryFormat::Contiguous) : in.new_floats({0});
  };
  if (in.empty()) {
    return {zeros(x), zeros(delta), zeros(delta_weight), zeros(A), zeros(B),
            zeros(C), zeros(D),     zeros(delta_bias)};
  }
  check(checkpoints_in, "checkpoints", in.checkpoint_sizes(), at::kFloat, x.device());
  const Tensor checkpoints = checkpoints_in.contiguous();
  const Tensor grad = with_fours(grad_out.contiguous());
  in.plan(true);
  const auto memory = in.memory();
  Backward p;
  p.problem = in.problem;
  const Problem& q = p.problem;
  const int64_t tokens = q.batch * q.length, d = q.channels, k = q.routes, n = q.states;

  Tensor dx = fresh(x), dA = fresh(A), dB = fresh(B), dC = fresh(C), dD = fresh(D),
         dbias = fresh(delta_bias), dweight = fresh(delta_weight), ddelta = fresh(delta);
  Tensor steps = q.rank > 0 ? at::empty({tokens, k * d}, x.options()) : ddelta;
  p.grad_out = grad.const_data_ptr();
  p.checkpoints = checkpoints.const_data_ptr<float>();
  p.dx = dx.mutable_data_ptr();
  p.ddelta = steps.mutable_data_ptr();

  Finish f;
  f.parts = in.groups();
  f.slots = q.batch * q.chunks;
  f.rows = tokens * k;
  f.states = q.states;
  f.routes = q.routes;
  f.channels = q.channels;
  f.dB = dB.mutable_data_ptr();
  f.dC = dC.mutable_data_ptr();
  f.dA = dA.mutable_data_ptr<float>();
  if (D.has_value()) f.dD = dD.mutable_data_ptr<float>();
  if (delta_bias.has_value()) f.ddelta_bias = dbias.mutable_data_ptr<float>();
  Tensor dBC = in.new_floats({f.parts, f.rows * 2 * n});
  Tensor parameters = in.new_floats({f.slots, k * d * (n + 1) + d});
  p.dBC = dBC.mutable_data_ptr<float>();
  p.parameters = parameters.mutable_data_ptr<float>();
  f.dBC = p.dBC;
  f.parameters = p.parameters;
  run(in, p, "cross_scan_backward");
  const auto finish = [&](auto type) { return launch_finish<type.value>(f, current_stream()); };
  check_launch(by_dtype(in.dtype, finish), "cross_scan_backward");

  if (q.rank > 0) {
    const int64_t r = q.rank;
    Tensor expanded = at::empty({k * d, k * r}, x.options());
    Expand e{q.weight, q.weight_is_float,          q.routes, q.channels,
             q.rank,   expanded.mutable_data_ptr()};
    const auto expand = [&](auto type) { return launch_expand<type.value>(e, current_stream()); };
    check_launch(by_dtype(in.dtype, expand), "cross_scan_backward");
    Tensor flat = ddelta.view({tokens, k * r});
    at::mm_out(flat, steps, expanded);
    // Of the product of all routes with all others, the blocks on the diagonal.
    const Tensor low = as_matrix(in.delta.narrow(4, 0, r), tokens);
    const Tensor products = at::mm(steps.t(), low);
    const int64_t width = low.size(1), apart = width == k * r ? r : in.delta.stride(3);
    dweight.copy_(at::as_strided(products, {k, d, r}, {d * width + apart, width, 1}));
  }
  return {dx, ddelta, dweight, dA, dB, dC, dD, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmvim, CUDA, m) {
  m.impl("cross_scan_fused", forward);
  m.impl("cross_scan_fused_backward", backward);
}

}  // namespace cross
}  // namespace mmvim
