// The backward cross scan: each round starts from the state that forward kept.
#pragma once

#include "cuda_forward.cuh"
#include "cuda_one.cuh"

namespace mmvim {
namespace cross {

template <class T, Discretization kMethod>
MMVIM_KERNEL void MMVIM_REGISTERS(255) backward_kernel(const MMVIM_GRID_CONSTANT Backward p) {
  using R = Rule<kMethod, GpuMath>;
  constexpr float kUnscale = static_cast<float>(1.0 / R::kRateScale);
  const Problem& q = p.problem;
  float* const shared = reinterpret_cast<float*>(gpu::shared_memory());
  const Layout at(q, kBackwardPlanes, true);
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
  const T* const grad = static_cast<const T*>(p.grad_out) + map * q.channels;
  T* const dx = static_cast<T*>(p.dx) + map * q.channels;
  float skip[2];
  channels.sum_over_routes(skip, q.D, q);
  const int64_t of_routes = static_cast<int64_t>(q.routes) * q.channels;
  float* const parameters =
      p.parameters + (b * q.chunks + chunk) * (of_routes * (states + 1) + q.channels);

  int buffer = 0;
  for (int k = q.first_route; k < q.last_route; ++k) {
    if (k > q.first_route) gpu::sync_block();
    load_route<T, kMethod>(shared, at, q, k, first, thread, threads);
    load_entry<true>(shared + at.carry, q, k, b, chunk, first, thread, threads);
    for (int i = thread; i < q.warps * states * kGroup; i += threads) shared[at.dA + i] = 0.f;
    gpu::sync_block();
    const Route route(q, k);
    float dbias[2] = {0.f, 0.f}, dD[2] = {0.f, 0.f};
    MMVIM_NO_UNROLL
    for (int round = end - 1; round >= begin; --round) {
      const int step = (round * q.warps + warp) * kWarpSteps;
      const int count = q.length - step - tile * kTile;
      const int mine = route.position(step + lane);
      steps[lane] = mine;
      gpu::sync_warp();
      int positions[kTile];
      load_positions(positions, steps + tile * kTile);
      Packed<T, 2> u[kTile], dy[kTile];
      MMVIM_UNROLL
      for (int i = 0; i < kTile; ++i) {
        const int64_t row = static_cast<int64_t>(positions[i]) * q.channels;
        u[i] = channels.load(x + row);
        dy[i] = channels.load(grad + row);
        keep(dy[i], i < count ? channels.count : 0);
      }
      if (q.rank > 0) copy_columns<T>(rows, steps, q.delta, b, k, q.rank, lane);
      copy_columns<T>(rows + q.rank * kPitch, steps, q.B, b, k, states, lane);
      copy_columns<T>(rows + (q.rank + states) * kPitch, steps, q.C, b, k, states, lane);
      gpu::sync_warp();
      float delta[kTile][2], slope[kTile][2];
      step_sizes<T, true>(delta, slope, q, shared, at, own, positions, b, k, pair, channels, count);
      float to_input[kTile][2], to_delta[kTile][2];

      const float* const carry = shared + at.carry + ((end - 1 - round) & 1) * states * kGroup;
      float* const next = shared + at.carry + ((end - round) & 1) * states * kGroup;
      MMVIM_NO_UNROLL
      for (int j = 0; j < states; ++j) {
        const float2 rate = load_pair(shared + at.A + j * kGroup + 2 * pair);
        float h[kTile + 1][2] = {};
        if (round > 0) {
          const int64_t row = ((k * q.batch + b) * (q.rounds - 1) + round - 1) * q.channels;
          const float* const kept = p.checkpoints + (row + channels.c) * states + j;
          h[0][0] = kept[0];
          h[0][1] = kept[channels.next * states];
        }
        float a[kTile][2], column[kTile], other[kTile];
        load_tile(column, own + (q.rank + j) * kPitch);
        load_tile(other, own + (q.rank + states + j) * kPitch);
        Pass total = Pass::identity(), before;
        MMVIM_UNROLL
        for (int i = 0; i < kTile; ++i) {
          MMVIM_UNROLL
          for (int e = 0; e < 2; ++e) {
            const auto s = R::step(delta[i][e], e == 0 ? rate.x : rate.y);
            a[i][e] = s.a;
            h[i + 1][e] = s.w0 * (u[i].get(e) * column[i]);
            total.end[e] = gpu::fused(s.a, total.end[e], h[i + 1][e]);
            total.decay[e] *= s.a;
          }
        }
        Pass gradient{{total.decay[0], total.decay[1]}, {0.f, 0.f}}, behind;
        MMVIM_UNROLL
        for (int i = kTile - 1; i >= 0; --i) {
          MMVIM_UNROLL
          for (int e = 0; e < 2; ++e) {
            gradient.end[e] = a[i][e] * gpu::fused(other[i], dy[i].get(e), gradient.end[e]);
          }
        }
        scan_tiles<false>(total, before, lane);
        scan_tiles<true>(gradient, behind, lane);
        float* const passed =
            shared + at.passed + buffer * q.warps * kBackwardPlanes * kGroup + 2 * pair;
        buffer ^= 1;
        if (tile == 0) {
          store_pair(passed + warp * kBackwardPlanes * kGroup, total.decay[0], total.decay[1]);
          store_pair(passed + (warp * kBackwardPlanes + 1) * kGroup, total.end[0], total.end[1]);
          store_pair(passed + (warp * kBackwardPlanes + 2) * kGroup, gradient.end[0],
                     gradient.end[1]);
        }
        gpu::sync_block();
        float g[2];
        {
          const float2 entry = load_pair(carry + j * kGroup + 2 * pair);
          g[0] = entry.x;
          g[1] = entry.y;
        }
        MMVIM_UNROLL_BY(4)
        for (int w = 0; w < warp; ++w) {
          const float2 decay = load_pair(passed + w * kBackwardPlanes * kGroup);
          const float2 last = load_pair(passed + (w * kBackwardPlanes + 1) * kGroup);
          h[0][0] = gpu::fused(decay.x, h[0][0], last.x);
          h[0][1] = gpu::fused(decay.y, h[0][1], last.y);
        }
        MMVIM_UNROLL_BY(4)
        for (int w = q.warps - 1; w > warp; --w) {
          const float2 decay = load_pair(passed + w * kBackwardPlanes * kGroup);
          const float2 last = load_pair(passed + (w * kBackwardPlanes + 2) * kGroup);
          g[0] = gpu::fused(decay.x, g[0], last.x);
          g[1] = gpu::fused(decay.y, g[1], last.y);
        }
        if (warp == 0 && tile == 0) {
          store_pair(next + j * kGroup + 2 * pair,
                     gpu::fused(gradient.decay[0], g[0], gradient.end[0]),
                     gpu::fused(gradient.decay[1], g[1], gradient.end[1]));
        }
        before.apply(h[0]);
        behind.apply(g);
        load_tile(column, own + (q.rank + j) * kPitch);
        load_tile(other, own + (q.rank + states + j) * kPitch);
        MMVIM_UNROLL
        for (int i = 0; i < kTile; ++i) {
          h[i + 1][0] = gpu::fused(a[i][0], h[i][0], h[i + 1][0]);
          h[i + 1][1] = gpu::fused(a[i][1], h[i][1], h[i + 1][1]);
        }

        float sums[2 * kTile], pulled[2] = {0.f, 0.f};
        MMVIM_UNROLL
        for (int i = kTile - 1; i >= 0; --i) {
          sums[2 * i] = sums[2 * i + 1] = 0.f;
          MMVIM_UNROLL
          for (int e = 0; e < 2; ++e) {
            const float rate_e = e == 0 ? rate.x : rate.y, input = u[i].get(e);
            StepWithGrad<float> s;
            if constexpr (R::kInputIsDelta) {
              s.a = s.a_z = a[i][e];
              s.w0 = delta[i][e];
            } else {
              s = R::step_with_grad(delta[i][e], rate_e);
            }
            const float own_dy = dy[i].get(e);
            const float state = gpu::fused(other[i], own_dy, g[e]);
            const float to_drive = state * column[i];
            float by_z, by_delta;
            pull_back<R, GpuMath>(s, state * h[i][e], to_drive * input, 0.f, &by_z, &by_delta);
            by_delta = gpu::fused(by_z, kUnscale * rate_e, by_delta);
            pulled[e] = gpu::fused(by_z, delta[i][e], pulled[e]);
            to_input[i][e] = j == 0 ? s.w0 * to_drive : gpu::fused(s.w0, to_drive, to_input[i][e]);
            to_delta[i][e] = j == 0 ? by_delta : to_delta[i][e] + by_delta;
            sums[2 * i] = gpu::fused(s.w0 * input, state, sums[2 * i]);
            sums[2 * i + 1] = gpu::fused(own_dy, h[i + 1][e], sums[2 * i + 1]);
            g[e] = state * s.a;
          }
        }
        sum_over_channels(sums, lane);
        if (step + lane < q.length) {
          float* const to =
              p.dBC +
              ((((first / kGroup) * q.batch + b) * q.length + mine) * q.routes + k) * 2 * states;
          to[j] = sums[0];
          to[states + j] = sums[1];
        }
        sum_over_tiles(pulled);
        float* const total_dA = shared + at.dA + (warp * states + j) * kGroup + 2 * pair;
        if (tile == 0) {
          const float2 others = load_pair(total_dA);
          store_pair(total_dA, others.x + pulled[0], others.y + pulled[1]);
        }
      }

      MMVIM_UNROLL
      for (int i = 0; i < kTile; ++i) {
        if (i >= count) break;
        float raw[2];
        MMVIM_UNROLL
        for (int e = 0; e < 2; ++e) {
          raw[e] = to_delta[i][e] * slope[i][e];
          dbias[e] += raw[e];
          if (k == 0) dD[e] = gpu::fused(u[i].get(e), dy[i].get(e), dD[e]);
        }
        const int64_t token = map + positions[i];
        channels.store(static_cast<T*>(p.ddelta) + (token * q.routes + k) * q.channels, raw[0],
                       raw[1]);
        if (q.whole) {
          float* const sum = shared + at.sum + slot_of(positions[i]) + 2 * pair;
          if (k > 0) {
            const float2 others = load_pair(sum);
            to_input[i][0] += others.x;
            to_input[i][1] += others.y;
          }
          store_pair(sum, to_input[i][0], to_input[i][1]);
          continue;
        }
        if (k > 0) {
          const auto others = channels.load(q.sum + token * q.channels);
          to_input[i][0] += others.get(0);
          to_input[i][1] += others.get(1);
        }
        if (k + 1 < q.routes) {
          channels.store(q.sum + token * q.channels, to_input[i][0], to_input[i][1]);
        } else {
          channels.store(dx + static_cast<int64_t>(positions[i]) * q.channels,
                         gpu::fused(skip[0], dy[i].get(0), to_input[i][0]),
                         gpu::fused(skip[1], dy[i].get(1), to_input[i][1]));
        }
      }
    }

    gpu::sync_block();
    sum_over_tiles(dbias);
    sum_over_tiles(dD);
    float* const passed = shared + at.passed;
    if (tile == 0) {
      store_pair(passed + warp * kBackwardPlanes * kGroup + 2 * pair, dbias[0], dbias[1]);
      store_pair(passed + (warp * kBackwardPlanes + 1) * kGroup + 2 * pair, dD[0], dD[1]);
    }
    gpu::sync_block();
    const int rows_of_sums = 2 + states;
    for (int i = thread; i < rows_of_sums * kGroup; i += threads) {
      const int which = i / kGroup, c = first + i % kGroup;
      if (c >= q.channels || (which == 1 && k > 0)) continue;
      const float* const from = which < 2 ? passed + which * kGroup + i % kGroup
                                          : shared + at.dA + (which - 2) * kGroup + i % kGroup;
      const int pitch = which < 2 ? kBackwardPlanes * kGroup : states * kGroup;
      float total = 0.f;
      for (int w = 0; w < q.warps; ++w) total += from[w * pitch];
      const int64_t row = static_cast<int64_t>(k) * q.channels + c;
      if (which == 0) {
        parameters[of_routes * states + row] = total;
      } else if (which == 1) {
        parameters[of_routes * (states + 1) + c] = total;
      } else {
        parameters[row * states + which - 2] = total;
      }
    }
  }

  if (!q.whole) return;
  gpu::sync_block();
  MMVIM_UNROLL_BY(4)
  for (int i = thread / (kGroup / 2); i < q.length; i += threads / (kGroup / 2)) {
    const float2 sum = load_pair(shared + at.sum + slot_of(i) + 2 * pair);
    const auto dy = channels.load(grad + static_cast<int64_t>(i) * q.channels);
    channels.store(dx + static_cast<int64_t>(i) * q.channels, gpu::fused(skip[0], dy.get(0), sum.x),
                   gpu::fused(skip[1], dy.get(1), sum.y));
  }
}

constexpr int kFinishThreads = 256;
constexpr int kFinishColumns = 32;

MMVIM_HD int64_t finish_values(const Finish& p) { return p.rows * 2 * p.states; }
MMVIM_HD int64_t finish_parameters(const Finish& p) {
  return static_cast<int64_t>(p.channels) * (p.routes * (p.states + 1) + 1);
}

// Grid: blocks for dB and dC, a value for each thread; blocks for the parameters, kFinishColumns
// values each.
template <class T>
MMVIM_KERNEL void finish_kernel(const MMVIM_GRID_CONSTANT Finish p) {
  const int thread = gpu::thread_index();
  const int64_t values = finish_values(p);
  const int64_t blocks = (values + kFinishThreads - 1) / kFinishThreads;
  if (gpu::block_x() < blocks) {
    const int64_t i = static_cast<int64_t>(gpu::block_x()) * kFinishThreads + thread;
    if (i >= values) return;
    float total = 0.f;
    MMVIM_UNROLL_BY(4)
    for (int64_t part = 0; part < p.parts; ++part) total += p.dBC[part * values + i];
    const int64_t row = i / (2 * p.states);
    const int j = static_cast<int>(i - row * 2 * p.states);
    T* const to = static_cast<T*>(j < p.states ? p.dB : p.dC);
    to[row * p.states + (j < p.states ? j : j - p.states)] = from_float<T>(total);
    return;
  }
  float* const shared = reinterpret_cast<float*>(gpu::shared_memory());
  const int64_t columns = finish_parameters(p);
  const int64_t i = (gpu::block_x() - blocks) * kFinishColumns + thread % kFinishColumns;
  float part = 0.f;
  if (i < columns) {
    for (int64_t s = thread / kFinishColumns; s < p.slots; s += kFinishThreads / kFinishColumns) {
      part += p.parameters[s * columns + i];
    }
  }
  shared[thread] = part;
  gpu::sync_block();
  if (thread >= kFinishColumns || i >= columns) return;
  float total = 0.f;
  for (int n = thread; n < kFinishThreads; n += kFinishColumns) total += shared[n];
  const int64_t of_routes = static_cast<int64_t>(p.routes) * p.channels;
  if (i < of_routes * p.states) {
    p.dA[i] = total;
  } else if (i < of_routes * (p.states + 1)) {
    if (p.ddelta_bias != nullptr) p.ddelta_bias[i - of_routes * p.states] = total;
  } else if (p.dD != nullptr) {
    const int64_t c = i - of_routes * (p.states + 1);
    for (int k = 0; k < p.routes; ++k) p.dD[k * p.channels + c] = total;
  }
}

template <class T>
MMVIM_KERNEL void expand_kernel(const MMVIM_GRID_CONSTANT Expand p) {
  const int64_t width = static_cast<int64_t>(p.routes) * p.rank;
  const int64_t i = static_cast<int64_t>(gpu::block_x()) * kFinishThreads + gpu::thread_index();
  if (i >= width * p.routes * p.channels) return;
  const int64_t row = i / width, column = i - row * width;
  const int64_t k = row / p.channels, r = column - k * p.rank;
  float w = 0.f;
  if (r >= 0 && r < p.rank) {
    const int64_t from = row * p.rank + r;
    w = p.weight_is_float ? static_cast<const float*>(p.weight)[from]
                          : to_float(static_cast<const T*>(p.weight)[from]);
  }
  static_cast<T*>(p.out)[i] = from_float<T>(w);
}

template <class T>
int launch_backward_of(Discretization method, const Backward& p, CUstream_st* stream) {
  const Problem& q = p.problem;
  const int threads = 32 * q.warps;
  const int64_t bytes = shared_bytes(q, true);
  if (q.one) {
    return gpu::launch(q.whole ? one_backward_kernel<T, true> : one_backward_kernel<T, false>,
                       grid_of(q), threads, bytes, stream, p);
  }
  return by_method(method, [&](auto tag) {
    return gpu::launch(backward_kernel<T, decltype(tag)::value>, grid_of(q), threads, bytes, stream,
                       p);
  });
}

template <class T>
int launch_finish_of(const Finish& p, CUstream_st* stream) {
  const int64_t blocks = (finish_values(p) + kFinishThreads - 1) / kFinishThreads;
  const int64_t others =
      p.dA == nullptr ? 0 : (finish_parameters(p) + kFinishColumns - 1) / kFinishColumns;
  return gpu::launch(finish_kernel<T>, {blocks + others}, kFinishThreads,
                     kFinishThreads * sizeof(float), stream, p);
}

template <class T>
int launch_expand_of(const Expand& p, CUstream_st* stream) {
  const int64_t size = static_cast<int64_t>(p.routes) * p.routes * p.rank * p.channels;
  return gpu::launch(expand_kernel<T>, {(size + kFinishThreads - 1) / kFinishThreads},
                     kFinishThreads, 0, stream, p);
}

}  // namespace cross
}  // namespace mmvim
