// Arrays on their way between the dtypes of a layer's parameters and those of its arithmetic, as
// plain data: any number of them is one kernel.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

struct CUstream_st;

namespace mmvim {

enum class Conversion : int {
  kScale,     // scale * x
  kDecay,     // -exp(x)
  kMultiply,  // x * factor
  kClear,     // 0
};

// All contiguous. Arithmetic is in double if the computing type is double, else in float.
struct Segment {
  const void* from = nullptr;
  void* to = nullptr;
  const void* factor = nullptr;  // of the computing type, for kMultiply
  int64_t count = 0;
  DType from_type = DType::kFloat, to_type = DType::kFloat;
  Conversion conversion = Conversion::kScale;
  float scale = 1.f;
};

constexpr int kMaxSegments = 20;

struct Segments {
  int count = 0;
  Segment segment[kMaxSegments];
};

MMVIM_DECLARE_PER_ISA(void convert_segments(const Segments& segments, bool is_double))

// Both return a CUDA error code (0: success).

// No array is of doubles.
int launch_convert_segments(const Segments& segments, CUstream_st* stream);

// out = y silu(z), for rows of channels; y and out are contiguous. Beside it numbers are cleared,
// for which a launch of its own would take longer.
struct Gate {
  const void* z = nullptr;
  const void* y = nullptr;
  void* out = nullptr;
  int64_t rows = 0, channels = 0;
  int64_t stride = 0;       // of z's rows
  bool vectorized = false;  // rows start at multiples of 16 bytes and hold whole vectors
  float* cleared = nullptr;
  int64_t cleared_count = 0;
};
int launch_gate(DType type, const Gate& p, CUstream_st* stream);

}  // namespace mmvim
