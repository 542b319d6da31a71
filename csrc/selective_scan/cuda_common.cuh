// What the kernels of the scan share: how a block's threads map to channels and states, and loads.
//
// A lane owns kCpt neighbouring channels, a warp a slice of kSlice states of its lanes' channels,
// so a block of ceil(n / kSlice) warps owns 32 kCpt channels.
#pragma once

#include <type_traits>

#include "../common/gpu_math.cuh"
#include "../common/vector.cuh"
#include "cuda.h"
#include "cuda_steps.cuh"

namespace mmvim {
namespace scan {

constexpr int kSlice = 4;

// A short series will do for bfloat16; what float16 keeps of the gradients of float parameters
// would show it.
template <class T>
constexpr bool kFineSoftplus = !std::is_same<T, __nv_bfloat16>::value;

MMVIM_HD int smaller(int a, int b) { return a < b ? a : b; }
MMVIM_HD int slices_of(const Sizes& size) { return (size.states + kSlice - 1) / kSlice; }
MMVIM_HD int channel_blocks(const Sizes& size, int width) {
  const int unit = size.channels / size.units;
  return size.units * ((unit + width - 1) / width);
}

// x: batch entries, each with its directions side by side; y: channel blocks; z: chunks.
inline gpu::Grid grid_of(const Sizes& size, int width, int directions, int chunks) {
  return {size.batch * directions, channel_blocks(size, width), chunks};
}

// Channels [first, first + count) of one block.
struct Channels {
  int first, count;

  MMVIM_DEVICE Channels(const Sizes& size, int block, int width) {
    int inner = block * width;
    int unit_channels = size.channels;
    first = 0;
    if (size.units > 1) {
      unit_channels /= size.units;
      const int per_unit = (unit_channels + width - 1) / width;
      const int unit = block / per_unit;
      first = unit * unit_channels;
      inner -= unit * per_unit * width;
    }
    first += inner;
    count = smaller(width, unit_channels - inner);
  }
  MMVIM_DEVICE int group(const Sizes& size, int groups) const {
    return groups == 1 ? 0 : first / (size.channels / groups);
  }
};

// A stretch of positions [begin, end), cut into tiles [at, stop) that end at multiples of
// `interval`.
constexpr int kForever = 0x7fffffff;

struct Walk {
  int at, stop, end;
  int pause;  // where a tile ends, too
  int until;  // steps from `at` to the next multiple of the interval

  MMVIM_DEVICE Walk(int begin, int end_, int pause_, int interval, int tile)
      : at(begin), end(end_), pause(pause_), until(interval - begin % interval) {
    set_stop(tile);
  }
  MMVIM_DEVICE void advance(int interval, int tile) {
    until -= stop - at;
    if (until == 0) until = interval;
    at = stop;
    set_stop(tile);
  }

 private:
  MMVIM_DEVICE void set_stop(int tile) {
    stop = at + smaller(tile, smaller((at < pause ? pause : end) - at, until));
  }
};

// Sequences packed into one row, seen from a walk along it. All lanes of a warp call together.
template <bool kPacked>
struct Sequences {
  const int32_t* row;
  int length;
  bool reverse;

  MMVIM_DEVICE Sequences(const int32_t* seq_idx, int64_t b, const Sizes& size, bool reverse_)
      : row(seq_idx + (kPacked ? b * size.length : 0)), length(size.length), reverse(reverse_) {}

  // Whether a sequence starts at the position where another one ends.
  MMVIM_DEVICE bool start_at(int position) const {
    if (!kPacked || position <= 0 || position >= length) return false;
    const int t = reverse ? length - 1 - position : position;
    return row[t] != row[reverse ? t + 1 : t - 1];
  }
  // Of at most 32 positions [first, first + count), the number of those up to the next start.
  MMVIM_DEVICE int up_to_start(int first, int count, int lane) const {
    if (!kPacked) return count;
    const uint32_t starts = gpu::ballot(lane > 0 && lane < count && start_at(first + lane));
    return starts == 0 ? count : gpu::lowest_bit(starts);
  }
  // Of at most 32 positions [first, end), the first of those from the last start on.
  MMVIM_DEVICE int last_start(int first, int end, int lane) const {
    if (!kPacked) return first;
    const uint32_t starts = gpu::ballot(lane > 0 && first + lane < end && start_at(first + lane));
    return starts == 0 ? first : first + gpu::highest_bit(starts);
  }
};

// Copies tiles of inputs to shared rows of kChannels, row r from time `time + r * step`. What lies
// past the last channel is left as it is.
template <class T, int kChannels>
struct RowCopy {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  static constexpr int kPerRow = kChannels / kElements;
  int index, threads;
  int channel;  // of the thread's vectors; negative if it has none, kChannels if elements are
                // copied
  int count;

  // `vectors`: all rows to be copied consist of vectors of 16 bytes.
  MMVIM_DEVICE RowCopy(bool vectors, const Channels& channels, int index_, int threads_)
      : index(index_), threads(threads_), channel(kChannels), count(channels.count) {
    if (vectors && count % kElements == 0) {
      const int c = index % kPerRow * kElements;
      channel = c < count ? c : -1;
    }
  }

  // `base`: of the block's first channel.
  MMVIM_DEVICE void copy(T* shared, const T* base, int stride, int time, int step, int rows) const {
    if (channel < kChannels) {
      if (channel < 0) return;
      base += channel;
      MMVIM_NO_UNROLL
      for (int i = index; i < rows * kPerRow; i += threads) {
        gpu::copy_async<16>(shared + i * kElements,
                            base + static_cast<int64_t>(time + i / kPerRow * step) * stride);
      }
      return;
    }
    MMVIM_NO_UNROLL
    for (int i = index; i < rows * kChannels; i += threads) {
      const int c = i % kChannels;
      if (c < count) {
        shared[i] = base[static_cast<int64_t>(time + i / kChannels * step) * stride + c];
      }
    }
  }
};

template <class T>
MMVIM_DEVICE const T* rows_of(const Rows& rows, int64_t b, int first) {
  return static_cast<const T*>(rows.data) + b * rows.stride_b + first;
}

// The same for one group's states of B, and then those of C, in rows of kSlice times the number of
// slices, zero past the last state. A thread copies one slice of one row, or nothing.
template <class T, int kTile>
struct ColumnCopy {
  const T* base;  // of the thread's slice
  int stride;
  int row;     // kTile for a thread that copies nothing
  int states;  // in the thread's slice
  bool whole;

  // `C` is null if there is but one of the two to copy.
  MMVIM_DEVICE ColumnCopy(const Rows& B, const Rows* C, int64_t b, int group, int states_,
                          int slices, int index) {
    const int rows = index / slices;
    const int slice = index - rows * slices;
    const bool second = rows >= kTile;
    row = second ? (C == nullptr ? kTile : rows - kTile) : rows;
    const Rows& columns = second && C != nullptr ? *C : B;
    stride = columns.stride_l;
    base = rows_of<T>(columns, b, slice * kSlice) + group * columns.stride_g;
    states = states_ - slice * kSlice;
    whole = states >= kSlice && columns.vector >= kSlice * static_cast<int>(sizeof(T));
  }

  // `shared`: of the thread's slice, kSlice times the thread's index from the tile's start.
  MMVIM_DEVICE void copy(T* shared, int time, int step, int count) const {
    if (row >= count) return;
    const T* const from = base + static_cast<int64_t>(time + row * step) * stride;
    if (whole) {
      gpu::copy_async<kSlice* static_cast<int>(sizeof(T))>(shared, from);
      return;
    }
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) shared[j] = j < states ? from[j] : from_float<T>(0.f);
  }
};

// Values of four neighbouring channels.
struct Quad {
  float v[4];

  template <class F>
  static MMVIM_DEVICE Quad of(F f) {
    Quad q;
    MMVIM_UNROLL
    for (int i = 0; i < 4; ++i) q.v[i] = f(i);
    return q;
  }
  // Aligned, written by another block.
  static MMVIM_DEVICE Quad load_coherent(const float* p) {
    const float4 x = gpu::load_coherent(reinterpret_cast<const float4*>(p));
    return {{x.x, x.y, x.z, x.w}};
  }
  static MMVIM_DEVICE Quad load_coherent(const float* p, int count) {
    return of([&](int i) { return i < count ? gpu::load_coherent(p + i) : 0.f; });
  }
  // Aligned.
  template <class T>
  static MMVIM_DEVICE Quad load(const T* p) {
    Packed<T, 4> x;
    x.raw = *reinterpret_cast<const typename Packed<T, 4>::Raw*>(p);
    return of([&](int i) { return x.get(i); });
  }
  template <class T>
  MMVIM_DEVICE void store(T* p) const {
    Packed<T, 4> x;
    MMVIM_UNROLL
    for (int i = 0; i < 4; ++i) x.set(i, v[i]);
    x.store(p);
  }
  template <class T>
  static MMVIM_DEVICE Quad of(const Packed<T, 4>& x) {
    return of([&](int i) { return x.get(i); });
  }
  // Elements from `count` on are absent: zero, not stored.
  template <class T>
  static MMVIM_DEVICE Quad load(const T* p, int count) {
    return of([&](int i) { return i < count ? to_float(p[i]) : 0.f; });
  }
  template <class T>
  MMVIM_DEVICE void store(T* p, int count) const {
    MMVIM_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i < count) p[i] = from_float<T>(v[i]);
    }
  }
  // Sum of `count` quads that are kPitch floats apart.
  template <int kPitch>
  static MMVIM_DEVICE Quad sum(const float* p, int count) {
    Quad x = load(p);
    if (count == 4) {
      MMVIM_UNROLL
      for (int i = 1; i < 4; ++i) x.add(load(p + i * kPitch));
    } else {
      MMVIM_NO_UNROLL
      for (int i = 1; i < count; ++i) x.add(load(p + i * kPitch));
    }
    return x;
  }
  MMVIM_DEVICE void add(const Quad& x) {
    MMVIM_UNROLL
    for (int i = 0; i < 4; ++i) v[i] += x.v[i];
  }
};

// Brings the block's part of `count` rows closer, from time `first` on; `step` 1 or -1.
template <class T, int kChannels>
MMVIM_DEVICE void prefetch_rows(const Rows& rows, int64_t b, const Channels& channels, int first,
                                int step, int count, int index, int threads) {
  constexpr int kSectors = kChannels * static_cast<int>(sizeof(T)) / 32;
  const T* const base = rows_of<T>(rows, b, channels.first);
  MMVIM_NO_UNROLL
  for (int i = index; i < count * kSectors; i += threads) {
    const int c = i % kSectors * (32 / static_cast<int>(sizeof(T)));
    const int64_t t = first + step * (i / kSectors);
    if (c < channels.count) gpu::prefetch(base + t * rows.stride_l + c);
  }
}

// Four channels of an input's rows.
template <class T>
struct QuadInput {
  const T* base;
  int stride;
  int count;
  bool whole;

  MMVIM_DEVICE QuadInput(const Rows& rows, int64_t b, const Channels& channels, int quad)
      : base(static_cast<const T*>(rows.data) + b * rows.stride_b + channels.first + 4 * quad),
        stride(rows.stride_l),
        count(channels.count - 4 * quad),
        whole(count >= 4 && rows.vector >= 4 * static_cast<int>(sizeof(T))) {}

  // Not converted, so that loads in flight cost few registers.
  MMVIM_DEVICE Packed<T, 4> load_whole(int t) const {
    Packed<T, 4> x;
    x.raw = *reinterpret_cast<const typename Packed<T, 4>::Raw*>(base +
                                                                 static_cast<int64_t>(t) * stride);
    return x;
  }
  MMVIM_DEVICE Packed<T, 4> load(int t) const {
    if (whole) return load_whole(t);
    const T* const from = base + static_cast<int64_t>(t) * stride;
    Packed<T, 4> x = Packed<T, 4>::zero();
    MMVIM_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i < count) x.element[i] = from[i];
    }
    return x;
  }
};

// Four channels of the rows of a contiguous (b, l, d) array, at one time step.
template <class T>
struct QuadRows {
  T* base;
  int64_t stride;
  int count;
  bool whole;

  MMVIM_DEVICE QuadRows(T* data, const Sizes& size, int64_t b, const Channels& channels, int quad)
      : QuadRows(data, size, b, channels, quad, size.channels) {}
  MMVIM_DEVICE QuadRows(T* data, const Sizes& size, int64_t b, const Channels& channels, int quad,
                        int pitch)
      : base(data + b * size.length * pitch + channels.first + 4 * quad),
        stride(pitch),
        count(channels.count - 4 * quad),
        whole(count >= 4 && (pitch | size.channels | channels.first) % 4 == 0) {}

  MMVIM_DEVICE Quad load(int t) const {
    return whole ? Quad::load(base + t * stride) : Quad::load(base + t * stride, count);
  }
  MMVIM_DEVICE Quad load_coherent(int t) const {
    return whole ? Quad::load_coherent(base + t * stride)
                 : Quad::load_coherent(base + t * stride, count);
  }
  MMVIM_DEVICE void store(int t, const Quad& x) const {
    if (whole) {
      x.store(base + t * stride);
    } else {
      x.store(base + t * stride, count);
    }
  }
};

// A parameter (d,) of the block's channels; zero where there is none.
template <int kChannels>
MMVIM_DEVICE void load_parameters(float* shared, const float* data, const Channels& channels,
                                  int index, int threads) {
  for (int c = index; c < kChannels; c += threads) {
    shared[c] = data != nullptr && c < channels.count ? data[channels.first + c] : 0.f;
  }
}

// Rows of B, then of C, as ColumnCopy leaves them, to float: for each slice and row kSlice states
// of B, then of C. Every thread converts one slice of one row.
template <int kTile, class T>
MMVIM_DEVICE void convert_columns(float* columns, const T* raw, int slices, int index) {
  static_assert(kTile == 16);
  const int from = (index % 2 * kTile + index % 32 / 2) * slices + index / 32;
  Quad::load(raw + from * kSlice).store(columns + index * kSlice);
}

// kSlice states of each of the lane's channels, of a (rows, d, pitch) array; zero outside.
template <int kCpt>
MMVIM_DEVICE void load_states(float (&h)[kCpt][kSlice], const float* data, int64_t row, int pitch,
                              const Sizes& size, const Channels& channels, int lane, int slice) {
  MMVIM_UNROLL
  for (int k = 0; k < kCpt; ++k) {
    const int c = lane * kCpt + k;
    const float* p = data + (row * size.channels + channels.first + c) * pitch + slice * kSlice;
    const int states = c < channels.count ? size.states - slice * kSlice : 0;
    if (reinterpret_cast<uintptr_t>(p) % 16 == 0 && states >= kSlice) {
      const float4 x = *reinterpret_cast<const float4*>(p);
      h[k][0] = x.x;
      h[k][1] = x.y;
      h[k][2] = x.z;
      h[k][3] = x.w;
      continue;
    }
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) h[k][j] = j < states ? p[j] : 0.f;
  }
}

template <int kCpt>
MMVIM_DEVICE void store_states(const float (&h)[kCpt][kSlice], float* data, int64_t row, int pitch,
                               const Sizes& size, const Channels& channels, int lane, int slice) {
  MMVIM_UNROLL
  for (int k = 0; k < kCpt; ++k) {
    const int c = lane * kCpt + k;
    if (c >= channels.count) continue;
    float* p = data + (row * size.channels + channels.first + c) * pitch + slice * kSlice;
    if (reinterpret_cast<uintptr_t>(p) % 16 == 0 && slice * kSlice + kSlice <= size.states) {
      *reinterpret_cast<float4*>(p) = make_float4(h[k][0], h[k][1], h[k][2], h[k][3]);
      continue;
    }
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) {
      if (slice * kSlice + j < size.states) p[j] = h[k][j];
    }
  }
}

// v of two-tap methods after the step at time t: B u.
template <class T, int kCpt>
MMVIM_DEVICE void load_drive(float (&v)[kCpt][kSlice], const Scan& scan, const Sizes& size,
                             int64_t b, int t, const Channels& channels, int lane, int slice) {
  const int64_t row = t;
  const T* u = static_cast<const T*>(scan.u.data) + b * scan.u.stride_b + row * scan.u.stride_l +
               channels.first;
  const T* B = static_cast<const T*>(scan.B.data) + b * scan.B.stride_b + row * scan.B.stride_l +
               channels.group(size, scan.groups) * scan.B.stride_g + slice * kSlice;
  MMVIM_UNROLL
  for (int k = 0; k < kCpt; ++k) {
    const int c = lane * kCpt + k;
    const float x = c < channels.count ? to_float(u[c]) : 0.f;
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) {
      v[k][j] = slice * kSlice + j < size.states ? x * to_float(B[j]) : 0.f;
    }
  }
}

template <int kCpt>
MMVIM_DEVICE void copy_states(float (&to)[kCpt][kSlice], const float (&from)[kCpt][kSlice]) {
  MMVIM_UNROLL
  for (int k = 0; k < kCpt; ++k) {
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) to[k][j] = from[k][j];
  }
}

template <int kCpt>
MMVIM_DEVICE void clear_states(float (&h)[kCpt][kSlice]) {
  MMVIM_UNROLL
  for (int k = 0; k < kCpt; ++k) {
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) h[k][j] = 0.f;
  }
}

MMVIM_DEVICE void load_slice(float (&v)[kSlice], const float* shared) {
  const float4 x = *reinterpret_cast<const float4*>(shared);
  v[0] = x.x;
  v[1] = x.y;
  v[2] = x.z;
  v[3] = x.w;
}

MMVIM_DEVICE void store_slice(float* shared, const float (&v)[kSlice]) {
  *reinterpret_cast<float4*>(shared) = make_float4(v[0], v[1], v[2], v[3]);
}

// One value of each of the lane's channels.
MMVIM_DEVICE void load_lane(float (&v)[1], const float* shared) { v[0] = shared[0]; }
MMVIM_DEVICE void load_lane(float (&v)[2], const float* shared) {
  const float2 x = *reinterpret_cast<const float2*>(shared);
  v[0] = x.x;
  v[1] = x.y;
}
MMVIM_DEVICE void store_lane(float* shared, const float (&v)[1]) { shared[0] = v[0]; }
MMVIM_DEVICE void store_lane(float* shared, const float (&v)[2]) {
  *reinterpret_cast<float2*>(shared) = make_float2(v[0], v[1]);
}

// v after a step: B u.
template <int kCpt>
MMVIM_DEVICE void drives_of(float (&v)[kCpt][kSlice], const float* input, const float* column) {
  float B[kSlice], u[kCpt];
  load_slice(B, column);
  load_lane(u, input);
  MMVIM_UNROLL
  for (int k = 0; k < kCpt; ++k) {
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) v[k][j] = u[k] * B[j];
  }
}

// Whether this warp's states may take quick steps.
template <class T, Discretization kMethod, int kCpt>
MMVIM_DEVICE bool may_be_quick(const float (&A)[kCpt][kSlice]) {
  if (!kHasQuickSteps<T, kMethod>) return false;
  if (!QuickStep<kMethod>::kCritical) return true;
  float largest = -3e38f;
  MMVIM_UNROLL
  for (int k = 0; k < kCpt; ++k) {
    MMVIM_UNROLL
    for (int j = 0; j < kSlice; ++j) {
      if (A[k][j] != 0.f) largest = fmaxf(largest, A[k][j]);
    }
  }
  MMVIM_UNROLL
  for (int m = 16; m > 0; m /= 2) largest = fmaxf(largest, gpu::exchange_xor(largest, m));
  return largest <= -kSmallestA;
}

// Makes the answer a template parameter.
template <class T, Discretization kMethod, class F>
MMVIM_DEVICE void by_steps(bool quick, F&& f) {
  if constexpr (!kHasQuickSteps<T, kMethod>) {
    f(std::false_type());
  } else if constexpr (!QuickStep<kMethod>::kCritical) {
    f(std::true_type());
  } else if (quick) {
    f(std::true_type());
  } else {
    f(std::false_type());
  }
}

template <class T, Discretization kMethod, int kCpt>
MMVIM_DEVICE void set_constants(StateConstants (&constants)[kCpt][kSlice],
                                const float (&A)[kCpt][kSlice], bool quick) {
  by_steps<T, kMethod>(quick, [&](auto kind) {
    MMVIM_UNROLL
    for (int k = 0; k < kCpt; ++k) {
      MMVIM_UNROLL
      for (int j = 0; j < kSlice; ++j) {
        constants[k][j] = state_constants<kMethod, decltype(kind)::value>(A[k][j]);
      }
    }
  });
}

}  // namespace scan
}  // namespace mmvim
