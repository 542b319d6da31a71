// The backward scan of one or two states: zero-order hold, one direction, no gate.
//
// Mapped as the scans of many states are, a block would be one warp whose lanes compute one state
// in four. Here a lane owns a channel, and the warps of a block take neighbouring tiles of
// kInterval steps at a time, each from its checkpoint. What a tile does to the gradient of the
// state that enters it from behind is g -> decay g + local, which forward steps can sum up, so the
// warps wait for each other once in all of their tiles.
#pragma once

#include "cuda_common.cuh"

namespace mmvim {
namespace scan {

constexpr int kFewStates = 2;
constexpr int kFewWarps = 8;
template <int kStates>
constexpr int kFewRegisters = kStates == 1 ? 80 : 112;
constexpr int kFewGroup = 4;

template <int kStates>
struct FewShared {
  float columns[kFewWarps][kInterval][2][kStates];
  float starts[kFewWarps][kInterval / kFewGroup][kStates][32];
  // Of each warp's tile; the tiles of successive rounds alternate.
  float decay[2][kFewWarps][kStates][32];
  float local[2][kFewWarps][kStates][32];
  // Of each warp, at the end: of dA, dD and ddelta_bias.
  float sums[kStates + 2][kFewWarps][32];
};

// Sums kCount values of each lane over the warp. The lane's result is the total of one of them,
// value lane / (32 / kCount).
template <int kCount>
MMVIM_DEVICE float sum_over_warp(float (&v)[kCount], int lane) {
  int mask = 16;
  MMVIM_UNROLL
  for (int half = kCount / 2; half > 0; half /= 2, mask /= 2) {
    const bool upper = lane & mask;
    MMVIM_UNROLL
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? v[half + i] : v[i];
      v[i] = kept + gpu::exchange_xor(upper ? v[i] : v[half + i], mask);
    }
  }
  MMVIM_UNROLL
  for (; mask > 0; mask /= 2) v[0] += gpu::exchange_xor(v[0], mask);
  return v[0];
}

// Inputs of the lane's channel in the rows of one tile.
template <class T>
struct FewRows {
  const T *u, *delta, *grad;
  int stride_u, stride_delta, stride_grad;
  int time, step;  // of the tile's first row, and from row to row
  int count;       // of rows; those behind are zero
  float bias, scale;
  bool softplus_of_delta;
  bool present;  // whether the channel exists

  struct Raw {
    T u, delta, grad;
  };
  MMVIM_DEVICE Raw load(int r) const {
    const int64_t t = time + smaller(r, count - 1) * step;
    return {u[t * stride_u], delta[t * stride_delta], grad[t * stride_grad]};
  }
  MMVIM_DEVICE void convert(const Raw& raw, int r, float* u_, float* delta_, float* dy) const {
    const bool inside = r < count;
    const float x = to_float(raw.delta) + bias;
    *delta_ = !inside ? 0.f : softplus_of_delta ? softplus<kFineSoftplus<T>>(x) : x;
    *u_ = inside && present ? to_float(raw.u) : 0.f;
    *dy = inside && present ? to_float(raw.grad) * scale : 0.f;
  }
};

template <class T, int kStates>
MMVIM_KERNEL void MMVIM_REGISTERS(kFewRegisters<kStates>)
    few_backward_kernel(const MMVIM_GRID_CONSTANT Backward p) {
  const Sizes& size = p.size;
  const Scan& scan = p.scan[0];
  const int lane = gpu::thread_index() % 32;
  const int warp = gpu::thread_index() / 32;
  const int warps = gpu::thread_count() / 32;
  const int64_t b = gpu::block_x();
  const Channels channels(size, gpu::block_y(), 32);
  const int group = channels.group(size, scan.groups);
  FewShared<kStates>& shared = *reinterpret_cast<FewShared<kStates>*>(gpu::shared_memory());

  // Lanes without a channel follow the last one, with inputs of zero.
  const bool present = lane < channels.count;
  const int c = channels.first + smaller(lane, channels.count - 1);
  const int64_t row_of_b = b * size.channels + c;
  float A[kStates];
  MMVIM_UNROLL
  for (int j = 0; j < kStates; ++j) A[j] = scan.A[static_cast<int64_t>(c) * size.pitch + j];
  const float skip = scan.D == nullptr ? 0.f : scan.D[c];
  const auto of_channel = [&](const Rows& rows) {
    return static_cast<const T*>(rows.data) + b * rows.stride_b + c;
  };
  FewRows<T> rows{of_channel(scan.u),
                  of_channel(scan.delta),
                  of_channel(p.grad_out),
                  scan.u.stride_l,
                  scan.delta.stride_l,
                  p.grad_out.stride_l,
                  0,
                  scan.reverse ? -1 : 1,
                  0,
                  scan.delta_bias == nullptr ? 0.f : scan.delta_bias[c],
                  p.scale,
                  size.softplus,
                  present};

  // Where the lane's sum over channels goes: the gradient of a state of B, or C, of a group's step.
  constexpr int kSums = 2 * kStates * kFewGroup;
  constexpr int kLanes = 32 / kSums;  // with the same sum
  const int target_step = lane / kLanes % kFewGroup;
  const int target_state = lane / kLanes / kFewGroup % kStates;
  const int64_t target_stride = static_cast<int64_t>(scan.groups) * 2 * size.pitch;
  float* target = p.dBC[0] + b * size.length * target_stride +
                  (group * 2 + lane / 16) * size.pitch + target_state;
  if (!p.atomic[0]) {
    const int blocks = channel_blocks(size, 32);
    const int part = scan.groups == 1 ? gpu::block_y() : gpu::block_y() % (blocks / scan.groups);
    target += static_cast<int64_t>(part) * size.batch * size.length * target_stride;
  }

  // Gradient of the state behind all tiles that are left.
  float carry[kStates], dA[kStates];
  MMVIM_UNROLL
  for (int j = 0; j < kStates; ++j) {
    carry[j] = p.grad_last[0] == nullptr ? 0.f : p.grad_last[0][row_of_b * p.grad_last_pitch + j];
    dA[j] = 0.f;
  }
  float dD = 0.f, dbias = 0.f;
  const int kept = (size.length - 1) / kInterval;
  int round = 0;
  for (int top = kept; top >= 0; top -= warps, round ^= 1) {
    const int tile = top - (warps - 1 - warp);
    const int at = tile * kInterval;
    rows.count = tile < 0 ? 0 : smaller(kInterval, size.length - at);
    rows.time = scan.reverse ? size.length - 1 - at : at;
    const int groups = (rows.count + kFewGroup - 1) / kFewGroup;
    float decay[kStates], local[kStates];
    MMVIM_UNROLL
    for (int j = 0; j < kStates; ++j) {
      decay[j] = 1.f;
      local[j] = 0.f;
    }
    if (rows.count > 0) {
      const int64_t t = rows.time + smaller(lane, rows.count - 1) * rows.step;
      const bool inside = lane < rows.count;
      MMVIM_UNROLL
      for (int which = 0; which < 2; ++which) {
        const Rows& column = which == 0 ? scan.B : scan.C;
        const T* from = static_cast<const T*>(column.data) + b * column.stride_b +
                        group * column.stride_g + t * column.stride_l;
        MMVIM_UNROLL
        for (int j = 0; j < kStates; ++j) {
          shared.columns[warp][lane][which][j] = inside ? to_float(from[j]) : 0.f;
        }
      }
      float h[kStates];
      MMVIM_UNROLL
      for (int j = 0; j < kStates; ++j) {
        h[j] = 0.f;
        if (tile > 0) {
          const int64_t row = (b * kept + tile - 1) * size.channels + c;
          h[j] = p.checkpoints[0][row * size.pitch + j];
        } else if (scan.initial != nullptr) {
          h[j] = scan.initial[row_of_b * scan.initial_pitch + j];
        }
      }
      gpu::sync_warp();
      MMVIM_NO_UNROLL
      for (int g = 0; g < groups; ++g) {
        MMVIM_UNROLL
        for (int j = 0; j < kStates; ++j) shared.starts[warp][g][j][lane] = h[j];
        typename FewRows<T>::Raw raw[kFewGroup];
        MMVIM_UNROLL
        for (int i = 0; i < kFewGroup; ++i) raw[i] = rows.load(g * kFewGroup + i);
        MMVIM_UNROLL
        for (int i = 0; i < kFewGroup; ++i) {
          const int r = g * kFewGroup + i;
          float u, delta, dy;
          rows.convert(raw[i], r, &u, &delta, &dy);
          MMVIM_UNROLL
          for (int j = 0; j < kStates; ++j) {
            const float a = gpu::exp2(delta * (kLog2e * A[j]));
            h[j] = gpu::fused(a, h[j], delta * u * shared.columns[warp][r][0][j]);
            decay[j] *= a;
            local[j] = gpu::fused(decay[j], shared.columns[warp][r][1][j] * dy, local[j]);
          }
        }
      }
    }
    MMVIM_UNROLL
    for (int j = 0; j < kStates; ++j) {
      shared.decay[round][warp][j][lane] = decay[j];
      shared.local[round][warp][j][lane] = local[j];
    }
    gpu::sync_block();
    // The gradient that enters this warp's tile from behind, and the one that leaves the round.
    float gradient[kStates];
    MMVIM_NO_UNROLL
    for (int w = warps - 1; w >= 0; --w) {
      MMVIM_UNROLL
      for (int j = 0; j < kStates; ++j) {
        if (w == warp) gradient[j] = carry[j];
        carry[j] =
            gpu::fused(shared.decay[round][w][j][lane], carry[j], shared.local[round][w][j][lane]);
      }
    }

    MMVIM_NO_UNROLL
    for (int g = groups - 1; g >= 0; --g) {
      const int first = g * kFewGroup;
      float u[kFewGroup], delta[kFewGroup], dy[kFewGroup];
      float before[kFewGroup + 1][kStates], sums[kSums];
      {
        typename FewRows<T>::Raw raw[kFewGroup];
        MMVIM_UNROLL
        for (int i = 0; i < kFewGroup; ++i) raw[i] = rows.load(first + i);
        MMVIM_UNROLL
        for (int i = 0; i < kFewGroup; ++i) {
          rows.convert(raw[i], first + i, &u[i], &delta[i], &dy[i]);
        }
      }
      MMVIM_UNROLL
      for (int j = 0; j < kStates; ++j) {
        before[0][j] = shared.starts[warp][g][j][lane];
        MMVIM_UNROLL
        for (int i = 0; i < kFewGroup; ++i) {
          const float a = gpu::exp2(delta[i] * (kLog2e * A[j]));
          const float B = shared.columns[warp][first + i][0][j];
          before[i + 1][j] = gpu::fused(a, before[i][j], delta[i] * u[i] * B);
        }
      }
      MMVIM_UNROLL
      for (int i = kFewGroup - 1; i >= 0; --i) {
        const int r = first + i;
        float to_input = 0.f, to_delta = 0.f;
        MMVIM_UNROLL
        for (int j = 0; j < kStates; ++j) {
          const float state = gpu::fused(shared.columns[warp][r][1][j], dy[i], gradient[j]);
          gradient[j] = state * gpu::exp2(delta[i] * (kLog2e * A[j]));
          const float by_z = gradient[j] * before[i][j];
          to_input = gpu::fused(state, shared.columns[warp][r][0][j], to_input);
          to_delta = gpu::fused(by_z, A[j], to_delta);
          dA[j] = gpu::fused(by_z, delta[i], dA[j]);
          sums[j * kFewGroup + i] = state * (delta[i] * u[i]);
          sums[(kStates + j) * kFewGroup + i] = dy[i] * before[i + 1][j];
        }
        dD = gpu::fused(u[i], dy[i], dD);
        to_delta = gpu::fused(u[i], to_input, to_delta);
        if (size.softplus) to_delta *= softplus_slope(delta[i]);
        if (r >= rows.count || !present) continue;
        dbias += to_delta;
        const int64_t row = b * size.length + rows.time + r * rows.step;
        static_cast<T*>(p.du[0])[row * size.channels + c] =
            from_float<T>(gpu::fused(delta[i], to_input, skip * dy[i]));
        static_cast<T*>(p.ddelta[0])[row * size.channels + c] = from_float<T>(to_delta);
      }
      const float sum = sum_over_warp(sums, lane);
      const int r = first + target_step;
      if (lane % kLanes == 0 && r < rows.count) {
        float* const address = target + (rows.time + r * rows.step) * target_stride;
        if (p.atomic[0]) {
          gpu::add_to_global(address, sum);
        } else {
          *address = sum;
        }
      }
    }
  }

  if (warp == 0 && present && p.dinitial[0] != nullptr) {
    MMVIM_UNROLL
    for (int j = 0; j < kStates; ++j) {
      p.dinitial[0][row_of_b * p.dinitial_pitch + j] = carry[j];
    }
  }
  MMVIM_UNROLL
  for (int j = 0; j < kStates; ++j) shared.sums[j][warp][lane] = dA[j];
  shared.sums[kStates][warp][lane] = dD;
  shared.sums[kStates + 1][warp][lane] = dbias;
  gpu::sync_block();
  if (!present) return;
  for (int i = warp; i < kStates + 2; i += warps) {
    float total = 0.f;
    for (int w = 0; w < warps; ++w) total += shared.sums[i][w][lane];
    if (i < kStates) {
      p.dA[0][row_of_b * size.pitch + i] = total;
    } else {
      p.dD[0][(b * 2 + i - kStates) * size.channels + c] = total;
    }
  }
}

template <class T>
int launch_few_backward(const Backward& p, const gpu::Grid& grid, CUstream_st* stream) {
  const int warps = smaller(kFewWarps, (p.size.length + kInterval - 1) / kInterval);
  if (p.size.states == 1) {
    return gpu::launch(few_backward_kernel<T, 1>, grid, 32 * warps, sizeof(FewShared<1>), stream,
                       p);
  }
  return gpu::launch(few_backward_kernel<T, 2>, grid, 32 * warps, sizeof(FewShared<2>), stream, p);
}

}  // namespace scan
}  // namespace mmvim
