// Function qualifiers shared by host and device code.
#pragma once

#if defined(__CUDACC__)
#define MMVIM_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define MMVIM_HD __forceinline
#else
#define MMVIM_HD inline __attribute__((always_inline))
#endif
