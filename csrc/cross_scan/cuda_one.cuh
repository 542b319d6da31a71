// The cross scan of one state by zero-order hold with softplus, of multiples of four channels, with
// step sizes of low rank that lie beside B and C: VMamba's.
//
// A lane owns kOneTile steps of four channels. Step sizes come from the tensor cores (from plain
// products for float), whose rows are given the steps in such an order that the results lie where
// they are used. Parameters of all routes stay in shared memory.
#pragma once

#include "cuda_common.cuh"

namespace mmvim {
namespace cross {

constexpr int kOneTile = 4;
constexpr int kQuads = kGroup / 4;

// Whether step sizes come from the tensor cores, 16 columns at a time.
template <class T>
constexpr bool kOnMatrixUnit = sizeof(T) == 2;
template <class T>
MMVIM_HD int weights_of(int rank) {
  return kOnMatrixUnit<T> ? (rank + 15) / 16 * 128 : rank * kGroup;
}

// Shared memory in floats.
struct OneLayout {
  int sum, places, passed, carry, parameters, per_route, total;

  MMVIM_HD OneLayout(const Problem& p, int planes, int weights) {
    sum = 0;
    places = p.whole ? p.slots * kGroup : 0;
    passed = places + p.warps * kWarpSteps;
    carry = passed + 2 * p.warps * planes * kGroup;
    parameters = carry + 2 * kGroup;
    // Weights, bias, A.
    per_route = weights + 2 * kGroup;
    total = parameters + (p.last_route - p.first_route) * per_route;
  }
};

// The position of a step, and above kPlaceBits where its sum lies in shared memory.
constexpr int kPlaceBits = 15;

MMVIM_DEVICE int divided(int t, uint32_t magic, int shift) {
  return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(t)) * magic) >> shift);
}
// Tiles of a warp, kOneTile steps apart in either direction, lie in different banks.
MMVIM_DEVICE int one_slot(int position, int row) {
  const int slot = position + row / kOneTile;
  return slot ^ (slot / kOneTile & 1);
}

template <bool kWhole>
MMVIM_DEVICE int place_of(const Problem& p, int k, int step) {
  step = smaller(step, p.length - 1);
  const int t = p.route[k] & 2 ? p.length - 1 - step : step;
  int position = t, row = 0;
  if (p.route[k] & 1) {
    const int column = divided(t, p.magic_height, p.shift_height);
    row = t - column * p.height;
    position = row * p.width + column;
  } else if (kWhole) {
    row = divided(t, p.magic_width, p.shift_width);
  }
  return kWhole ? position | one_slot(position, row) << kPlaceBits : position;
}

// Values of the lane's channels.
struct Four {
  float v[4];

  static MMVIM_DEVICE Four load(const float* p) {
    const float4 x = *reinterpret_cast<const float4*>(p);
    return {{x.x, x.y, x.z, x.w}};
  }
  MMVIM_DEVICE void store(float* p) const {
    *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
  }
  template <class T>
  MMVIM_DEVICE void store_as(T* p) const {
    Packed<T, 4> x;
    MMVIM_UNROLL
    for (int e = 0; e < 4; ++e) x.set(e, v[e]);
    x.store(p);
  }
};
MMVIM_DEVICE Four each(float x) { return {{x, x, x, x}}; }
// a b + c
MMVIM_DEVICE Four fused(const Four& a, const Four& b, const Four& c) {
  Four r;
  MMVIM_UNROLL
  for (int e = 0; e < 4; ++e) r.v[e] = gpu::fused(a.v[e], b.v[e], c.v[e]);
  return r;
}
MMVIM_DEVICE Four exchanged(const Four& x, int mask) {
  Four r;
  MMVIM_UNROLL
  for (int e = 0; e < 4; ++e) r.v[e] = gpu::exchange_xor(x.v[e], mask);
  return r;
}

// A raw step size of which none is left, nor of its slope.
constexpr float kNoStep = -1e30f;

// log2(1 + 2^x): softplus in base 2, where kLn2 times x would be its argument.
template <class T>
MMVIM_DEVICE float softplus2(float x) {
  if constexpr (kFineSoftplus<T>) return kLog2e * softplus<true>(kLn2 * x);
  const float e = gpu::exp2(fminf(x, 126.f));
  const float small = e * gpu::fused(e, -0.5f * kLog2e, kLog2e);
  return e < 0.00390625f ? small : fmaxf(gpu::log2(1.f + e), x);
}

template <class T, bool kWhole>
struct OneBlock {
  const Problem& q;
  const OneLayout at;
  float* const shared;
  int thread, threads, lane, warp, quad, tile, first, c;
  int64_t b;
  bool present;
  int chunk, begin, end;
  int* places;
  const T *x, *columns;

  MMVIM_DEVICE OneBlock(const Problem& p, int planes)
      : q(p),
        at(p, planes, weights_of<T>(p.rank)),
        shared(reinterpret_cast<float*>(gpu::shared_memory())),
        thread(gpu::thread_index()),
        threads(gpu::thread_count()),
        lane(thread % 32),
        warp(thread / 32),
        quad(lane % kQuads),
        tile(lane / kQuads),
        chunk(gpu::block_y()) {
    const int groups = groups_of(q);
    b = gpu::block_x() / groups;
    first = static_cast<int>(gpu::block_x() - b * groups) * kGroup;
    // Lanes without channels follow the last ones, and store nothing.
    present = first + 4 * quad < q.channels;
    c = present ? first + 4 * quad : q.channels - 4;
    begin = chunk * q.chunk_rounds;
    end = smaller(begin + q.chunk_rounds, q.rounds);
    places = reinterpret_cast<int*>(shared + at.places) + warp * kWarpSteps;
    x = static_cast<const T*>(q.x) + b * q.length * q.channels + c;
    columns = static_cast<const T*>(q.delta.data) + b * q.delta.stride_b;
  }

  MMVIM_DEVICE float weight(int k, int channel, int r) const {
    if (channel >= q.channels || r >= q.rank) return 0.f;
    const int64_t i = (static_cast<int64_t>(k) * q.channels + channel) * q.rank + r;
    return q.weight_is_float ? static_cast<const float*>(q.weight)[i]
                             : to_float(static_cast<const T*>(q.weight)[i]);
  }
  // Of all routes of the launch.
  MMVIM_DEVICE void load_parameters() const {
    const int weights = at.per_route - 2 * kGroup;
    for (int k = q.first_route; k < q.last_route; ++k) {
      float* const to = shared + at.parameters + (k - q.first_route) * at.per_route;
      MMVIM_UNROLL_BY(2)
      for (int i = thread; i < weights; i += threads) {
        if constexpr (kOnMatrixUnit<T>) {
          // Word i % 4 of lane i / 4 % 32: rows 2q, or 2q + 8, of column g of the left or right
          // half.
          const int g = i / 16 % 8, column = first + g / 2 * 4 + i / 2 % 2 * 2 + g % 2;
          const int r = i / 128 * 16 + i / 4 % 4 * 2 + i % 2 * 8;
          Packed<T, 2> pair;
          pair.set(0, weight(k, column, r));
          pair.set(1, weight(k, column, r + 1));
          reinterpret_cast<uint32_t*>(to)[i] = pair.raw;
        } else {
          to[i] = weight(k, first + i % kGroup, i / kGroup);
        }
      }
      for (int i = thread; i < kGroup; i += threads) {
        const bool inside = first + i < q.channels;
        const int parameter = k * q.channels + first + i;
        to[weights + i] = q.delta_bias != nullptr && inside ? q.delta_bias[parameter] : 0.f;
        to[weights + kGroup + i] = inside ? q.A[parameter] : -1.f;
      }
    }
  }
  MMVIM_DEVICE const float* parameters(int k) const {
    return shared + at.parameters + (k - q.first_route) * at.per_route;
  }
  MMVIM_DEVICE Four bias(const float* parameter) const {
    return Four::load(parameter + at.per_route - 2 * kGroup + 4 * quad);
  }
  MMVIM_DEVICE Four A(const float* parameter) const {
    return Four::load(parameter + at.per_route - kGroup + 4 * quad);
  }
  // Sum over all routes of a parameter (k, d).
  MMVIM_DEVICE Four sum_over_routes(const float* data) const {
    Four sum = each(0.f);
    for (int k = 0; data != nullptr && k < q.routes; ++k) {
      MMVIM_UNROLL
      for (int e = 0; e < 4; ++e) sum.v[e] += data[k * q.channels + c + e];
    }
    return sum;
  }

  static MMVIM_DEVICE int position(int place) {
    return kWhole ? place & ((1 << kPlaceBits) - 1) : place;
  }
  MMVIM_DEVICE float* sum_at(int place) const {
    return shared + at.sum + (place >> kPlaceBits) * kGroup + 4 * quad;
  }
  template <class U>
  MMVIM_DEVICE U* row(U* from, int position) const {
    return from + static_cast<int64_t>(position) * q.channels;
  }
  MMVIM_DEVICE Packed<T, 4> load(const T* from, int position) const {
    Packed<T, 4> v;
    v.raw = *reinterpret_cast<const typename Packed<T, 4>::Raw*>(row(from, position));
    return v;
  }

  // The places of the warp's steps; the lane's own, and those of its tile.
  MMVIM_DEVICE int find_places(int (&place)[kOneTile], int k, int round) const {
    const int mine = place_of<kWhole>(q, k, (round * q.warps + warp) * kWarpSteps + lane);
    gpu::sync_warp();
    places[lane] = mine;
    gpu::sync_warp();
    const int4 p = *reinterpret_cast<const int4*>(places + tile * kOneTile);
    place[0] = p.x;
    place[1] = p.y;
    place[2] = p.z;
    place[3] = p.w;
    return mine;
  }

  // Raw step sizes times log2(e), and B times ln 2 and C, of the tile.
  MMVIM_DEVICE void load_columns(Four (&delta)[kOneTile], float (&B)[kOneTile],
                                 float (&C)[kOneTile], const int (&place)[kOneTile], int k,
                                 const float* parameter) const {
    const T* from[kOneTile];
    MMVIM_UNROLL
    for (int i = 0; i < kOneTile; ++i) {
      from[i] = columns + k * q.delta.stride_k +
                static_cast<int64_t>(position(place[i])) * q.delta.stride;
    }
    const Four first_value = bias(parameter);
    if constexpr (kOnMatrixUnit<T>) {
      Packed<T, 2> columns_of_states[kOneTile];
      MMVIM_UNROLL
      for (int i = 0; i < kOneTile; ++i) {
        columns_of_states[i].raw = *reinterpret_cast<const uint32_t*>(from[i] + q.rank);
      }
      // Of steps 0 and 1, then 2 and 3; of channels 0 and 1, then 2 and 3.
      float sums[2][2][4];
      MMVIM_UNROLL
      for (int half = 0; half < 2; ++half) {
        MMVIM_UNROLL
        for (int m = 0; m < 2; ++m) {
          MMVIM_UNROLL
          for (int e = 0; e < 4; ++e) sums[m][half][e] = first_value.v[2 * half + e % 2];
        }
      }
      MMVIM_NO_UNROLL
      for (int r = 0; r < q.rank; r += 16) {
        uint32_t a[2][4];
        MMVIM_UNROLL
        for (int i = 0; i < kOneTile; ++i) {
          MMVIM_UNROLL
          for (int n = 0; n < 2; ++n) {
            const int column = r + 8 * n + 2 * quad;
            a[i / 2][i % 2 + 2 * n] =
                column < q.rank ? *reinterpret_cast<const uint32_t*>(from[i] + column) : 0u;
          }
        }
        const uint4 w = *reinterpret_cast<const uint4*>(parameter + r * 8 + lane * 4);
        MMVIM_UNROLL
        for (int m = 0; m < 2; ++m) {
#if MMVIM_MATRIX_ADDER
          gpu::multiply_16x8x16<T>(sums[m][0], a[m], w.x, w.y);
          gpu::multiply_16x8x16<T>(sums[m][1], a[m], w.z, w.w);
#endif
        }
      }
      MMVIM_UNROLL
      for (int i = 0; i < kOneTile; ++i) {
        MMVIM_UNROLL
        for (int e = 0; e < 4; ++e) {
          delta[i].v[e] = kLog2e * sums[i / 2][e / 2][i % 2 * 2 + e % 2];
        }
        B[i] = kLn2 * columns_of_states[i].get(0);
        C[i] = columns_of_states[i].get(1);
      }
    } else {
      MMVIM_UNROLL
      for (int i = 0; i < kOneTile; ++i) {
        delta[i] = first_value;
        B[i] = kLn2 * from[i][q.rank];
        C[i] = from[i][q.rank + 1];
      }
      MMVIM_UNROLL_BY(2)
      for (int r = 0; r < q.rank; ++r) {
        const Four w = Four::load(parameter + r * kGroup + 4 * quad);
        MMVIM_UNROLL
        for (int i = 0; i < kOneTile; ++i) delta[i] = fused(w, each(from[i][r]), delta[i]);
      }
      MMVIM_UNROLL
      for (int i = 0; i < kOneTile; ++i) {
        MMVIM_UNROLL
        for (int e = 0; e < 4; ++e) delta[i].v[e] *= kLog2e;
      }
    }
  }
};

// What a part of a route does to a state, and to the gradient of one from behind.
struct OnePass {
  Four decay, end, gradient;
};

// Makes `total`, of a tile, that of all tiles of the warp; `before` and, kBackward, `behind` become
// what the tiles before and behind the lane's do.
template <bool kBackward>
MMVIM_DEVICE void scan_warp(OnePass& total, OnePass& before, OnePass& behind, int lane) {
  before = behind = {each(1.f), each(0.f), each(0.f)};
  MMVIM_UNROLL
  for (int mask = kQuads; mask < 32; mask *= 2) {
    const bool upper = lane & mask;
    const Four decay = exchanged(total.decay, mask), end = exchanged(total.end, mask);
    Four gradient;
    if (kBackward) gradient = exchanged(total.gradient, mask);
    MMVIM_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (upper) {
        before.end.v[e] = gpu::fused(before.decay.v[e], end.v[e], before.end.v[e]);
        before.decay.v[e] *= decay.v[e];
        total.end.v[e] = gpu::fused(total.decay.v[e], end.v[e], total.end.v[e]);
      } else {
        total.end.v[e] = gpu::fused(decay.v[e], total.end.v[e], end.v[e]);
      }
      if (kBackward) {
        if (!upper) {
          behind.gradient.v[e] = gpu::fused(behind.decay.v[e], gradient.v[e], behind.gradient.v[e]);
          behind.decay.v[e] *= decay.v[e];
          total.gradient.v[e] = gpu::fused(total.decay.v[e], gradient.v[e], total.gradient.v[e]);
        } else {
          total.gradient.v[e] = gpu::fused(decay.v[e], total.gradient.v[e], gradient.v[e]);
        }
      }
      total.decay.v[e] *= decay.v[e];
    }
  }
}

template <class T, bool kWhole>
MMVIM_KERNEL void MMVIM_REGISTERS(128) one_forward_kernel(const MMVIM_GRID_CONSTANT Forward p) {
  const Problem& q = p.problem;
  const OneBlock<T, kWhole> block(q, kForwardPlanes);
  float* const shared = block.shared;
  const int lane = block.lane, warp = block.warp, quad = block.quad, tile = block.tile;
  const int64_t map = block.b * q.length;
  T* const out = static_cast<T*>(p.out) + map * q.channels + block.c;
  float* const sum = kWhole ? nullptr : q.sum + map * q.channels + block.c;
  const Four skip = block.sum_over_routes(q.D);

  block.load_parameters();
  int buffer = 0;
  for (int k = q.first_route; k < q.last_route; ++k) {
    gpu::sync_block();
    load_entry<false>(shared + block.at.carry, q, k, block.b, block.chunk, block.first,
                      block.thread, block.threads);
    const float* const parameter = block.parameters(k);
    MMVIM_NO_UNROLL
    for (int round = block.begin; round < block.end; ++round) {
      const int count = q.length - (round * q.warps + warp) * kWarpSteps - tile * kOneTile;
      int place[kOneTile];
      block.find_places(place, k, round);
      Packed<T, 4> u[kOneTile];
      MMVIM_UNROLL
      for (int i = 0; i < kOneTile; ++i) u[i] = block.load(block.x, block.position(place[i]));
      Four a[kOneTile], drive[kOneTile];
      float B[kOneTile], C[kOneTile];
      block.load_columns(a, B, C, place, k, parameter);
      const Four A = block.A(parameter);
      OnePass total{each(1.f), each(0.f), each(0.f)}, before, behind;
      MMVIM_UNROLL
      for (int i = 0; i < kOneTile; ++i) {
        MMVIM_UNROLL
        for (int e = 0; e < 4; ++e) {
          const float step = softplus2<T>(i < count ? a[i].v[e] : kNoStep);
          a[i].v[e] = gpu::exp2(step * A.v[e]);
          drive[i].v[e] = step * (u[i].get(e) * B[i]);
          total.end.v[e] = gpu::fused(a[i].v[e], total.end.v[e], drive[i].v[e]);
          total.decay.v[e] *= a[i].v[e];
        }
      }
      scan_warp<false>(total, before, behind, lane);
      const int parity = (round - block.begin) & 1;
      float* const passed =
          shared + block.at.passed + buffer * q.warps * kForwardPlanes * kGroup + 4 * quad;
      buffer ^= 1;
      if (tile == 0) {
        total.decay.store(passed + warp * kForwardPlanes * kGroup);
        total.end.store(passed + (warp * kForwardPlanes + 1) * kGroup);
      }
      gpu::sync_block();
      Four h = Four::load(shared + block.at.carry + parity * kGroup + 4 * quad);
      if (p.checkpoints != nullptr && round > 0 && warp == 0 && tile == 0 && block.present) {
        const int64_t row = ((k * q.batch + block.b) * (q.rounds - 1) + round - 1) * q.channels;
        h.store(p.checkpoints + row + block.c);
      }
      MMVIM_UNROLL_BY(4)
      for (int w = 0; w < warp; ++w) {
        h = fused(Four::load(passed + w * kForwardPlanes * kGroup), h,
                  Four::load(passed + (w * kForwardPlanes + 1) * kGroup));
      }
      if (warp == q.warps - 1 && tile == 0) {
        fused(total.decay, h, total.end)
            .store(shared + block.at.carry + (parity ^ 1) * kGroup + 4 * quad);
      }
      h = fused(before.decay, h, before.end);
      MMVIM_UNROLL
      for (int i = 0; i < kOneTile; ++i) {
        h = fused(a[i], h, drive[i]);
        MMVIM_UNROLL
        for (int e = 0; e < 4; ++e) drive[i].v[e] = C[i] * h.v[e];
      }
      MMVIM_UNROLL
      for (int i = 0; i < kOneTile; ++i) {
        if constexpr (kWhole) {
          float* const to = block.sum_at(place[i]);
          if (i < count) {
            Four y = drive[i];
            if (k > 0) y = fused(each(1.f), y, Four::load(to));
            y.store(to);
          }
        } else if (i < count && block.present) {
          float* const to = block.row(sum, place[i]);
          Four y = drive[i];
          if (k > 0) y = fused(each(1.f), y, Four::load(to));
          if (k + 1 < q.routes) {
            y.store(to);
          } else {
            MMVIM_UNROLL
            for (int e = 0; e < 4; ++e) y.v[e] = gpu::fused(skip.v[e], u[i].get(e), y.v[e]);
            y.store_as(block.row(out, place[i]));
          }
        }
      }
    }
  }

  if constexpr (kWhole) {
    gpu::sync_block();
    if (!block.present) return;
    const int stride = block.threads / kQuads;
    MMVIM_UNROLL_BY(4)
    for (int i = block.thread / kQuads; i < q.length; i += stride) {
      const int slot = one_slot(i, divided(i, q.magic_width, q.shift_width));
      Four y = Four::load(shared + block.at.sum + slot * kGroup + 4 * quad);
      const auto u = block.load(block.x, i);
      MMVIM_UNROLL
      for (int e = 0; e < 4; ++e) y.v[e] = gpu::fused(skip.v[e], u.get(e), y.v[e]);
      y.store_as(block.row(out, i));
    }
  }
}

template <class T, bool kWhole>
MMVIM_KERNEL void MMVIM_REGISTERS(128) one_backward_kernel(const MMVIM_GRID_CONSTANT Backward p) {
  const Problem& q = p.problem;
  const OneBlock<T, kWhole> block(q, kBackwardPlanes);
  float* const shared = block.shared;
  const int lane = block.lane, warp = block.warp, quad = block.quad, tile = block.tile;
  const int64_t map = block.b * q.length;
  const T* const grad = static_cast<const T*>(p.grad_out) + map * q.channels + block.c;
  T* const dx = static_cast<T*>(p.dx) + map * q.channels + block.c;
  float* const sum = kWhole ? nullptr : q.sum + map * q.channels + block.c;
  const Four skip = block.sum_over_routes(q.D);
  const int64_t of_routes = static_cast<int64_t>(q.routes) * q.channels;
  float* const parameters =
      p.parameters + (block.b * q.chunks + block.chunk) * (2 * of_routes + q.channels);
  float* const dBC = p.dBC + ((block.first / kGroup) * q.batch + block.b) * q.length * q.routes * 2;

  block.load_parameters();
  int buffer = 0;
  for (int k = q.first_route; k < q.last_route; ++k) {
    gpu::sync_block();
    load_entry<true>(shared + block.at.carry, q, k, block.b, block.chunk, block.first, block.thread,
                     block.threads);
    const float* const parameter = block.parameters(k);
    T* const ddelta = static_cast<T*>(p.ddelta) + (map * q.routes + k) * q.channels + block.c;
    Four dA = each(0.f), dbias = each(0.f), dD = each(0.f);
    MMVIM_NO_UNROLL
    for (int round = block.end - 1; round >= block.begin; --round) {
      const int step = (round * q.warps + warp) * kWarpSteps;
      const int count = q.length - step - tile * kOneTile;
      int place[kOneTile];
      const int mine = block.position(block.find_places(place, k, round));
      Packed<T, 4> u[kOneTile], dy[kOneTile];
      MMVIM_UNROLL
      for (int i = 0; i < kOneTile; ++i) {
        u[i] = block.load(block.x, block.position(place[i]));
        dy[i] = block.load(grad, block.position(place[i]));
      }
      Four h[kOneTile + 1];
      h[0] = each(0.f);
      if (round > 0) {
        const int64_t row = ((k * q.batch + block.b) * (q.rounds - 1) + round - 1) * q.channels;
        h[0] = Four::load(p.checkpoints + row + block.c);
      }
      Four delta[kOneTile], slope[kOneTile], a[kOneTile];
      float B[kOneTile], C[kOneTile];
      block.load_columns(delta, B, C, place, k, parameter);
      const Four A = block.A(parameter);
      OnePass total{each(1.f), each(0.f), each(0.f)}, before, behind;
      MMVIM_UNROLL
      for (int i = 0; i < kOneTile; ++i) {
        if (i >= count || !block.present) dy[i] = Packed<T, 4>::zero();
        MMVIM_UNROLL
        for (int e = 0; e < 4; ++e) {
          const float raw = i < count ? delta[i].v[e] : kNoStep;
          const float exponential = gpu::exp2(-fabsf(raw));
          const float r = gpu::reciprocal(1.f + exponential);
          slope[i].v[e] = raw < 0.f ? exponential * r : r;
          delta[i].v[e] = softplus2<T>(raw);
          a[i].v[e] = gpu::exp2(delta[i].v[e] * A.v[e]);
          h[i + 1].v[e] = delta[i].v[e] * (u[i].get(e) * B[i]);
          total.end.v[e] = gpu::fused(a[i].v[e], total.end.v[e], h[i + 1].v[e]);
          total.decay.v[e] *= a[i].v[e];
        }
      }
      MMVIM_UNROLL
      for (int i = kOneTile - 1; i >= 0; --i) {
        MMVIM_UNROLL
        for (int e = 0; e < 4; ++e) {
          total.gradient.v[e] = a[i].v[e] * gpu::fused(C[i], dy[i].get(e), total.gradient.v[e]);
        }
      }
      scan_warp<true>(total, before, behind, lane);
      const int parity = (block.end - 1 - round) & 1;
      float* const passed =
          shared + block.at.passed + buffer * q.warps * kBackwardPlanes * kGroup + 4 * quad;
      buffer ^= 1;
      if (tile == 0) {
        total.decay.store(passed + warp * kBackwardPlanes * kGroup);
        total.end.store(passed + (warp * kBackwardPlanes + 1) * kGroup);
        total.gradient.store(passed + (warp * kBackwardPlanes + 2) * kGroup);
      }
      gpu::sync_block();
      Four g = Four::load(shared + block.at.carry + parity * kGroup + 4 * quad);
      MMVIM_UNROLL_BY(4)
      for (int w = 0; w < warp; ++w) {
        h[0] = fused(Four::load(passed + w * kBackwardPlanes * kGroup), h[0],
                     Four::load(passed + (w * kBackwardPlanes + 1) * kGroup));
      }
      MMVIM_UNROLL_BY(4)
      for (int w = q.warps - 1; w > warp; --w) {
        g = fused(Four::load(passed + w * kBackwardPlanes * kGroup), g,
                  Four::load(passed + (w * kBackwardPlanes + 2) * kGroup));
      }
      if (warp == 0 && tile == 0) {
        fused(total.decay, g, total.gradient)
            .store(shared + block.at.carry + (parity ^ 1) * kGroup + 4 * quad);
      }
      h[0] = fused(before.decay, h[0], before.end);
      g = fused(behind.decay, g, behind.gradient);
      MMVIM_UNROLL
      for (int i = 0; i < kOneTile; ++i) h[i + 1] = fused(a[i], h[i], h[i + 1]);

      // From here on `slope` holds the gradients of the step sizes, `delta` those of the input.
      float sums[2 * kOneTile];
      MMVIM_UNROLL
      for (int i = kOneTile - 1; i >= 0; --i) {
        sums[2 * i] = sums[2 * i + 1] = 0.f;
        MMVIM_UNROLL
        for (int e = 0; e < 4; ++e) {
          const float input = u[i].get(e), own_dy = dy[i].get(e);
          const float state = gpu::fused(C[i], own_dy, g.v[e]);
          const float to_drive = state * B[i];
          g.v[e] = state * a[i].v[e];
          const float by_z = g.v[e] * h[i].v[e];
          dA.v[e] = gpu::fused(by_z, delta[i].v[e], dA.v[e]);
          sums[2 * i] = gpu::fused(delta[i].v[e] * input, state, sums[2 * i]);
          sums[2 * i + 1] = gpu::fused(own_dy, h[i + 1].v[e], sums[2 * i + 1]);
          // B has a factor of ln 2, which A and the step size, in base 2, lack.
          const float by_delta = gpu::fused(by_z, A.v[e], kLog2e * to_drive * input);
          slope[i].v[e] *= by_delta;
          dbias.v[e] += slope[i].v[e];
          delta[i].v[e] *= to_drive;
          if (k == 0) dD.v[e] = gpu::fused(input, own_dy, dD.v[e]);
        }
      }
      // Over the lanes of a tile: the lane keeps the two values of its own step.
      MMVIM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const bool upper = lane & 2;
        const float kept = upper ? sums[4 + i] : sums[i];
        sums[i] = kept + gpu::exchange_xor(upper ? sums[i] : sums[4 + i], 2);
      }
      MMVIM_UNROLL
      for (int i = 0; i < 2; ++i) {
        const bool upper = lane & 1;
        const float kept = upper ? sums[2 + i] : sums[i];
        sums[i] = kept + gpu::exchange_xor(upper ? sums[i] : sums[2 + i], 1);
      }
      if (step + lane < q.length) {
        store_pair(dBC + (static_cast<int64_t>(mine) * q.routes + k) * 2, kLn2 * sums[0], sums[1]);
      }
      MMVIM_UNROLL
      for (int i = 0; i < kOneTile; ++i) {
        const int position = block.position(place[i]);
        if (i < count && block.present) {
          slope[i].store_as(ddelta + static_cast<int64_t>(position) * of_routes);
        }
        if constexpr (kWhole) {
          float* const to = block.sum_at(place[i]);
          if (i < count) {
            if (k > 0) delta[i] = fused(each(1.f), delta[i], Four::load(to));
            delta[i].store(to);
          }
        } else if (i < count && block.present) {
          float* const to = block.row(sum, position);
          if (k > 0) delta[i] = fused(each(1.f), delta[i], Four::load(to));
          if (k + 1 < q.routes) {
            delta[i].store(to);
          } else {
            MMVIM_UNROLL
            for (int e = 0; e < 4; ++e) {
              delta[i].v[e] = gpu::fused(skip.v[e], dy[i].get(e), delta[i].v[e]);
            }
            delta[i].store_as(block.row(dx, position));
          }
        }
      }
    }

    gpu::sync_block();
    float* const sums_of_warps = shared + block.at.passed;
    MMVIM_UNROLL
    for (int mask = kQuads; mask < 32; mask *= 2) {
      dA = fused(each(1.f), exchanged(dA, mask), dA);
      dbias = fused(each(1.f), exchanged(dbias, mask), dbias);
      dD = fused(each(1.f), exchanged(dD, mask), dD);
    }
    if (tile == 0) {
      float* const to = sums_of_warps + warp * kBackwardPlanes * kGroup + 4 * quad;
      MMVIM_UNROLL
      for (int e = 0; e < 4; ++e) dA.v[e] *= kLn2;
      dA.store(to);
      dbias.store(to + kGroup);
      dD.store(to + 2 * kGroup);
    }
    gpu::sync_block();
    for (int i = block.thread; i < kBackwardPlanes * kGroup; i += block.threads) {
      const int which = i / kGroup, c = block.first + i % kGroup;
      if (c >= q.channels || (which == 2 && k > 0)) continue;
      float total = 0.f;
      for (int w = 0; w < q.warps; ++w) total += sums_of_warps[w * kBackwardPlanes * kGroup + i];
      const int64_t row = which == 2 ? c : static_cast<int64_t>(k) * q.channels + c;
      parameters[which * of_routes + row] = total;
    }
  }

  if constexpr (kWhole) {
    gpu::sync_block();
    if (!block.present) return;
    const int stride = block.threads / kQuads;
    MMVIM_UNROLL_BY(4)
    for (int i = block.thread / kQuads; i < q.length; i += stride) {
      const int slot = one_slot(i, divided(i, q.magic_width, q.shift_width));
      Four y = Four::load(shared + block.at.sum + slot * kGroup + 4 * quad);
      const auto dy = block.load(grad, i);
      MMVIM_UNROLL
      for (int e = 0; e < 4; ++e) y.v[e] = gpu::fused(skip.v[e], dy.get(e), y.v[e]);
      y.store_as(block.row(dx, i));
    }
  }
}

// What each chunk does to a state that enters it, or with kBackward to the gradient of a state that
// enters from behind, as run_local() of other scans.
template <class T, bool kBackward>
MMVIM_DEVICE void run_one_local(const Problem& q, const void* source) {
  const OneBlock<T, false> block(q, kForwardPlanes);
  float* const shared = block.shared;
  const int lane = block.lane, warp = block.warp, quad = block.quad, tile = block.tile;
  const int k = gpu::block_z();
  const int rounds = block.end - block.begin;
  const T* const from = static_cast<const T*>(source) + block.b * q.length * q.channels + block.c;
  block.load_parameters();
  gpu::sync_block();
  const float* const parameter = block.parameters(k);
  Four decay = each(1.f), end = each(0.f);
  MMVIM_NO_UNROLL
  for (int r = 0; r < rounds; ++r) {
    const int part = warp * rounds + (kBackward ? rounds - 1 - r : r);
    const int step = block.begin * q.warps * kWarpSteps + part * kWarpSteps;
    const int count = q.length - step - tile * kOneTile;
    int place[kOneTile];
    const int mine = place_of<false>(q, k, step + lane);
    gpu::sync_warp();
    block.places[lane] = mine;
    gpu::sync_warp();
    const int4 found = *reinterpret_cast<const int4*>(block.places + tile * kOneTile);
    place[0] = found.x;
    place[1] = found.y;
    place[2] = found.z;
    place[3] = found.w;
    Packed<T, 4> u[kOneTile];
    MMVIM_UNROLL
    for (int i = 0; i < kOneTile; ++i) u[i] = block.load(from, place[i]);
    Four delta[kOneTile];
    float B[kOneTile], C[kOneTile];
    block.load_columns(delta, B, C, place, k, parameter);
    const Four A = block.A(parameter);
    OnePass total{each(1.f), each(0.f), each(0.f)}, before, behind;
    MMVIM_UNROLL
    for (int n = 0; n < kOneTile; ++n) {
      const int i = kBackward ? kOneTile - 1 - n : n;
      MMVIM_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float size = softplus2<T>(i < count ? delta[i].v[e] : kNoStep);
        const float a = gpu::exp2(size * A.v[e]);
        if (kBackward) {
          const float input = i < count ? u[i].get(e) * C[i] : 0.f;
          total.gradient.v[e] = a * (total.gradient.v[e] + input);
        } else {
          total.end.v[e] = gpu::fused(a, total.end.v[e], size * (u[i].get(e) * B[i]));
        }
        total.decay.v[e] *= a;
      }
    }
    scan_warp<kBackward>(total, before, behind, lane);
    end = fused(total.decay, end, kBackward ? total.gradient : total.end);
    MMVIM_UNROLL
    for (int e = 0; e < 4; ++e) decay.v[e] *= total.decay.v[e];
  }
  float* const passed = shared + block.at.passed;
  if (tile == 0) {
    decay.store(passed + warp * 2 * kGroup + 4 * quad);
    end.store(passed + (warp * 2 + 1) * kGroup + 4 * quad);
  }
  gpu::sync_block();
  const int c = block.first + block.thread;
  if (block.thread >= kGroup || c >= q.channels) return;
  float all = 1.f, last = 0.f;
  for (int n = 0; n < q.warps; ++n) {
    const int w = kBackward ? q.warps - 1 - n : n;
    const float one = passed[w * 2 * kGroup + block.thread];
    last = gpu::fused(one, last, passed[(w * 2 + 1) * kGroup + block.thread]);
    all *= one;
  }
  const int64_t plane = q.batch * q.channels;
  float* const result = q.local + (static_cast<int64_t>(k) * q.chunks + block.chunk) * plane +
                        block.b * q.channels + c;
  result[0] = all;
  result[static_cast<int64_t>(q.routes) * q.chunks * plane] = last;
}

template <class T>
MMVIM_KERNEL void MMVIM_REGISTERS(128) one_local_kernel(const MMVIM_GRID_CONSTANT Forward p) {
  run_one_local<T, false>(p.problem, p.problem.x);
}
template <class T>
MMVIM_KERNEL void MMVIM_REGISTERS(128)
    one_local_backward_kernel(const MMVIM_GRID_CONSTANT Backward p) {
  run_one_local<T, true>(p.problem, p.grad_out);
}

}  // namespace cross
}  // namespace mmvim
