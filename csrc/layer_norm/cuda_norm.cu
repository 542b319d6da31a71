// Layer norm (Ba et al., arXiv 1607.06450). A warp, or for narrow rows half a warp, takes rows,
// each in registers, four columns per lane and step. The gradients of weight and bias are summed
// over the rows of a warp in registers, over the warps of a block in shared memory and over blocks
// by a second kernel in a fixed order.
#include <cuda_runtime.h>

#include <type_traits>

#include "../common/sum_slots.cuh"
#include "../common/vector.cuh"
#include "cuda.h"

namespace mmvim {
namespace layer_norm {
namespace {

constexpr int kThreads = 128;

// Over the lanes of a row.
template <int kLanes>
__device__ __forceinline__ float row_sum(float v) {
  const unsigned lanes = kLanes == 32 ? 0xffffffffu : 0xffffu << (threadIdx.y % 2 * 16);
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset >>= 1) v += __shfl_xor_sync(lanes, v, offset);
  return v;
}

// Four columns of each step of the lane; zero behind the last column.
template <int kLanes, int kSteps>
struct Row {
  static constexpr int kStep = kLanes * 4;
  float v[kSteps][4];

  template <class T>
  __device__ __forceinline__ void load(const T* p, int columns) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int c = s * kStep + static_cast<int>(threadIdx.x) * 4;
      auto x = Packed<T, 4>::zero();
      if (c < columns) x = Packed<T, 4>::load(p + c);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[s][i] = x.get(i);
    }
  }
  template <class T>
  __device__ __forceinline__ void store(T* p, int columns) const {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int c = s * kStep + static_cast<int>(threadIdx.x) * 4;
      Packed<T, 4> x;
#pragma unroll
      for (int i = 0; i < 4; ++i) x.set(i, v[s][i]);
      if (c < columns) x.store(p + c);
    }
  }
  // f(value, step, column of the step, whether there is such a column)
  template <class F>
  __device__ __forceinline__ void each(int columns, F f) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const bool inside = s * kStep + static_cast<int>(threadIdx.x) * 4 < columns;
#pragma unroll
      for (int i = 0; i < 4; ++i) f(v[s][i], s, i, inside);
    }
  }
};

template <class X, class T, int kLanes, int kSteps, bool kAdd>
__global__ void __launch_bounds__(kThreads) forward_kernel(Norm p) {
  constexpr int kRows = kThreads / kLanes;
  Row<kLanes, kSteps> weight, bias, row;
  weight.load(p.weight, p.columns);
  bias.load(p.bias, p.columns);
  const float scale = 1.f / p.columns;
  for (int64_t r = blockIdx.x * static_cast<int64_t>(kRows) + threadIdx.y; r < p.rows;
       r += gridDim.x * static_cast<int64_t>(kRows)) {
    row.load(static_cast<const X*>(p.x) + r * p.columns, p.columns);
    if constexpr (kAdd) {
      Row<kLanes, kSteps> added;
      added.load(static_cast<const T*>(p.added) + r * p.columns, p.columns);
      row.each(p.columns, [&](float& x, int s, int i, bool) { x += added.v[s][i]; });
      row.store(static_cast<X*>(p.sum) + r * p.columns, p.columns);
    }
    float sum = 0.f, squares = 0.f;
    row.each(p.columns, [&](float x, int, int, bool) { sum += x; });
    const float mean = row_sum<kLanes>(sum) * scale;
    row.each(p.columns, [&](float x, int, int, bool inside) {
      const float d = inside ? x - mean : 0.f;
      squares = fmaf(d, d, squares);
    });
    const float inverse = rsqrtf(fmaf(row_sum<kLanes>(squares), scale, p.eps));
    row.each(p.columns, [&](float& x, int s, int i, bool) {
      x = fmaf((x - mean) * inverse, weight.v[s][i], bias.v[s][i]);
    });
    row.store(static_cast<T*>(p.out) + r * p.columns, p.columns);
    if (p.statistics != nullptr && threadIdx.x == 0) {
      reinterpret_cast<float2*>(p.statistics)[r] = make_float2(mean, inverse);
    }
  }
}

template <class X, class T, int kLanes, int kSteps>
__global__ void __launch_bounds__(kThreads) backward_kernel(Norm p) {
  constexpr int kRows = kThreads / kLanes;
  Row<kLanes, kSteps> weight, row, grad, to_weight, to_bias;
  weight.load(p.weight, p.columns);
  const auto clear = [](float& x, int, int, bool) { x = 0.f; };
  to_weight.each(p.columns, clear);
  to_bias.each(p.columns, clear);
  const float scale = 1.f / p.columns;
  for (int64_t r = blockIdx.x * static_cast<int64_t>(kRows) + threadIdx.y; r < p.rows;
       r += gridDim.x * static_cast<int64_t>(kRows)) {
    row.load(static_cast<const X*>(p.x) + r * p.columns, p.columns);
    grad.load(static_cast<const T*>(p.grad) + r * p.columns, p.columns);
    const float2 statistics = reinterpret_cast<const float2*>(p.statistics)[r];
    float sum = 0.f, product = 0.f;
    row.each(p.columns, [&](float& x, int s, int i, bool inside) {
      x = inside ? (x - statistics.x) * statistics.y : 0.f;
      float& g = grad.v[s][i];
      to_weight.v[s][i] = fmaf(g, x, to_weight.v[s][i]);
      to_bias.v[s][i] += g;
      g *= weight.v[s][i];
      sum += g;
      product = fmaf(g, x, product);
    });
    sum = row_sum<kLanes>(sum) * scale;
    product = row_sum<kLanes>(product) * scale;
    row.each(p.columns, [&](float& x, int s, int i, bool) {
      x = statistics.y * (grad.v[s][i] - sum - x * product);
    });
    if (p.grad_input != nullptr) {
      grad.load(static_cast<const X*>(p.grad_input) + r * p.columns, p.columns);
      row.each(p.columns, [&](float& x, int s, int i, bool) { x += grad.v[s][i]; });
    }
    row.store(static_cast<X*>(p.dx) + r * p.columns, p.columns);
  }
  constexpr int kWidth = kLanes * 4 * kSteps;
  __shared__ float shared[kRows][2][kWidth];
  to_weight.store(shared[threadIdx.y][0], kWidth);
  to_bias.store(shared[threadIdx.y][1], kWidth);
  __syncthreads();
  for (int i = threadIdx.y * kLanes + threadIdx.x; i < 2 * p.columns; i += kThreads) {
    const int which = i / p.columns, c = i - which * p.columns;
    float total = 0.f;
    for (int row_of = 0; row_of < kRows; ++row_of) total += shared[row_of][which][c];
    p.partial[blockIdx.x * 2 * static_cast<int64_t>(p.columns) + i] = total;
  }
}

// Calls launch(a value of the dtype of x, the lanes of a row, its steps).
template <class T, class F>
int by_row(const Norm& p, F launch) {
  const auto by_columns = [&](auto x) {
    const auto warp = [&](auto steps) { launch(x, std::integral_constant<int, 32>(), steps); };
    if (p.columns <= 64) {
      launch(x, std::integral_constant<int, 16>(), std::integral_constant<int, 1>());
    } else if (p.columns <= 128) {
      warp(std::integral_constant<int, 1>());
    } else if (p.columns <= 256) {
      warp(std::integral_constant<int, 2>());
    } else if (p.columns <= 384) {
      warp(std::integral_constant<int, 3>());
    } else if (p.columns <= 512) {
      warp(std::integral_constant<int, 4>());
    } else if (p.columns <= 768) {
      warp(std::integral_constant<int, 6>());
    } else {
      warp(std::integral_constant<int, 8>());
    }
  };
  if (p.x_type == DType::kFloat) {
    by_columns(float());
  } else if constexpr (!std::is_same_v<T, float>) {
    by_columns(T());
  } else if (p.x_type == DType::kBFloat16) {
    by_columns(__nv_bfloat16());
  } else {
    by_columns(__half());
  }
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int forward(const Norm& p, cudaStream_t stream) {
  return by_row<T>(p, [&](auto x, auto lanes, auto steps) {
    constexpr int kLanes = decltype(lanes)::value, kRows = kThreads / kLanes;
    const int64_t blocks = (p.rows + kRows - 1) / kRows;
    const auto grid = static_cast<unsigned>(blocks < 16384 ? blocks : 16384);
    if constexpr (std::is_same_v<decltype(x), float> && !std::is_same_v<T, float>) {
      if (p.added != nullptr) {
        forward_kernel<float, T, kLanes, decltype(steps)::value, true>
            <<<grid, dim3(kLanes, kRows), 0, stream>>>(p);
        return;
      }
    }
    forward_kernel<decltype(x), T, kLanes, decltype(steps)::value, false>
        <<<grid, dim3(kLanes, kRows), 0, stream>>>(p);
  });
}

template <class T>
int backward(const Norm& p, cudaStream_t stream) {
  return by_row<T>(p, [&](auto x, auto lanes, auto steps) {
    constexpr int kLanes = decltype(lanes)::value;
    backward_kernel<decltype(x), T, kLanes, decltype(steps)::value>
        <<<p.slots, dim3(kLanes, kThreads / kLanes), 0, stream>>>(p);
    sum_slots(p.partial, p.parameters, 1, p.slots, 2 * static_cast<int64_t>(p.columns), stream);
  });
}

}  // namespace

template <>
int launch_forward<DType::kFloat>(const Norm& p, CUstream_st* stream) {
  return forward<float>(p, stream);
}
template <>
int launch_backward<DType::kFloat>(const Norm& p, CUstream_st* stream) {
  return backward<float>(p, stream);
}
template <>
int launch_forward<DType::kBFloat16>(const Norm& p, CUstream_st* stream) {
  return forward<__nv_bfloat16>(p, stream);
}
template <>
int launch_forward<DType::kHalf>(const Norm& p, CUstream_st* stream) {
  return forward<__half>(p, stream);
}
template <>
int launch_backward<DType::kBFloat16>(const Norm& p, CUstream_st* stream) {
  return backward<__nv_bfloat16>(p, stream);
}
template <>
int launch_backward<DType::kHalf>(const Norm& p, CUstream_st* stream) {
  return backward<__half>(p, stream);
}

}  // namespace layer_norm
}  // namespace mmvim
