// What the kernels of the cross scan share: shared memory, loads, steps, scans over tiles.
#pragma once

#include <type_traits>

#include "../common/gpu_math.cuh"
#include "../common/vector.cuh"
#include "cuda.h"

namespace mmvim {
namespace cross {

// Floats between the columns of a warp's rows: 16 bytes apart in banks.
constexpr int kPitch = kWarpSteps + 4;

// A short series will do for bfloat16; what float16 keeps of the gradients of float parameters
// would show it.
template <class T>
constexpr bool kFineSoftplus = !std::is_same<T, __nv_bfloat16>::value;

MMVIM_HD int smaller(int a, int b) { return a < b ? a : b; }
MMVIM_HD int groups_of(const Problem& p) { return (p.channels + kGroup - 1) / kGroup; }
MMVIM_HD int columns_of(const Problem& p) { return p.rank + 2 * p.states; }
// Neighbouring tiles of a row end up in different halves of the banks.
MMVIM_HD int slot_of(int position) { return (position ^ (position >> 3 & 1)) * kGroup; }

// Values that a warp passes on of a state and channel.
constexpr int kForwardPlanes = 2;
constexpr int kBackwardPlanes = 3;

// Shared memory in floats.
struct Layout {
  int sum, rows, positions, passed, carry, weight, bias, A, dA, total;

  MMVIM_HD Layout(const Problem& p, int planes, bool keeps_dA) {
    const int warps = p.warps, states = p.states;
    sum = 0;
    rows = p.whole ? (p.length + 1) / 2 * 2 * kGroup : 0;
    positions = rows + warps * columns_of(p) * kPitch;
    passed = positions + warps * kWarpSteps;
    carry = passed + 2 * warps * planes * kGroup;
    weight = carry + 2 * states * kGroup;
    bias = weight + p.rank * kGroup;
    A = bias + kGroup;
    dA = A + states * kGroup;
    total = dA + (keeps_dA ? warps * states * kGroup : 0);
  }
};

// The two channels of a lane. Lanes without a channel follow the last one, and store nothing.
struct ChannelPair {
  int c, next, count;
  bool pairs;

  MMVIM_DEVICE ChannelPair(const Problem& p, int first, int pair) : pairs(p.pairs) {
    c = first + 2 * pair;
    count = smaller(p.channels - c, 2);
    if (count < 1) {
      count = 0;
      c = pairs ? p.channels - 2 : p.channels - 1;
    }
    next = c + 1 < p.channels ? 1 : 0;
  }
  template <class T>
  MMVIM_DEVICE Packed<T, 2> load(const T* row) const {
    Packed<T, 2> v;
    if (pairs) {
      v.raw = *reinterpret_cast<const typename Packed<T, 2>::Raw*>(row + c);
    } else {
      v.element[0] = row[c];
      v.element[1] = row[c + next];
    }
    return v;
  }
  template <class T>
  MMVIM_DEVICE void store(T* row, float x, float y) const {
    if (pairs) {
      Packed<T, 2> v;
      v.set(0, x);
      v.set(1, y);
      if (count > 0) v.store(row + c);
    } else {
      if (count > 0) row[c] = from_float<T>(x);
      if (count > 1) row[c + 1] = from_float<T>(y);
    }
  }
  // Sum over routes of a parameter (k, d), or zero.
  MMVIM_DEVICE void sum_over_routes(float (&sum)[2], const float* data, const Problem& p) const {
    sum[0] = sum[1] = 0.f;
    if (data == nullptr) return;
    for (int k = 0; k < p.routes; ++k) {
      sum[0] += data[k * p.channels + c];
      sum[1] += data[k * p.channels + c + next];
    }
  }
};

// Where the step `t` of a route lies in the map.
struct Route {
  bool columns, reverse;
  int height, width, length;

  MMVIM_DEVICE Route(const Problem& p, int k)
      : columns(p.route[k] & 1),
        reverse(p.route[k] & 2),
        height(p.height),
        width(p.width),
        length(p.length) {}
  // Steps behind the last one follow it.
  MMVIM_DEVICE int position(int step) const {
    step = smaller(step, length - 1);
    const int t = reverse ? length - 1 - step : step;
    return columns ? t % height * width + t / height : t;
  }
};

// One warp's `count` columns of each of its steps, as float, to `rows`.
template <class T, int kWord>
MMVIM_DEVICE void copy_columns(float* rows, const int* positions, const T* from, int stride,
                               int count, int lane) {
  const int words = count / kWord;
  const int step = 32 / words, rest = 32 - step * words;
  int row = lane / words;
  int word = lane - row * words;
  MMVIM_UNROLL_BY(4)
  for (int i = 0; i < words; ++i) {
    Packed<T, kWord> v;
    v.raw = *reinterpret_cast<const typename Packed<T, kWord>::Raw*>(
        from + static_cast<int64_t>(positions[row]) * stride + word * kWord);
    MMVIM_UNROLL
    for (int e = 0; e < kWord; ++e) rows[(word * kWord + e) * kPitch + row] = v.get(e);
    row += step;
    word += rest;
    if (word >= words) {
      word -= words;
      ++row;
    }
  }
}
template <class T>
MMVIM_DEVICE void copy_columns(float* rows, const int* positions, const Columns& c, int64_t b,
                               int k, int count, int lane) {
  const T* const from =
      static_cast<const T*>(c.data) + b * c.stride_b + static_cast<int64_t>(k) * c.stride_k;
  if constexpr (sizeof(T) == 2) {
    if (c.words) return copy_columns<T, 2>(rows, positions, from, c.stride, count, lane);
  }
  copy_columns<T, 1>(rows, positions, from, c.stride, count, lane);
}

MMVIM_DEVICE void load_tile(float (&v)[kTile], const float* shared) {
  MMVIM_UNROLL
  for (int i = 0; i < kTile; i += 4) {
    const float4 x = *reinterpret_cast<const float4*>(shared + i);
    v[i] = x.x;
    v[i + 1] = x.y;
    v[i + 2] = x.z;
    v[i + 3] = x.w;
  }
}
MMVIM_DEVICE void load_positions(int (&v)[kTile], const int* shared) {
  MMVIM_UNROLL
  for (int i = 0; i < kTile; i += 4) {
    const int4 x = *reinterpret_cast<const int4*>(shared + i);
    v[i] = x.x;
    v[i + 1] = x.y;
    v[i + 2] = x.z;
    v[i + 3] = x.w;
  }
}
MMVIM_DEVICE float2 load_pair(const float* shared) {
  return *reinterpret_cast<const float2*>(shared);
}
MMVIM_DEVICE void store_pair(float* shared, float x, float y) {
  *reinterpret_cast<float2*>(shared) = make_float2(x, y);
}

// Parameters of a route to shared memory: zero and a decaying state for channels that are absent.
template <class T, Discretization kMethod>
MMVIM_DEVICE void load_route(float* shared, const Layout& at, const Problem& p, int k, int first,
                             int thread, int threads) {
  for (int i = thread; i < p.rank * kGroup; i += threads) {
    const int r = i / kGroup, c = first + i % kGroup;
    const int64_t from = (static_cast<int64_t>(k) * p.channels + c) * p.rank + r;
    float w = 0.f;
    if (c < p.channels) {
      w = p.weight_is_float ? static_cast<const float*>(p.weight)[from]
                            : to_float(static_cast<const T*>(p.weight)[from]);
    }
    shared[at.weight + i] = w;
  }
  for (int i = thread; i < kGroup; i += threads) {
    const int c = first + i;
    shared[at.bias + i] =
        p.delta_bias != nullptr && c < p.channels ? p.delta_bias[k * p.channels + c] : 0.f;
  }
  constexpr float kScale = static_cast<float>(Rule<kMethod, GpuMath>::kRateScale);
  for (int i = thread; i < p.states * kGroup; i += threads) {
    const int j = i / kGroup, c = first + i % kGroup;
    const int64_t from = (static_cast<int64_t>(k) * p.channels + c) * p.states + j;
    shared[at.A + i] = kScale * (c < p.channels ? p.A[from] : -1.f);
  }
}

// Of a chunk's states, or with kBackward their gradients: what enters it, from the chunks before
// it.
template <bool kBackward>
MMVIM_DEVICE void load_entry(float* carry, const Problem& p, int k, int64_t b, int chunk, int first,
                             int thread, int threads) {
  for (int i = thread; i < p.states * kGroup; i += threads) {
    const int j = i / kGroup, c = first + i % kGroup;
    float h = 0.f;
    if (c < p.channels) {
      const int64_t plane = p.batch * p.channels * p.states;
      const float* local = p.local + static_cast<int64_t>(k) * p.chunks * plane +
                           (b * p.channels + c) * p.states + j;
      const float* const end = local + static_cast<int64_t>(p.routes) * p.chunks * plane;
      if (kBackward) {
        for (int i = p.chunks - 1; i > chunk; --i) {
          h = gpu::fused(local[i * plane], h, end[i * plane]);
        }
      } else {
        for (int i = 0; i < chunk; ++i) h = gpu::fused(local[i * plane], h, end[i * plane]);
      }
    }
    carry[i] = h;
  }
}

// Step sizes of the lane's steps, zero behind the last one; where wanted their slopes.
template <class T, bool kSlope>
MMVIM_DEVICE void step_sizes(float (&delta)[kTile][2], float (&slope)[kSlope ? kTile : 1][2],
                             const Problem& p, const float* shared, const Layout& at,
                             const float* rows, const int (&positions)[kTile], int64_t b, int k,
                             int pair, const ChannelPair& channels, int count) {
  const float2 bias = load_pair(shared + at.bias + 2 * pair);
  if (p.rank > 0) {
    MMVIM_UNROLL
    for (int i = 0; i < kTile; ++i) {
      delta[i][0] = bias.x;
      delta[i][1] = bias.y;
    }
    MMVIM_UNROLL_BY(2)
    for (int r = 0; r < p.rank; ++r) {
      const float2 w = load_pair(shared + at.weight + r * kGroup + 2 * pair);
      float low[kTile];
      load_tile(low, rows + r * kPitch);
      MMVIM_UNROLL
      for (int i = 0; i < kTile; ++i) {
        delta[i][0] = gpu::fused(w.x, low[i], delta[i][0]);
        delta[i][1] = gpu::fused(w.y, low[i], delta[i][1]);
      }
    }
  } else {
    const T* const from = static_cast<const T*>(p.delta.data) + b * p.delta.stride_b +
                          static_cast<int64_t>(k) * p.delta.stride_k;
    MMVIM_UNROLL
    for (int i = 0; i < kTile; ++i) {
      const T* const row = from + static_cast<int64_t>(positions[i]) * p.delta.stride;
      Packed<T, 2> v;
      if (p.delta.words) {
        v.raw = *reinterpret_cast<const typename Packed<T, 2>::Raw*>(row + channels.c);
      } else {
        v.element[0] = row[channels.c];
        v.element[1] = row[channels.c + channels.next];
      }
      delta[i][0] = v.get(0) + bias.x;
      delta[i][1] = v.get(1) + bias.y;
    }
  }
  MMVIM_UNROLL
  for (int i = 0; i < kTile; ++i) {
    MMVIM_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float x = delta[i][e];
      if constexpr (kSlope) {
        const float exponential = gpu::exp2(-kLog2e * fabsf(x));
        const float r = gpu::reciprocal(1.f + exponential);
        slope[i][e] = !p.softplus ? 1.f : x < 0.f ? exponential * r : r;
      }
      const float d = p.softplus ? softplus<kFineSoftplus<T>>(x) : x;
      delta[i][e] = i < count ? d : 0.f;
    }
  }
}

// A linear map of a state, h -> decay h + end, of two channels.
struct Pass {
  float decay[2], end[2];

  static MMVIM_DEVICE Pass identity() { return {{1.f, 1.f}, {0.f, 0.f}}; }
  MMVIM_DEVICE void apply(float (&h)[2]) const {
    h[0] = gpu::fused(decay[0], h[0], end[0]);
    h[1] = gpu::fused(decay[1], h[1], end[1]);
  }
};

// Makes `total`, the map of a tile, that of all tiles of the warp, and `before` the map of the
// tiles that a scan passes before the lane's; kBackward: from the last tile to the first.
template <bool kBackward>
MMVIM_DEVICE void scan_tiles(Pass& total, Pass& before, int lane) {
  before = Pass::identity();
  MMVIM_UNROLL
  for (int mask = kGroup / 2; mask < 32; mask *= 2) {
    const bool behind = ((lane & mask) != 0) != kBackward;
    MMVIM_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float decay = gpu::exchange_xor(total.decay[e], mask);
      const float end = gpu::exchange_xor(total.end[e], mask);
      if (behind) {
        before.end[e] = gpu::fused(before.decay[e], end, before.end[e]);
        before.decay[e] *= decay;
        total.end[e] = gpu::fused(total.decay[e], end, total.end[e]);
      } else {
        total.end[e] = gpu::fused(decay, total.end[e], end);
      }
      total.decay[e] *= decay;
    }
  }
}

// Sums 2 kTile values of each lane over the eight lanes of a tile; the lane keeps the totals of
// values 2 i and 2 i + 1, where i is its number in the tile.
template <int kHalf = kTile, int kMask = kGroup / 4>
MMVIM_DEVICE void sum_over_channels(float (&v)[2 * kTile], int lane) {
  const bool upper = lane & kMask;
  MMVIM_UNROLL
  for (int i = 0; i < kHalf; ++i) {
    const float kept = upper ? v[kHalf + i] : v[i];
    v[i] = kept + gpu::exchange_xor(upper ? v[i] : v[kHalf + i], kMask);
  }
  if constexpr (kMask > 1) sum_over_channels<kHalf / 2, kMask / 2>(v, lane);
}

// Clears all but the first `count` elements.
template <class T>
MMVIM_DEVICE void keep(Packed<T, 2>& v, int count) {
  if constexpr (sizeof(T) == 2) {
    v.raw &= count > 1 ? 0xffffffffu : count == 1 ? 0xffffu : 0u;
  } else {
    v.raw.x = count > 0 ? v.raw.x : 0u;
    v.raw.y = count > 1 ? v.raw.y : 0u;
  }
}

MMVIM_DEVICE void sum_over_tiles(float (&v)[2]) {
  MMVIM_UNROLL
  for (int mask = kGroup / 2; mask < 32; mask *= 2) {
    v[0] += gpu::exchange_xor(v[0], mask);
    v[1] += gpu::exchange_xor(v[1], mask);
  }
}

}  // namespace cross
}  // namespace mmvim
