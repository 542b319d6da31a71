// Rows of channels: conversion between tensors of any element type and stride and aligned arrays of
// the computing type, padded with zeros to whole vectors.
#pragma once

#if defined(MMVIM_BUILD_X86)
#include <xmmintrin.h>
#endif

#include "dtype.h"
#include "runtime.h"
#include "simd.h"

namespace mmvim {
namespace MMVIM_ISA {

// Strides in elements. A float kernel meets every type but double, a double kernel only double (and
// float where a schema allows it).
void load_row(float* dst, const void* src, DType type, int64_t stride, int count);
void load_row(double* dst, const void* src, DType type, int64_t stride, int count);
void store_row(void* dst, DType type, const float* src, int count);
void store_row(void* dst, DType type, const double* src, int count);

template <class S>
inline void fill(S* dst, S value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dst[i] = value;
}

// `padded` >= count elements: a row and zeros behind it.
template <class S>
inline void load_padded(S* dst, const View& view, int64_t b, int64_t t, int64_t c, int count,
                        int padded) {
  load_row(dst, view.at(b, t, c), view.dtype, view.stride_d, count);
  fill(dst + count, S(0), padded - count);
}

MMVIM_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MMVIM_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
MMVIM_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class S>
constexpr int64_t round_up(int64_t count) {
  return (count + kLanes<S> - 1) / kLanes<S> * kLanes<S>;
}

// Aligned memory of one thread, cut into arrays. Measure first (no memory yet), then take.
class Arena {
 public:
  Arena() = default;
  ~Arena() {
    if (memory_ != nullptr) release(memory_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class S>
  S* take(int64_t count) {
    char* p = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(S)) + 63) / 64 * 64;
    return reinterpret_cast<S*>(p);
  }
  // Allocates what the takes so far asked for; the same takes then follow again.
  void reserve() {
    memory_ = static_cast<char*>(allocate(used_));
    used_ = 0;
  }

 private:
  char* memory_ = nullptr;
  int64_t used_ = 0;
};

// While it lives, denormal numbers count as 0 in this thread. A state that decays towards 0 would
// otherwise spend thousands of steps among numbers on which x86 is a hundred times slower.
class FlushDenormals {
 public:
#if defined(MMVIM_BUILD_X86)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
#endif
};

// parallel_for with a callable body(begin, end).
template <class F>
inline void parallel(int64_t count, const F& body) {
  parallel_for(
      count,
      [](void* context, int64_t begin, int64_t end) {
        const FlushDenormals guard;
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace MMVIM_ISA
}  // namespace mmvim
