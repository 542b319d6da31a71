// Depthwise convolutions on a CPU: arguments of the kernels, as plain data.
//
// Output t sees the inputs t - left ... t - left + width - 1. A causal filter has left = width - 1,
// a reverse one left = 0 and its taps in reverse order, a centred one left = (width - 1) / 2.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace mmvim {

struct ConvFilter {
  const void* weight = nullptr;  // (channels, width), contiguous, of the computing type
  const void* bias = nullptr;    // (channels,) or absent
  int64_t left = 0;
  bool reverse = false;
};

// (batch, channels, width - 1), contiguous: the last inputs in scan order, oldest first.
struct ConvState {
  void* data = nullptr;
  DType dtype = DType::kFloat;
};

struct ConvInput {
  int64_t batch = 0, length = 0, channels = 0, width = 0;
  bool silu = false;
  int filters = 1;
  ConvFilter filter[2];
  View x;
  const int32_t* seq_idx = nullptr;  // (batch, length) or null: no tap reaches beyond a change
  ConvState initial;                 // absent with two filters and with a centred one
};

struct ConvForwardArgs {
  ConvInput in;
  ConvState last;
  Output out[2];
};

struct ConvBackwardArgs {
  ConvInput in;
  View grad[2];
  ConvState grad_last, dinitial;
  Output dx;
  void* dweight[2] = {nullptr, nullptr};  // (channels, width), of the computing type
  void* dbias[2] = {nullptr, nullptr};    // (channels,) or absent
};

MMVIM_DECLARE_PER_ISA(void conv_forward(const ConvForwardArgs& args, bool is_double))
MMVIM_DECLARE_PER_ISA(void conv_backward(const ConvBackwardArgs& args, bool is_double))

}  // namespace mmvim
