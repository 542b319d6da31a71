// Residual addition and RMSNorm on a CPU: arguments of the kernels, as plain data.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace mmvim {

// Tensors are (1, rows, channels) views; outputs are contiguous.
struct NormForwardArgs {
  int64_t rows = 0, channels = 0;
  double eps = 0.0;
  View x, residual;
  const void* keep = nullptr;    // (samples,), factors of x, of the computing type; or null
  int64_t sample = 1;            // rows of one
  const void* weight = nullptr;  // (channels,), of the computing type
  Output out, residual_out;
  void* rstd = nullptr;  // (rows,), of the computing type
};

struct NormBackwardArgs {
  int64_t rows = 0, channels = 0;
  View grad_out, grad_residual_out, residual_out;
  const void* keep = nullptr;  // as in the forward pass
  int64_t sample = 1;
  const void* weight = nullptr;
  const void* rstd = nullptr;
  Output dx, dresidual;
  void* dweight = nullptr;  // (channels,), of the computing type
};

MMVIM_DECLARE_PER_ISA(void norm_forward(const NormForwardArgs& args, bool is_double))
MMVIM_DECLARE_PER_ISA(void norm_backward(const NormBackwardArgs& args, bool is_double))

}  // namespace mmvim
