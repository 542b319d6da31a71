// Forward scan.
//
// A block walks its channels' length in tiles. While each warp runs its slice of states over a
// tile, and leaves its share of the outputs in shared memory, the next tile's inputs are on their
// way. Between two barriers all threads then gate and store the tile's outputs and turn the next
// tile's inputs into step sizes and drives.
//
// Two directions share a block, half of its warps each, and walk the same stretch of time from both
// ends. Who passes a time step first leaves the output there, the other one adds its own and gates.
#pragma once

#include "cuda_common.cuh"

namespace mmvim {
namespace scan {

constexpr int kForwardTile = 16;

// Offsets into shared memory, in bytes; all but `meeting` are of the first direction.
struct ForwardShared {
  int u, delta, z, deltas, drives, columns, outputs, direction, meeting, total;

  MMVIM_HD ForwardShared(int element, int directions, int slices, int channels, int meeting_rows) {
    const int rows = kForwardTile * channels;
    u = 0;
    delta = u + 2 * rows * element;
    z = delta + rows * element;
    deltas = z + rows * element;
    drives = deltas + rows * 4;
    columns = drives + rows * 4;
    outputs = columns + kForwardTile * slices * kSlice * 8;
    direction = outputs + slices * rows * 4;
    meeting = directions * direction;
    total = meeting + meeting_rows * channels * 4;
  }
};

// A stretch of positions and the tile [at, stop) in it.
struct Stretch {
  int end, at, stop;
};

template <class T, Discretization kMethod, int kCpt>
MMVIM_KERNEL void MMVIM_REGISTERS(80) forward_kernel(const MMVIM_GRID_CONSTANT Forward p) {
  using R = Rule<kMethod, GpuMath>;
  constexpr int kChannels = 32 * kCpt;
  constexpr int kQuads = kChannels / 4;
  constexpr int kTile = kForwardTile;
  constexpr int kColumnRows = 16 / kSlice;
  constexpr int kColumnItems = kTile / kColumnRows;

  const Sizes& size = p.size;
  const int slices = slices_of(size);
  const int threads = 32 * slices;  // of one direction
  const int lane = gpu::thread_index() % 32;
  const int direction = gpu::thread_index() / threads;
  const int index = gpu::thread_index() - direction * threads;
  const int slice = index / 32;

  const int blocks = channel_blocks(size, kChannels);
  const int64_t block = gpu::block_index();
  const Channels channels(size, static_cast<int>(block % blocks), kChannels);
  const int chunk = static_cast<int>(block / blocks % p.chunks.count);
  const int64_t b = block / blocks / p.chunks.count;
  const int time_begin = chunk * p.chunks.length;
  const int time_end = time_begin + smaller(size.length - time_begin, p.chunks.length);

  const ForwardShared layout(sizeof(T), p.directions, slices, kChannels, 0);
  char* shared = gpu::shared_memory() + direction * layout.direction;
  T* const u_tiles = reinterpret_cast<T*>(shared + layout.u);
  T* const delta_tile = reinterpret_cast<T*>(shared + layout.delta);
  T* const z_tile = reinterpret_cast<T*>(shared + layout.z);
  float* const deltas = reinterpret_cast<float*>(shared + layout.deltas);
  float* const drives = reinterpret_cast<float*>(shared + layout.drives);
  float* const columns = reinterpret_cast<float*>(shared + layout.columns);
  float* const outputs = reinterpret_cast<float*>(shared + layout.outputs);

  const Scan& scan = p.scan[direction];
  const bool reverse = scan.reverse;
  const bool gated = p.z.data != nullptr;
  const int interval = p.checkpoints[direction] != nullptr ? p.interval : 0;

  const int begin = reverse ? size.length - time_end : time_begin;
  Stretch own, other;
  own.at = begin;
  own.end = reverse ? size.length - time_begin : time_end;
  other.at = reverse ? time_begin : size.length - time_end;
  other.end = reverse ? time_end : size.length - time_begin;
  // Tiles end at checkpoints.
  const auto set_stop = [&](Stretch& s) {
    s.stop = smaller(s.end, s.at + kTile);
    if (interval > 0) s.stop = smaller(s.stop, (s.at / interval + 1) * interval);
  };
  const auto time_of = [&](int position) {
    return reverse ? size.length - 1 - position : position;
  };
  const int time_step = reverse ? -1 : 1;

  // This thread's column of B or C, in rows `column_row + i * kColumnRows` of a tile.
  const int width = slices * kSlice;
  const int column_row = index / (2 * width);
  const int column = index - column_row * 2 * width;
  const int state = column < width ? column : column - width;
  const Rows& column_rows = column < width ? scan.B : scan.C;
  const T* const column_base = static_cast<const T*>(column_rows.data) + b * column_rows.stride_b +
                               channels.group(size, scan.groups) * column_rows.stride_g + state;
  T next_column[kColumnItems];

  const auto load = [&](T* u_tile) {
    const InputRows<T> u(scan.u, b, channels.first);
    const InputRows<T> delta(scan.delta, b, channels.first);
    const int t = time_of(own.at);
    const int count = own.stop - own.at;
    u.template copy<kChannels>(u_tile, t, time_step, count, channels.count, index, threads);
    delta.template copy<kChannels>(delta_tile, t, time_step, count, channels.count, index, threads);
    MMVIM_UNROLL
    for (int i = 0; i < kColumnItems; ++i) {
      const int r = column_row + i * kColumnRows;
      next_column[i] = from_float<T>(0.f);
      if (r < count && state < size.states) {
        next_column[i] = column_base[(t + r * time_step) * column_rows.stride_l];
      }
    }
  };

  const auto prepare = [&](const T* u_tile) {
    const int quad = index % kQuads;
    const Quad bias = load_parameter(scan.delta_bias, channels, quad);
    for (int r = index / kQuads; r < own.stop - own.at; r += threads / kQuads) {
      const int at = r * kChannels + 4 * quad;
      const Quad u = Quad::load(u_tile + at);
      const Quad raw = Quad::load(delta_tile + at);
      const Quad delta = Quad::of([&](int i) {
        const float x = raw.v[i] + bias.v[i];
        return size.softplus ? softplus(x) : x;
      });
      delta.store(deltas + at);
      Quad::of([&](int i) {
        return R::kInputIsDelta ? u.v[i] * delta.v[i] : u.v[i];
      }).store(drives + at);
    }
    MMVIM_UNROLL
    for (int i = 0; i < kColumnItems; ++i) {
      columns[(column_row + i * kColumnRows) * 2 * width + column] = to_float(next_column[i]);
    }
  };

  // Writes the outputs of `count` positions from `first`. Of the other direction's positions, those
  // below `passed` are done.
  const bool writes = p.out != nullptr || p.pregate != nullptr || p.sum_out != nullptr;
  const bool plain =
      p.directions == 1 && p.sum_in == nullptr && p.sum_out == nullptr && p.pregate == nullptr;
  const auto finish = [&](const T* u_tile, int first, int count, int passed) {
    const int quad = index % kQuads;
    const Quad skip = load_parameter(scan.D, channels, quad);
    const QuadRows<T> out(static_cast<T*>(p.out), size, b, channels, quad);
    for (int r = index / kQuads; r < count; r += threads / kQuads) {
      const int at = r * kChannels + 4 * quad;
      const int t = time_of(first + r);
      const Quad u = Quad::load(u_tile + at);
      Quad y = Quad::of([&](int i) { return skip.v[i] * u.v[i]; });
      for (int s = 0; s < slices; ++s) y.add(Quad::load(outputs + s * kTile * kChannels + at));
      if (!plain) {
        if (p.directions == 2) {
          const bool leave = size.length - 1 - (first + r) >= passed;
          const QuadRows<float> scratch(p.meeting, size, b, channels, quad);
          float* meeting = reinterpret_cast<float*>(gpu::shared_memory() + layout.meeting) +
                           (t - time_begin) * kChannels + 4 * quad;
          if (leave && p.meeting == nullptr) y.store(meeting);
          if (leave && p.meeting != nullptr) scratch.store(t, y);
          if (leave) continue;
          y.add(p.meeting == nullptr ? Quad::load(meeting) : scratch.load(t));
        }
        if (p.sum_in != nullptr) {
          y.add(QuadRows<const float>(p.sum_in, size, b, channels, quad).load(t));
        }
        if (p.sum_out != nullptr) {
          QuadRows<float>(p.sum_out, size, b, channels, quad).store(t, y);
          continue;
        }
        if (p.pregate != nullptr) {
          QuadRows<T>(static_cast<T*>(p.pregate), size, b, channels, quad).store(t, y);
        }
        y = Quad::of([&](int i) { return y.v[i] * p.scale; });
      }
      if (p.out == nullptr) continue;
      if (gated) {
        const Quad z = Quad::load(z_tile + at);
        y = Quad::of([&](int i) { return y.v[i] * z.v[i] * logistic(z.v[i]); });
      }
      out.store(t, y);
    }
  };

  float rate[kCpt][kSlice], h[kCpt][kSlice], v[kCpt][kSlice];
  load_states(rate, scan.A, 0, size.pitch, size, channels, lane, slice);
  MMVIM_UNROLL
  for (int k = 0; k < kCpt; ++k) {
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) {
      rate[k][j] *= static_cast<float>(R::kRateScale);
      h[k][j] = v[k][j] = 0.f;
    }
  }
  if (p.chunks.count > 1) {
    const int64_t at = (static_cast<int64_t>(direction) * p.chunks.count + chunk) * size.batch + b;
    load_states(h, p.chunks.state, at, size.pitch, size, channels, lane, slice);
  } else if (scan.initial != nullptr) {
    load_states(h, scan.initial, b, scan.initial_pitch, size, channels, lane, slice);
  }
  if (R::kTwoTap) {
    if (begin > 0) {
      load_drive<T>(v, scan, size, b, time_of(begin - 1), channels, lane, slice);
    } else if (scan.initial_drive != nullptr) {
      load_states(v, scan.initial_drive, b, scan.initial_pitch, size, channels, lane, slice);
    }
  }

  set_stop(own);
  set_stop(other);
  T* u_tile = u_tiles;
  T* next_u_tile = u_tiles + kTile * kChannels;
  load(u_tile);
  gpu::wait_for_copies();
  gpu::sync_block();
  prepare(u_tile);
  gpu::sync_block();
  while (true) {
    const int first = own.at;
    const int count = own.stop - own.at;
    // Where the directions' tiles overlap, the first one waits for the second.
    const int passed = p.directions == 1 ? size.length : direction == 0 ? other.stop : other.at;
    const bool overlap = p.directions == 2 && count > 0 && other.at < other.stop &&
                         own.at < size.length - other.at && size.length - other.stop < own.stop;
    if (gated) {
      InputRows<T>(p.z, b, channels.first)
          .template copy<kChannels>(z_tile, time_of(first), time_step, count, channels.count, index,
                                    threads);
    }
    own.at = own.stop;
    set_stop(own);
    other.at = other.stop;
    set_stop(other);
    load(next_u_tile);

    const float* step = deltas + lane * kCpt;
    const float* row = columns + slice * kSlice;
    float* output = outputs + slice * kTile * kChannels + lane * kCpt;
    MMVIM_UNROLL_4
    for (int i = 0; i < count; ++i) {
      float B[kSlice], C[kSlice], delta[kCpt], x[kCpt], y[kCpt];
      load_slice(B, row);
      load_slice(C, row + width);
      load_lane(delta, step);
      load_lane(x, step + kTile * kChannels);
      MMVIM_UNROLL
      for (int k = 0; k < kCpt; ++k) {
        y[k] = 0.f;
        MMVIM_UNROLL
        for (int j = 0; j < kSlice; ++j) {
          advance_state<R>(h[k][j], v[k][j], delta[k], rate[k][j], x[k], B[j]);
          y[k] = gpu::fused(C[j], h[k][j], y[k]);
        }
      }
      store_lane(output, y);
      step += kChannels;
      row += 2 * width;
      output += kChannels;
    }
    if (interval > 0 && count > 0 && own.at % interval == 0 && own.at < size.length) {
      const int64_t kept = (size.length - 1) / interval;
      store_states(h, p.checkpoints[direction], b * kept + own.at / interval - 1, size.pitch, size,
                   channels, lane, slice);
    }
    gpu::wait_for_copies();
    gpu::sync_block();
    for (int turn = 0; turn <= static_cast<int>(overlap); ++turn) {
      if (turn == 1) gpu::sync_block();
      if (writes && turn == static_cast<int>(overlap && direction == 0)) {
        finish(u_tile, first, count, passed);
      }
    }
    if (own.at >= own.end && other.at >= other.end) break;
    prepare(next_u_tile);
    gpu::sync_block();
    T* const swap = u_tile;
    u_tile = next_u_tile;
    next_u_tile = swap;
  }

  if (own.end == size.length && p.last[direction] != nullptr) {
    store_states(h, p.last[direction], b, p.last_pitch, size, channels, lane, slice);
    if (R::kTwoTap) {
      store_states(v, p.last_drive[direction], b, p.last_pitch, size, channels, lane, slice);
    }
  }
}

}  // namespace scan
}  // namespace mmvim
