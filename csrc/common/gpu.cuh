// The few things that kernels ask of the GPU beyond plain C++: fast functions, warp exchange, the
// tensor cores as an adder, launches. Kernels use nothing else of CUDA, so a host can stand in for
// it.
#pragma once

#if defined(MMVIM_GPU_HEADER)
#include MMVIM_GPU_HEADER
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#define MMVIM_KERNEL __global__
#define MMVIM_DEVICE __device__ __forceinline__
#define MMVIM_GRID_CONSTANT __grid_constant__
// Registers of a thread, which decide how many blocks share a multiprocessor.
#define MMVIM_REGISTERS(count) __maxnreg__(count)
#define MMVIM_UNROLL _Pragma("unroll")
#define MMVIM_NO_UNROLL _Pragma("unroll 1")
#define MMVIM_PRAGMA(text) _Pragma(#text)
#define MMVIM_UNROLL_BY(count) MMVIM_PRAGMA(unroll count)

namespace mmvim {
namespace gpu {

MMVIM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MMVIM_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
MMVIM_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }
// Blocks of a Grid are started in order of x, then y, then z. What is derived from these alone is
// the same for all threads, and costs no register of theirs.
MMVIM_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
MMVIM_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
MMVIM_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
MMVIM_DEVICE void sync_block() { __syncthreads(); }
MMVIM_DEVICE void sync_warp() { __syncwarp(); }

MMVIM_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

MMVIM_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MMVIM_DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MMVIM_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MMVIM_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

MMVIM_DEVICE uint32_t bits(float x) { return __float_as_uint(x); }
MMVIM_DEVICE float from_bits(uint32_t x) { return __uint_as_float(x); }

MMVIM_DEVICE float exchange_xor(float x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}

// The lanes of the warp for which x is true, as bits; the lowest and the highest set bit.
MMVIM_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
MMVIM_DEVICE int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }
MMVIM_DEVICE int highest_bit(uint32_t x) { return 31 - __clz(static_cast<int>(x)); }

MMVIM_DEVICE void add_to_global(float* address, float x) { atomicAdd(address, x); }

// Brings 32 bytes closer that will be read soon.
MMVIM_DEVICE void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// One block tells another what it has written: after a barrier of its own, one of its threads
// publishes; a thread of the other block awaits it, and after a barrier there all may read with
// load_coherent().
MMVIM_DEVICE void publish(int* flag) {
  __threadfence();
  atomicExch(flag, 1);
}
MMVIM_DEVICE void await(const int* flag) {
  while (*static_cast<const volatile int*>(flag) == 0) {
  }
  __threadfence();
}
template <class T>
MMVIM_DEVICE T load_coherent(const T* p) {
  return __ldcg(p);
}

// Copies kBytes (4, 8 or 16, aligned) from global to shared memory, visible to the thread after
// wait_for_copies() and to the block after a barrier that follows.
template <int kBytes>
MMVIM_DEVICE void copy_async(void* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes)
                 : "memory");
  }
#else
  for (int i = 0; i < kBytes / 4; ++i) {
    static_cast<uint32_t*>(shared)[i] = static_cast<const uint32_t*>(global)[i];
  }
#endif
}
MMVIM_DEVICE void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define MMVIM_MATRIX_ADDER 0
#else
#define MMVIM_MATRIX_ADDER 1
#endif

#if MMVIM_MATRIX_ADDER
// c += a b on 16 x 8 x 8 tf32: of a, lane 4g + q holds (g, q), (g + 8, q), (g, q + 4), (g + 8, q +
// 4); of b (q, g), (q + 4, g); of c (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1). Only the
// upper 19 bits of the elements of a and b count.
MMVIM_DEVICE void multiply_16x8x8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                  uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c += a b on 16 x 8 x 16 pairs of 16 bits: of a, lane 4g + q holds columns 2q and 2q + 1 of rows g
// and g + 8, then columns 2q + 8 and 2q + 9; of b rows 2q and 2q + 1, then 2q + 8 and 2q + 9, of
// column g; c as above.
template <class T>
MMVIM_DEVICE void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  if constexpr (std::is_same<T, __half>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
#endif

// y and z at most 65535.
struct Grid {
  int64_t x;
  int y = 1, z = 1;
};

// Launches and returns the CUDA error code (0: success).
template <class Params>
inline int launch(void (*kernel)(Params), const Grid& grid, int threads, size_t shared_bytes,
                  CUstream_st* stream, const Params& params) {
  if (grid.x == 0) return 0;
  if (grid.x > 0x7fffffff) return static_cast<int>(cudaErrorInvalidConfiguration);
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return static_cast<int>(
      cudaLaunchKernel(function,
                       dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                            static_cast<unsigned>(grid.z)),
                       dim3(static_cast<unsigned>(threads)), arguments, shared_bytes, stream));
}

}  // namespace gpu
}  // namespace mmvim

#endif
