// Forward scan.
//
// A block walks its channels' length in tiles. While each warp runs its slice of states over a
// tile, and leaves its share of the outputs in shared memory, the next tile's inputs are on their
// way. Between two barriers all threads then gate and store the tile's outputs and turn the next
// tile's inputs into step sizes and drives.
//
// Two directions are blocks side by side that walk the same stretch of time from both ends. Each
// leaves the outputs of its first half in global memory; in its second half it adds what the other
// one has left, and gates.
#pragma once

#include "cuda_common.cuh"

namespace mmvim {
namespace scan {

constexpr int kForwardTile = 16;
constexpr int kSingleRegisters = 80;
// Of a pair. kTight fits a fifth more blocks, spills, and takes 10 to 20 % longer where kWide fits.
constexpr int kWideRegisters = 96;
constexpr int kTightRegisters = 80;

// Offsets into shared memory, in bytes.
struct ForwardShared {
  int u, delta, z, raw_columns, deltas, drives, columns, outputs, parameters, total;

  MMVIM_HD ForwardShared(int element, int slices, int channels) {
    const int rows = kForwardTile * channels;
    const int columns_of_tile = kForwardTile * slices * kSlice * 2;
    u = 0;
    delta = u + 2 * rows * element;
    z = delta + rows * element;
    raw_columns = z + rows * element;
    deltas = raw_columns + columns_of_tile * element;
    drives = deltas + rows * 4;
    columns = drives + rows * 4;
    outputs = columns + columns_of_tile * 4;
    parameters = outputs + slices * rows * 4;
    total = parameters + 2 * channels * 4;
  }
};

template <class T, Discretization kMethod, int kCpt, bool kPair, int kRegisters,
          bool kPacked = false>
MMVIM_KERNEL void MMVIM_REGISTERS(kRegisters) forward_kernel(const MMVIM_GRID_CONSTANT Forward p) {
  using R = Rule<kMethod, GpuMath>;
  constexpr int kChannels = 32 * kCpt;
  constexpr int kQuads = kChannels / 4;
  constexpr int kTile = kForwardTile;
  constexpr int kUnrolled = kPair && kRegisters == kTightRegisters ? 16 : 8;

  const Sizes& size = p.size;
  const int slices = slices_of(size);
  const int threads = 32 * slices;
  const int index = gpu::thread_index();
  const int lane = index % 32;
  const int slice = index / 32;

  const int direction = kPair ? gpu::block_x() % 2 : 0;
  const int64_t b = kPair ? gpu::block_x() / 2 : gpu::block_x();
  const Channels channels(size, gpu::block_y(), kChannels);
  const int chunk = gpu::block_z();
  const int time_begin = chunk * p.chunks.length;
  const int time_end = time_begin + smaller(size.length - time_begin, p.chunks.length);

  const ForwardShared layout(sizeof(T), slices, kChannels);
  char* const shared = gpu::shared_memory();
  T* const u_tiles = reinterpret_cast<T*>(shared + layout.u);
  T* const delta_tile = reinterpret_cast<T*>(shared + layout.delta);
  T* const z_tile = reinterpret_cast<T*>(shared + layout.z);
  T* const raw_columns = reinterpret_cast<T*>(shared + layout.raw_columns);
  float* const deltas = reinterpret_cast<float*>(shared + layout.deltas);
  float* const columns = reinterpret_cast<float*>(shared + layout.columns);
  float* const outputs = reinterpret_cast<float*>(shared + layout.outputs);
  float* const parameters = reinterpret_cast<float*>(shared + layout.parameters);

  const Scan& scan = p.scan[direction];
  const bool reverse = scan.reverse;
  const bool gated = p.z.data != nullptr;
  const int interval = p.checkpoints[direction] != nullptr ? p.interval : kForever;
  const int begin = reverse ? size.length - time_end : time_begin;
  const int end = reverse ? size.length - time_begin : time_end;
  // Of a pair: the positions that are left to the other direction end here.
  const int half = kPair ? begin + (end - begin + (direction == 0 ? 1 : 0)) / 2 : end;
  const Sequences<kPacked> sequences(p.seq_idx, b, size, reverse);
  Walk own(begin, end, half, interval, sequences.up_to_start(begin, kTile, lane));
  const auto time_of = [&](int position) {
    return reverse ? size.length - 1 - position : position;
  };
  const int time_step = reverse ? -1 : 1;
  const int group = channels.group(size, scan.groups);

  const RowCopy<T, kChannels> row_copy(
      scan.u.vector == 16 && scan.delta.vector == 16 && (!gated || p.z.vector == 16), channels,
      index, threads);
  const ColumnCopy<T, kTile> column_copy(scan.B, &scan.C, b, group, size.states, slices, index);
  const T* const u_rows = rows_of<T>(scan.u, b, channels.first);
  const T* const delta_rows = rows_of<T>(scan.delta, b, channels.first);
  const auto load = [&](T* u_tile) {
    const int t = time_of(own.at);
    const int count = own.stop - own.at;
    row_copy.copy(u_tile, u_rows, scan.u.stride_l, t, time_step, count);
    row_copy.copy(delta_tile, delta_rows, scan.delta.stride_l, t, time_step, count);
    column_copy.copy(raw_columns + index * kSlice, t, time_step, count);
  };

  const auto prepare = [&](const T* u_tile) {
    const int quad = index % kQuads;
    const Quad bias = Quad::load(parameters + 4 * quad);
    MMVIM_NO_UNROLL
    for (int r = index / kQuads; r < own.stop - own.at; r += threads / kQuads) {
      const int at = r * kChannels + 4 * quad;
      const Quad u = Quad::load(u_tile + at);
      const Quad raw = Quad::load(delta_tile + at);
      const Quad delta = Quad::of([&](int i) {
        const float x = raw.v[i] + bias.v[i];
        return size.softplus ? softplus<kFineSoftplus<T>>(x) : x;
      });
      delta.store(deltas + at);
      Quad::of([&](int i) {
        return R::kInputIsDelta ? u.v[i] * delta.v[i] : u.v[i];
      }).store(deltas + kTile * kChannels + at);
    }
    convert_columns<kTile>(columns, raw_columns, slices, index);
  };

  const auto gate = [&](const Quad& y, int at) {
    const Quad z = Quad::load(z_tile + at);
    return Quad::of([&](int i) { return y.v[i] * z.v[i] * logistic(z.v[i]); });
  };
  // Writes the outputs of `count` positions from `first`.
  const bool writes = p.out != nullptr || p.pregate != nullptr || p.sum_out != nullptr;
  const bool plain =
      !kPair && p.out != nullptr && p.sum_in == nullptr && p.pregate == nullptr && p.scale == 1.f;
  const auto finish = [&](const T* u_tile, int first, int count) {
    const int quad = index % kQuads;
    const Quad skip = Quad::load(parameters + kChannels + 4 * quad);
    const QuadRows<T> out(static_cast<T*>(p.out), size, b, channels, quad);
    const auto sum = [&](int at) {
      const Quad u = Quad::load(u_tile + at);
      const Quad y = Quad::sum<kTile * kChannels>(outputs + at, slices);
      return Quad::of([&](int i) { return gpu::fused(skip.v[i], u.v[i], y.v[i]); });
    };
    if (plain && out.whole) {
      MMVIM_NO_UNROLL
      for (int r = index / kQuads; r < count; r += threads / kQuads) {
        const int at = r * kChannels + 4 * quad;
        Quad y = sum(at);
        if (gated) y = gate(y, at);
        y.store(out.base + time_of(first + r) * out.stride);
      }
      return;
    }
    MMVIM_NO_UNROLL
    for (int r = index / kQuads; r < count; r += threads / kQuads) {
      const int at = r * kChannels + 4 * quad;
      const int t = time_of(first + r);
      Quad y = sum(at);
      if (kPair) {
        const QuadRows<float> meeting(p.meeting, size, b, channels, quad);
        if (first < half) {
          meeting.store(t, y);
          continue;
        }
        y.add(meeting.load_coherent(t));
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
      if (p.out == nullptr) continue;
      y = Quad::of([&](int i) { return y.v[i] * p.scale; });
      if (gated) y = gate(y, at);
      out.store(t, y);
    }
  };

  StateConstants constants[kCpt][kSlice];
  float h[kCpt][kSlice], v[kCpt][kSlice];
  load_states(h, scan.A, 0, size.pitch, size, channels, lane, slice);
  const bool quick = may_be_quick<T, kMethod>(h);
  set_constants<T, kMethod>(constants, h, quick);
  clear_states(h);
  clear_states(v);
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

  // Whether a pair's blocks have left their outputs.
  const auto flag_of = [&](int direction_) {
    const int64_t pair_index =
        (static_cast<int64_t>(chunk) * size.batch + b) * channel_blocks(size, kChannels) +
        gpu::block_y();
    return p.left + pair_index * 2 + direction_;
  };

  // An offset and not a pointer: ptxas 13.0 computes addresses of other tiles from a pointer that
  // changes, with its new value.
  int u_at = 0;
  load(u_tiles);
  load_parameters<kChannels>(parameters, scan.delta_bias, channels, index, threads);
  load_parameters<kChannels>(parameters + kChannels, scan.D, channels, index, threads);
  gpu::wait_for_copies();
  gpu::sync_block();
  prepare(u_tiles);
  gpu::sync_block();
  while (true) {
    const int first = own.at;
    const int count = own.stop - own.at;
    if (kPair && first == half && index == 0) {
      if (half > begin) gpu::publish(flag_of(direction));
      if (half < end) gpu::await(flag_of(1 - direction));
    }
    if (gated) {
      row_copy.copy(z_tile, rows_of<T>(p.z, b, channels.first), p.z.stride_l, time_of(first),
                    time_step, count);
    }
    if (!kPair && p.sum_in != nullptr) {
      Rows rows;
      rows.data = p.sum_in;
      rows.stride_b = static_cast<int64_t>(size.length) * size.channels;
      rows.stride_l = size.channels;
      prefetch_rows<float, kChannels>(rows, b, channels, time_of(first), time_step, count, index,
                                      threads);
    }
    own.advance(interval, sequences.up_to_start(own.stop, kTile, lane));
    load(u_tiles + (kTile * kChannels - u_at));

    if (sequences.start_at(first)) {
      clear_states(h);
      clear_states(v);
    }
    const float* step = deltas + lane * kCpt;
    const float* column = columns + slice * kTile * 2 * kSlice;
    float* output = outputs + slice * kTile * kChannels + lane * kCpt;
    by_steps<T, kMethod>(quick, [&](auto kind) {
      MMVIM_UNROLL_BY(kUnrolled)
      for (int i = 0; i < count; ++i) {
        float B[kSlice], C[kSlice], delta[kCpt], x[kCpt], y[kCpt];
        load_slice(B, column + i * 2 * kSlice);
        load_slice(C, column + i * 2 * kSlice + kSlice);
        load_lane(delta, step + i * kChannels);
        load_lane(x, step + (kTile + i) * kChannels);
        MMVIM_UNROLL
        for (int k = 0; k < kCpt; ++k) {
          const ChannelStep s = channel_step<kMethod>(delta[k]);
          y[k] = 0.f;
          MMVIM_UNROLL
          for (int j = 0; j < kSlice; ++j) {
            advance_state<kMethod, decltype(kind)::value>(h[k][j], v[k][j], s, constants[k][j],
                                                          x[k], B[j]);
            y[k] = gpu::fused(C[j], h[k][j], y[k]);
          }
        }
        store_lane(output + i * kChannels, y);
      }
    });
    if (own.until == interval && count > 0 && own.at < size.length) {
      const int64_t kept = (size.length - 1) / interval;
      store_states(h, p.checkpoints[direction], b * kept + own.at / interval - 1, size.pitch, size,
                   channels, lane, slice);
    }
    gpu::wait_for_copies();
    gpu::sync_block();
    if (writes) finish(u_tiles + u_at, first, count);
    if (own.at >= end) break;
    u_at = kTile * kChannels - u_at;
    prepare(u_tiles + u_at);
    gpu::sync_block();
  }

  // A pair of one time step: nothing follows the first half.
  if (kPair && half == end) {
    gpu::sync_block();
    if (index == 0) gpu::publish(flag_of(direction));
  }
  if (end == size.length && p.last[direction] != nullptr) {
    store_states(h, p.last[direction], b, p.last_pitch, size, channels, lane, slice);
    if (R::kTwoTap) {
      store_states(v, p.last_drive[direction], b, p.last_pitch, size, channels, lane, slice);
    }
  }
}

}  // namespace scan
}  // namespace mmvim
