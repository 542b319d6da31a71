// One scan of an ONNX graph, for either kind of device.
#pragma once

#include <cstdint>

#include "../common/discretization.h"

struct CUstream_st;

namespace mmvim {

// All arrays are contiguous, of the shapes of mmvim.ops.selective_scan.
struct OnnxScan {
  int64_t batch = 0, length = 0, channels = 0, states = 0, groups = 1;
  Discretization method = Discretization::kZoh;
  bool softplus = false, reverse = false;
  const float *u = nullptr, *delta = nullptr, *A = nullptr, *B = nullptr, *C = nullptr;
  const float *D = nullptr, *delta_bias = nullptr;  // or null
  const float* initial_state = nullptr;             // (b, d, initial_parts * n) or null
  int64_t initial_parts = 1;
  const int32_t* seq_idx = nullptr;  // (b, l) or null
  float *out = nullptr, *last_state = nullptr;

  int64_t state_parts() const { return is_two_tap(method) ? 2 : 1; }
};

// Enqueues the scan; returns a CUDA error code (0: success).
int onnx_scan_cuda(const OnnxScan& scan, CUstream_st* stream);

}  // namespace mmvim
