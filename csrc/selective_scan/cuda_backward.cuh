// Backward scan.
//
// A block walks its channels' length against the scan, in tiles that start at a checkpoint. For
// each tile it runs the states forward once, keeping those at which its groups of kGroup steps
// start; then, group by group from the last, it runs the states forward again into registers and
// the gradient of the state backward. Sums over states (the gradients of u and delta, the ungated
// output) go through shared memory; sums over channels (the gradients of B and C) through the
// tensor cores, where a warp adds 32 values of its 32 lanes in 16 instructions, and then to global
// memory: one addition per block.
#pragma once

#include "cuda_common.cuh"

namespace mmvim {
namespace scan {

constexpr int kBackwardTile = kInterval;
template <int kCpt>
constexpr int kBackwardRegisters = kCpt == 2 ? 168 : 128;
constexpr int kGroup = 4;
constexpr int kBatch = 4;                            // rows of inputs that a thread loads at once
constexpr int kStarts = kBackwardTile / kGroup - 2;  // the first and the last group need none
constexpr int kParts = 3;  // sums over states: for u, for delta, of the output

// Offsets into shared memory, in bytes.
struct BackwardShared {
  int deltas, inputs, grads, gates, columns, starts, parts, parameters, total;

  MMVIM_HD BackwardShared(int slices, int channels) {
    const int rows = kBackwardTile * channels * 4;
    deltas = 0;
    inputs = deltas + rows;
    grads = inputs + rows;
    gates = grads + rows;
    columns = gates + rows;
    starts = columns + slices * kBackwardTile * 2 * kSlice * 4;
    parts = starts + slices * kStarts * channels * kSlice * 4;
    parameters = parts + slices * kParts * kGroup * channels * 4;
    total = parameters + 2 * channels * 4;
  }
};

// How values become the 19-bit ones that the tensor cores multiply: cut off, which suits results in
// bfloat16; to the nearest; or as a sum of two.
enum class Rounding { kCut, kNearest, kTwo };

template <class T>
constexpr Rounding kRoundingFor = Rounding::kCut;
template <>
constexpr Rounding kRoundingFor<__half> = Rounding::kNearest;
template <>
constexpr Rounding kRoundingFor<float> = Rounding::kTwo;

// Adds 32 values over the lanes of a warp: of kGroup steps kSlice values for B and as many for C.
template <Rounding kRounding>
class ChannelSum {
 public:
  MMVIM_DEVICE explicit ChannelSum(int lane) : row_(lane / 4), quarter_(lane % 4) {
#if MMVIM_MATRIX_ADDER
    MMVIM_UNROLL
    for (int i = 0; i < 8; ++i) one_[i] = gpu::bits(row_ == i ? 1.f : 0.f);
#endif
    clear();
  }

  MMVIM_DEVICE void clear() {
#if MMVIM_MATRIX_ADDER
    MMVIM_UNROLL
    for (int i = 0; i < 8; ++i) sum_[i / 4][i % 4] = 0.f;
#endif
  }

  // `step` is a constant after unrolling.
  MMVIM_DEVICE void add(int step, const float (&for_B)[kSlice], const float (&for_C)[kSlice]) {
#if MMVIM_MATRIX_ADDER
    // Product i of a sum puts the four lanes' totals of its values into columns 2i and 2i + 1.
    float (&sum)[4] = sum_[step / 2];
    MMVIM_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = step % 2 * 2 + half;
      const float value[4] = {for_B[2 * half], for_C[2 * half], for_B[2 * half + 1],
                              for_C[2 * half + 1]};
      uint32_t x[4];
      MMVIM_UNROLL
      for (int j = 0; j < 4; ++j) x[j] = round(value[j]);
      gpu::multiply_16x8x8(sum, x[0], x[1], x[2], x[3], one_[2 * i], one_[2 * i + 1]);
      if (kRounding == Rounding::kTwo) {
        uint32_t rest[4];
        MMVIM_UNROLL
        for (int j = 0; j < 4; ++j) rest[j] = gpu::bits(value[j] - gpu::from_bits(x[j]));
        gpu::multiply_16x8x8(sum, rest[0], rest[1], rest[2], rest[3], one_[2 * i], one_[2 * i + 1]);
      }
    }
#else
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) {
      values_[step * 2 * kSlice + j] = for_B[j];
      values_[(step * 2 + 1) * kSlice + j] = for_C[j];
    }
#endif
  }

  // The lane's total: that of step(), state() and, if is_C(), C.
  MMVIM_DEVICE float get() const {
#if MMVIM_MATRIX_ADDER
    // Over the rows of eight lanes each, halving the values that a lane is left with.
    float a[4], b[2];
    MMVIM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const bool upper = row_ & 4;
      a[i] = (upper ? sum_[1][i] : sum_[0][i]) +
             gpu::exchange_xor(upper ? sum_[0][i] : sum_[1][i], 16);
    }
    MMVIM_UNROLL
    for (int i = 0; i < 2; ++i) {
      const bool upper = row_ & 2;
      b[i] = (upper ? a[2 + i] : a[i]) + gpu::exchange_xor(upper ? a[i] : a[2 + i], 8);
    }
    const bool upper = row_ & 1;
    return (upper ? b[1] : b[0]) + gpu::exchange_xor(upper ? b[0] : b[1], 4);
#else
    float mine = 0.f;
    MMVIM_UNROLL
    for (int i = 0; i < 32; ++i) {
      float x = values_[i];
      MMVIM_UNROLL
      for (int m = 16; m > 0; m /= 2) x += gpu::exchange_xor(x, m);
      if (i == (step() * 2 + is_C()) * kSlice + state()) mine = x;
    }
    return mine;
#endif
  }
  MMVIM_DEVICE int step() const { return row_ / 4 * 2 + quarter_ / 2; }
  MMVIM_DEVICE int state() const { return quarter_ % 2 * 2 + row_ % 2; }
  MMVIM_DEVICE bool is_C() const { return row_ / 2 % 2 == 1; }

 private:
  static MMVIM_DEVICE uint32_t round(float x) {
    const uint32_t bits = gpu::bits(x);
    if (kRounding == Rounding::kCut) return bits;
    return kRounding == Rounding::kNearest ? bits + 0x1000u : bits & 0xffffe000u;
  }

  int row_, quarter_;
#if MMVIM_MATRIX_ADDER
  uint32_t one_[8];
  float sum_[2][4];
#else
  float values_[32];
#endif
};

// Advances the lane's states by one step; `decay` receives the factors of the old ones.
template <Discretization kMethod, bool kQuick, int kCpt>
MMVIM_DEVICE void advance_lane(float (&h)[kCpt][kSlice], float (&v)[kCpt][kSlice],
                               float (&decay)[kCpt][kSlice],
                               const StateConstants (&constants)[kCpt][kSlice], const float* input,
                               const float* step, const float* column) {
  float B[kSlice], delta[kCpt], u[kCpt];
  load_slice(B, column);
  load_lane(delta, step);
  load_lane(u, input);
  MMVIM_UNROLL
  for (int k = 0; k < kCpt; ++k) {
    const ChannelStep s = channel_step<kMethod>(delta[k]);
    const float x = Rule<kMethod, GpuMath>::kInputIsDelta ? u[k] * delta[k] : u[k];
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) {
      decay[k][j] = advance_state<kMethod, kQuick>(h[k][j], v[k][j], s, constants[k][j], x, B[j]);
    }
  }
}

// Takes the gradient one step back: from that of the states after the step to that of the states
// before it, and on to the step's inputs. `to_u` and `to_delta`, of the lane's states, `for_B` and
// `for_C`, of its channels, are the terms of sums; y is the output's.
template <Discretization kMethod, bool kQuick, int kCpt>
MMVIM_DEVICE void pull_lane(const float (&h_before)[kCpt][kSlice],
                            const float (&h_after)[kCpt][kSlice],
                            const float (&decay)[kCpt][kSlice], const float (&v)[kCpt][kSlice],
                            const StateConstants (&constants)[kCpt][kSlice],
                            const float (&delta)[kCpt], const float (&u)[kCpt],
                            const float (&dy)[kCpt], const float (&B)[kSlice],
                            const float (&C)[kSlice], float (&gradient)[kCpt][kSlice],
                            float (&carry)[kCpt][kSlice], float (&dA)[kCpt][kSlice],
                            float (&to_u)[kCpt], float (&to_delta)[kCpt], float (&y)[kCpt],
                            float (&for_B)[kSlice], float (&for_C)[kSlice]) {
  MMVIM_UNROLL
  for (int k = 0; k < kCpt; ++k) {
    const ChannelStep s = channel_step<kMethod>(delta[k]);
    const float x = Rule<kMethod, GpuMath>::kInputIsDelta ? u[k] * delta[k] : u[k];
    to_u[k] = to_delta[k] = y[k] = 0.f;
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) {
      const StateConstants& c = constants[k][j];
      const float g = gpu::fused(C[j], dy[k], gradient[k][j]);
      float a = decay[k][j];
      float to_drive = g;  // gradient of B times x
      if constexpr (Rule<kMethod, GpuMath>::kInputIsDelta) {
        const float by_z = g * a * h_before[k][j];
        to_delta[k] = gpu::fused(by_z, c.rate, to_delta[k]);
        dA[k][j] = gpu::fused(by_z, delta[k], dA[k][j]);
      } else {
        Weights w;
        const Pull pull = pull_of<kMethod, kQuick>(g, a, w, s, c, h_before[k][j], x, B[j], v[k][j]);
        to_delta[k] += pull.delta;
        dA[k][j] += pull.A;
        to_drive = g * w.w0;
        if (Rule<kMethod, GpuMath>::kTwoTap) {
          to_drive += carry[k][j];
          carry[k][j] = g * w.w1;
        }
      }
      gradient[k][j] = g * a;
      to_u[k] = gpu::fused(to_drive, B[j], to_u[k]);
      y[k] = gpu::fused(C[j], h_after[k][j], y[k]);
      for_B[j] = k == 0 ? to_drive * x : gpu::fused(to_drive, x, for_B[j]);
      for_C[j] = k == 0 ? dy[k] * h_after[k][j] : gpu::fused(dy[k], h_after[k][j], for_C[j]);
    }
  }
}

MMVIM_DEVICE void prefetch_states(const float* data, int64_t row, const Sizes& size,
                                  const Channels& channels, int index, int threads) {
  const float* const states = data + (row * size.channels + channels.first) * size.pitch;
  MMVIM_NO_UNROLL
  for (int i = index * 8; i < channels.count * size.pitch; i += threads * 8) {
    gpu::prefetch(states + i);
  }
}

// dz for y = 1, given z and its logistic: silu'(z) = s (1 + z (1 - s)).
MMVIM_DEVICE Quad gate_gradient(const Quad& dy, const Quad& z, const Quad& s) {
  return Quad::of([&](int j) { return dy.v[j] * s.v[j] * gpu::fused(z.v[j], 1.f - s.v[j], 1.f); });
}

// Adds up the slices' parts of a row, step i of its group, and writes its gradients; `from` is
// the place of the thread's quad in the tile.
template <class T, class R, int kChannels>
MMVIM_DEVICE void store_row(const Backward& p, int direction, int64_t b, int t, int i, int from,
                            const Channels& channels, int quad, int slices, char* shared,
                            const BackwardShared& layout, bool writes_dz, bool needs_y,
                            bool in_parts, Quad& dD, Quad& dbias) {
  const Sizes& size = p.size;
  const float* const deltas = reinterpret_cast<const float*>(shared + layout.deltas);
  const float* const inputs = reinterpret_cast<const float*>(shared + layout.inputs);
  const float* const grads = reinterpret_cast<const float*>(shared + layout.grads);
  const float* const gates = reinterpret_cast<const float*>(shared + layout.gates);
  const float* const parts = reinterpret_cast<const float*>(shared + layout.parts);
  const float* const parameters = reinterpret_cast<const float*>(shared + layout.parameters);
  const auto part = [&](int which) {
    return Quad::sum<kParts * kGroup * kChannels>(
        parts + (which * kGroup + i) * kChannels + 4 * quad, slices);
  };
  const Quad skip = Quad::load(parameters + kChannels + 4 * quad);
  const Quad delta = Quad::load(deltas + from);
  const Quad u = Quad::load(inputs + from);
  const Quad dy = Quad::load(grads + from);
  Quad du = part(0);
  // The rates are A times a constant.
  Quad ddelta = part(1);
  ddelta = Quad::of([&](int i) { return ddelta.v[i] * static_cast<float>(1 / R::kRateScale); });
  if (R::kInputIsDelta) {
    ddelta = Quad::of([&](int i) { return gpu::fused(u.v[i], du.v[i], ddelta.v[i]); });
    du = Quad::of([&](int i) { return delta.v[i] * du.v[i]; });
  }
  Quad y = Quad::of([](int) { return 0.f; });
  if (needs_y) y = part(2);
  if (in_parts) {
    const int64_t pitch = size.batch * size.length * size.channels;
    if (p.sum_in[direction] != nullptr) {
      const float* sums = p.sum_in[direction];
      du.add(QuadRows<const float>(sums, size, b, channels, quad).load(t));
      ddelta.add(QuadRows<const float>(sums + pitch, size, b, channels, quad).load(t));
      if (needs_y) {
        y.add(QuadRows<const float>(sums + 2 * pitch, size, b, channels, quad).load(t));
      }
    }
    if (p.sum_out[direction] != nullptr) {
      float* sums = p.sum_out[direction];
      QuadRows<float>(sums, size, b, channels, quad).store(t, du);
      QuadRows<float>(sums + pitch, size, b, channels, quad).store(t, ddelta);
      QuadRows<float>(sums + 2 * pitch, size, b, channels, quad).store(t, y);
      return;
    }
  }
  du = Quad::of([&](int i) { return gpu::fused(skip.v[i], dy.v[i], du.v[i]); });
  if (size.softplus) {
    ddelta = Quad::of([&](int i) { return ddelta.v[i] * softplus_slope(delta.v[i]); });
  }
  dD = Quad::of([&](int i) { return gpu::fused(u.v[i], dy.v[i], dD.v[i]); });
  dbias.add(ddelta);
  QuadRows<T>(static_cast<T*>(p.du[direction]), size, b, channels, quad).store(t, du);
  QuadRows<T>(static_cast<T*>(p.ddelta[direction]), size, b, channels, quad).store(t, ddelta);
  if (writes_dz && needs_y) {
    const Quad gate = Quad::load(gates + from);
    y = Quad::of([&](int i) { return gate.v[i] * gpu::fused(skip.v[i], u.v[i], y.v[i]); });
    QuadRows<T>(static_cast<T*>(p.dz), size, b, channels, quad, p.dz_pitch).store(t, y);
  }
}

// Runs a tile forward up to its last group, and keeps the states at which the groups start.
template <Discretization kMethod, bool kQuick, int kCpt>
MMVIM_DEVICE void keep_starts(int groups, float (&h)[kCpt][kSlice], float (&v)[kCpt][kSlice],
                              const StateConstants (&constants)[kCpt][kSlice],
                              const float* my_inputs, const float* my_deltas,
                              const float* my_columns, float* starts) {
  constexpr int kChannels = 32 * kCpt;
  for (int g = 0; g + 1 < groups; ++g) {
    if (g > 0) {
      MMVIM_UNROLL
      for (int k = 0; k < kCpt; ++k) {
        store_slice(starts + ((g - 1) * kCpt + k) * 32 * kSlice, h[k]);
      }
    }
    MMVIM_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      const int r = g * kGroup + i;
      float unused[kCpt][kSlice];
      advance_lane<kMethod, kQuick>(h, v, unused, constants, my_inputs + r * kChannels,
                                    my_deltas + r * kChannels, my_columns + r * 2 * kSlice);
    }
  }
}

// Runs the group of a tile's steps from `first` forward, and then its gradients backward. h is the
// state before the group; pointers are to the lane's part of the tile.
template <Discretization kMethod, bool kQuick, int kCpt, class F, class Sum>
MMVIM_DEVICE void run_group(int first, int count, bool needs_y, float (&h)[kCpt][kSlice],
                            const StateConstants (&constants)[kCpt][kSlice], const float* my_inputs,
                            const float* my_deltas, const float* my_columns, float* my_parts,
                            const F& load_start_drive, float (&gradient)[kCpt][kSlice],
                            float (&carry)[kCpt][kSlice], float (&dA)[kCpt][kSlice],
                            Sum& channel_sum) {
  constexpr bool kTwoTap = Traits<kMethod>::kTwoTap;
  constexpr int kChannels = 32 * kCpt;
  constexpr int kTile = kBackwardTile;
  float before[kCpt][kSlice], v_before[kCpt][kSlice], v[kCpt][kSlice];
  float after[kGroup][kCpt][kSlice], decay[kGroup][kCpt][kSlice];
  copy_states(before, h);
  if (kTwoTap) {
    if (first == 0) {
      load_start_drive(v_before);
    } else {
      drives_of(v_before, my_inputs + (first - 1) * kChannels,
                my_columns + (first - 1) * 2 * kSlice);
    }
    copy_states(v, v_before);
  }
  MMVIM_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    const int r = first + i;
    advance_lane<kMethod, kQuick>(h, v, decay[i], constants, my_inputs + r * kChannels,
                                  my_deltas + r * kChannels, my_columns + r * 2 * kSlice);
    copy_states(after[i], h);
  }

  MMVIM_UNROLL
  for (int i = kGroup - 1; i >= 0; --i) {
    const int r = first + i;
    // The gradient of v must not pass through steps that do not exist.
    if (kTwoTap && r >= count) continue;
    float B[kSlice], C[kSlice], delta[kCpt], u[kCpt], dy[kCpt];
    float for_B[kSlice], for_C[kSlice], to_u[kCpt], to_delta[kCpt], y[kCpt];
    load_slice(B, my_columns + r * 2 * kSlice);
    load_slice(C, my_columns + r * 2 * kSlice + kSlice);
    load_lane(delta, my_deltas + r * kChannels);
    load_lane(u, my_inputs + r * kChannels);
    load_lane(dy, my_deltas + (2 * kTile + r) * kChannels);
    if (kTwoTap && i > 0) {
      drives_of(v, my_inputs + (r - 1) * kChannels, my_columns + (r - 1) * 2 * kSlice);
    } else if (kTwoTap) {
      copy_states(v, v_before);
    }
    pull_lane<kMethod, kQuick>(i > 0 ? after[i - 1] : before, after[i], decay[i], v, constants,
                               delta, u, dy, B, C, gradient, carry, dA, to_u, to_delta, y, for_B,
                               for_C);
    channel_sum.add(i, for_B, for_C);
    store_lane(my_parts + i * kChannels, to_u);
    store_lane(my_parts + (kGroup + i) * kChannels, to_delta);
    if (needs_y) store_lane(my_parts + (2 * kGroup + i) * kChannels, y);
  }
}

template <class T, Discretization kMethod, int kCpt, bool kPacked = false>
MMVIM_KERNEL void MMVIM_REGISTERS(kBackwardRegisters<kCpt>)
    backward_kernel(const MMVIM_GRID_CONSTANT Backward p) {
  using R = Rule<kMethod, GpuMath>;
  constexpr int kChannels = 32 * kCpt;
  constexpr int kQuads = kChannels / 4;
  constexpr int kTile = kBackwardTile;

  const Sizes& size = p.size;
  const int slices = slices_of(size);
  const int threads = 32 * slices;
  const int index = gpu::thread_index();
  const int lane = index % 32;
  const int slice = index / 32;

  const bool pair = p.directions == 2;
  const int direction = pair ? gpu::block_x() % 2 : 0;
  const int64_t b = pair ? gpu::block_x() / 2 : gpu::block_x();
  const int channel_block = gpu::block_y();
  const Channels channels(size, channel_block, kChannels);
  const int chunk = gpu::block_z();
  const int begin = chunk * p.chunks.length;
  const int end = begin + smaller(size.length - begin, p.chunks.length);

  const BackwardShared layout(slices, kChannels);
  char* const shared = gpu::shared_memory();
  float* const deltas = reinterpret_cast<float*>(shared + layout.deltas);
  float* const inputs = reinterpret_cast<float*>(shared + layout.inputs);
  float* const grads = reinterpret_cast<float*>(shared + layout.grads);
  float* const gates = reinterpret_cast<float*>(shared + layout.gates);
  float* const columns = reinterpret_cast<float*>(shared + layout.columns);
  float* const starts = reinterpret_cast<float*>(shared + layout.starts) +
                        slice * kStarts * kChannels * kSlice + 4 * lane;
  float* const parts = reinterpret_cast<float*>(shared + layout.parts);
  float* const parameters = reinterpret_cast<float*>(shared + layout.parameters);
  // Of this warp's slice and this lane.
  const float* const my_columns = columns + slice * kTile * 2 * kSlice;
  const float* const my_deltas = deltas + lane * kCpt;
  const float* const my_inputs = inputs + lane * kCpt;
  float* const my_parts = parts + slice * kParts * kGroup * kChannels + lane * kCpt;

  const Scan& scan = p.scan[direction];
  const bool reverse = scan.reverse;
  const bool gated = p.z.data != nullptr;
  // Loads without a condition do not wait for each other: without a gate, of anything.
  Rows z_source = p.z;
  if (!gated) {
    z_source.data = p.grad_out.data;
    z_source.stride_b = p.grad_out.stride_b;
    z_source.stride_l = p.grad_out.stride_l;
    z_source.vector = p.grad_out.vector;
  }
  const bool writes_dz = gated && direction == 0;
  const bool needs_y = (writes_dz && p.pregate.data == nullptr) || p.sum_out[direction] != nullptr;
  const bool in_parts = p.sum_in[direction] != nullptr || p.sum_out[direction] != nullptr;
  const auto time_of = [&](int position) {
    return reverse ? size.length - 1 - position : position;
  };
  const int group = channels.group(size, scan.groups);
  const int quad = index % kQuads;
  const int quad_row = index / kQuads;
  const int quad_rows = threads / kQuads;

  // Global targets of the lane's sums over channels.
  ChannelSum<kRoundingFor<T>> channel_sum(lane);
  const int target_state = slice * kSlice + channel_sum.state();
  const int64_t target_stride = static_cast<int64_t>(scan.groups) * 2 * size.pitch;
  float* target = p.dBC[direction] + b * size.length * target_stride +
                  (group * 2 + channel_sum.is_C()) * size.pitch + target_state;
  if (!p.atomic[direction]) {
    const int part = scan.groups == 1
                         ? channel_block
                         : channel_block % (channel_blocks(size, kChannels) / scan.groups);
    target += static_cast<int64_t>(part) * size.batch * size.length * target_stride;
  }

  StateConstants constants[kCpt][kSlice];
  float h[kCpt][kSlice], gradient[kCpt][kSlice], carry[kCpt][kSlice];
  float dA[kCpt][kSlice];
  load_states(h, scan.A, 0, size.pitch, size, channels, lane, slice);
  const bool quick = may_be_quick<T, kMethod>(h);
  set_constants<T, kMethod>(constants, h, quick);
  MMVIM_UNROLL
  for (int k = 0; k < kCpt; ++k) {
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) {
      gradient[k][j] = carry[k][j] = dA[k][j] = 0.f;
    }
  }
  // `gradient`: of the state after the current step, from the steps behind it; `carry`: of v.
  if (p.chunks.count > 1) {
    const int64_t at = (static_cast<int64_t>(direction) * p.chunks.count + chunk) * size.batch + b;
    load_states(gradient, p.chunks.state, at, size.pitch, size, channels, lane, slice);
    if (R::kTwoTap) load_states(carry, p.chunks.drive, at, size.pitch, size, channels, lane, slice);
  } else if (p.grad_last[direction] != nullptr) {
    load_states(gradient, p.grad_last[direction], b, p.grad_last_pitch, size, channels, lane,
                slice);
    if (R::kTwoTap) {
      load_states(carry, p.grad_last_drive[direction], b, p.grad_last_pitch, size, channels, lane,
                  slice);
    }
  }
  load_parameters<kChannels>(parameters, scan.delta_bias, channels, index, threads);
  load_parameters<kChannels>(parameters + kChannels, scan.D, channels, index, threads);
  gpu::sync_block();
  int turn = 0;
  Quad dD = Quad::of([](int) { return 0.f; });
  Quad dbias = dD;

  const Sequences<kPacked> sequences(p.seq_idx, b, size, reverse);
  int stop = end;
  for (int at = (end - 1) / kTile * kTile; at >= begin; at -= kTile) {
    // A tile of packed sequences starts with one, if one starts there.
    if (kPacked) at = sequences.last_start(at, stop, lane);
    const bool fresh = sequences.start_at(at);
    const int count = kPacked ? stop - at : smaller(kTile, end - at);
    const int groups = (count + kGroup - 1) / kGroup;

    // State, and v for two taps, before the tile.
    const auto load_start = [&] {
      if (fresh) {
        clear_states(h);
      } else if (at > 0) {
        const int64_t kept = (size.length - 1) / kInterval;
        load_states(h, p.checkpoints[direction], b * kept + at / kInterval - 1, size.pitch, size,
                    channels, lane, slice);
      } else if (scan.initial != nullptr) {
        load_states(h, scan.initial, b, scan.initial_pitch, size, channels, lane, slice);
      } else {
        clear_states(h);
      }
    };
    const auto load_start_drive = [&](float (&v)[kCpt][kSlice]) {
      if (fresh) {
        clear_states(v);
      } else if (R::kTwoTap && at > 0) {
        load_drive<T>(v, scan, size, b, time_of(at - 1), channels, lane, slice);
      } else if (R::kTwoTap && scan.initial_drive != nullptr) {
        load_states(v, scan.initial_drive, b, scan.initial_pitch, size, channels, lane, slice);
      } else {
        clear_states(v);
      }
    };
    load_start();
    // Inputs of the tile; zero behind the end of the scan. All that a thread loads is on its way
    // before the first is used.
    {
      const QuadInput<T> u_rows(scan.u, b, channels, quad),
          delta_rows(scan.delta, b, channels, quad), grad_rows(p.grad_out, b, channels, quad),
          z_rows(z_source, b, channels, quad);
      // Every lane one slice of B or C, in every 16th row.
      const Rows& column_rows = lane % 2 == 0 ? scan.B : scan.C;
      const T* const column_base = static_cast<const T*>(column_rows.data) +
                                   b * column_rows.stride_b + group * column_rows.stride_g +
                                   slice * kSlice;
      const int states = size.states - slice * kSlice;
      const bool whole =
          states >= kSlice && column_rows.vector >= kSlice * static_cast<int>(sizeof(T));
      Packed<T, 4> column[kTile / 16];
      const auto column_row = [&](int i) {
        return column_base +
               static_cast<int64_t>(time_of(at + smaller(lane / 2 + 16 * i, count - 1))) *
                   column_rows.stride_l;
      };
      if (whole) {
        MMVIM_UNROLL
        for (int i = 0; i < kTile / 16; ++i) {
          column[i].raw = *reinterpret_cast<const typename Packed<T, 4>::Raw*>(column_row(i));
        }
      } else {
        MMVIM_UNROLL
        for (int i = 0; i < kTile / 16; ++i) {
          column[i] = Packed<T, 4>::zero();
          MMVIM_UNROLL
          for (int j = 0; j < kSlice; ++j) {
            if (j < states) column[i].element[j] = column_row(i)[j];
          }
        }
      }
      const Quad bias = Quad::load(parameters + 4 * quad);
      // Turns one row's inputs into what the steps need.
      const auto prepare = [&](int r, const Packed<T, 4>& raw_u, const Packed<T, 4>& raw_delta,
                               const Packed<T, 4>& raw_grad, const Packed<T, 4>& raw_z) {
        if (r >= groups * kGroup) return;
        const bool inside = r < count;
        const int to = r * kChannels + 4 * quad;
        Quad::of([&](int j) { return inside ? raw_u.get(j) : 0.f; }).store(inputs + to);
        Quad::of([&](int j) {
          const float x = raw_delta.get(j) + bias.v[j];
          return !inside ? 0.f : size.softplus ? softplus<kFineSoftplus<T>>(x) : x;
        }).store(deltas + to);
        Quad dy = Quad::of([&](int j) { return inside ? raw_grad.get(j) * p.scale : 0.f; });
        if (gated) {
          const Quad z = Quad::of(raw_z);
          const Quad s = Quad::of([&](int j) { return logistic(z.v[j]); });
          if (writes_dz) {
            const Quad gate = gate_gradient(dy, z, s);
            if (needs_y) {
              gate.store(gates + to);
            } else if (inside) {
              const int t = time_of(at + r);
              const Quad y = Quad::of(QuadInput<T>(p.pregate, b, channels, quad).load(t));
              QuadRows<T>(static_cast<T*>(p.dz), size, b, channels, quad, p.dz_pitch)
                  .store(t, Quad::of([&](int j) { return gate.v[j] * y.v[j]; }));
            }
          }
          dy = Quad::of([&](int j) { return dy.v[j] * z.v[j] * s.v[j]; });
        }
        dy.store(grads + to);
      };
      const auto time_of_row = [&](int r) { return time_of(at + smaller(r, count - 1)); };
      if (u_rows.whole && delta_rows.whole && grad_rows.whole && z_rows.whole) {
        MMVIM_NO_UNROLL
        for (int r0 = quad_row; r0 < groups * kGroup; r0 += kBatch * quad_rows) {
          Packed<T, 4> raw_u[kBatch], raw_delta[kBatch], raw_grad[kBatch], raw_z[kBatch];
          MMVIM_UNROLL
          for (int i = 0; i < kBatch; ++i) {
            const int t = time_of_row(r0 + i * quad_rows);
            raw_u[i] = u_rows.load_whole(t);
            raw_delta[i] = delta_rows.load_whole(t);
            raw_grad[i] = grad_rows.load_whole(t);
            raw_z[i] = z_rows.load_whole(t);
          }
          MMVIM_UNROLL
          for (int i = 0; i < kBatch; ++i) {
            prepare(r0 + i * quad_rows, raw_u[i], raw_delta[i], raw_grad[i], raw_z[i]);
          }
        }
      } else {
        MMVIM_NO_UNROLL
        for (int r = quad_row; r < groups * kGroup; r += quad_rows) {
          const int t = time_of_row(r);
          prepare(r, u_rows.load(t), delta_rows.load(t), grad_rows.load(t), z_rows.load(t));
        }
      }
      MMVIM_UNROLL
      for (int i = 0; i < kTile / 16; ++i) {
        const int r = lane / 2 + 16 * i;
        const bool inside = r < count;
        Quad::of([&](int j) {
          return inside ? column[i].get(j) : 0.f;
        }).store(columns + (slice * kTile + r) * 2 * kSlice + lane % 2 * kSlice);
      }
      // The tile that comes next.
      if (at > begin && (!kPacked || at >= kTile)) {
        const int first = reverse ? time_of(at - 1) : at - kTile;
        const auto bring_closer = [&](const Rows& rows) {
          prefetch_rows<T, kChannels>(rows, b, channels, first, 1, kTile, index, threads);
        };
        bring_closer(scan.u);
        bring_closer(scan.delta);
        bring_closer(p.grad_out);
        if (gated) bring_closer(p.z);
        if (!kPacked && at > kTile) {
          const int64_t kept = (size.length - 1) / kInterval;
          prefetch_states(p.checkpoints[direction], b * kept + at / kInterval - 2, size, channels,
                          index, threads);
        }
      }
    }
    gpu::sync_block();

    by_steps<T, kMethod>(quick, [&](auto kind) {
      float v[kCpt][kSlice];
      load_start_drive(v);
      keep_starts<kMethod, decltype(kind)::value>(groups, h, v, constants, my_inputs, my_deltas,
                                                  my_columns, starts);
    });

    for (int g = groups - 1; g >= 0; --g) {
      const int first = g * kGroup;
      // After the first run, h is the state before the last group.
      if (g + 1 < groups && g > 0) {
        MMVIM_UNROLL
        for (int k = 0; k < kCpt; ++k)
          load_slice(h[k], starts + ((g - 1) * kCpt + k) * 32 * kSlice);
      } else if (g + 1 < groups) {
        load_start();
      }
      channel_sum.clear();
      by_steps<T, kMethod>(quick, [&](auto kind) {
        run_group<kMethod, decltype(kind)::value>(first, count, needs_y, h, constants, my_inputs,
                                                  my_deltas, my_columns, my_parts, load_start_drive,
                                                  gradient, carry, dA, channel_sum);
      });

      const float sum = channel_sum.get();
      const int sum_row = first + channel_sum.step();
      if (sum_row < count && target_state < size.states) {
        float* const address = target + time_of(at + sum_row) * target_stride;
        if (p.atomic[direction]) {
          gpu::add_to_global(address, sum);
        } else {
          *address = sum;
        }
      }
      gpu::sync_block();

      // Different warps take their turn in successive groups.
      int i = quad_row - turn;
      if (i < 0) i += quad_rows;
      turn += kGroup;
      while (turn >= quad_rows) turn -= quad_rows;
      MMVIM_NO_UNROLL
      for (; i < kGroup && first + i < count; i += quad_rows) {
        store_row<T, R, kChannels>(p, direction, b, time_of(at + first + i), i,
                                   (first + i) * kChannels + 4 * quad, channels, quad, slices,
                                   shared, layout, writes_dz, needs_y, in_parts, dD, dbias);
      }
      gpu::sync_block();
    }
    if (kPacked) {
      if (fresh) {
        clear_states(gradient);
        clear_states(carry);
      }
      stop = at;
      at = (at + kTile - 1) / kTile * kTile;
    }
  }

  if (kHasQuickSteps<T, kMethod> && QuickStep<kMethod>::kCritical && quick) {
    MMVIM_UNROLL
    for (int k = 0; k < kCpt; ++k) {
      MMVIM_UNROLL
      for (int j = 0; j < kSlice; ++j) dA[k][j] /= constants[k][j].A;
    }
  }
  const int64_t row = chunk * size.batch + b;
  store_states(dA, p.dA[direction], row, size.pitch, size, channels, lane, slice);
  if (begin == 0 && p.dinitial[direction] != nullptr) {
    store_states(gradient, p.dinitial[direction], b, p.dinitial_pitch, size, channels, lane, slice);
    if (R::kTwoTap && p.dinitial_drive[direction] != nullptr) {
      store_states(carry, p.dinitial_drive[direction], b, p.dinitial_pitch, size, channels, lane,
                   slice);
    }
  }
  if (p.sum_out[direction] != nullptr) return;
  dD.store(deltas + quad_row * kChannels + 4 * quad);
  dbias.store(inputs + quad_row * kChannels + 4 * quad);
  gpu::sync_block();
  for (int c = index; c < channels.count; c += threads) {
    float sum_D = 0.f, sum_bias = 0.f;
    for (int r = 0; r < quad_rows; ++r) {
      sum_D += deltas[r * kChannels + c];
      sum_bias += inputs[r * kChannels + c];
    }
    float* to = p.dD[direction] + row * 2 * size.channels + channels.first + c;
    to[0] = sum_D;
    to[size.channels] = sum_bias;
  }
}

}  // namespace scan
}  // namespace mmvim
