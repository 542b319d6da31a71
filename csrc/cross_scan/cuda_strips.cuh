// The cross scan of one state by zero-order hold with softplus, of multiples of four channels, with
// step sizes of low rank that lie beside B and C: VMamba's.
//
// A lane owns a strip of kStrip steps of two channels. Lane 4g + q has channels 2g and 2g + 1 of
// the block, and the steps from kStrip q on of the warp. Step sizes, B and C come from the tensor
// cores (from plain products for float): channels are rows, and steps are columns in such an order
// that the results lie where they are used. What is not finite in a step's columns makes its route
// so.
//
// States are kept without the factor ln 2 of step sizes in base 2, which the sums get at last.
#pragma once

#include "cuda_common.cuh"

namespace mmvim {
namespace cross {
namespace strips {

constexpr int kStrip = 8;
constexpr int kPairs = kGroup / 2;

// Whether step sizes come from the tensor cores. kTiles of a kernel: Problem::tiles.
template <class T>
constexpr bool kOnMatrixUnit = sizeof(T) == 2;

// Values for a channel that backward adds over warps.
MMVIM_HD int sums_of(int tiles) { return 3 + 8 * tiles; }

// Shared memory in floats.
struct StripLayout {
  int sum, tables, passed, carry, weights, per_route, total;

  MMVIM_HD StripLayout(const Problem& p, int planes) {
    sum = 0;
    const int warps = p.teams * p.warps;
    tables = p.whole ? (p.slots + 2) * kGroup : 0;
    passed = tables + warps * 6 * kWarpSteps;
    carry = passed + 2 * warps * planes * kGroup;
    weights = carry + 2 * p.teams * kGroup;
    per_route = p.element == 2 ? (p.rank + 17) / 16 * 256 : p.rank * kGroup;
    if (p.tiles > 0) per_route = 0;
    total = weights + (p.last_route - p.first_route) * per_route;
    // The sums of the warps take the place of the tables, and of what follows where need be.
    const int of_sums = tables + warps * sums_of(p.tiles) * kGroup;
    if (planes == kBackwardPlanes && total < of_sums) total = of_sums;
  }
};

MMVIM_DEVICE int divided(int t, uint32_t magic, int shift) {
  return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(t)) * magic) >> shift);
}
// Bytes to the sums of a position, XOR 4 times the number of a channel. Positions kStrip steps
// apart in a row or, mostly, in a column lie in different quarters of the banks.
MMVIM_DEVICE int slot_of(int position, int row) {
  const int s = position + row / kStrip;
  const int mask = (((s >> 1) ^ (s >> 3)) & 1) | (s >> 3 & 2);
  return ((2 * s) ^ mask) * 32;
}

// Of a warp's steps: positions, elements to their values, bytes to their sums.
struct Tables {
  int* data;

  MMVIM_DEVICE void load(int (&v)[4], int which, int first) const {
    const int4 x = *reinterpret_cast<const int4*>(data + which * kWarpSteps + first);
    v[0] = x.x;
    v[1] = x.y;
    v[2] = x.z;
    v[3] = x.w;
  }
  MMVIM_DEVICE void load(int (&v)[kStrip], int which, int q) const {
    int one[4], two[4];
    load(one, which, q * kStrip);
    load(two, which, q * kStrip + 4);
    MMVIM_UNROLL
    for (int i = 0; i < 4; ++i) {
      v[i] = one[i];
      v[4 + i] = two[i];
    }
  }
};

// Values of the lane's channels.
struct Two {
  float v[2];

  static MMVIM_DEVICE Two load(const float* p) {
    const float2 x = *reinterpret_cast<const float2*>(p);
    return {{x.x, x.y}};
  }
  MMVIM_DEVICE void store(float* p) const { store_pair(p, v[0], v[1]); }
};
MMVIM_DEVICE Two both(float x) { return {{x, x}}; }
// a b + c
MMVIM_DEVICE Two fused(const Two& a, const Two& b, const Two& c) {
  return {{gpu::fused(a.v[0], b.v[0], c.v[0]), gpu::fused(a.v[1], b.v[1], c.v[1])}};
}

// A raw step size of which none is left, nor of its slope.
constexpr float kNoStep = -1e30f;

// log2(1 + e) / e for 0 <= e <= 1, to 6e-5, or 3e-8.
template <bool kFine>
MMVIM_DEVICE float logarithm_ratio(float e) {
  if constexpr (kFine) {
    float p = gpu::fused(e, 0.007549182119f, -0.04256706188f);
    p = gpu::fused(e, p, 0.1128561932f);
    p = gpu::fused(e, p, -0.1971189698f);
    p = gpu::fused(e, p, 0.2756414122f);
    p = gpu::fused(e, p, -0.3584084724f);
    p = gpu::fused(e, p, 0.4806929573f);
    p = gpu::fused(e, p, -0.721340208f);
    return gpu::fused(e, p, 1.442694997f);
  }
  float p = gpu::fused(e, 0.05965154827f, -0.2271194512f);
  p = gpu::fused(e, p, 0.441898832f);
  p = gpu::fused(e, p, -0.7169874152f);
  return gpu::fused(e, p, 1.442613208f);
}
// log2(1 + 2^x), where e = 2^-|x|.
template <class T>
MMVIM_DEVICE float softplus2(float x, float e) {
  return gpu::fused(e, logarithm_ratio<kFineSoftplus<T>>(e), fmaxf(x, 0.f));
}

// The slope of softplus, 1 - 2^-y, where y is what softplus2() returned.
template <class T>
MMVIM_DEVICE float slope_of(float y) {
  if constexpr (kFineSoftplus<T>) return softplus_slope(kLn2 * y);
  const float small = y * gpu::fused(y, -0.5f * kLn2 * kLn2, kLn2);
  return y < 0.015625f ? small : 1.f - gpu::exp2(-y);
}

// The values of a pair.
template <class T>
MMVIM_DEVICE Two two(const Packed<T, 2>& x) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    return {{gpu::from_bits(x.raw << 16), gpu::from_bits(x.raw & 0xffff0000u)}};
  }
  return {{x.get(0), x.get(1)}};
}
// Pairs of 16 bits: x and y, and what that leaves of them.
template <class T>
MMVIM_DEVICE uint32_t packed(float x, float y) {
  Packed<T, 2> v;
  v.set(0, x);
  v.set(1, y);
  return v.raw;
}
template <class T>
MMVIM_DEVICE void split(uint32_t& high, uint32_t& low, const Two& x) {
  Packed<T, 2> v;
  v.raw = high = packed<T>(x.v[0], x.v[1]);
  const Two rounded = two(v);
  low = packed<T>(x.v[0] - rounded.v[0], x.v[1] - rounded.v[1]);
}

// Of 16 channels and 16 columns, as the left operand.
struct Weights {
  uint32_t high[4], low[4];
};

template <class T, bool kWhole, int kTiles>
struct Block {
  static constexpr int kKept = kTiles > 0 ? kTiles : 1;

  const Problem& q;
  const StripLayout at;
  float* const shared;
  // `worker` and `warp` count in a team.
  int thread, threads, team, worker, lane, warp, pair, part, first, c, chunk, begin, end;
  float *passed, *carry;
  int64_t b;
  bool present;
  int* tables;
  const T *x, *columns;

  // What a warp reads of a round.
  struct Loaded {
    Packed<T, 2> u[kStrip];
    uint32_t words[kKept][4];
  };
  // Of a route. `choice` makes B of the rows of a product's first half, C of its second.
  struct Parameters {
    float bias[4], A[2];
    Weights weights;
    uint32_t choice[4];
    const float* shared;
    const T* columns;
  };

  MMVIM_DEVICE Block(const Problem& p, int planes)
      : q(p),
        at(p, planes),
        shared(reinterpret_cast<float*>(gpu::shared_memory())),
        thread(gpu::thread_index()),
        threads(gpu::thread_count()),
        team(kWhole ? gpu::of_warp(thread / (32 * q.warps)) : 0),
        worker(thread - team * 32 * q.warps),
        lane(thread % 32),
        warp(gpu::of_warp(worker / 32)),
        pair(lane / 4),
        part(lane % 4),
        chunk(gpu::block_y()) {
    const int groups = groups_of(q);
    b = gpu::block_x() / groups;
    first = static_cast<int>(gpu::block_x() - b * groups) * kGroup;
    // Lanes without channels follow the last ones, and store nothing.
    present = first + 2 * pair < q.channels;
    c = present ? first + 2 * pair : q.channels - 2;
    begin = chunk * q.chunk_rounds;
    end = smaller(begin + q.chunk_rounds, q.rounds);
    tables = reinterpret_cast<int*>(shared + at.tables) + thread / 32 * 6 * kWarpSteps;
    passed = shared + at.passed + team * 2 * q.warps * planes * kGroup;
    carry = shared + at.carry + team * 2 * kGroup;
    x = static_cast<const T*>(q.x) + b * q.length * q.channels + c;
    columns = static_cast<const T*>(q.delta.data) + b * q.delta.stride_b;
  }

  MMVIM_DEVICE float weight(int k, int channel, int r) const {
    if (channel >= q.channels || r >= q.rank) return 0.f;
    const int64_t i = static_cast<int64_t>(k * q.channels + channel) * q.rank + r;
    return kLog2e * (q.weight_is_float ? static_cast<const float*>(q.weight)[i]
                                       : to_float(static_cast<const T*>(q.weight)[i]));
  }
  // Of the columns r and r + 1, where r is even, as the rank.
  MMVIM_DEVICE Two weights_of_pair(int k, int channel, int r) const {
    if (channel >= q.channels || r >= q.rank) return both(0.f);
    const int64_t i = static_cast<int64_t>(k * q.channels + channel) * q.rank + r;
    const Two w = q.weight_is_float ? Two::load(static_cast<const float*>(q.weight) + i)
                                    : two(load(static_cast<const T*>(q.weight) + i));
    return {{kLog2e * w.v[0], kLog2e * w.v[1]}};
  }
  // Of the columns from 16 * tile on, for lane 4g + q: rows g and g + 8 are channels 2g and 2g + 1.
  MMVIM_DEVICE Weights weights(int k, int tile, int of_lane) const {
    Weights w;
    MMVIM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int channel = first + of_lane / 4 * 2 + i % 2;
      const int r = tile * 16 + i / 2 * 8 + of_lane % 4 * 2;
      split<T>(w.high[i], w.low[i], weights_of_pair(k, channel, r));
    }
    return w;
  }
  // Of all routes of the launch, where registers do not hold them.
  MMVIM_DEVICE void load_weights() const {
    if constexpr (kTiles > 0) return;
    const int routes = q.last_route - q.first_route;
    if constexpr (kOnMatrixUnit<T>) {
      const int tiles = at.per_route / 256;
      MMVIM_NO_UNROLL
      for (int i = thread; i < routes * tiles * 32; i += threads) {
        const int tile = i / 32;
        const Weights w = weights(q.first_route + tile / tiles, tile % tiles, i % 32);
        uint4* const words = reinterpret_cast<uint4*>(shared + at.weights) + tile * 64 + i % 32;
        words[0] = make_uint4(w.high[0], w.high[1], w.high[2], w.high[3]);
        words[32] = make_uint4(w.low[0], w.low[1], w.low[2], w.low[3]);
      }
    } else {
      for (int i = thread; i < routes * at.per_route; i += threads) {
        const int row = i / kGroup, k = row / q.rank;
        shared[at.weights + i] = weight(q.first_route + k, first + i % kGroup, row - k * q.rank);
      }
    }
  }
  MMVIM_DEVICE Parameters parameters(int k) const {
    Parameters p;
    MMVIM_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int i = k * q.channels + c + e;
      p.A[e] = present ? q.A[i] : -1.f;
      p.bias[2 * e] = p.bias[2 * e + 1] =
          q.delta_bias != nullptr && present ? kLog2e * q.delta_bias[i] : 0.f;
    }
    if constexpr (kTiles > 0) {
      p.weights = weights(k, 0, lane);
    }
    if constexpr (kOnMatrixUnit<T>) {
      const uint32_t one = part == q.rank % 8 / 2 ? packed<T>(1.f, 0.f) : 0u;
      const bool right = q.rank / 8 % 2;
      p.choice[0] = right ? 0u : one;
      p.choice[1] = right ? 0u : one << 16;
      p.choice[2] = right ? one : 0u;
      p.choice[3] = right ? one << 16 : 0u;
    }
    p.shared = shared + at.weights + (k - q.first_route) * at.per_route;
    p.columns = columns + k * q.delta.stride_k;
    return p;
  }
  // Sum over all routes of a parameter (k, d), of neighbouring channels.
  template <int kCount>
  MMVIM_DEVICE void sum_over_routes(float (&sum)[kCount], const float* data, int channel) const {
    MMVIM_UNROLL
    for (int e = 0; e < kCount; ++e) sum[e] = 0.f;
    for (int k = 0; data != nullptr && k < q.routes; ++k) {
      MMVIM_UNROLL
      for (int e = 0; e < kCount; ++e) sum[e] += data[k * q.channels + channel + e];
    }
  }

  // The tables of the 32 steps from `step` on; steps behind the last one have its position.
  MMVIM_DEVICE Tables find_places(int k, int step, int buffer) const {
    const int own = step + lane, inside = smaller(own, q.length - 1);
    const int t = q.route[k] & 2 ? q.length - 1 - inside : inside;
    int position = t, row = 0;
    if (q.route[k] & 1) {
      const int column = divided(t, q.magic_height, q.shift_height);
      row = t - column * q.height;
      position = row * q.width + column;
    } else if (kWhole) {
      row = divided(t, q.magic_width, q.shift_width);
    }
    const Tables to{tables + buffer * 3 * kWarpSteps};
    gpu::sync_warp();
    to.data[lane] = position;
    to.data[kWarpSteps + lane] = position * q.channels;
    if (kWhole) {
      to.data[2 * kWarpSteps + lane] =
          own < q.length ? slot_of(position, row) : slot_of(q.slots, 0);
    }
    gpu::sync_warp();
    return to;
  }
  MMVIM_DEVICE void sync_team() const {
    if constexpr (kWhole) {
      gpu::sync_team(team, 32 * q.warps);
    } else {
      gpu::sync_block();
    }
  }
  MMVIM_DEVICE float* sum_at(int slot) const {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(shared + at.sum) + (slot ^ 8 * pair));
  }
  static MMVIM_DEVICE Packed<T, 2> load(const T* from) {
    Packed<T, 2> v;
    v.raw = *reinterpret_cast<const typename Packed<T, 2>::Raw*>(from);
    return v;
  }
  static MMVIM_DEVICE void load_rows(Packed<T, 2> (&v)[kStrip], const T* from,
                                     const int (&offset)[kStrip]) {
    MMVIM_UNROLL
    for (int i = 0; i < kStrip; ++i) v[i] = load(gpu::advanced(from, offset[i], sizeof(T)));
  }
  // Words of columns from 8 * tile + 2 * part on, of the steps 4 * pair ... in which a product's
  // columns lie; behind the last one, which has a weight of zero, those of B and C.
  MMVIM_DEVICE void load_words(uint32_t (&words)[4], const int (&position)[4], const Parameters& p,
                               int tile) const {
    const int column = smaller(8 * tile + 2 * part, q.rank);
    MMVIM_UNROLL
    for (int j = 0; j < 4; ++j) {
      words[j] = *reinterpret_cast<const uint32_t*>(
          gpu::advanced(p.columns + column, position[j], q.delta.stride * int{sizeof(T)}));
    }
  }
  MMVIM_DEVICE void load_round(Loaded& to, const T* from, const Tables& places,
                               const Parameters& p) const {
    int offset[kStrip];
    places.load(offset, 1, part);
    load_rows(to.u, from, offset);
    if constexpr (kTiles > 0) {
      int position[4];
      places.load(position, 0, pair * 4);
      MMVIM_UNROLL
      for (int t = 0; t < kTiles; ++t) load_words(to.words[t], position, p, t);
    }
  }

  // Raw step sizes times log2(e), B and C of the strip.
  MMVIM_DEVICE void step_sizes(float (&raw)[kStrip][2], float (&B)[kStrip], float (&C)[kStrip],
                               const Loaded& from, const Tables& places, const Parameters& p,
                               int count, bool full) const {
    if constexpr (kOnMatrixUnit<T>) {
#if MMVIM_MATRIX_ADDER
      const float zero[4] = {0.f, 0.f, 0.f, 0.f};
      float sums[4][4], chosen[4][4];
      if constexpr (kTiles > 0) {
        MMVIM_UNROLL
        for (int j = 0; j < 4; ++j) {
          const uint32_t left = from.words[0][j], right = from.words[kTiles - 1][j];
          if constexpr (kTiles == 1) {
            gpu::multiply_16x8x8<T>(sums[j], p.weights.high[0], p.weights.high[1], left, p.bias);
            gpu::multiply_16x8x8<T>(sums[j], p.weights.low[0], p.weights.low[1], left, sums[j]);
            gpu::multiply_16x8x8<T>(chosen[j], p.choice[0], p.choice[1], left, zero);
          } else {
            gpu::multiply_16x8x16<T>(sums[j], p.weights.high, left, right, p.bias);
            gpu::multiply_16x8x16<T>(sums[j], p.weights.low, left, right);
            gpu::multiply_16x8x16<T>(chosen[j], p.choice, left, right, zero);
          }
        }
      } else {
        int position[4];
        places.load(position, 0, pair * 4);
        MMVIM_UNROLL
        for (int j = 0; j < 4; ++j) {
          MMVIM_UNROLL
          for (int e = 0; e < 4; ++e) sums[j][e] = p.bias[e];
        }
        MMVIM_NO_UNROLL
        for (int t = 0; 16 * t <= q.rank; ++t) {
          uint32_t left[4], right[4];
          load_words(left, position, p, 2 * t);
          load_words(right, position, p, 2 * t + 1);
          const uint4 x = reinterpret_cast<const uint4*>(p.shared)[t * 64 + lane];
          const uint4 y = reinterpret_cast<const uint4*>(p.shared)[t * 64 + 32 + lane];
          const uint32_t high[4] = {x.x, x.y, x.z, x.w}, low[4] = {y.x, y.y, y.z, y.w};
          MMVIM_UNROLL
          for (int j = 0; j < 4; ++j) {
            gpu::multiply_16x8x16<T>(sums[j], high, left[j], right[j]);
            gpu::multiply_16x8x16<T>(sums[j], low, left[j], right[j]);
          }
          if (16 * t + 16 > q.rank) {
            MMVIM_UNROLL
            for (int j = 0; j < 4; ++j) {
              gpu::multiply_16x8x16<T>(chosen[j], p.choice, left[j], right[j], zero);
            }
          }
        }
      }
      MMVIM_UNROLL
      for (int i = 0; i < kStrip; ++i) {
        raw[i][0] = sums[i % 4][i / 4];
        raw[i][1] = sums[i % 4][2 + i / 4];
        B[i] = chosen[i % 4][i / 4];
        C[i] = chosen[i % 4][2 + i / 4];
      }
#endif
    } else {
      int position[kStrip];
      places.load(position, 0, part);
      const T* row[kStrip];
      MMVIM_UNROLL
      for (int i = 0; i < kStrip; ++i) {
        row[i] = p.columns + static_cast<int64_t>(position[i]) * q.delta.stride;
        raw[i][0] = p.bias[0];
        raw[i][1] = p.bias[2];
        B[i] = row[i][q.rank];
        C[i] = row[i][q.rank + 1];
      }
      MMVIM_UNROLL_BY(2)
      for (int r = 0; r < q.rank; ++r) {
        const Two w = Two::load(p.shared + r * kGroup + 2 * pair);
        MMVIM_UNROLL
        for (int i = 0; i < kStrip; ++i) {
          const float low = row[i][r];
          raw[i][0] = gpu::fused(w.v[0], low, raw[i][0]);
          raw[i][1] = gpu::fused(w.v[1], low, raw[i][1]);
        }
      }
    }
    if (full) return;
    MMVIM_UNROLL
    for (int i = 0; i < kStrip; ++i) {
      raw[i][0] = i < count ? raw[i][0] : kNoStep;
      raw[i][1] = i < count ? raw[i][1] : kNoStep;
    }
  }
};

// What a part of a route does to a state: h -> decay h + end.
struct Map {
  Two decay, end;
};

// Makes `total`, of a strip, that of the strips of the warp up to the lane's; returns that of those
// before it. kBackward: from the last strip to the first.
template <bool kBackward>
MMVIM_DEVICE Map scan_warp(Map& total, int part) {
  const auto neighbour = [](float x, int lanes) {
    return kBackward ? gpu::exchange_down_of_four(x, lanes) : gpu::exchange_up_of_four(x, lanes);
  };
  const int place = kBackward ? 3 - part : part;
  MMVIM_UNROLL
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    MMVIM_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float decay = neighbour(total.decay.v[e], lanes);
      const float end = neighbour(total.end.v[e], lanes);
      if (place >= lanes) {
        total.end.v[e] = gpu::fused(total.decay.v[e], end, total.end.v[e]);
        total.decay.v[e] *= decay;
      }
    }
  }
  Map before;
  MMVIM_UNROLL
  for (int e = 0; e < 2; ++e) {
    const float decay = neighbour(total.decay.v[e], 1), end = neighbour(total.end.v[e], 1);
    before.decay.v[e] = place > 0 ? decay : 1.f;
    before.end.v[e] = place > 0 ? end : 0.f;
  }
  return before;
}

// The sums in shared memory, and the rows of `from` times the sums of D, to `out`.
template <class T, int kTiles>
MMVIM_DEVICE void finish_sums(const Block<T, true, kTiles>& block, void* out, const void* from,
                              float factor) {
  const Problem& q = block.q;
  const int quad = block.thread % 4, c = block.first + 4 * quad;
  if (c >= q.channels) return;
  float skip[4];
  block.sum_over_routes(skip, q.D, c);
  const int64_t map = block.b * q.length * q.channels + c;
  MMVIM_UNROLL_BY(4)
  for (int i = block.thread / 4; i < q.length; i += block.threads / 4) {
    const int slot = slot_of(i, divided(i, q.magic_width, q.shift_width)) ^ 16 * quad;
    const float4 y = *reinterpret_cast<const float4*>(
        reinterpret_cast<const char*>(block.shared + block.at.sum) + slot);
    const float value[4] = {y.x, y.y, y.z, y.w};
    const int64_t at = map + static_cast<int64_t>(i) * q.channels;
    Packed<T, 4> v;
    v.raw = *reinterpret_cast<const typename Packed<T, 4>::Raw*>(static_cast<const T*>(from) + at);
    MMVIM_UNROLL
    for (int e = 0; e < 4; ++e) v.set(e, gpu::fused(skip[e], v.get(e), factor * value[e]));
    v.store(static_cast<T*>(out) + at);
  }
}

template <class T, bool kWhole, int kTiles>
MMVIM_KERNEL void MMVIM_REGISTERS(kTiles > 0 ? 144 : 96)
    forward_kernel(const MMVIM_GRID_CONSTANT Forward p) {
  using Own = Block<T, kWhole, kTiles>;
  const Problem& q = p.problem;
  const Own block(q, kForwardPlanes);
  const int warp = block.warp, pair = block.pair, part = block.part;
  const int64_t map = block.b * q.length;
  T* const out = static_cast<T*>(p.out) + map * q.channels;
  float* const sum = kWhole ? nullptr : q.sum + map * q.channels + block.c;
  float skip[2];
  if (!kWhole) block.sum_over_routes(skip, q.D, block.c);

  block.load_weights();
  int buffer = 0;
  const int half = q.teams > 1 ? q.rounds / 2 : q.rounds;
  for (int turn = q.first_route; turn < q.last_route; turn += q.teams) {
    const int k = q.order[turn + block.team];
    const auto parameters = block.parameters(k);
    const auto step_of = [&](int round) { return (round * q.warps + warp) * kWarpSteps; };
    Tables places = block.find_places(k, step_of(block.begin), buffer);
    typename Own::Loaded loaded;
    if (kTiles > 0) block.load_round(loaded, block.x, places, parameters);
    gpu::sync_block();
    load_entry<false>(block.carry, q, k, block.b, block.chunk, block.first, block.worker,
                      32 * q.warps);
    MMVIM_NO_UNROLL
    for (int round = block.begin; round < block.end; ++round) {
      if (round == half) gpu::sync_block();
      const bool others_before = turn > 0 || round >= half;
      const int step = step_of(round), count = q.length - step - part * kStrip;
      if (kTiles == 0) block.load_round(loaded, block.x, places, parameters);
      float a[kStrip][2], drive[kStrip][2], B[kStrip], C[kStrip];
      block.step_sizes(a, B, C, loaded, places, parameters, count, step + kWarpSteps <= q.length);
      Map total{both(1.f), both(0.f)};
      MMVIM_UNROLL
      for (int i = 0; i < kStrip; ++i) {
        const Two input = two(loaded.u[i]);
        MMVIM_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float size = softplus2<T>(a[i][e], gpu::exp2(-fabsf(a[i][e])));
          a[i][e] = gpu::exp2(size * parameters.A[e]);
          drive[i][e] = size * (input.v[e] * B[i]);
          total.end.v[e] = gpu::fused(a[i][e], total.end.v[e], drive[i][e]);
          total.decay.v[e] *= a[i][e];
        }
      }
      const Map before = scan_warp<false>(total, part);
      const int parity = (round - block.begin) & 1;
      float* const passed = block.passed + buffer * q.warps * kForwardPlanes * kGroup + 4 * pair;
      if (part == 3) {
        *reinterpret_cast<float4*>(passed + warp * kForwardPlanes * kGroup) =
            make_float4(total.decay.v[0], total.decay.v[1], total.end.v[0], total.end.v[1]);
      }
      // The sums of other routes, and what the next round begins with.
      Packed<T, 2> u[kStrip];
      int place[kStrip];
      Two others[kStrip];
      places.load(place, kWhole ? 2 : 1, part);
      MMVIM_UNROLL
      for (int i = 0; i < kStrip; ++i) {
        if (!kWhole) u[i] = loaded.u[i];
        others[i] =
            others_before ? Two::load(kWhole ? block.sum_at(place[i]) : sum + place[i]) : both(0.f);
      }
      buffer ^= 1;
      if (round + 1 < block.end) {
        places = block.find_places(k, step_of(round + 1), buffer);
        if (kTiles > 0) block.load_round(loaded, block.x, places, parameters);
      }
      block.sync_team();
      Two h = Two::load(block.carry + parity * kGroup + 2 * pair);
      if (p.checkpoints != nullptr && round > 0 && warp == 0 && part == 0 && block.present) {
        const int64_t row = ((k * q.batch + block.b) * (q.rounds - 1) + round - 1) * q.channels;
        h.store(p.checkpoints + row + block.c);
      }
      MMVIM_UNROLL_BY(4)
      for (int w = 0; w < warp; ++w) {
        const float4 x = *reinterpret_cast<const float4*>(passed + w * kForwardPlanes * kGroup);
        h = fused({{x.x, x.y}}, h, {{x.z, x.w}});
      }
      if (warp == q.warps - 1 && part == 3) {
        fused(total.decay, h, total.end).store(block.carry + (parity ^ 1) * kGroup + 2 * pair);
      }
      h = fused(before.decay, h, before.end);
      MMVIM_UNROLL
      for (int i = 0; i < kStrip; ++i) {
        h = fused({{a[i][0], a[i][1]}}, h, {{drive[i][0], drive[i][1]}});
        const Two y = fused(both(C[i]), h, others[i]);
        if constexpr (kWhole) {
          y.store(block.sum_at(place[i]));
        } else if (i < count && block.present) {
          if (k + 1 < q.routes) {
            y.store(sum + place[i]);
          } else {
            Packed<T, 2> v;
            MMVIM_UNROLL
            for (int e = 0; e < 2; ++e) {
              v.set(e, gpu::fused(skip[e], u[i].get(e), kLn2 * y.v[e]));
            }
            v.store(out + block.c + place[i]);
          }
        }
      }
    }
  }

  if constexpr (kWhole) {
    gpu::sync_block();
    finish_sums(block, p.out, q.x, kLn2);
  }
}

// Sums 16 values over the eight lanes of a tile of channels; lane 4g + q keeps values g and 8 + g.
template <int kHalf = 4, int kMask = 16>
MMVIM_DEVICE void sum_over_pairs(float (&v)[kStrip], int lane) {
  const bool upper = lane & kMask;
  MMVIM_UNROLL
  for (int i = 0; i < kHalf; ++i) {
    const float kept = upper ? v[kHalf + i] : v[i];
    v[i] = kept + gpu::exchange_xor(upper ? v[i] : v[kHalf + i], kMask);
  }
  if constexpr (kMask > 4) sum_over_pairs<kHalf / 2, kMask / 2>(v, lane);
}

// Gradients of the columns and of their weights, on the tensor cores; kTiles > 0.
template <class T, int kTiles>
struct ColumnGradients {
  // Right operands: the weights, and what puts the gradients of B and C beside those of the rank.
  uint32_t left[kTiles], right[kTiles], of_B, of_C;
  float weight[kTiles][4];

  template <class Own>
  MMVIM_DEVICE ColumnGradients(const Own& block, int k) {
    const int g = block.lane / 4, first = block.first + block.lane % 4 * 4;
    MMVIM_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const auto weight_of = [&](int channel) {
        return kLn2 * block.weight(k, first + channel, 8 * t + g);
      };
      left[t] = packed<T>(weight_of(0), weight_of(2));
      right[t] = packed<T>(weight_of(1), weight_of(3));
      MMVIM_UNROLL
      for (int e = 0; e < 4; ++e) weight[t][e] = 0.f;
    }
    of_B = g == block.q.rank % 8 ? packed<T>(1.f, 1.f) : 0u;
    of_C = g == block.q.rank % 8 + 1 ? packed<T>(1.f, 1.f) : 0u;
  }

  // `steps`: gradients of the step sizes; dB, dC: of B and C, over the lane's channels.
  template <class Own>
  MMVIM_DEVICE void add(const Own& block, T* low, const int (&position)[4], int step,
                        const float (&steps)[kStrip][2], const float (&dB)[kStrip],
                        const float (&dC)[kStrip], const uint32_t (&words)[kTiles][4]) {
#if MMVIM_MATRIX_ADDER
    const int own = step + 4 * (block.lane / 4);
    constexpr int kStride = 8 * kTiles * static_cast<int>(sizeof(T));
    MMVIM_UNROLL
    for (int j = 0; j < 4; j += 2) {
      // Channels 2g, then 2g + 1, of the columns j and j + 1 of the products above.
      uint32_t a[4];
      MMVIM_UNROLL
      for (int i = 0; i < 4; ++i) {
        a[i] = packed<T>(steps[j + i / 2][i % 2], steps[4 + j + i / 2][i % 2]);
      }
      MMVIM_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        gpu::multiply_16x8x16<T>(weight[t], a, gpu::transposed_8x8(words[t][j]),
                                 gpu::transposed_8x8(words[t][j + 1]));
      }
      const uint32_t of_steps[4] = {gpu::transposed_8x8(a[0]), gpu::transposed_8x8(a[2]),
                                    gpu::transposed_8x8(a[1]), gpu::transposed_8x8(a[3])};
      const uint32_t of_others[4] = {gpu::transposed_8x8(packed<T>(dB[j], dB[4 + j])),
                                     gpu::transposed_8x8(packed<T>(dB[j + 1], dB[5 + j])),
                                     gpu::transposed_8x8(packed<T>(dC[j], dC[4 + j])),
                                     gpu::transposed_8x8(packed<T>(dC[j + 1], dC[5 + j]))};
      MMVIM_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        const float zero[4] = {0.f, 0.f, 0.f, 0.f};
        float sums[4];
        gpu::multiply_16x8x16<T>(sums, of_steps, left[t], right[t], zero);
        if (t == block.q.rank / 8) gpu::multiply_16x8x16<T>(sums, of_others, of_B, of_C);
        MMVIM_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (own + j + i >= block.q.length) continue;
          T* const to = gpu::advanced(low + 8 * t, position[j + i], kStride);
          *reinterpret_cast<uint32_t*>(to) = packed<T>(sums[2 * i], sums[2 * i + 1]);
        }
      }
    }
#endif
  }
};

// Without tensor cores, or of many columns.
template <class T>
struct ColumnGradients<T, 0> {
  template <class Own>
  MMVIM_DEVICE ColumnGradients(const Own&, int) {}
};

template <class T, bool kWhole, int kTiles>
MMVIM_KERNEL void MMVIM_REGISTERS(144) backward_kernel(const MMVIM_GRID_CONSTANT Backward p) {
  using Own = Block<T, kWhole, kTiles>;
  const Problem& q = p.problem;
  const Own block(q, kBackwardPlanes);
  float* const shared = block.shared;
  const int lane = block.lane, warp = block.warp, pair = block.pair, part = block.part;
  const int64_t map = block.b * q.length;
  const T* const grad = static_cast<const T*>(p.grad_out) + map * q.channels + block.c;
  T* const dx = static_cast<T*>(p.dx) + map * q.channels + block.c;
  float* const sum = kWhole ? nullptr : q.sum + map * q.channels + block.c;
  float skip[2];
  if (!kWhole) block.sum_over_routes(skip, q.D, block.c);
  const int group = block.first / kGroup;
  const int64_t of_routes = static_cast<int64_t>(q.routes) * q.channels;
  const int64_t columns = 2 * of_routes + q.channels + (kTiles > 0 ? of_routes * q.rank : 0);
  float* const of_parameters = p.parameters + (block.b * q.chunks + block.chunk) * columns;

  block.load_weights();
  int buffer = 0;
  const int half = q.teams > 1 ? q.rounds / 2 : 0;
  for (int turn = q.first_route; turn < q.last_route; turn += q.teams) {
    const int k = q.order[turn + block.team];
    const auto parameters = block.parameters(k);
    const auto step_of = [&](int round) { return (round * q.warps + warp) * kWarpSteps; };
    ColumnGradients<T, kTiles> gradients(block, k);
    T* const low = gpu::kept(
        static_cast<T*>(p.low) +
        (((group * q.batch + block.b) * q.routes + k) * q.length) * (8 * kTiles) + 2 * part);
    // Of the round before `block.begin`, as if it had one.
    const float* const entries = gpu::kept(
        p.checkpoints + ((k * q.batch + block.b) * (q.rounds - 1) + block.begin - 1) * q.channels +
        block.c);
    Two dA = both(0.f), dbias = both(0.f), dD = both(0.f);
    Tables places = block.find_places(k, step_of(block.end - 1), buffer);
    typename Own::Loaded loaded;
    Packed<T, 2> dy[kStrip];
    Two entry;
    const auto load_round = [&](int round) {
      int offset[kStrip];
      places.load(offset, 1, part);
      Own::load_rows(dy, grad, offset);
      block.load_round(loaded, block.x, places, parameters);
      entry = both(0.f);
      if (round > 0) {
        entry = Two::load(gpu::advanced(entries, round - block.begin,
                                        q.channels * static_cast<int>(sizeof(float))));
      }
    };
    load_round(block.end - 1);
    gpu::sync_block();
    load_entry<true>(block.carry, q, k, block.b, block.chunk, block.first, block.worker,
                     32 * q.warps);
    MMVIM_NO_UNROLL
    for (int round = block.end - 1; round >= block.begin; --round) {
      if (round + 1 == half) gpu::sync_block();
      const bool others_before = turn > 0 || round < half;
      const int step = step_of(round), count = q.length - step - part * kStrip;
      const bool full = step + kWarpSteps <= q.length;
      float a[kStrip][2], delta[kStrip][2], h[kStrip][2], B[kStrip], C[kStrip];
      block.step_sizes(a, B, C, loaded, places, parameters, count, full);
      if (!full || !block.present) {
        MMVIM_UNROLL
        for (int i = 0; i < kStrip; ++i) {
          if (i >= count || !block.present) dy[i] = Packed<T, 2>::zero();
        }
      }
      Map total{both(1.f), both(0.f)}, behind_total;
      MMVIM_UNROLL
      for (int i = 0; i < kStrip; ++i) {
        const Two input = two(loaded.u[i]);
        MMVIM_UNROLL
        for (int e = 0; e < 2; ++e) {
          delta[i][e] = softplus2<T>(a[i][e], gpu::exp2(-fabsf(a[i][e])));
          a[i][e] = gpu::exp2(delta[i][e] * parameters.A[e]);
          h[i][e] = delta[i][e] * (input.v[e] * B[i]);
          total.end.v[e] = gpu::fused(a[i][e], total.end.v[e], h[i][e]);
          total.decay.v[e] *= a[i][e];
        }
      }
      behind_total = {total.decay, both(0.f)};
      MMVIM_UNROLL
      for (int i = kStrip - 1; i >= 0; --i) {
        const Two own_dy = two(dy[i]);
        MMVIM_UNROLL
        for (int e = 0; e < 2; ++e) {
          behind_total.end.v[e] = a[i][e] * gpu::fused(C[i], own_dy.v[e], behind_total.end.v[e]);
        }
      }
      const Map before = scan_warp<false>(total, part);
      const Map behind = scan_warp<true>(behind_total, part);
      const int parity = (block.end - 1 - round) & 1;
      float* const passed = block.passed + buffer * q.warps * kBackwardPlanes * kGroup;
      if (part == 3) {
        *reinterpret_cast<float4*>(passed + warp * kBackwardPlanes * kGroup + 4 * pair) =
            make_float4(total.decay.v[0], total.decay.v[1], total.end.v[0], total.end.v[1]);
      }
      if (part == 0) {
        behind_total.end.store(passed + warp * kBackwardPlanes * kGroup + 2 * kGroup + 2 * pair);
      }
      block.sync_team();
      Two g = Two::load(block.carry + parity * kGroup + 2 * pair), state = entry;
      MMVIM_UNROLL_BY(4)
      for (int w = 0; w < warp; ++w) {
        const float4 x =
            *reinterpret_cast<const float4*>(passed + w * kBackwardPlanes * kGroup + 4 * pair);
        state = fused({{x.x, x.y}}, state, {{x.z, x.w}});
      }
      MMVIM_UNROLL_BY(4)
      for (int w = q.warps - 1; w > warp; --w) {
        const float* const from = passed + w * kBackwardPlanes * kGroup;
        g = fused(Two::load(from + 4 * pair), g, Two::load(from + 2 * kGroup + 2 * pair));
      }
      if (warp == 0 && part == 0) {
        fused(behind_total.decay, g, behind_total.end)
            .store(block.carry + (parity ^ 1) * kGroup + 2 * pair);
      }
      state = fused(before.decay, state, before.end);
      g = fused(behind.decay, g, behind.end);
      const Two first_state = state;
      MMVIM_UNROLL
      for (int i = 0; i < kStrip; ++i) {
        state = fused({{a[i][0], a[i][1]}}, state, {{h[i][0], h[i][1]}});
        h[i][0] = state.v[0];
        h[i][1] = state.v[1];
      }
      if (k == 0) {
        MMVIM_UNROLL
        for (int i = 0; i < kStrip; ++i) dD = fused(two(loaded.u[i]), two(dy[i]), dD);
      }

      // From here on `delta`, B and C hold their own gradients.
      int place[kStrip];
      places.load(place, kWhole ? 2 : 1, part);
      const Two by_A{{kLn2 * parameters.A[0], kLn2 * parameters.A[1]}};
      Two others[4];
      MMVIM_UNROLL
      for (int i = kStrip - 1; i >= 0; --i) {
        if (i % 4 == 3) {
          MMVIM_UNROLL
          for (int n = 0; n < 4; ++n) {
            const int at = place[i - n];
            others[n] = others_before ? Two::load(kWhole ? block.sum_at(at) : sum + at) : both(0.f);
          }
        }
        const Two input = two(loaded.u[i]), own_dy = two(dy[i]);
        Two to_input;
        float dB = 0.f, dC = 0.f;
        MMVIM_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float own = gpu::fused(C[i], own_dy.v[e], g.v[e]);
          const float driven = delta[i][e] * own;
          to_input.v[e] = gpu::fused(driven, B[i], others[3 - i % 4].v[e]);
          dB = gpu::fused(driven, input.v[e], dB);
          dC = gpu::fused(own_dy.v[e], h[i][e], dC);
          g.v[e] = own * a[i][e];
          const float by_decay = g.v[e] * (i > 0 ? h[i > 0 ? i - 1 : 0][e] : first_state.v[e]);
          dA.v[e] = gpu::fused(by_decay, delta[i][e], dA.v[e]);
          delta[i][e] =
              slope_of<T>(delta[i][e]) * gpu::fused(by_decay, by_A.v[e], own * (input.v[e] * B[i]));
          dbias.v[e] += delta[i][e];
        }
        if constexpr (kWhole) {
          to_input.store(block.sum_at(place[i]));
        } else if (i < count && block.present) {
          if (k + 1 < q.routes) {
            to_input.store(sum + place[i]);
          } else {
            Packed<T, 2> v;
            MMVIM_UNROLL
            for (int e = 0; e < 2; ++e) {
              v.set(e, gpu::fused(skip[e], own_dy.v[e], kLn2 * to_input.v[e]));
            }
            v.store(dx + place[i]);
          }
        }
        B[i] = kLn2 * dB;
        C[i] = kLn2 * dC;
      }
      if constexpr (kTiles > 0) {
        int position[4];
        places.load(position, 0, pair * 4);
        uint32_t words[kTiles][4];
        MMVIM_UNROLL
        for (int i = 0; i < 4 * kTiles; ++i) words[i / 4][i % 4] = loaded.words[i / 4][i % 4];
        buffer ^= 1;
        if (round > block.begin) {
          places = block.find_places(k, step_of(round - 1), buffer);
          load_round(round - 1);
        }
        gradients.add(block, low, position, step, delta, B, C, words);
      } else {
        int position[kStrip];
        places.load(position, 0, part);
        T* const ddelta = static_cast<T*>(p.ddelta) + (map * q.routes + k) * q.channels + block.c;
        MMVIM_UNROLL
        for (int i = 0; i < kStrip; ++i) {
          if (i >= count || !block.present) continue;
          Packed<T, 2> v;
          v.set(0, delta[i][0]);
          v.set(1, delta[i][1]);
          v.store(ddelta + static_cast<int64_t>(position[i]) * of_routes);
        }
        sum_over_pairs(B, lane);
        sum_over_pairs(C, lane);
        const int own = step + part * kStrip + pair;
        if (own < q.length) {
          const int64_t row =
              (group * q.batch + block.b) * q.length + places.data[part * kStrip + pair];
          store_pair(p.dBC + (row * q.routes + k) * 2, B[0], C[0]);
        }
        buffer ^= 1;
        if (round > block.begin) {
          places = block.find_places(k, step_of(round - 1), buffer);
          load_round(round - 1);
        }
      }
    }

    // Tables and what warps have passed on make room for the sums of the warps.
    gpu::sync_block();
    constexpr int kOfWarp = (3 + 8 * kTiles) * kGroup;
    float* const sums = shared + block.at.tables + block.team * q.warps * kOfWarp;
    MMVIM_UNROLL
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      MMVIM_UNROLL
      for (int e = 0; e < 2; ++e) {
        dA.v[e] += gpu::exchange_xor(dA.v[e], lanes);
        dbias.v[e] += gpu::exchange_xor(dbias.v[e], lanes);
        dD.v[e] += gpu::exchange_xor(dD.v[e], lanes);
      }
    }
    if (part == 0) {
      float* const to = sums + warp * kOfWarp + 2 * pair;
      store_pair(to, kLn2 * kLn2 * dA.v[0], kLn2 * kLn2 * dA.v[1]);
      dbias.store(to + kGroup);
      dD.store(to + 2 * kGroup);
    }
    if constexpr (kTiles > 0) {
      MMVIM_UNROLL
      for (int i = 0; i < 4 * kTiles; ++i) {
        const int column = i / 4 * 8 + 2 * part + i % 2, channel = 2 * pair + i % 4 / 2;
        sums[warp * kOfWarp + (3 + column) * kGroup + channel] = gradients.weight[i / 4][i % 4];
      }
    }
    gpu::sync_block();
    for (int i = block.worker; i < kOfWarp; i += 32 * q.warps) {
      const int which = i / kGroup, channel = block.first + i % kGroup;
      if (channel >= q.channels || (which == 2 && k > 0) || which >= 3 + q.rank) continue;
      float sum_of_warps = 0.f;
      for (int w = 0; w < q.warps; ++w) sum_of_warps += sums[w * kOfWarp + i];
      const int64_t row = static_cast<int64_t>(k) * q.channels + channel;
      int64_t to = which * of_routes + row;
      if (which == 2) to = 2 * of_routes + channel;
      if (which >= 3) to = 2 * of_routes + q.channels + row * q.rank + which - 3;
      of_parameters[to] = sum_of_warps;
    }
    gpu::sync_block();
  }

  if constexpr (kWhole) {
    gpu::sync_block();
    finish_sums(block, p.dx, p.grad_out, kLn2);
  }
}

// What each chunk does to a state that enters it, or with kBackward to the gradient of a state that
// enters from behind. The warps of a block take neighbouring parts of the chunk.
template <class T, int kTiles, bool kBackward>
MMVIM_DEVICE void run_local(const Problem& q, const void* source) {
  using Own = Block<T, false, kTiles>;
  const Own block(q, kForwardPlanes);
  float* const shared = block.shared;
  const int warp = block.warp, pair = block.pair, part = block.part;
  const int k = gpu::block_z();
  const int rounds = block.end - block.begin;
  const T* const from = static_cast<const T*>(source) + block.b * q.length * q.channels + block.c;
  block.load_weights();
  gpu::sync_block();
  const auto parameters = block.parameters(k);
  Map all{both(1.f), both(0.f)};
  MMVIM_NO_UNROLL
  for (int r = 0; r < rounds; ++r) {
    const int own = warp * rounds + (kBackward ? rounds - 1 - r : r);
    const int step = block.begin * q.warps * kWarpSteps + own * kWarpSteps;
    const int count = q.length - step - part * kStrip;
    const Tables places = block.find_places(k, step, r & 1);
    typename Own::Loaded loaded;
    block.load_round(loaded, from, places, parameters);
    float raw[kStrip][2], B[kStrip], C[kStrip];
    block.step_sizes(raw, B, C, loaded, places, parameters, count, step + kWarpSteps <= q.length);
    Map total{both(1.f), both(0.f)};
    MMVIM_UNROLL
    for (int n = 0; n < kStrip; ++n) {
      const int i = kBackward ? kStrip - 1 - n : n;
      const Two input = two(loaded.u[i]);
      MMVIM_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float size = softplus2<T>(raw[i][e], gpu::exp2(-fabsf(raw[i][e])));
        const float a = gpu::exp2(size * parameters.A[e]);
        if (kBackward) {
          const float driven = i < count ? input.v[e] * C[i] : 0.f;
          total.end.v[e] = a * (total.end.v[e] + driven);
        } else {
          total.end.v[e] = gpu::fused(a, total.end.v[e], size * (input.v[e] * B[i]));
        }
        total.decay.v[e] *= a;
      }
    }
    scan_warp<kBackward>(total, part);
    // Of the lane that has all strips; the others' count for nothing.
    all.end = fused(total.decay, all.end, total.end);
    all.decay = fused(total.decay, all.decay, both(0.f));
  }
  float* const passed = shared + block.at.passed + 2 * pair;
  if (part == (kBackward ? 0 : 3)) {
    all.decay.store(passed + warp * 2 * kGroup);
    all.end.store(passed + (warp * 2 + 1) * kGroup);
  }
  gpu::sync_block();
  const int c = block.first + block.thread;
  if (block.thread >= kGroup || c >= q.channels) return;
  float decay = 1.f, end = 0.f;
  for (int n = 0; n < q.warps; ++n) {
    const int w = kBackward ? q.warps - 1 - n : n;
    const float* const one = shared + block.at.passed + w * 2 * kGroup + block.thread;
    end = gpu::fused(one[0], end, one[kGroup]);
    decay *= one[0];
  }
  const int64_t plane = q.batch * q.channels;
  float* const result = q.local + (static_cast<int64_t>(k) * q.chunks + block.chunk) * plane +
                        block.b * q.channels + c;
  result[0] = decay;
  result[static_cast<int64_t>(q.routes) * q.chunks * plane] = end;
}

template <class T, int kTiles>
MMVIM_KERNEL void MMVIM_REGISTERS(128) local_kernel(const MMVIM_GRID_CONSTANT Forward p) {
  run_local<T, kTiles, false>(p.problem, p.problem.x);
}
template <class T, int kTiles>
MMVIM_KERNEL void MMVIM_REGISTERS(128) local_backward_kernel(const MMVIM_GRID_CONSTANT Backward p) {
  run_local<T, kTiles, true>(p.problem, p.grad_out);
}

// Adds the gradients of the columns of all groups of channels: a thread, two columns of a step.
// Grid: `blocks_of_map` for each map.
template <class T>
MMVIM_KERNEL void finish_columns_kernel(const MMVIM_GRID_CONSTANT Finish p) {
  const int b = gpu::block_x() / p.blocks_of_map;
  const int64_t i =
      int64_t{gpu::block_x() - b * p.blocks_of_map} * gpu::thread_count() + gpu::thread_index();
  const int shift = p.tiles == 1 ? 2 : 3, word = static_cast<int>(i & ((1 << shift) - 1));
  const auto step = static_cast<uint32_t>(i >> shift), position = step / p.routes;
  const int k = static_cast<int>(step - position * p.routes), column = 2 * word;
  if (position >= static_cast<uint32_t>(p.length) || column > p.rank) return;
  const int64_t from =
      (((static_cast<int64_t>(b) * p.routes + k) * p.length + position) << shift) + word;
  float x = 0.f, y = 0.f;
  MMVIM_UNROLL_BY(4)
  for (int64_t part = 0; part < p.parts; ++part) {
    const Two v = two(
        Packed<T, 2>::load(static_cast<const T*>(p.low) + 2 * (((part * p.rows) << shift) + from)));
    x += v.v[0];
    y += v.v[1];
  }
  const int64_t row = static_cast<int64_t>(b) * p.length * p.routes + step;
  if (column < p.rank) {
    *reinterpret_cast<uint32_t*>(static_cast<T*>(p.ddelta) + row * p.rank + column) =
        packed<T>(x, y);
  } else {
    static_cast<T*>(p.dB)[row] = from_float<T>(x);
    static_cast<T*>(p.dC)[row] = from_float<T>(y);
  }
}

}  // namespace strips
}  // namespace cross
}  // namespace mmvim
