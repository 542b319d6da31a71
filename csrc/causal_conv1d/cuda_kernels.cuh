// Depthwise convolutions of width 2 to 4 over (batch, length, channels), forward and backward.
//
// Forward: a thread owns one vector of neighbouring channels and kRows rows; all rows are loaded
// before the first is used, so the kernel runs at the speed of memory. With `both`, the causal and
// the reverse convolution share the one pass over the input.
//
// Backward: a thread walks a tile of rows with a sliding window. Sums for the taps stay in
// registers over all tiles of the thread, are added within the block, written once per block and
// added by a second kernel in a fixed order: no atomics, and equal results in every run.
#pragma once

#include "../common/sum_slots.cuh"
#include "../common/vector.cuh"
#include "cuda.h"

namespace mmvim {
namespace conv {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

constexpr int kRows = 8;
constexpr int kForwardThreads = 128;
constexpr int kBackwardThreads = 256;
constexpr int kBatch = 4;  // rows that the backward kernel loads at once

template <class T, bool kVectorized, bool kBoth>
constexpr int forward_vector() {
  return !kVectorized ? 1 : (kBoth ? 8 : 16) / static_cast<int>(sizeof(T));
}
// With both directions the window and the sums need twice the registers.
template <class T, bool kVectorized, bool kBoth>
constexpr int backward_vector() {
  return !kVectorized ? 1 : (kBoth ? 4 : 8) / static_cast<int>(sizeof(T));
}

// Element c + i, i < kCount, of the virtual input at position p < 0 (causal) or p >= length
// (reverse), which lies in the state.
template <class T, int kCount>
__device__ __forceinline__ Packed<T, kCount> load_state(const State& state, const Input& in,
                                                        const Taps& taps, int64_t b, int64_t p,
                                                        int64_t c) {
  Packed<T, kCount> v = Packed<T, kCount>::zero();
  const int64_t reach = in.width - 1;
  const int64_t slot = taps.reverse ? reach - 1 - (p - in.length) : reach + p;
  const bool inside = taps.reverse ? p >= in.length : p < 0;
  if (state.data == nullptr || !inside || slot < 0 || slot >= reach) return v;
  for (int i = 0; i < kCount; ++i) {
    const int64_t at = (b * in.channels + c + i) * reach + slot;
    v.set(i, state.is_float ? static_cast<const float*>(state.data)[at]
                            : to_float(static_cast<const T*>(state.data)[at]));
  }
  return v;
}

template <class T, int kCount>
__device__ __forceinline__ Packed<T, kCount> load_input(const Input& in, const State& state,
                                                        const Taps& taps, const T* row0, int64_t b,
                                                        int64_t p, int64_t c) {
  if (p >= 0 && p < in.length) return Packed<T, kCount>::load(row0 + p * in.stride_l);
  return load_state<T, kCount>(state, in, taps, b, p, c);
}

template <int kWidth, int kCount>
__device__ __forceinline__ void load_taps(const Taps& taps, int64_t c, float (&w)[kWidth][kCount],
                                          float (&bias)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    bias[i] = taps.bias == nullptr ? 0.f : taps.bias[c + i];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      w[k][i] = taps.weight[(c + i) * kWidth + (taps.reverse ? kWidth - 1 - k : k)];
    }
  }
}

template <class T, int kCount, int kWidth, int kFirst, int kLoaded>
__device__ __forceinline__ void write_rows(const Forward& p, const Taps& taps, void* out,
                                           const Packed<T, kCount> (&rows)[kLoaded], int64_t b,
                                           int64_t t0, int64_t c) {
  float w[kWidth][kCount], bias[kCount];
  load_taps<kWidth, kCount>(taps, c, w, bias);
  T* dst = static_cast<T*>(out) + (b * p.in.length + t0) * p.in.channels + c;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (t0 + r >= p.in.length) break;
    Packed<T, kCount> result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float sum = bias[i];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum = fmaf(w[k][i], rows[kFirst + r + k].get(i), sum);
      result.set(i, p.in.silu ? sum * sigmoid(sum) : sum);
    }
    result.store(dst + r * p.in.channels);
  }
}

template <class T, int kCount, int kWidth, bool kBoth>
__global__ void __launch_bounds__(kForwardThreads) forward_kernel(Forward p, int64_t tiles) {
  const int64_t vectors = p.in.channels / kCount;
  int64_t index = blockIdx.x * static_cast<int64_t>(kForwardThreads) + threadIdx.x;
  const int64_t c = index % vectors * kCount;
  index /= vectors;
  const int64_t t0 = index % tiles * kRows;
  const int64_t b = index / tiles;
  if (b >= p.in.batch) return;

  constexpr int kLoaded = kRows + (kBoth ? 2 : 1) * (kWidth - 1);
  const int64_t first = t0 - (kBoth ? kWidth - 1 : p.taps[0].left);
  const T* row0 = static_cast<const T*>(p.in.x) + b * p.in.stride_b + c;
  Packed<T, kCount> rows[kLoaded];
#pragma unroll
  for (int r = 0; r < kLoaded; ++r) {
    rows[r] = load_input<T, kCount>(p.in, p.initial, p.taps[0], row0, b, first + r, c);
  }
  write_rows<T, kCount, kWidth, 0, kLoaded>(p, p.taps[0], p.out[0], rows, b, t0, c);
  if constexpr (kBoth) {
    write_rows<T, kCount, kWidth, kWidth - 1, kLoaded>(p, p.taps[1], p.out[1], rows, b, t0, c);
  }
}

template <class T>
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

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) window[k][i] = 0.f;
    }
  }

  template <class T>
  __device__ __forceinline__ void step(const float (&x)[kWidth][kCount],
                                       const Packed<T, kCount>& grad, bool own, bool silu,
                                       float (&dx)[kCount]) {
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
      for (int k = 0; k < kWidth; ++k) {
        sums[k][i] = fmaf(mine, x[k][i], sums[k][i]);
        dx[i] = fmaf(w[k][i], window[k][i], dx[i]);
      }
      sums[kWidth][i] += mine;
    }
  }
};

template <class T, int kCount>
__device__ __forceinline__ Packed<T, kCount> load_grad(const Backward& p, int which, int64_t b,
                                                       int64_t q, int64_t c) {
  if (q < 0 || q >= p.in.length) return Packed<T, kCount>::zero();
  return Packed<T, kCount>::load(static_cast<const T*>(p.grad[which]) + b * p.grad_stride_b[which] +
                                 q * p.grad_stride_l[which] + c);
}

template <class T>
__device__ __forceinline__ void store_gradient(const Backward& p, int64_t b, int64_t at, int64_t c,
                                               float value) {
  const int64_t reach = p.in.width - 1;
  if (p.grad_last.data != nullptr) {
    const int64_t step = p.taps[0].reverse ? p.in.length - 1 - at : at;
    const int64_t slot = step - (p.in.length - reach);
    if (slot >= 0 && slot < reach) {
      const int64_t i = (b * p.in.channels + c) * reach + slot;
      value += p.grad_last.is_float ? static_cast<const float*>(p.grad_last.data)[i]
                                    : to_float(static_cast<const T*>(p.grad_last.data)[i]);
    }
  }
  if (at >= 0 && at < p.in.length) {
    static_cast<T*>(p.dx)[(b * p.in.length + at) * p.in.channels + c] = from_float<T>(value);
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

// Block: (vectors of channels, work items); grid: (groups of vectors, slots).
template <class T, int kCount, int kWidth, bool kBoth>
__global__ void __launch_bounds__(kBackwardThreads)
    backward_kernel(Backward p, int64_t tile_rows, int64_t tiles) {
  constexpr int kReach = kWidth - 1;
  const int64_t vector = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const bool active = vector < p.in.channels / kCount;
  const int64_t c = active ? vector * kCount : 0;
  const int left = kBoth ? kReach : p.taps[0].left;

  Branch<kWidth, kCount> first, second;
  load_taps<kWidth, kCount>(p.taps[0], c, first.w, first.bias);
  if constexpr (kBoth) load_taps<kWidth, kCount>(p.taps[1], c, second.w, second.bias);
#pragma unroll
  for (int k = 0; k <= kWidth; ++k) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      first.sums[k][i] = 0.f;
      if constexpr (kBoth) second.sums[k][i] = 0.f;
    }
  }

  const int64_t items = active ? p.in.batch * tiles : 0;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t item = blockIdx.y * static_cast<int64_t>(blockDim.y) + threadIdx.y; item < items;
       item += stride) {
    const int64_t b = item / tiles;
    const int64_t tile = item % tiles;
    const int64_t t0 = tile * tile_rows;
    int64_t stop = t0 + tile_rows;
    if (tile == tiles - 1) {
      // Positions behind the end receive gradients only if they came from a state.
      stop = p.in.length + (!kBoth && p.dinitial != nullptr && p.taps[0].reverse ? kReach : 0);
    }
    const T* row0 = static_cast<const T*>(p.in.x) + b * p.in.stride_b + c;
    float x[kWidth][kCount];
#pragma unroll
    for (int k = 0; k < kReach; ++k) {
      const auto v = load_input<T, kCount>(p.in, p.initial, p.taps[0], row0, b, t0 - kReach + k, c);
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[k + 1][i] = v.get(i);
    }
    first.start();
    if constexpr (kBoth) second.start();

    for (int64_t start = t0 - kReach; start < stop; start += kBatch) {
      Packed<T, kCount> rows[kBatch], grads[kBatch], grads_b[kBatch];
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        const int64_t at = start + r;
        rows[r] = load_input<T, kCount>(p.in, p.initial, p.taps[0], row0, b, at + kReach, c);
        grads[r] = load_grad<T, kCount>(p, 0, b, at + left, c);
        if constexpr (kBoth) grads_b[r] = load_grad<T, kCount>(p, 1, b, at, c);
      }
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        const int64_t at = start + r;
        if (at >= stop) break;
        float dx[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          dx[i] = 0.f;
#pragma unroll
          for (int k = 0; k < kReach; ++k) x[k][i] = x[k + 1][i];
          x[kReach][i] = rows[r].get(i);
        }
        // Each output counts for the taps in one tile only; those before the first tile's start
        // have no other.
        const bool own = at >= t0 || tile == 0;
        first.template step<T>(x, grads[r], own, p.in.silu, dx);
        if constexpr (kBoth) second.template step<T>(x, grads_b[r], own, p.in.silu, dx);
        if (at < t0 && (tile != 0 || kBoth || p.dinitial == nullptr)) continue;
        if (!kBoth && (p.grad_last.data != nullptr || at < 0 || at >= p.in.length)) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) store_gradient<T>(p, b, at, c + i, dx[i]);
        } else {
          Packed<T, kCount> result;
#pragma unroll
          for (int i = 0; i < kCount; ++i) result.set(i, dx[i]);
          result.store(static_cast<T*>(p.dx) + (b * p.in.length + at) * p.in.channels + c);
        }
      }
    }
  }

  __shared__ float shared[kBackwardThreads * kCount];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int which = 0; which < (kBoth ? 2 : 1); ++which) {
#pragma unroll
    for (int k = 0; k <= kWidth; ++k) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float own = first.sums[k][i];
        if constexpr (kBoth) {
          if (which == 1) own = second.sums[k][i];
        }
        shared[thread * kCount + i] = own;
      }
      __syncthreads();
      // The taps of a reverse convolution were loaded back to front.
      const int row = p.taps[which].reverse && k < kWidth ? kWidth - 1 - k : k;
      if (threadIdx.y == 0 && active) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          float sum = 0.f;
          for (int y = 0; y < blockDim.y; ++y) {
            sum += shared[(y * blockDim.x + threadIdx.x) * kCount + i];
          }
          p.partial[((which * p.slots + blockIdx.y) * (kWidth + 1) + row) * p.in.channels + c + i] =
              sum;
        }
      }
      __syncthreads();
    }
  }
}

template <class T, int kCount, int kWidth, bool kBoth>
void forward_typed(const Forward& p, cudaStream_t stream) {
  const int64_t tiles = (p.in.length + kRows - 1) / kRows;
  const int64_t threads = p.in.batch * tiles * (p.in.channels / kCount);
  const int64_t blocks = (threads + kForwardThreads - 1) / kForwardThreads;
  forward_kernel<T, kCount, kWidth, kBoth>
      <<<static_cast<unsigned>(blocks), kForwardThreads, 0, stream>>>(p, tiles);
}

struct BackwardShape {
  int64_t tile_rows, tiles, groups;
  int block_x, block_y;
};

inline BackwardShape backward_shape(const Input& in, int count) {
  BackwardShape s;
  // Long tiles waste less on the window's start, short ones give more threads.
  const int64_t vectors = in.channels / count;
  s.tile_rows = 32;
  while (s.tile_rows > 8 &&
         in.batch * ((in.length + s.tile_rows - 1) / s.tile_rows) * vectors < 100000) {
    s.tile_rows /= 2;
  }
  s.tiles = (in.length + s.tile_rows - 1) / s.tile_rows;
  if (s.tiles == 0) s.tiles = 1;
  s.groups = (vectors + kBackwardThreads - 1) / kBackwardThreads;
  s.block_x = static_cast<int>((vectors + s.groups - 1) / s.groups);
  s.block_y = kBackwardThreads / s.block_x;
  return s;
}

template <class T, int kCount, int kWidth, bool kBoth>
void backward_typed(const Backward& p, cudaStream_t stream) {
  const BackwardShape s = backward_shape(p.in, kCount);
  const dim3 grid(static_cast<unsigned>(s.groups), static_cast<unsigned>(p.slots));
  const dim3 block(s.block_x, s.block_y);
  backward_kernel<T, kCount, kWidth, kBoth><<<grid, block, 0, stream>>>(p, s.tile_rows, s.tiles);
  sum_slots(p.partial, p.dtaps, kBoth ? 2 : 1, p.slots, (kWidth + 1) * p.in.channels, stream);
}

// Calls f.template run<kWidth, kBoth, kVectorized>() for the run-time values.
template <class F>
void with_shape(const Input& in, bool both, const F& f) {
  auto with_width = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    if (in.vectorized) {
      both ? f.template run<kWidth, true, true>() : f.template run<kWidth, false, true>();
    } else {
      both ? f.template run<kWidth, true, false>() : f.template run<kWidth, false, false>();
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
  template <int kWidth, bool kBoth, bool kVectorized>
  void run() const {
    forward_typed<T, forward_vector<T, kVectorized, kBoth>(), kWidth, kBoth>(p, stream);
  }
};

template <class T>
struct RunBackward {
  const Backward& p;
  cudaStream_t stream;
  template <int kWidth, bool kBoth, bool kVectorized>
  void run() const {
    backward_typed<T, backward_vector<T, kVectorized, kBoth>(), kWidth, kBoth>(p, stream);
  }
};

template <class T>
int forward_launch(const Forward& p, cudaStream_t stream) {
  if (p.in.batch * p.in.length * p.in.channels > 0) {
    with_shape(p.in, p.both, RunForward<T>{p, stream});
  }
  const int64_t states = p.in.batch * p.in.channels * (p.in.width - 1);
  if (p.last_state != nullptr && states > 0) {
    last_state_kernel<T><<<static_cast<unsigned>((states + 255) / 256), 256, 0, stream>>>(p);
  }
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int backward_launch(const Backward& p, cudaStream_t stream) {
  if (p.in.channels > 0) with_shape(p.in, p.both, RunBackward<T>{p, stream});
  return static_cast<int>(cudaGetLastError());
}

}  // namespace conv
}  // namespace mmvim
