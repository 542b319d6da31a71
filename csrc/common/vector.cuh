// Vector loads and stores of float, __nv_bfloat16 and __half, computing in float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mmvim {

template <int kBytes>
struct RawOf;
template <>
struct RawOf<16> {
  using type = uint4;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<4> {
  using type = uint32_t;
};
template <>
struct RawOf<2> {
  using type = uint16_t;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// kCount neighbouring elements, moved as one word. Unpacked late, so that loads in flight cost few
// registers.
template <class T, int kCount>
struct Packed {
  using Raw = typename RawOf<sizeof(T) * kCount>::type;
  union {
    Raw raw;
    T element[kCount];
  };

  __device__ __forceinline__ Packed() {}

  static __device__ __forceinline__ Packed load(const T* p) {
    Packed v;
    v.raw = __ldg(reinterpret_cast<const Raw*>(p));
    return v;
  }
  static __device__ __forceinline__ Packed zero() {
    Packed v;
    v.raw = Raw{};
    return v;
  }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<Raw*>(p) = raw; }

  __device__ __forceinline__ float get(int i) const { return to_float(element[i]); }
  __device__ __forceinline__ void set(int i, float v) { element[i] = from_float<T>(v); }
};

// In four instructions: without the scaling that denormal results would need.
__device__ __forceinline__ float sigmoid(float v) {
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.f + e));
  return s;
}

}  // namespace mmvim
