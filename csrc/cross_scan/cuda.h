// What the glue hands to the CUDA kernels of the cross scan. No torch and no CUDA header.
//
// A lane owns kTile steps of two channels in scan order, eight lanes kGroup channels, a warp
// kWarpSteps steps, and the warps of a block the neighbouring steps of one round. A block takes the
// rounds of a route one after the other, the routes too, and adds their outputs in shared memory.
// Where a map is too large for that, a launch takes one route, whose rounds are shared out to
// `chunks` blocks, and adds in global memory.
#pragma once

#include <cstdint>

#include "../common/discretization.h"
#include "../common/dtype.h"

struct CUstream_st;

namespace mmvim {
namespace cross {

constexpr int kTile = 8;
constexpr int kGroup = 16;
constexpr int kWarpSteps = 32;
constexpr int kMaxRoutes = 16;
// Of a block: of the kernels of one state, and of the others.
constexpr int kMaxWarps = 16;
constexpr int kMaxWarpsOfMany = 8;

// (batch, position, route, columns), neighbouring columns side by side; strides in elements.
struct Columns {
  const void* data = nullptr;
  int64_t stride_b = 0;
  int stride = 0, stride_k = 0;
  bool words = false;  // columns come in aligned pairs of 16 bits
};

struct Problem {
  int64_t batch = 0;
  int height = 0, width = 0, length = 0, channels = 0;
  int states = 0;
  int rank = 0;  // 0: delta has a column for each channel
  int routes = 0;
  uint8_t route[kMaxRoutes] = {};  // bit 0: column by column; bit 1: from the end
  bool softplus = false;
  bool pairs = false;       // channels come in aligned pairs in x, the gradients and the outputs
  const void* x = nullptr;  // (b, position, d)
  Columns delta, B, C;
  const void* weight = nullptr;  // (k, d, rank)
  bool weight_is_float = false;
  const float* A = nullptr;           // (k, d, n)
  const float* D = nullptr;           // (k, d) or null
  const float* delta_bias = nullptr;  // (k, d) or null

  int element = 0;   // bytes of a value of x
  bool one = false;  // the kernels of one state run
  // t / height is t * magic >> shift, as t / width.
  uint32_t magic_height = 0, magic_width = 0;
  int shift_height = 0, shift_width = 0;
  int slots = 0;  // of sums in shared memory

  int warps = 0, rounds = 0;            // a round is warps * kWarpSteps steps
  int chunks = 1, chunk_rounds = 0;     // of each route
  float* local = nullptr;               // chunks: (2, k, chunks, b, d, n): decay, and end from zero
  int first_route = 0, last_route = 0;  // [first, last) of this launch
  bool whole = false;                   // sums lie in shared memory
  float* sum = nullptr;                 // (b, position, d) otherwise
};

struct Forward {
  Problem problem;
  void* out = nullptr;           // (b, position, d)
  float* checkpoints = nullptr;  // (k, b, rounds - 1, d, n) or null
};

struct Backward {
  Problem problem;
  const void* grad_out = nullptr;
  const float* checkpoints = nullptr;
  void* dx = nullptr;      // (b, position, d)
  void* ddelta = nullptr;  // (b, position, k, d)
  // Partial sums: (groups of channels, b, position, k, 2, n); of the blocks (b, chunks) k d (n + 1)
  // values of dA, then of ddelta_bias, and d of dD.
  float* dBC = nullptr;
  float* parameters = nullptr;
};

// Adds the partial sums in a fixed order.
struct Finish {
  const float* dBC = nullptr;
  const float* parameters = nullptr;
  int64_t parts = 0, slots = 0;
  int64_t rows = 0;  // b * position * k
  int states = 0, routes = 0, channels = 0;
  void* dB = nullptr;  // (rows, n), or null, as the following: nothing to write
  void* dC = nullptr;
  float* dA = nullptr;  // (k, d, n)
  float* dD = nullptr;  // (k, d)
  float* ddelta_bias = nullptr;
};

// The weights (k, d, rank) as one matrix (k d, k rank), zero outside its blocks.
struct Expand {
  const void* weight = nullptr;
  bool weight_is_float = false;
  int routes = 0, channels = 0, rank = 0;
  void* out = nullptr;
};

// Bytes of shared memory of a block.
int64_t shared_bytes(const Problem& p, bool backward);

// Each returns a CUDA error code (0: success).
template <DType kType>
int launch_forward(Discretization method, const Forward& p, CUstream_st* stream);
template <DType kType>
int launch_backward(Discretization method, const Backward& p, CUstream_st* stream);
// Fills `local`: the chunks of all routes, or those of the gradient of the states.
template <DType kType>
int launch_local(Discretization method, const Forward& p, CUstream_st* stream);
template <DType kType>
int launch_local(Discretization method, const Backward& p, CUstream_st* stream);
template <DType kType>
int launch_finish(const Finish& p, CUstream_st* stream);
template <DType kType>
int launch_expand(const Expand& p, CUstream_st* stream);

}  // namespace cross
}  // namespace mmvim
