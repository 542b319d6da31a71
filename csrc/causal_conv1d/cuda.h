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
  const int32_t* seq_idx = nullptr;  // only without `both`: (b, l), no tap reaches beyond a change
};

struct Backward {
  Input in;
  bool both = false;
  Taps taps[2];
  State initial;
  State grad_last;           // gradient of the last state
  const void* grad[2] = {};  // (b, l, d), inner stride 1
  int64_t grad_stride_b[2] = {}, grad_stride_l[2] = {};
  void* dx = nullptr;        // (b, l, d)
  int64_t dx_pitch = 0;      // from row to row
  void* dinitial = nullptr;  // dtype of the initial state, or null
  float* partial = nullptr;  // (2 if both, slots, width + 1, d): sums of one block each
  TapGradients dtaps[2];
  int64_t slots = 0;
  const int32_t* seq_idx = nullptr;
};

// Backward, windows and sums take so many registers that two channels a thread, and more threads,
// keep more loads in flight.
constexpr int kBackwardVector = 2;
struct BackwardShape {
  int threads;       // of a block
  int residents;     // blocks that share a multiprocessor
  int batch;         // rows that a thread loads at a time
  int most_vectors;  // of a block
  bool prefetches;   // brings the rows of the next batch closer
};
// For one direction and for both.
constexpr BackwardShape kBackwardShape[2] = {{128, 5, 6, 32, true}, {128, 4, 6, 32, true}};

// Blocks of the backward kernel: x vectors of channels, y work items; `groups` blocks side by side
// cover the channels.
struct BackwardBlocks {
  int64_t groups;
  int x, y;

  BackwardBlocks(const Input& in, bool both) {
    const BackwardShape& shape = kBackwardShape[both];
    const int64_t vectors = in.channels / (in.vectorized ? kBackwardVector : 1);
    groups = (vectors + shape.most_vectors - 1) / shape.most_vectors;
    x = static_cast<int>((vectors + groups - 1) / groups);
    y = shape.threads / x;
  }
};

// Number of blocks that share the sums over batch and time, such that all blocks run at a time; the
// size of `partial`.
inline int64_t backward_slots(const Input& in, bool both, int multiprocessors) {
  if (in.channels == 0) return 1;
  const BackwardBlocks blocks(in, both);
  const int64_t work = (in.batch * ((in.length + 7) / 8) + blocks.y - 1) / blocks.y;
  const int64_t most =
      kBackwardShape[both].residents * static_cast<int64_t>(multiprocessors) / blocks.groups;
  const int64_t slots = work < most ? work : most;
  return slots < 1 ? 1 : slots;
}

// Each returns a CUDA error code (0: success).
template <DType kType>
int launch_forward(const Forward& p, CUstream_st* stream);
template <DType kType>
int launch_backward(const Backward& p, CUstream_st* stream);

}  // namespace conv
}  // namespace mmvim
