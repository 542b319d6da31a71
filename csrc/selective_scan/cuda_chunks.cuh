// Chunks of the length that run side by side: each is scanned from zero, then the states that enter
// the chunks follow one from another. `kAdjoint` does so for the gradient of the state, against the
// scan's order.
#pragma once

#include "cuda_common.cuh"

namespace mmvim {
namespace scan {

constexpr int kLocalTile = 16;

struct LocalShared {
  int first, second, third, raw_columns, deltas, drives, columns, parameters, total;  // bytes

  MMVIM_HD LocalShared(int element, int slices, int channels) {
    const int rows = kLocalTile * channels;
    const int columns_of_tile = kLocalTile * slices * kSlice;
    first = 0;
    second = first + rows * element;
    third = second + rows * element;
    raw_columns = third + rows * element;
    deltas = raw_columns + columns_of_tile * element;
    drives = deltas + rows * 4;
    columns = drives + rows * 4;
    parameters = columns + columns_of_tile * 4;
    total = parameters + channels * 4;
  }
};

struct Local {
  Sizes size;
  Scan scan[2];
  int directions = 1;
  Rows z, grad_out;  // adjoint only
  float scale = 1.f;
  Chunks chunks;
  // Whether chunks are counted along time or, as in backward, in scan order.
  bool in_scan_order = false;
  const int32_t* seq_idx = nullptr;
};

// Positions [begin, end) of a chunk.
struct ChunkRange {
  int begin, end;

  MMVIM_DEVICE ChunkRange(const Sizes& size, const Chunks& chunks, int chunk, bool from_end) {
    begin = chunk * chunks.length;
    end = begin + smaller(size.length - begin, chunks.length);
    if (from_end) {
      const int first = size.length - end;
      end = size.length - begin;
      begin = first;
    }
  }
};

template <class T, Discretization kMethod, int kCpt, bool kAdjoint, bool kPacked = false>
MMVIM_KERNEL void MMVIM_REGISTERS(80) local_kernel(const MMVIM_GRID_CONSTANT Local p) {
  using R = Rule<kMethod, GpuMath>;
  constexpr int kChannels = 32 * kCpt;
  constexpr int kQuads = kChannels / 4;
  constexpr int kTile = kLocalTile;
  // The gradient of v leaves a chunk with the weight of its first step's second tap.
  constexpr bool kDrive = kAdjoint && R::kTwoTap;

  const Sizes& size = p.size;
  const int slices = slices_of(size);
  const int threads = 32 * slices;
  const int index = gpu::thread_index();
  const int lane = index % 32;
  const int slice = index / 32;

  const bool pair = p.directions == 2;
  const int direction = pair ? gpu::block_x() % 2 : 0;
  const int64_t b = pair ? gpu::block_x() / 2 : gpu::block_x();
  const Channels channels(size, gpu::block_y(), kChannels);
  const int chunk = gpu::block_z();

  const LocalShared layout(sizeof(T), slices, kChannels);
  char* const shared = gpu::shared_memory();
  T* const first_tile = reinterpret_cast<T*>(shared + layout.first);
  T* const second_tile = reinterpret_cast<T*>(shared + layout.second);
  T* const third_tile = reinterpret_cast<T*>(shared + layout.third);
  T* const raw_columns = reinterpret_cast<T*>(shared + layout.raw_columns);
  float* const deltas = reinterpret_cast<float*>(shared + layout.deltas);
  float* const columns = reinterpret_cast<float*>(shared + layout.columns);
  float* const parameters = reinterpret_cast<float*>(shared + layout.parameters);

  const Scan& scan = p.scan[direction];
  // Order of this walk: that of the scan, or against it.
  const bool reverse = scan.reverse != kAdjoint;
  const bool gated = kAdjoint && p.z.data != nullptr;
  const ChunkRange range(size, p.chunks, chunk, p.in_scan_order ? kAdjoint : scan.reverse);
  const int time_step = reverse ? -1 : 1;
  const auto time_of = [&](int position) {
    return reverse ? size.length - 1 - position : position;
  };

  const Sequences<kPacked> sequences(p.seq_idx, b, size, reverse);
  const int group = channels.group(size, scan.groups);

  const Rows& input = kAdjoint ? p.grad_out : scan.u;
  const Rows& column_rows = kAdjoint ? scan.C : scan.B;
  const RowCopy<T, kChannels> row_copy(
      scan.delta.vector == 16 && input.vector == 16 && (!gated || p.z.vector == 16), channels,
      index, threads);
  const ColumnCopy<T, kTile> column_copy(column_rows, nullptr, b, group, size.states, slices,
                                         index);
  const auto load = [&](int at, int count) {
    const int t = time_of(at);
    const auto copy = [&](T* tile, const Rows& rows) {
      row_copy.copy(tile, rows_of<T>(rows, b, channels.first), rows.stride_l, t, time_step, count);
    };
    copy(first_tile, scan.delta);
    copy(second_tile, input);
    if (gated) copy(third_tile, p.z);
    column_copy.copy(raw_columns + index * kSlice, t, time_step, count);
  };
  const auto prepare = [&](int count) {
    const int quad = index % kQuads;
    const Quad bias = Quad::load(parameters + 4 * quad);
    MMVIM_NO_UNROLL
    for (int r = index / kQuads; r < count; r += threads / kQuads) {
      const int at = r * kChannels + 4 * quad;
      const Quad raw = Quad::load(first_tile + at);
      const Quad delta = Quad::of([&](int i) {
        const float x = raw.v[i] + bias.v[i];
        return size.softplus ? softplus<kFineSoftplus<T>>(x) : x;
      });
      delta.store(deltas + at);
      Quad drive = Quad::load(second_tile + at);
      if (kAdjoint) {
        drive = Quad::of([&](int i) { return drive.v[i] * p.scale; });
        if (gated) {
          const Quad z = Quad::load(third_tile + at);
          drive = Quad::of([&](int i) { return drive.v[i] * z.v[i] * logistic(z.v[i]); });
        }
      } else if (R::kInputIsDelta) {
        drive = Quad::of([&](int i) { return drive.v[i] * delta.v[i]; });
      }
      drive.store(deltas + kTile * kChannels + at);
    }
    if (lane < kTile) {
      Quad::load(raw_columns + (lane * slices + slice) * kSlice)
          .store(columns + (slice * kTile + lane) * kSlice);
    }
  };

  StateConstants constants[kCpt][kSlice];
  float h[kCpt][kSlice], v[kCpt][kSlice], decay[kCpt][kSlice];
  float last_w1[kCpt][kSlice], sum[kCpt];
  load_states(h, scan.A, 0, size.pitch, size, channels, lane, slice);
  const bool quick = may_be_quick<T, kMethod>(h);
  set_constants<T, kMethod>(constants, h, quick);
  MMVIM_UNROLL
  for (int k = 0; k < kCpt; ++k) {
    sum[k] = 0.f;
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) {
      h[k][j] = v[k][j] = last_w1[k][j] = 0.f;
      decay[k][j] = 1.f;
    }
  }
  if (!kAdjoint && R::kTwoTap && !sequences.start_at(range.begin)) {
    if (range.begin > 0) {
      load_drive<T>(v, scan, size, b, time_of(range.begin - 1), channels, lane, slice);
    } else if (scan.initial_drive != nullptr) {
      load_states(v, scan.initial_drive, b, scan.initial_pitch, size, channels, lane, slice);
    }
  }

  const auto count_from = [&](int at) {
    return sequences.up_to_start(at, smaller(kTile, range.end - at), lane);
  };
  // Whether the chunk holds the start of a sequence, which what enters does not get past.
  bool cut = false;
  int count = count_from(range.begin);
  load(range.begin, count);
  load_parameters<kChannels>(parameters, scan.delta_bias, channels, index, threads);
  for (int at = range.begin; at < range.end;) {
    gpu::wait_for_copies();
    gpu::sync_block();
    prepare(count);
    gpu::sync_block();
    const int next = at + count;
    const int next_count = count_from(next);
    if (next_count > 0) load(next, next_count);

    const float* step = deltas + lane * kCpt;
    const float* column = columns + slice * kTile * kSlice;
    by_steps<T, kMethod>(quick, [&](auto kind) {
      constexpr bool kQuick = decltype(kind)::value;
      MMVIM_UNROLL_BY(4)
      for (int i = 0; i < count; ++i) {
        float B[kSlice], delta[kCpt], x[kCpt];
        load_slice(B, column + i * kSlice);
        load_lane(delta, step + i * kChannels);
        load_lane(x, step + (kTile + i) * kChannels);
        MMVIM_UNROLL
        for (int k = 0; k < kCpt; ++k) {
          const ChannelStep s = channel_step<kMethod>(delta[k]);
          sum[k] += delta[k];
          MMVIM_UNROLL
          for (int j = 0; j < kSlice; ++j) {
            const StateConstants& c = constants[k][j];
            if (!kAdjoint) {
              if (!R::kDecaysExponentially) decay[k][j] *= decay_of<kMethod, kQuick>(s, c);
              advance_state<kMethod, kQuick>(h[k][j], v[k][j], s, c, x[k], B[j]);
              continue;
            }
            // h is the gradient that reaches the state before this step.
            const float a = decay_of<kMethod, kQuick>(s, c);
            const float g = gpu::fused(B[j], x[k], h[k][j]);
            h[k][j] = a * g;
            if (kDrive) {
              const float w1 = weights_of<kMethod, kQuick>(a, s, c).w1;
              v[k][j] = w1 * g;
              last_w1[k][j] = w1 * decay[k][j];
            }
            if (kDrive || !R::kDecaysExponentially) decay[k][j] *= a;
          }
        }
      }
    });
    at = next;
    count = next_count;
    if (sequences.start_at(at)) {
      cut = true;
      clear_states(h);
      clear_states(v);
      clear_states(last_w1);
      clear_states(decay);
    }
  }
  if (R::kDecaysExponentially) {
    MMVIM_UNROLL
    for (int k = 0; k < kCpt; ++k) {
      MMVIM_UNROLL
      for (int j = 0; j < kSlice; ++j) {
        decay[k][j] = GpuMath::exp(sum[k] * constants[k][j].A);
      }
    }
  }
  if (cut) clear_states(decay);
  const int64_t to = (static_cast<int64_t>(direction) * p.chunks.count + chunk) * size.batch + b;
  store_states(h, p.chunks.state, to, size.pitch, size, channels, lane, slice);
  store_states(decay, p.chunks.decay, to, size.pitch, size, channels, lane, slice);
  if (kDrive) {
    store_states(v, p.chunks.drive, to, size.pitch, size, channels, lane, slice);
    store_states(last_w1, p.chunks.drive_decay, to, size.pitch, size, channels, lane, slice);
  }
}

// Puts what enters each chunk in place of what leaves it.
struct Carry {
  Sizes size;
  int directions = 1;
  bool backwards[2] = {};        // whether the walk meets the last chunk first
  const float* initial[2] = {};  // state or gradient that enters the first chunk, or null
  const float* initial_drive[2] = {};
  int initial_pitch = 0;
  Chunks chunks;
};
int launch_carry(const Carry& p, CUstream_st* stream);

}  // namespace scan
}  // namespace mmvim
