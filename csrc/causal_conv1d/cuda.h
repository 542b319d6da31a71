// What the glue hands to the CUDA kernels of the depthwise convolutions. No torch and no CUDA
// header.
//
// One position p of the output sees the inputs x[p - left .. p - left + width - 1]. A causal
// convolution has left = width - 1; a reverse one has left = 0 and its taps in reverse order;
// "same" has left = (width - 1) / 2.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

struct CUstream_st;

namespace mmvim {
namespace conv {

// Positions and what lies around them fit in 32 bits.
constexpr int64_t kMaxLength = 0x7fff0000;

struct Taps {
  const float* weight = nullptr;  // (d, width), contiguous
  const float* bias = nullptr;    // (d,) or null
  bool aligned = false;           // `weight` starts at a multiple of 16 bytes
  int left = 0;
  bool reverse = false;
};

// State (b, d, width - 1), the most recent inputs in scan order, oldest first.
struct State {
  const void* data = nullptr;  // contiguous or null
  bool is_float = false;       // float, otherwise the dtype of x
};

struct Input {
  const void* x = nullptr;  // inner stride 1
  int64_t stride_b = 0, stride_l = 0;
  int64_t batch = 0, length = 0, channels = 0;
  int width = 0;
  bool silu = false;
  bool vectorized = false;  // rows start at multiples of 16 bytes and hold whole vectors
};

// Gradients of one direction's taps, like the parameters themselves.
struct TapGradients {
  void* weight = nullptr;  // (d, width), contiguous
  void* bias = nullptr;    // (d,) or null
  DType weight_type = DType::kFloat, bias_type = DType::kFloat;
};

struct Forward {
  Input in;
  bool both = false;
  Taps taps[2];
  State initial;               // only without `both`
  void* out[2] = {};           // (b, l, d), contiguous
  void* last_state = nullptr;  // (b, d, width - 1); float if `last_is_float`
  bool last_is_float = false;
};

struct Backward {
  Input in;
  bool both = false;
  Taps taps[2];
  State initial;
  State grad_last;           // gradient of the last state
  const void* grad[2] = {};  // (b, l, d), inner stride 1
  int64_t grad_stride_b[2] = {}, grad_stride_l[2] = {};
  void* dx = nullptr;        // (b, l, d), contiguous
  void* dinitial = nullptr;  // dtype of the initial state, or null
  float* partial = nullptr;  // (2 if both, slots, width + 1, d): sums of one block each
  TapGradients dtaps[2];
  int64_t slots = 0;
};

// Number of blocks that share the sums over batch and time; the size of `partial`.
inline int64_t backward_slots(const Input& in, int multiprocessors) {
  const int64_t work = in.batch * ((in.length + 7) / 8);
  const int64_t most = 2 * static_cast<int64_t>(multiprocessors);
  return work < 1 ? 1 : (work < most ? work : most);
}

// Each returns a CUDA error code (0: success).
template <DType kType>
int launch_forward(const Forward& p, CUstream_st* stream);
template <DType kType>
int launch_backward(const Backward& p, CUstream_st* stream);

}  // namespace conv
}  // namespace mmvim
