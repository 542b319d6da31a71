// What the glue hands to the CUDA kernels of add_rms_norm. No torch and no CUDA header.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

struct CUstream_st;

namespace mmvim {
namespace norm {

// All (rows, columns) tensors are contiguous.
struct Forward {
  const void* x = nullptr;
  const void* residual = nullptr;  // or null
  const void* keep = nullptr;      // (samples,), factors of x, of its dtype; or null
  const float* weight = nullptr;
  void* out = nullptr;  // dtype of x
  void* residual_out = nullptr;
  float* rstd = nullptr;  // (rows,)
  DType residual_type = DType::kFloat, residual_out_type = DType::kFloat;
  int64_t rows = 0, columns = 0, sample = 0;  // sample: rows of one
  float eps = 0.f;
};

struct Backward {
  const void* grad_out = nullptr;       // dtype of x
  const void* grad_residual = nullptr;  // dtype of residual_out, or null
  const void* residual_out = nullptr;
  const void* keep = nullptr;  // as in Forward
  const float* weight = nullptr;
  const float* rstd = nullptr;
  void* dx = nullptr;         // dtype of x
  void* dresidual = nullptr;  // dtype of the residual, or null
  float* partial = nullptr;   // (slots, columns): sums of one block each
  float* dweight = nullptr;   // (columns,)
  DType residual_type = DType::kFloat, residual_out_type = DType::kFloat;
  int64_t rows = 0, columns = 0, slots = 0, sample = 0;
};

// Rows of up to this many columns stay in registers.
constexpr int64_t kMostColumnsInRegisters = 2048;

// Each returns a CUDA error code (0: success); kType is the dtype of x.
template <DType kType>
int launch_forward(const Forward& p, CUstream_st* stream);
template <DType kType>
int launch_backward(const Backward& p, CUstream_st* stream);

}  // namespace norm
}  // namespace mmvim
