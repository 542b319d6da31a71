// Function qualifiers shared by host and device code.
#pragma once

#if defined(__CUDACC__)
#define MMVIM_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define MMVIM_HD __forceinline
#else
#define MMVIM_HD inline __attribute__((always_inline))
#endif

// For what is called once a row: keeps code and compile time small.
#if defined(_MSC_VER) && !defined(__clang__)
#define MMVIM_NOINLINE __declspec(noinline)
#else
#define MMVIM_NOINLINE __attribute__((noinline))
#endif
