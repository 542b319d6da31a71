// Depthwise convolutions of width 2 to 4 over (batch, length, channels), forward and backward.
//
// A thread owns one vector of neighbouring channels and walks a tile of rows with a sliding window;
// kBatch rows are on their way before the first of them is used, so the kernels run at the speed of
// memory. With `both`, the causal and the reverse convolution share the one pass over the input.
//
// Backward, sums for the taps stay in registers over all tiles of the thread, are added within the
// block, written once per block and added by a second kernel in a fixed order: no atomics, and
// equal results in every run.
#pragma once

#include <type_traits>

#include "../common/vector.cuh"
#include "cuda.h"

namespace mmvim {
namespace conv {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

constexpr int kForwardThreads = 128;
constexpr int kForwardBatch = 8;
// So many threads of the forward kernel fill a large GPU.
constexpr int64_t kManyThreads = 100000;

// Channels of a vector.
template <class T, bool kVectorized>
constexpr int forward_vector() {
  return !kVectorized ? 1 : 8 / static_cast<int>(sizeof(T));
}
// Elements c .. c + kCount of the virtual input at position p < 0 (causal) or p >= length
// (reverse), which lies in the state and may be finer than T.
template <class T, int kCount>
__device__ __noinline__ Packed<float, kCount> load_state(const State& state, const Input& in,
                                                         bool reverse, int64_t b, int p,
                                                         int64_t c) {
  Packed<float, kCount> v = Packed<float, kCount>::zero();
  const int64_t reach = in.width - 1;
  const int64_t slot = reverse ? reach - 1 - (p - in.length) : reach + p;
  const bool inside = reverse ? p >= in.length : p < 0;
  if (state.data == nullptr || !inside || slot < 0 || slot >= reach) return v;
  for (int i = 0; i < kCount; ++i) {
    const int64_t at = (b * in.channels + c + i) * reach + slot;
    v.element[i] = state.is_float ? static_cast<const float*>(state.data)[at]
                                  : to_float(static_cast<const T*>(state.data)[at]);
  }
  return v;
}

// The rows of one batch entry, from one vector of channels on; zero outside.
template <class T, int kCount>
struct Column {
  const T* base;
  int64_t stride;
  int length;

  __device__ __forceinline__ const T* at(int p) const { return base + p * stride; }
  __device__ __forceinline__ Packed<T, kCount> load(int p) const {
    Packed<T, kCount> v = Packed<T, kCount>::zero();
    if (static_cast<unsigned>(p) < static_cast<unsigned>(length)) {
      v = Packed<T, kCount>::load(base + p * stride);
    }
    return v;
  }
};

// The same, with the state around it if there is one.
template <class T, int kCount, bool kStates>
using InputRow = Packed<std::conditional_t<kStates, float, T>, kCount>;

template <bool kStates, class T, int kCount>
__device__ __forceinline__ InputRow<T, kCount, kStates> load_input(const Column<T, kCount>& column,
                                                                   const Input& in,
                                                                   const State& state, bool reverse,
                                                                   int64_t b, int p, int64_t c) {
  if constexpr (kStates) {
    if (p < 0 || p >= column.length) return load_state<T, kCount>(state, in, reverse, b, p, c);
    InputRow<T, kCount, kStates> row;
    const Packed<T, kCount> x = column.load(p);
#pragma unroll
    for (int i = 0; i < kCount; ++i) row.element[i] = x.get(i);
    return row;
  } else {
    return column.load(p);
  }
}

// Where sequences start that are packed into one row: bit i stands for the position i behind the
// first of the kCount that a sliding window holds.
template <bool kPacked, int kCount>
struct Starts {
  const int32_t* row;
  int length;
  uint32_t bits = 0;

  __device__ __forceinline__ Starts(const int32_t* seq_idx, int64_t b, int length_)
      : row(seq_idx + (kPacked ? b * length_ : 0)), length(length_) {}

  __device__ __forceinline__ void shift_in(int p) {
    if constexpr (kPacked) {
      const bool starts = p > 0 && p < length && row[p] != row[p - 1];
      bits = bits >> 1 | (starts ? 1u << (kCount - 1) : 0u);
    }
  }
  // Whether one sequence holds both positions. What lies before and behind a row belongs to the
  // sequences next to it.
  __device__ __forceinline__ bool join(int one, int two) const {
    if (!kPacked) return true;
    const int first = one < two ? one : two, last = one < two ? two : one;
    return (bits & ((2u << last) - (2u << first))) == 0;
  }
};

// The same for the position `at` and the last one in scan order.
__device__ __forceinline__ bool joins_last(const int32_t* row, int length, bool reverse,
                                           int64_t at) {
  int64_t first = reverse ? 1 : at + 1;
  if (first < 1) first = 1;
  const int64_t last = reverse && at < length ? at : length - 1;
  for (int64_t p = first; p <= last; ++p) {
    if (row[p] != row[p - 1]) return false;
  }
  return true;
}

template <int kWidth, int kCount>
__device__ __forceinline__ void load_taps(const Taps& taps, int64_t c, float (&w)[kWidth][kCount],
                                          float (&bias)[kCount]) {
  float flat[kWidth * kCount];
  const float* const from = taps.weight + c * kWidth;
  if (kWidth * kCount % 4 == 0 && taps.aligned) {
#pragma unroll
    for (int i = 0; i < kWidth * kCount / 4; ++i) {
      const float4 x = __ldg(reinterpret_cast<const float4*>(from) + i);
      flat[4 * i] = x.x;
      flat[4 * i + 1] = x.y;
      flat[4 * i + 2] = x.z;
      flat[4 * i + 3] = x.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth * kCount; ++i) flat[i] = __ldg(from + i);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    bias[i] = taps.bias == nullptr ? 0.f : __ldg(taps.bias + c + i);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float first = flat[i * kWidth + k], last = flat[i * kWidth + kWidth - 1 - k];
      w[k][i] = taps.reverse ? last : first;
    }
  }
}

template <class T, int kCount>
__device__ __forceinline__ void unpack(float (&x)[kCount], const Packed<T, kCount>& v) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = v.get(i);
}

// Drops the oldest of a window's rows, which then lacks its newest.
template <int kRows, int kCount>
__device__ __forceinline__ void shift(float (&x)[kRows][kCount]) {
#pragma unroll
  for (int k = 0; k + 1 < kRows; ++k) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[k][i] = x[k + 1][i];
  }
}

// The rows of a window that one sequence holds together with row `own`; others zero. Bit `first`
// of the starts is that of row 0.
template <int kWidth, int kCount, class S>
__device__ __forceinline__ void select_joined(float (&seen)[kWidth][kCount],
                                              const float (&x)[kWidth][kCount], const S& starts,
                                              int own, int first) {
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const bool joined = starts.join(first + k, first + own);
#pragma unroll
    for (int i = 0; i < kCount; ++i) seen[k][i] = joined ? x[k][i] : 0.f;
  }
}

// Output from the rows kFirst .. of a window.
template <int kFirst, class T, int kWidth, int kCount, int kRows>
__device__ __forceinline__ void write_row(T* to, const float (&x)[kRows][kCount],
                                          const float (&w)[kWidth][kCount],
                                          const float (&bias)[kCount], bool silu) {
  Packed<T, kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float sum = bias[i];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum = fmaf(w[k][i], x[kFirst + k][i], sum);
    result.set(i, silu ? sum * sigmoid(sum) : sum);
  }
  result.store(to);
}

// Grid: (vectors times tiles, batch).
template <class T, int kCount, int kWidth, bool kBoth, bool kStates, bool kPacked>
__global__ void __launch_bounds__(kForwardThreads, kBoth ? 4 : 6)
    forward_kernel(Forward p, unsigned tile_rows, unsigned tiles) {
  const unsigned vectors = static_cast<unsigned>(p.in.channels / kCount);
  const unsigned index = blockIdx.x * kForwardThreads + threadIdx.x;
  const unsigned tile = index / vectors;
  if (tile >= tiles) return;
  const int64_t c = static_cast<int64_t>(index - tile * vectors) * kCount;
  const int begin = static_cast<int>(tile * tile_rows);
  const int length = static_cast<int>(p.in.length);
  const int end = length - begin < static_cast<int>(tile_rows) ? length : begin + tile_rows;

  constexpr int kWindow = kBoth ? 2 * kWidth - 1 : kWidth;
  const int first = begin - (kBoth ? kWidth - 1 : p.taps[0].left);
  float w[kWidth][kCount], bias[kCount], w_b[kBoth ? kWidth : 1][kCount], bias_b[kCount];
  load_taps<kWidth, kCount>(p.taps[0], c, w, bias);
  if constexpr (kBoth) load_taps<kWidth, kCount>(p.taps[1], c, w_b, bias_b);

  for (int64_t b = blockIdx.y; b < p.in.batch; b += gridDim.y) {
    const Column<T, kCount> column{static_cast<const T*>(p.in.x) + b * p.in.stride_b + c,
                                   p.in.stride_l, length};
    const auto load = [&](int at) {
      return load_input<kStates>(column, p.in, p.initial, p.taps[0].reverse, b, at, c);
    };
    float x[kWindow][kCount];
    Starts<kPacked, kWindow> starts(p.seq_idx, b, length);
#pragma unroll
    for (int k = 0; k + 1 < kWindow; ++k) {
      unpack(x[k + 1], load(first + k));
      starts.shift_in(first + k);
    }
    const int64_t to = (b * length + begin) * p.in.channels + c;
    T* out = static_cast<T*>(p.out[0]) + to;
    T* out_b = kBoth ? static_cast<T*>(p.out[1]) + to : nullptr;
    for (int t = begin; t < end; t += kForwardBatch) {
      InputRow<T, kCount, kStates> rows[kForwardBatch];
#pragma unroll
      for (int r = 0; r < kForwardBatch; ++r) rows[r] = load(first + kWindow - 1 + (t - begin) + r);
#pragma unroll
      for (int r = 0; r < kForwardBatch; ++r) {
        if (t + r >= end) break;
        shift(x);
        unpack(x[kWindow - 1], rows[r]);
        if constexpr (kPacked) {
          starts.shift_in(t + r - p.taps[0].left + kWindow - 1);
          float seen[kWidth][kCount];
          select_joined(seen, x, starts, p.taps[0].left, 0);
          write_row<0, T>(out, seen, w, bias, p.in.silu);
        } else {
          write_row<0, T>(out, x, w, bias, p.in.silu);
        }
        out += p.in.channels;
        if constexpr (kBoth) {
          write_row<kWidth - 1, T>(out_b, x, w_b, bias_b, p.in.silu);
          out_b += p.in.channels;
        }
      }
    }
  }
}

template <class T, bool kPacked>
__global__ void last_state_kernel(Forward p) {
  const int64_t reach = p.in.width - 1;
  const int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (index >= p.in.batch * p.in.channels * reach) return;
  const int64_t slot = index % reach;
  const int64_t c = index / reach % p.in.channels;
  const int64_t b = index / reach / p.in.channels;
  const int64_t step = p.in.length - reach + slot;  // in scan order
  const int64_t at = p.taps[0].reverse ? p.in.length - 1 - step : step;
  const T* row0 = static_cast<const T*>(p.in.x) + b * p.in.stride_b + c;
  float value = 0.f;
  if (step >= 0) {
    value = to_float(row0[at * p.in.stride_l]);
  } else if (p.initial.data != nullptr) {
    const int64_t old = (b * p.in.channels + c) * reach + slot + p.in.length;
    value = p.initial.is_float ? static_cast<const float*>(p.initial.data)[old]
                               : to_float(static_cast<const T*>(p.initial.data)[old]);
  }
  if constexpr (kPacked) {
    const bool reverse = p.taps[0].reverse;
    if (!joins_last(p.seq_idx + b * p.in.length, static_cast<int>(p.in.length), reverse, at)) {
      value = 0.f;
    }
  }
  if (p.last_is_float) {
    static_cast<float*>(p.last_state)[index] = value;
  } else {
    static_cast<T*>(p.last_state)[index] = from_float<T>(value);
  }
}

// One direction of the backward kernel: taps, the window of gradients before the activation
// (newest first) and the sums for the taps.
template <int kWidth, int kCount>
struct Branch {
  float w[kWidth][kCount], bias[kCount];
  float window[kWidth][kCount];
  float sums[kWidth + 1][kCount];

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int k = 0; k <= kWidth; ++k) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[k][i] = 0.f;
    }
  }
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) window[k][i] = 0.f;
    }
  }

  // Takes one row of gradients in; it counts for the taps if it is this tile's `own`.
  template <class T>
  __device__ __forceinline__ void take(const float (&x)[kWidth][kCount],
                                       const Packed<T, kCount>& grad, bool own, bool silu) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float g = grad.get(i);
      if (silu) {
        float pre = bias[i];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) pre = fmaf(w[k][i], x[k][i], pre);
        const float s = sigmoid(pre);
        g *= s * fmaf(pre, 1.f - s, 1.f);
      }
#pragma unroll
      for (int k = kWidth - 1; k > 0; --k) window[k][i] = window[k - 1][i];
      window[0][i] = g;
      const float mine = own ? g : 0.f;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sums[k][i] = fmaf(mine, x[k][i], sums[k][i]);
      sums[kWidth][i] += mine;
    }
  }
  __device__ __forceinline__ void add_to(float (&dx)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) dx[i] = fmaf(w[k][i], window[k][i], dx[i]);
    }
  }
  // The same from outputs of the sequence of the window's position kWidth - 1 alone; tap k is that
  // of the output `left - k` behind it.
  template <class S>
  __device__ __forceinline__ void add_to(float (&dx)[kCount], const S& starts, int left) const {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const bool joined = starts.join(kWidth - 1, kWidth - 1 + left - k);
#pragma unroll
      for (int i = 0; i < kCount; ++i) dx[i] = fmaf(w[k][i], joined ? window[k][i] : 0.f, dx[i]);
    }
  }
};

// Gradient of the virtual input at position `at`, which may lie in the state.
template <class T, bool kPacked>
__device__ __noinline__ void store_gradient(const Backward& p, int64_t b, int64_t at, int64_t c,
                                            float value) {
  const int64_t reach = p.in.width - 1;
  if (p.grad_last.data != nullptr) {
    const int64_t step = p.taps[0].reverse ? p.in.length - 1 - at : at;
    const int64_t slot = step - (p.in.length - reach);
    bool counts = slot >= 0 && slot < reach;
    if constexpr (kPacked) {
      counts = counts && joins_last(p.seq_idx + b * p.in.length, static_cast<int>(p.in.length),
                                    p.taps[0].reverse, at);
    }
    if (counts) {
      const int64_t i = (b * p.in.channels + c) * reach + slot;
      value += p.grad_last.is_float ? static_cast<const float*>(p.grad_last.data)[i]
                                    : to_float(static_cast<const T*>(p.grad_last.data)[i]);
    }
  }
  if (at >= 0 && at < p.in.length) {
    static_cast<T*>(p.dx)[(b * p.in.length + at) * p.dx_pitch + c] = from_float<T>(value);
    return;
  }
  if (p.dinitial == nullptr) return;
  const int64_t slot = p.taps[0].reverse ? reach - 1 - (at - p.in.length) : reach + at;
  if (slot < 0 || slot >= reach) return;
  const int64_t i = (b * p.in.channels + c) * reach + slot;
  if (p.initial.is_float) {
    static_cast<float*>(p.dinitial)[i] = value;
  } else {
    static_cast<T*>(p.dinitial)[i] = from_float<T>(value);
  }
}

template <class T, int kCount, int kRows>
__device__ __forceinline__ void load_rows(Packed<T, kCount> (&rows)[kRows], const T* from,
                                          int64_t stride) {
#pragma unroll
  for (int r = 0; r < kRows; ++r, from += stride) rows[r] = Packed<T, kCount>::load(from);
}
template <int kRows, class T>
__device__ __forceinline__ void prefetch_rows(const T* from, int64_t stride) {
#pragma unroll
  for (int r = 0; r < kRows; ++r, from += stride) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  }
}

// Block: (vectors of channels, work items); grid: (groups of vectors, slots).
template <class T, int kCount, int kWidth, bool kBoth, bool kStates, bool kPacked>
__global__ void __launch_bounds__(kBackwardShape[kBoth].threads,
                                  kPacked ? 4 : kBackwardShape[kBoth].residents)
    backward_kernel(Backward p, int tile_rows, int tiles) {
  constexpr int kReach = kWidth - 1;
  constexpr int kBatch = kBackwardShape[kBoth].batch;
  const int64_t vector = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const bool active = vector < p.in.channels / kCount;
  const int64_t c = active ? vector * kCount : 0;
  const int left = kBoth ? kReach : p.taps[0].left;
  const int length = static_cast<int>(p.in.length);

  Branch<kWidth, kCount> first, second;
  load_taps<kWidth, kCount>(p.taps[0], c, first.w, first.bias);
  first.clear_sums();
  if constexpr (kBoth) {
    load_taps<kWidth, kCount>(p.taps[1], c, second.w, second.bias);
    second.clear_sums();
  }

  const int64_t items = active ? p.in.batch * tiles : 0;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t item = blockIdx.y * static_cast<int64_t>(blockDim.y) + threadIdx.y; item < items;
       item += stride) {
    const int64_t b = item / tiles;
    const int tile = static_cast<int>(item - b * tiles);
    const int begin = tile * tile_rows;
    int end = length - begin < tile_rows ? length : begin + tile_rows;
    // Positions behind the end receive gradients only if they came from a state.
    if (kStates && tile == tiles - 1 && p.dinitial != nullptr && p.taps[0].reverse) {
      end = length + kReach;
    }
    const Column<T, kCount> column{static_cast<const T*>(p.in.x) + b * p.in.stride_b + c,
                                   p.in.stride_l, length};
    const auto grads_of = [&](int which) {
      return Column<T, kCount>{
          static_cast<const T*>(p.grad[which]) + b * p.grad_stride_b[which] + c,
          p.grad_stride_l[which], length};
    };
    const Column<T, kCount> grad_column = grads_of(0), grad_column_b = grads_of(kBoth ? 1 : 0);
    const auto load = [&](int at) {
      return load_input<kStates>(column, p.in, p.initial, p.taps[0].reverse, b, at, c);
    };
    T* to = static_cast<T*>(p.dx) + (b * length + begin) * p.dx_pitch + c;
    const auto store = [&](int at, const float (&dx)[kCount]) {
      if (kStates && (p.grad_last.data != nullptr || at < 0 || at >= length)) {
        for (int i = 0; i < kCount; ++i) store_gradient<T, kPacked>(p, b, at, c + i, dx[i]);
        return;
      }
      Packed<T, kCount> result;
#pragma unroll
      for (int i = 0; i < kCount; ++i) result.set(i, dx[i]);
      result.store(to);
    };

    Starts<kPacked, 2 * kWidth - 1> starts(p.seq_idx, b, length);
#pragma unroll
    for (int r = 0; r < 2 * kReach; ++r) starts.shift_in(begin - 2 * kReach + r);
    // Takes the row of gradients that position `at` is the first input of.
    const auto take = [&](int at, const float (&x)[kWidth][kCount], const Packed<T, kCount>& grad,
                          bool own) {
      if constexpr (kPacked) {
        starts.shift_in(at + kReach);
        float seen[kWidth][kCount];
        select_joined(seen, x, starts, left, kReach);
        first.take(seen, grad, own, p.in.silu);
      } else {
        first.take(x, grad, own, p.in.silu);
      }
    };
    const auto add_to = [&](float (&dx)[kCount]) {
      if constexpr (kPacked) {
        first.add_to(dx, starts, left);
      } else {
        first.add_to(dx);
      }
    };

    // The window's start: rows that another tile answers for, or none.
    float x[kWidth][kCount];
    {
      InputRow<T, kCount, kStates> rows[2 * kReach];
      Packed<T, kCount> grads[kReach], grads_b[kReach];
#pragma unroll
      for (int r = 0; r < 2 * kReach; ++r) rows[r] = load(begin - kReach + r);
#pragma unroll
      for (int r = 0; r < kReach; ++r) {
        grads[r] = grad_column.load(begin - kReach + r + left);
        if constexpr (kBoth) grads_b[r] = grad_column_b.load(begin - kReach + r);
      }
#pragma unroll
      for (int k = 0; k < kReach; ++k) unpack(x[k + 1], rows[k]);
      first.start();
      if constexpr (kBoth) second.start();
#pragma unroll
      for (int r = 0; r < kReach; ++r) {
        shift(x);
        unpack(x[kReach], rows[kReach + r]);
        take(begin - kReach + r, x, grads[r], tile == 0);
        if constexpr (kBoth) second.take(x, grads_b[r], tile == 0, p.in.silu);
        if (kStates && tile == 0 && p.dinitial != nullptr) {
          float dx[kCount] = {};
          add_to(dx);
          store(begin - kReach + r, dx);
        }
      }
    }
    for (int at = begin; at < end; at += kBatch) {
      InputRow<T, kCount, kStates> rows[kBatch];
      Packed<T, kCount> grads[kBatch], grads_b[kBatch];
      if (at + kBatch + kReach <= length) {
        if constexpr (kStates) {
#pragma unroll
          for (int r = 0; r < kBatch; ++r) rows[r] = load(at + r + kReach);
        } else {
          load_rows(rows, column.at(at + kReach), column.stride);
        }
        load_rows(grads, grad_column.at(at + left), grad_column.stride);
        if constexpr (kBoth) load_rows(grads_b, grad_column_b.at(at), grad_column_b.stride);
      } else {
#pragma unroll
        for (int r = 0; r < kBatch; ++r) {
          rows[r] = load(at + r + kReach);
          grads[r] = grad_column.load(at + r + left);
          if constexpr (kBoth) grads_b[r] = grad_column_b.load(at + r);
        }
      }
      if (kBackwardShape[kBoth].prefetches && at + 2 * kBatch + kReach <= length) {
        prefetch_rows<kBatch>(column.at(at + kBatch + kReach), column.stride);
        prefetch_rows<kBatch>(grad_column.at(at + kBatch + left), grad_column.stride);
        if constexpr (kBoth) {
          prefetch_rows<kBatch>(grad_column_b.at(at + kBatch), grad_column_b.stride);
        }
      }
#pragma unroll
      for (int r = 0; r < kBatch; ++r, to += p.dx_pitch) {
        if (at + r >= end) break;
        float dx[kCount] = {};
        shift(x);
        unpack(x[kReach], rows[r]);
        take(at + r, x, grads[r], true);
        add_to(dx);
        if constexpr (kBoth) {
          second.take(x, grads_b[r], true, p.in.silu);
          second.add_to(dx);
        }
        store(at + r, dx);
      }
    }
  }

  // Sums over the block's rows of threads.
  __shared__ float shared[(kWidth + 1) * kCount][kBackwardShape[kBoth].threads];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int which = 0; which < (kBoth ? 2 : 1); ++which) {
    if (which > 0) __syncthreads();
#pragma unroll
    for (int k = 0; k <= kWidth; ++k) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float own = first.sums[k][i];
        if constexpr (kBoth) {
          if (which == 1) own = second.sums[k][i];
        }
        shared[k * kCount + i][thread] = own;
      }
    }
    __syncthreads();
    if (!active) continue;
    float* const to = p.partial + (which * p.slots + blockIdx.y) * (kWidth + 1) * p.in.channels + c;
    for (int j = threadIdx.y; j < (kWidth + 1) * kCount; j += blockDim.y) {
      float sum = 0.f;
      for (int y = 0; y < blockDim.y; ++y) sum += shared[j][y * blockDim.x + threadIdx.x];
      // The taps of a reverse convolution were loaded back to front.
      const int k = j / kCount;
      const int row = p.taps[which].reverse && k < kWidth ? kWidth - 1 - k : k;
      to[row * p.in.channels + j % kCount] = sum;
    }
  }
}

__device__ __forceinline__ void store_as(void* to, DType type, int64_t i, float value) {
  switch (type) {
    case DType::kFloat:
      static_cast<float*>(to)[i] = value;
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(to)[i] = from_float<__nv_bfloat16>(value);
      break;
    default:
      static_cast<__half*>(to)[i] = from_float<__half>(value);
  }
}

constexpr int kSumColumns = 32, kSumRows = 32;

// Adds the blocks' sums in a fixed order. Block: (columns of (width + 1, d), parts of the slots);
// grid: (groups of columns, directions).
template <int kWidth>
__global__ void __launch_bounds__(kSumColumns* kSumRows) sum_kernel(Backward p) {
  __shared__ float shared[kSumRows][kSumColumns + 1];
  const int64_t columns = (kWidth + 1) * p.in.channels;
  const int64_t column = blockIdx.x * static_cast<int64_t>(kSumColumns) + threadIdx.x;
  const float* const from = p.partial + blockIdx.y * p.slots * columns;
  float sum = 0.f;
  if (column < columns) {
    for (int64_t s = threadIdx.y; s < p.slots; s += kSumRows) sum += from[s * columns + column];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  for (int y = 1; y < kSumRows; ++y) sum += shared[y][threadIdx.x];
  const TapGradients& to = p.dtaps[blockIdx.y];
  const int64_t row = column / p.in.channels, c = column - row * p.in.channels;
  if (row < kWidth) {
    store_as(to.weight, to.weight_type, c * kWidth + row, sum);
  } else if (to.bias != nullptr) {
    store_as(to.bias, to.bias_type, c, sum);
  }
}

inline unsigned batch_blocks(int64_t batch) {
  return static_cast<unsigned>(batch < 65535 ? batch : 65535);
}

template <class T, int kCount, int kWidth, bool kBoth, bool kStates, bool kPacked>
void forward_typed(const Forward& p, cudaStream_t stream) {
  // Long tiles waste less on the window's start and the taps, short ones give more threads.
  const int64_t vectors = p.in.channels / kCount;
  int64_t tile_rows = 2 * kForwardBatch;
  while (tile_rows > kForwardBatch &&
         p.in.batch * vectors * ((p.in.length + tile_rows - 1) / tile_rows) < kManyThreads) {
    tile_rows /= 2;
  }
  const int64_t tiles = (p.in.length + tile_rows - 1) / tile_rows;
  const int64_t blocks = (vectors * tiles + kForwardThreads - 1) / kForwardThreads;
  forward_kernel<T, kCount, kWidth, kBoth, kStates, kPacked>
      <<<dim3(static_cast<unsigned>(blocks), batch_blocks(p.in.batch)), kForwardThreads, 0,
         stream>>>(p, static_cast<unsigned>(tile_rows), static_cast<unsigned>(tiles));
}

template <class T, int kCount, int kWidth, bool kBoth, bool kStates, bool kPacked>
void backward_typed(const Backward& p, cudaStream_t stream) {
  const BackwardBlocks shape(p.in, kBoth);
  // Rows of a tile such that the last round of tiles is a full one, and the start of the window
  // costs little.
  constexpr int kBatch = kBackwardShape[kBoth].batch;
  const int64_t lanes = p.slots * shape.y;
  int64_t best_rows = kBatch, best = INT64_MAX;
  for (int64_t rows = kBatch; rows <= 32 * kBatch; rows += kBatch) {
    const int64_t items = p.in.batch * ((p.in.length + rows - 1) / rows);
    const int64_t cost = (items + lanes - 1) / lanes * (rows + kWidth + 2);
    if (cost < best) {
      best = cost;
      best_rows = rows;
    }
  }
  const int64_t tiles = p.in.length == 0 ? 1 : (p.in.length + best_rows - 1) / best_rows;
  backward_kernel<T, kCount, kWidth, kBoth, kStates, kPacked>
      <<<dim3(static_cast<unsigned>(shape.groups), static_cast<unsigned>(p.slots)),
         dim3(shape.x, shape.y), 0, stream>>>(p, static_cast<int>(best_rows),
                                              static_cast<int>(tiles));
  const int64_t columns = (kWidth + 1) * p.in.channels;
  sum_kernel<kWidth>
      <<<dim3(static_cast<unsigned>((columns + kSumColumns - 1) / kSumColumns), kBoth ? 2 : 1),
         dim3(kSumColumns, kSumRows), 0, stream>>>(p);
}

// Calls f.template run<kWidth, kBoth, kVectorized, kStates, kPacked>() for the run-time values.
template <class F>
void with_shape(const Input& in, bool both, bool states, bool packed, const F& f) {
  auto with_width = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    if (in.vectorized) {
      packed   ? f.template run<kWidth, false, true, true, true>()
      : both   ? f.template run<kWidth, true, true, false, false>()
      : states ? f.template run<kWidth, false, true, true, false>()
               : f.template run<kWidth, false, true, false, false>();
    } else {
      packed   ? f.template run<kWidth, false, false, true, true>()
      : both   ? f.template run<kWidth, true, false, false, false>()
      : states ? f.template run<kWidth, false, false, true, false>()
               : f.template run<kWidth, false, false, false, false>();
    }
  };
  switch (in.width) {
    case 2:
      with_width(Constant<2>{});
      break;
    case 3:
      with_width(Constant<3>{});
      break;
    default:
      with_width(Constant<4>{});
      break;
  }
}

template <class T>
struct RunForward {
  const Forward& p;
  cudaStream_t stream;
  template <int kWidth, bool kBoth, bool kVectorized, bool kStates, bool kPacked>
  void run() const {
    forward_typed<T, forward_vector<T, kVectorized>(), kWidth, kBoth, kStates, kPacked>(p, stream);
  }
};

template <class T>
struct RunBackward {
  const Backward& p;
  cudaStream_t stream;
  template <int kWidth, bool kBoth, bool kVectorized, bool kStates, bool kPacked>
  void run() const {
    backward_typed<T, kVectorized ? kBackwardVector : 1, kWidth, kBoth, kStates, kPacked>(p,
                                                                                          stream);
  }
};

template <class T>
int forward_launch(const Forward& p, cudaStream_t stream) {
  if (p.in.batch * p.in.length * p.in.channels > 0) {
    with_shape(p.in, p.both, p.initial.data != nullptr, p.seq_idx != nullptr,
               RunForward<T>{p, stream});
  }
  const int64_t states = p.in.batch * p.in.channels * (p.in.width - 1);
  if (p.last_state != nullptr && states > 0) {
    auto* const kernel =
        p.seq_idx != nullptr ? last_state_kernel<T, true> : last_state_kernel<T, false>;
    kernel<<<static_cast<unsigned>((states + 255) / 256), 256, 0, stream>>>(p);
  }
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int backward_launch(const Backward& p, cudaStream_t stream) {
  const bool states =
      p.initial.data != nullptr || p.grad_last.data != nullptr || p.dinitial != nullptr;
  if (p.in.channels > 0) {
    with_shape(p.in, p.both, states, p.seq_idx != nullptr, RunBackward<T>{p, stream});
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace conv
}  // namespace mmvim
