// Residual add and root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467) over rows.
//
// One warp per row with the row in registers, vectors of four columns per lane and step; rows too
// long for that go through memory a second time. The weight's gradient is summed over the rows of a
// warp in registers, over the warps of a block in shared memory and over blocks by a second kernel
// in a fixed order.
#pragma once

#include "../common/sum_slots.cuh"
#include "../common/vector.cuh"
#include "cuda.h"

namespace mmvim {
namespace norm {

constexpr int kWarps = 4;
constexpr int kVector = 4;
constexpr int kStep = 32 * kVector;

template <class T>
__device__ __forceinline__ void load4(const T* p, int64_t columns_left, float (&v)[kVector]) {
  if (columns_left >= kVector) {
    const auto packed = Packed<T, kVector>::load(p);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = packed.get(i);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = i < columns_left ? to_float(p[i]) : 0.f;
  }
}

template <class T>
__device__ __forceinline__ void store4(T* p, int64_t columns_left, const float (&v)[kVector]) {
  if (columns_left >= kVector) {
    Packed<T, kVector> packed;
#pragma unroll
    for (int i = 0; i < kVector; ++i) packed.set(i, v[i]);
    packed.store(p);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < columns_left) p[i] = from_float<T>(v[i]);
    }
  }
}

// kAligned: rows hold whole vectors; otherwise columns go one by one.
template <bool kAligned, class T>
__device__ __forceinline__ void load_columns(const T* row, int64_t c, int64_t columns,
                                             float (&v)[kVector]) {
  if constexpr (kAligned) {
    load4(row + c, c < columns ? kVector : 0, v);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = c + i < columns ? to_float(row[c + i]) : 0.f;
  }
}
template <bool kAligned, class T>
__device__ __forceinline__ void store_columns(T* row, int64_t c, int64_t columns,
                                              const float (&v)[kVector]) {
  if constexpr (kAligned) {
    if (c < columns) store4(row + c, kVector, v);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (c + i < columns) row[c + i] = from_float<T>(v[i]);
    }
  }
}

// T itself or float, as `type` says.
template <bool kAligned, class T>
__device__ __forceinline__ void load_either(const void* p, DType type, int64_t row, int64_t c,
                                            int64_t columns, float (&v)[kVector]) {
  if (type == DType::kFloat) {
    load_columns<kAligned>(static_cast<const float*>(p) + row * columns, c, columns, v);
  } else {
    load_columns<kAligned>(static_cast<const T*>(p) + row * columns, c, columns, v);
  }
}
template <bool kAligned, class T>
__device__ __forceinline__ void store_either(void* p, DType type, int64_t row, int64_t c,
                                             int64_t columns, const float (&v)[kVector]) {
  if (type == DType::kFloat) {
    store_columns<kAligned>(static_cast<float*>(p) + row * columns, c, columns, v);
  } else {
    store_columns<kAligned>(static_cast<T*>(p) + row * columns, c, columns, v);
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// The factor of x in a row.
template <class T>
__device__ __forceinline__ float kept_share(const void* keep, int64_t row, int64_t sample) {
  return keep == nullptr ? 1.f : to_float(static_cast<const T*>(keep)[row / sample]);
}

// kSteps > 0: the row is kSteps * kStep columns or fewer and stays in registers.
template <class T, int kSteps, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps) forward_kernel(Forward p) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.y;
  if (row >= p.rows) return;
  const int64_t c0 = threadIdx.x * kVector;
  float kept[kSteps > 0 ? kSteps : 1][kVector];
  float squares = 0.f;
  const float keep = kept_share<T>(p.keep, row, p.sample);

  auto read = [&](int64_t c, float (&v)[kVector]) {
    load_columns<kAligned>(static_cast<const T*>(p.x) + row * p.columns, c, p.columns, v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] *= keep;
    if (p.residual != nullptr) {
      float r[kVector];
      load_either<kAligned, T>(p.residual, p.residual_type, row, c, p.columns, r);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] += r[i];
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares = fmaf(v[i], v[i], squares);
  };
  auto write = [&](int64_t c, const float (&v)[kVector], float scale) {
    float w[kVector], result[kVector];
    load_columns<kAligned>(p.weight, c, p.columns, w);
#pragma unroll
    for (int i = 0; i < kVector; ++i) result[i] = v[i] * scale * w[i];
    store_columns<kAligned>(static_cast<T*>(p.out) + row * p.columns, c, p.columns, result);
    store_either<kAligned, T>(p.residual_out, p.residual_out_type, row, c, p.columns, v);
  };

  if constexpr (kSteps > 0) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) read(c0 + s * kStep, kept[s]);
  } else {
    for (int64_t c = c0; c < p.columns; c += kStep) read(c, kept[0]);
  }
  const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(p.columns) + p.eps);
  if (threadIdx.x == 0) p.rstd[row] = scale;
  if constexpr (kSteps > 0) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) write(c0 + s * kStep, kept[s], scale);
  } else {
    for (int64_t c = c0; c < p.columns; c += kStep) {
      read(c, kept[0]);
      write(c, kept[0], scale);
    }
  }
}

// Grid: slots. A row with kSteps == 0 adds its share of the weight's gradient to shared memory.
template <class T, int kSteps, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps) backward_kernel(Backward p) {
  extern __shared__ float shared[];  // (kWarps, columns)
  const int64_t c0 = threadIdx.x * kVector;
  float* own = shared + threadIdx.y * p.columns;
  float sums[kSteps > 0 ? kSteps : 1][kVector];
  if constexpr (kSteps > 0) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[s][i] = 0.f;
    }
  }
  auto add_shared = [&](int64_t c, const float (&v)[kVector], bool first) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (c + i < p.columns) own[c + i] = first ? v[i] : own[c + i] + v[i];
    }
  };
  if constexpr (kSteps == 0) {
    const float zero[kVector] = {};
    for (int64_t c = c0; c < p.columns; c += kStep) add_shared(c, zero, true);
  }

  for (int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.y; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    const float rstd = p.rstd[row], keep = kept_share<T>(p.keep, row, p.sample);
    float grad[kSteps > 0 ? kSteps : 1][kVector], normed[kSteps > 0 ? kSteps : 1][kVector];
    float dot = 0.f;
    auto read = [&](int64_t c, float (&g)[kVector], float (&n)[kVector], float (&sum)[kVector]) {
      float w[kVector];
      load_columns<kAligned>(static_cast<const T*>(p.grad_out) + row * p.columns, c, p.columns, g);
      load_either<kAligned, T>(p.residual_out, p.residual_out_type, row, c, p.columns, n);
      load_columns<kAligned>(p.weight, c, p.columns, w);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        n[i] *= rstd;
        sum[i] = fmaf(g[i], n[i], sum[i]);
        g[i] *= w[i];
        dot = fmaf(g[i], n[i], dot);
      }
    };
    auto write = [&](int64_t c, const float (&g)[kVector], const float (&n)[kVector], float mean) {
      float result[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) result[i] = (g[i] - n[i] * mean) * rstd;
      if (p.grad_residual != nullptr) {
        float r[kVector];
        load_either<kAligned, T>(p.grad_residual, p.residual_out_type, row, c, p.columns, r);
#pragma unroll
        for (int i = 0; i < kVector; ++i) result[i] += r[i];
      }
      if (p.dresidual != nullptr) {
        store_either<kAligned, T>(p.dresidual, p.residual_type, row, c, p.columns, result);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) result[i] *= keep;
      store_columns<kAligned>(static_cast<T*>(p.dx) + row * p.columns, c, p.columns, result);
    };

    if constexpr (kSteps > 0) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) read(c0 + s * kStep, grad[s], normed[s], sums[s]);
      const float mean = warp_sum(dot) / static_cast<float>(p.columns);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) write(c0 + s * kStep, grad[s], normed[s], mean);
    } else {
      for (int64_t c = c0; c < p.columns; c += kStep) {
        float sum[kVector] = {};
        read(c, grad[0], normed[0], sum);
        add_shared(c, sum, false);
      }
      const float mean = warp_sum(dot) / static_cast<float>(p.columns);
      for (int64_t c = c0; c < p.columns; c += kStep) {
        float sum[kVector] = {};
        read(c, grad[0], normed[0], sum);
        write(c, grad[0], normed[0], mean);
      }
    }
  }

  if constexpr (kSteps > 0) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) add_shared(c0 + s * kStep, sums[s], true);
  }
  __syncthreads();
  for (int64_t c = threadIdx.y * 32 + threadIdx.x; c < p.columns; c += 32 * kWarps) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared[w * p.columns + c];
    p.partial[blockIdx.x * p.columns + c] = sum;
  }
}

// Calls f.template run<kSteps, kAligned>() for rows of `columns`.
template <class F>
void with_columns(int64_t columns, const F& f) {
  if (columns % kVector != 0) return f.template run<0, false>();
  if (columns <= 2 * kStep) return f.template run<2, true>();
  if (columns <= 4 * kStep) return f.template run<4, true>();
  if (columns <= 8 * kStep) return f.template run<8, true>();
  if (columns <= kMostColumnsInRegisters) return f.template run<16, true>();
  return f.template run<0, true>();
}

template <class T>
struct RunForward {
  const Forward& p;
  cudaStream_t stream;
  template <int kSteps, bool kAligned>
  void run() const {
    const int64_t blocks = (p.rows + kWarps - 1) / kWarps;
    forward_kernel<T, kSteps, kAligned>
        <<<static_cast<unsigned>(blocks), dim3(32, kWarps), 0, stream>>>(p);
  }
};

template <class T>
struct RunBackward {
  const Backward& p;
  cudaStream_t stream;
  template <int kSteps, bool kAligned>
  void run() const {
    const size_t bytes = kWarps * p.columns * sizeof(float);
    if (bytes > 48 * 1024) {
      cudaFuncSetAttribute(backward_kernel<T, kSteps, kAligned>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    }
    backward_kernel<T, kSteps, kAligned>
        <<<static_cast<unsigned>(p.slots), dim3(32, kWarps), bytes, stream>>>(p);
    sum_slots(p.partial, p.dweight, 1, p.slots, p.columns, stream);
  }
};

template <class T>
int forward_launch(const Forward& p, cudaStream_t stream) {
  if (p.rows > 0 && p.columns > 0) with_columns(p.columns, RunForward<T>{p, stream});
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int backward_launch(const Backward& p, cudaStream_t stream) {
  if (p.columns > 0) with_columns(p.columns, RunBackward<T>{p, stream});
  return static_cast<int>(cudaGetLastError());
}

}  // namespace norm
}  // namespace mmvim
