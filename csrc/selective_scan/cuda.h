// What the glue hands to the CUDA kernels of the scan. No torch and no CUDA header.
//
// Positions p = 0 .. length - 1 count in scan order; a reverse scan reads time length - 1 - p.
// One launch handles up to kMaxStates states; more are a sum over launches, which `State::pitch`
// and the `sum` buffers are for.
#pragma once

#include <cstdint>

#include "../common/discretization.h"
#include "../common/dtype.h"

struct CUstream_st;

namespace mmvim {
namespace scan {

constexpr int kMaxStates = 32;
// Steps between the states that the backward kernel starts from.
constexpr int kInterval = 32;

// A (batch, length, ...) tensor with inner stride 1; strides in elements, that of length within
// int32.
struct Rows {
  const void* data = nullptr;
  int64_t stride_b = 0, stride_g = 0;
  int stride_l = 0;
  // Rows start at multiples of so many bytes (16, 8; 4 for B and C), channels also from each unit's
  // first one; 0: no such multiple, or B and C have an odd number of 16-bit states.
  int vector = 0;
};

struct Sizes {
  int64_t batch = 0;
  int length = 0, channels = 0;
  int states = 0;  // of this launch
  int pitch = 0;   // of A, checkpoints and chunk states: all states
  int units = 1;   // least common multiple of the directions' groups; no block straddles a unit
  bool softplus = false;
};

// One direction.
struct Scan {
  Rows u, delta, B, C;
  const float* A = nullptr;              // (d, n)
  const float* D = nullptr;              // (d,) or null
  const float* delta_bias = nullptr;     // (d,) or null
  const float* initial = nullptr;        // (b, d, state_width) or null
  const float* initial_drive = nullptr;  // v of two-tap methods, same pitch
  int initial_pitch = 0;
  int groups = 1;
  bool reverse = false;
};

// Length cut into chunks that run side by side: a first launch scans each from zero, a second one
// carries the states over, a third one starts from those. Arrays are (directions, count, b, d, n).
struct Chunks {
  int count = 1;
  int length = 0;
  float* state = nullptr;  // what a scan from zero ends with, then what enters the chunk
  float* decay = nullptr;  // factor of what enters
  // Two taps, backward: the same for the gradient of v.
  float* drive = nullptr;
  float* drive_decay = nullptr;
};

struct Forward {
  Sizes size;
  Scan scan[2];
  int directions = 1;
  Rows z;  // data null: no gate
  float scale = 1.f;
  void* out = nullptr;            // (b, l, d)
  void* pregate = nullptr;        // (b, l, d) or null
  float* meeting = nullptr;       // two directions: (b, l, d) scratch
  int* left = nullptr;            // two directions: (chunks, b, channel blocks, 2) zeros
  const float* sum_in = nullptr;  // (b, l, d), of the launches before, or null
  float* sum_out = nullptr;       // (b, l, d), written in place of `out`, or null
  float* last[2] = {};            // (b, d, last_pitch) or null
  float* last_drive[2] = {};
  int last_pitch = 0;
  float* checkpoints[2] = {};  // (b, floor((l - 1) / interval), d, n) or null
  int interval = 0;
  Chunks chunks;
  const int32_t* seq_idx = nullptr;  // (b, l) or null: a change starts the states anew
};

struct Backward {
  Sizes size;
  Scan scan[2];
  int directions = 1;
  Rows z, grad_out, pregate;  // pregate: two directions with gate only
  float scale = 1.f;
  const float* grad_last[2] = {};  // (b, d, grad_last_pitch) or null
  const float* grad_last_drive[2] = {};
  int grad_last_pitch = 0;
  const float* checkpoints[2] = {};  // every kInterval steps
  void* du[2] = {};
  void* ddelta[2] = {};
  void* dz = nullptr;
  int dz_pitch = 0;  // from row to row
  // Launches for parts of the states: (3, b, l, d) sums of du, ddelta and y.
  const float* sum_in[2] = {};
  float* sum_out[2] = {};
  // Partial sums: (parts, b, l, g, 2, n) of dB and dC, where parts = 1 if added atomically;
  // (chunks, b, d, n) of dA, which may be chunks.state; (chunks, b, 2, d) of dD and ddelta_bias.
  float* dBC[2] = {};
  bool atomic[2] = {};
  float* dA[2] = {};
  float* dD[2] = {};
  float* dinitial[2] = {};
  float* dinitial_drive[2] = {};
  int dinitial_pitch = 0;
  Chunks chunks;
  const int32_t* seq_idx = nullptr;  // (b, l) or null
};

// Second pass of backward: sums the partial sums in a fixed order.
struct Finish {
  Sizes size;
  int directions = 1;
  int groups[2] = {1, 1};
  const float* dBC[2] = {};
  int parts[2] = {1, 1};
  const float* dA[2] = {};
  const float* dD[2] = {};
  int64_t rows = 0;  // b * chunks
  void* out_dB[2] = {};
  void* out_dC[2] = {};
  int out_pitch = 0;  // of both, from row to row
  float* out_dA[2] = {};
  float* out_dD[2] = {};           // or null
  float* out_ddelta_bias[2] = {};  // or null
};

// Forward, two directions: a launch for each; or one for both, and the registers of its threads.
enum class Joint { kNo, kWide, kTight };

// How the work is cut: channels of one block, chunks of the length.
struct Plan {
  int channels = 32;  // 32 or 64; joint: 32
  int chunks = 1;
  int chunk_length = 0;
  Joint joint = Joint::kNo;
  bool few = false;  // one or two states, whose tiles run side by side
};
// `packed`: several sequences in a row, for which there are kernels of 32 channels, not joint.
Plan plan_forward(const Sizes& size, int directions, bool packed, int multiprocessors);
// `plain`: zero-order hold without a gate.
Plan plan_backward(const Sizes& size, int directions, bool plain, bool packed, int multiprocessors);
// Blocks of channels that share one group of B and C.
int blocks_per_group(const Sizes& size, int groups, int block_channels);

// Each returns a CUDA error code (0: success).
template <DType kType>
int launch_forward(Discretization method, const Plan& plan, const Forward& p, CUstream_st* stream);
template <DType kType>
int launch_backward(Discretization method, const Plan& plan, const Backward& p,
                    CUstream_st* stream);
template <DType kType>
int launch_finish(const Finish& p, CUstream_st* stream);

}  // namespace scan
}  // namespace mmvim
