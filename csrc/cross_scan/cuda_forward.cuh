// The forward cross scan, and what chunks of routes do to the states and their gradients.
#pragma once

#include "cuda_common.cuh"
#include "cuda_one.cuh"

namespace mmvim {
namespace cross {

template <class T, Discretization kMethod>
MMVIM_KERNEL void MMVIM_REGISTERS(255) forward_kernel(const MMVIM_GRID_CONSTANT Forward p) {
  using R = Rule<kMethod, GpuMath>;
  const Problem& q = p.problem;
  float* const shared = reinterpret_cast<float*>(gpu::shared_memory());
  const Layout at(q, kForwardPlanes, false);
  const int thread = gpu::thread_index(), threads = gpu::thread_count();
  const int lane = thread % 32, warp = thread / 32;
  const int pair = lane % (kGroup / 2), tile = lane / (kGroup / 2);
  const int groups = groups_of(q);
  const int64_t b = gpu::block_x() / groups;
  const int first = static_cast<int>(gpu::block_x() - b * groups) * kGroup;
  const ChannelPair channels(q, first, pair);
  const int chunk = gpu::block_y();
  const int begin = chunk * q.chunk_rounds;
  const int end = smaller(begin + q.chunk_rounds, q.rounds);
  const int states = q.states;

  float* const rows = shared + at.rows + warp * columns_of(q) * kPitch;
  int* const steps = reinterpret_cast<int*>(shared + at.positions) + warp * kWarpSteps;
  const float* const own = rows + tile * kTile;
  const int64_t map = b * q.length;
  const T* const x = static_cast<const T*>(q.x) + map * q.channels;
  T* const out = static_cast<T*>(p.out) + map * q.channels;
  float skip[2];
  channels.sum_over_routes(skip, q.D, q);

  int buffer = 0;
  for (int k = q.first_route; k < q.last_route; ++k) {
    if (k > q.first_route) gpu::sync_block();
    load_route<T, kMethod>(shared, at, q, k, first, thread, threads);
    load_entry<false>(shared + at.carry, q, k, b, chunk, first, thread, threads);
    gpu::sync_block();
    const Route route(q, k);
    MMVIM_NO_UNROLL
    for (int round = begin; round < end; ++round) {
      const int step = (round * q.warps + warp) * kWarpSteps;
      const int count = q.length - step - tile * kTile;
      steps[lane] = route.position(step + lane);
      gpu::sync_warp();
      int positions[kTile];
      load_positions(positions, steps + tile * kTile);
      Packed<T, 2> u[kTile];
      MMVIM_UNROLL
      for (int i = 0; i < kTile; ++i) {
        u[i] = channels.load(x + static_cast<int64_t>(positions[i]) * q.channels);
      }
      if (q.rank > 0) copy_columns<T>(rows, steps, q.delta, b, k, q.rank, lane);
      copy_columns<T>(rows + q.rank * kPitch, steps, q.B, b, k, states, lane);
      copy_columns<T>(rows + (q.rank + states) * kPitch, steps, q.C, b, k, states, lane);
      gpu::sync_warp();
      float delta[kTile][2], unused[1][2], y[kTile][2];
      step_sizes<T, false>(delta, unused, q, shared, at, own, positions, b, k, pair, channels,
                           count);

      const float* const carry = shared + at.carry + ((round - begin) & 1) * states * kGroup;
      float* const next = shared + at.carry + ((round - begin + 1) & 1) * states * kGroup;
      MMVIM_NO_UNROLL
      for (int j = 0; j < states; ++j) {
        const float2 rate = load_pair(shared + at.A + j * kGroup + 2 * pair);
        float a[kTile][2], drive[kTile][2], column[kTile];
        load_tile(column, own + (q.rank + j) * kPitch);
        Pass total = Pass::identity(), before;
        MMVIM_UNROLL
        for (int i = 0; i < kTile; ++i) {
          MMVIM_UNROLL
          for (int e = 0; e < 2; ++e) {
            const auto s = R::step(delta[i][e], e == 0 ? rate.x : rate.y);
            a[i][e] = s.a;
            drive[i][e] = s.w0 * (u[i].get(e) * column[i]);
            total.end[e] = gpu::fused(s.a, total.end[e], drive[i][e]);
            total.decay[e] *= s.a;
          }
        }
        scan_tiles<false>(total, before, lane);
        float* const passed = shared + at.passed + buffer * q.warps * 2 * kGroup + 2 * pair;
        buffer ^= 1;
        if (tile == 0) {
          store_pair(passed + warp * 2 * kGroup, total.decay[0], total.decay[1]);
          store_pair(passed + (warp * 2 + 1) * kGroup, total.end[0], total.end[1]);
        }
        gpu::sync_block();
        float h[2];
        {
          const float2 entry = load_pair(carry + j * kGroup + 2 * pair);
          h[0] = entry.x;
          h[1] = entry.y;
        }
        if (p.checkpoints != nullptr && round > 0 && warp == 0 && tile == 0) {
          const int64_t row = ((k * q.batch + b) * (q.rounds - 1) + round - 1) * q.channels;
          float* const kept = p.checkpoints + (row + channels.c) * states + j;
          if (channels.count > 0) kept[0] = h[0];
          if (channels.count > 1) kept[states] = h[1];
        }
        MMVIM_UNROLL_BY(4)
        for (int w = 0; w < warp; ++w) {
          const float2 decay = load_pair(passed + w * 2 * kGroup);
          const float2 last = load_pair(passed + (w * 2 + 1) * kGroup);
          h[0] = gpu::fused(decay.x, h[0], last.x);
          h[1] = gpu::fused(decay.y, h[1], last.y);
        }
        if (warp == q.warps - 1 && tile == 0) {
          store_pair(next + j * kGroup + 2 * pair, gpu::fused(total.decay[0], h[0], total.end[0]),
                     gpu::fused(total.decay[1], h[1], total.end[1]));
        }
        before.apply(h);
        load_tile(column, own + (q.rank + states + j) * kPitch);
        MMVIM_UNROLL
        for (int i = 0; i < kTile; ++i) {
          MMVIM_UNROLL
          for (int e = 0; e < 2; ++e) {
            h[e] = gpu::fused(a[i][e], h[e], drive[i][e]);
            y[i][e] = j == 0 ? column[i] * h[e] : gpu::fused(column[i], h[e], y[i][e]);
          }
        }
      }

      MMVIM_UNROLL
      for (int i = 0; i < kTile; ++i) {
        if (i >= count) break;
        if (q.whole) {
          float* const sum = shared + at.sum + slot_of(positions[i]) + 2 * pair;
          if (k > 0) {
            const float2 others = load_pair(sum);
            y[i][0] += others.x;
            y[i][1] += others.y;
          }
          store_pair(sum, y[i][0], y[i][1]);
          continue;
        }
        const int64_t row = (map + positions[i]) * q.channels;
        if (k > 0) {
          const auto others = channels.load(q.sum + row);
          y[i][0] += others.get(0);
          y[i][1] += others.get(1);
        }
        if (k + 1 < q.routes) {
          channels.store(q.sum + row, y[i][0], y[i][1]);
        } else {
          channels.store(out + static_cast<int64_t>(positions[i]) * q.channels,
                         gpu::fused(skip[0], u[i].get(0), y[i][0]),
                         gpu::fused(skip[1], u[i].get(1), y[i][1]));
        }
      }
    }
  }

  if (!q.whole) return;
  gpu::sync_block();
  MMVIM_UNROLL_BY(4)
  for (int i = thread / (kGroup / 2); i < q.length; i += threads / (kGroup / 2)) {
    const float2 sum = load_pair(shared + at.sum + slot_of(i) + 2 * pair);
    const auto u = channels.load(x + static_cast<int64_t>(i) * q.channels);
    channels.store(out + static_cast<int64_t>(i) * q.channels, gpu::fused(skip[0], u.get(0), sum.x),
                   gpu::fused(skip[1], u.get(1), sum.y));
  }
}

// What each chunk does to a state that enters it, or with kBackward to the gradient of a state that
// enters from behind. `source`: x or the gradient of the output. The warps of a block take
// neighbouring parts of the chunk. Grid: groups of all entries of the batch, chunks, routes.
template <class T, Discretization kMethod, bool kBackward>
MMVIM_DEVICE void run_local(const Problem& q, const void* source) {
  using R = Rule<kMethod, GpuMath>;
  float* const shared = reinterpret_cast<float*>(gpu::shared_memory());
  const Layout at(q, kForwardPlanes, false);
  const int thread = gpu::thread_index(), threads = gpu::thread_count();
  const int lane = thread % 32, warp = thread / 32;
  const int pair = lane % (kGroup / 2), tile = lane / (kGroup / 2);
  const int groups = groups_of(q);
  const int64_t b = gpu::block_x() / groups;
  const int first = static_cast<int>(gpu::block_x() - b * groups) * kGroup;
  const ChannelPair channels(q, first, pair);
  const int chunk = gpu::block_y(), k = gpu::block_z();
  const int states = q.states;
  const int rounds = smaller(q.chunk_rounds, q.rounds - chunk * q.chunk_rounds);

  float* const rows = shared + at.rows + warp * columns_of(q) * kPitch;
  int* const steps = reinterpret_cast<int*>(shared + at.positions) + warp * kWarpSteps;
  const float* const own = rows + tile * kTile;
  const T* const from = static_cast<const T*>(source) + b * q.length * q.channels;
  const Columns& matrix = kBackward ? q.C : q.B;
  // Of each warp and state: decay, end.
  float* const passed = shared + at.total + 2 * pair;
  load_route<T, kMethod>(shared, at, q, k, first, thread, threads);
  for (int i = thread; i < q.warps * states * 2 * kGroup; i += threads) {
    shared[at.total + i] = i / kGroup % 2 == 0 ? 1.f : 0.f;
  }
  gpu::sync_block();
  const Route route(q, k);
  MMVIM_NO_UNROLL
  for (int r = 0; r < rounds; ++r) {
    const int part = kBackward ? rounds - 1 - r : r;
    const int step = (chunk * q.chunk_rounds * q.warps + warp * rounds + part) * kWarpSteps;
    const int count = q.length - step - tile * kTile;
    gpu::sync_warp();
    steps[lane] = route.position(step + lane);
    gpu::sync_warp();
    int positions[kTile];
    load_positions(positions, steps + tile * kTile);
    Packed<T, 2> u[kTile];
    MMVIM_UNROLL
    for (int i = 0; i < kTile; ++i) {
      u[i] = channels.load(from + static_cast<int64_t>(positions[i]) * q.channels);
    }
    if (q.rank > 0) copy_columns<T>(rows, steps, q.delta, b, k, q.rank, lane);
    copy_columns<T>(rows + q.rank * kPitch, steps, matrix, b, k, states, lane);
    gpu::sync_warp();
    float delta[kTile][2], unused[1][2];
    step_sizes<T, false>(delta, unused, q, shared, at, own, positions, b, k, pair, channels, count);
    MMVIM_NO_UNROLL
    for (int j = 0; j < states; ++j) {
      const float2 rate = load_pair(shared + at.A + j * kGroup + 2 * pair);
      float column[kTile];
      load_tile(column, own + (q.rank + j) * kPitch);
      Pass total = Pass::identity(), before;
      MMVIM_UNROLL
      for (int n = 0; n < kTile; ++n) {
        const int i = kBackward ? kTile - 1 - n : n;
        MMVIM_UNROLL
        for (int e = 0; e < 2; ++e) {
          const auto s = R::step(delta[i][e], e == 0 ? rate.x : rate.y);
          const float input = i < count ? u[i].get(e) * column[i] : 0.f;
          total.end[e] = kBackward ? s.a * (total.end[e] + input)
                                   : gpu::fused(s.a, total.end[e], s.w0 * input);
          total.decay[e] *= s.a;
        }
      }
      scan_tiles<kBackward>(total, before, lane);
      if (tile == 0) {
        float* const own_passed = passed + (warp * states + j) * 2 * kGroup;
        const float2 decay = load_pair(own_passed), last = load_pair(own_passed + kGroup);
        store_pair(own_passed, decay.x * total.decay[0], decay.y * total.decay[1]);
        store_pair(own_passed + kGroup, gpu::fused(total.decay[0], last.x, total.end[0]),
                   gpu::fused(total.decay[1], last.y, total.end[1]));
      }
    }
  }
  gpu::sync_block();
  for (int i = thread; i < states * kGroup; i += threads) {
    const int j = i / kGroup, c = first + i % kGroup;
    if (c >= q.channels) continue;
    float decay = 1.f, last = 0.f;
    for (int n = 0; n < q.warps; ++n) {
      const int w = kBackward ? q.warps - 1 - n : n;
      const float* const one = shared + at.total + (w * states + j) * 2 * kGroup + i % kGroup;
      last = gpu::fused(one[0], last, one[kGroup]);
      decay *= one[0];
    }
    const int64_t plane = q.batch * q.channels * states;
    float* const result = q.local + (static_cast<int64_t>(k) * q.chunks + chunk) * plane +
                          (b * q.channels + c) * states + j;
    result[0] = decay;
    result[static_cast<int64_t>(q.routes) * q.chunks * plane] = last;
  }
}

template <class T, Discretization kMethod>
MMVIM_KERNEL void MMVIM_REGISTERS(128) local_kernel(const MMVIM_GRID_CONSTANT Forward p) {
  run_local<T, kMethod, false>(p.problem, p.problem.x);
}
template <class T, Discretization kMethod>
MMVIM_KERNEL void MMVIM_REGISTERS(128) local_backward_kernel(const MMVIM_GRID_CONSTANT Backward p) {
  run_local<T, kMethod, true>(p.problem, p.grad_out);
}

inline int64_t local_bytes(const Problem& p) {
  return 4 * (Layout(p, kForwardPlanes, false).total + int64_t{2} * p.warps * p.states * kGroup);
}
inline gpu::Grid grid_of(const Problem& p) { return {p.batch * groups_of(p), p.chunks, 1}; }

// Calls launch(method); methods of two taps have no kernels.
template <class F>
int by_method(Discretization method, F&& launch) {
  int error = static_cast<int>(cudaErrorNotSupported);
  with_discretization(method, [&](auto tag) {
    if constexpr (!is_two_tap(decltype(tag)::value)) error = launch(tag);
  });
  return error;
}

template <class T>
int launch_forward_of(Discretization method, const Forward& p, CUstream_st* stream) {
  const Problem& q = p.problem;
  const int threads = 32 * q.warps;
  const int64_t bytes = shared_bytes(q, false);
  if (q.one) {
    return gpu::launch(q.whole ? one_forward_kernel<T, true> : one_forward_kernel<T, false>,
                       grid_of(q), threads, bytes, stream, p);
  }
  return by_method(method, [&](auto tag) {
    return gpu::launch(forward_kernel<T, decltype(tag)::value>, grid_of(q), threads, bytes, stream,
                       p);
  });
}

template <class T>
int launch_local_of(Discretization method, const Forward& p, CUstream_st* stream) {
  const Problem& q = p.problem;
  const gpu::Grid grid{grid_of(q).x, q.chunks, q.routes};
  if (q.one) {
    return gpu::launch(one_local_kernel<T>, grid, 32 * q.warps, shared_bytes(q, false), stream, p);
  }
  return by_method(method, [&](auto tag) {
    return gpu::launch(local_kernel<T, decltype(tag)::value>, grid, 32 * q.warps, local_bytes(q),
                       stream, p);
  });
}

template <class T>
int launch_local_of(Discretization method, const Backward& p, CUstream_st* stream) {
  const Problem& q = p.problem;
  const gpu::Grid grid{grid_of(q).x, q.chunks, q.routes};
  if (q.one) {
    return gpu::launch(one_local_backward_kernel<T>, grid, 32 * q.warps, shared_bytes(q, false),
                       stream, p);
  }
  return by_method(method, [&](auto tag) {
    return gpu::launch(local_backward_kernel<T, decltype(tag)::value>, grid, 32 * q.warps,
                       local_bytes(q), stream, p);
  });
}

}  // namespace cross
}  // namespace mmvim
