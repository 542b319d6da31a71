// Conversions, one launch for all arrays (a block finds the array that it has a part of), and the
// gate.
#include <cmath>

#include "../common/vector.cuh"
#include "parameters.h"

namespace mmvim {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;
constexpr int kStep = kThreads * kVector;
constexpr int kBlock = 2 * kStep;

template <class T>
__device__ __forceinline__ void load(const void* from, int64_t i, int64_t end,
                                     float (&v)[kVector]) {
  const T* p = static_cast<const T*>(from) + i;
  if (i + kVector <= end && reinterpret_cast<uintptr_t>(p) % sizeof(Packed<T, kVector>) == 0) {
    const auto packed = Packed<T, kVector>::load(p);
#pragma unroll
    for (int k = 0; k < kVector; ++k) v[k] = packed.get(k);
  } else {
#pragma unroll
    for (int k = 0; k < kVector; ++k) v[k] = i + k < end ? to_float(p[k]) : 0.f;
  }
}

template <class T>
__device__ __forceinline__ void store(void* to, int64_t i, int64_t end, const float (&v)[kVector]) {
  T* p = static_cast<T*>(to) + i;
  if (i + kVector <= end && reinterpret_cast<uintptr_t>(p) % sizeof(Packed<T, kVector>) == 0) {
    Packed<T, kVector> packed;
#pragma unroll
    for (int k = 0; k < kVector; ++k) packed.set(k, v[k]);
    packed.store(p);
  } else {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if (i + k < end) p[k] = from_float<T>(v[k]);
    }
  }
}

__global__ void __launch_bounds__(kThreads) convert_kernel(const __grid_constant__ Segments all) {
  int64_t block = blockIdx.x;
  int index = 0;
  for (; index < all.count; ++index) {
    const int64_t blocks = (all.segment[index].count + kBlock - 1) / kBlock;
    if (block < blocks) break;
    block -= blocks;
  }
  const Segment& s = all.segment[index];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int64_t i = block * kBlock + part * kStep + threadIdx.x * kVector;
    if (i >= s.count) return;
    float v[kVector], factor[kVector];
    switch (s.from_type) {
      case DType::kBFloat16:
        load<__nv_bfloat16>(s.from, i, s.count, v);
        break;
      case DType::kHalf:
        load<__half>(s.from, i, s.count, v);
        break;
      default:
        load<float>(s.from, i, s.count, v);
    }
    if (s.conversion == Conversion::kMultiply) load<float>(s.factor, i, s.count, factor);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      v[k] = s.conversion == Conversion::kDecay      ? -expf(v[k])
             : s.conversion == Conversion::kMultiply ? v[k] * factor[k]
             : s.conversion == Conversion::kClear    ? 0.f
                                                     : v[k] * s.scale;
    }
    switch (s.to_type) {
      case DType::kBFloat16:
        store<__nv_bfloat16>(s.to, i, s.count, v);
        break;
      case DType::kHalf:
        store<__half>(s.to, i, s.count, v);
        break;
      default:
        store<float>(s.to, i, s.count, v);
    }
  }
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) gate_kernel(const __grid_constant__ Gate p) {
  const int64_t words = p.channels / kCount;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = index; i < p.cleared_count; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    p.cleared[i] = 0.f;
  }
  if (index >= p.rows * words) return;
  const int64_t row = index / words, c = (index - row * words) * kCount;
  const auto z = Packed<T, kCount>::load(static_cast<const T*>(p.z) + row * p.stride + c);
  const auto y = Packed<T, kCount>::load(static_cast<const T*>(p.y) + row * p.channels + c);
  Packed<T, kCount> out;
#pragma unroll
  for (int i = 0; i < kCount; ++i) out.set(i, y.get(i) * z.get(i) / (1.f + __expf(-z.get(i))));
  out.store(static_cast<T*>(p.out) + row * p.channels + c);
}

template <class T>
int gate_launch(const Gate& p, CUstream_st* stream) {
  constexpr int kCount = 16 / sizeof(T);
  const int64_t work = p.rows * (p.vectorized ? p.channels / kCount : p.channels);
  if (work == 0) return 0;
  const auto blocks = static_cast<unsigned>((work + kThreads - 1) / kThreads);
  if (p.vectorized) {
    gate_kernel<T, kCount><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    gate_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(p);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int launch_gate(DType type, const Gate& p, CUstream_st* stream) {
  switch (type) {
    case DType::kBFloat16:
      return gate_launch<__nv_bfloat16>(p, stream);
    case DType::kHalf:
      return gate_launch<__half>(p, stream);
    default:
      return gate_launch<float>(p, stream);
  }
}

int launch_convert_segments(const Segments& segments, CUstream_st* stream) {
  int64_t blocks = 0;
  for (int i = 0; i < segments.count; ++i) {
    blocks += (segments.segment[i].count + kBlock - 1) / kBlock;
  }
  if (blocks == 0) return 0;
  convert_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(segments);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace mmvim
