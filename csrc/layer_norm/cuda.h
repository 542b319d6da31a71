// What the glue hands to the CUDA kernels of the layer norm. No torch and no CUDA header.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

struct CUstream_st;

namespace mmvim {
namespace layer_norm {

constexpr int kMostColumns = 1024;

struct Norm {
  const void* x = nullptr;  // (rows, columns)
  DType x_type = DType::kFloat;
  const float* weight = nullptr;
  const float* bias = nullptr;
  int64_t rows = 0;
  int columns = 0;  // a multiple of 4
  float eps = 0.f;
  float* statistics = nullptr;  // (rows, 2): mean, 1 / deviation
  void* out = nullptr;
  // Absent, or of the dtype of the result, which is not that of x, float: added to x, which gives
  // `sum`, float.
  const void* added = nullptr;
  void* sum = nullptr;
  // Backward.
  const void* grad = nullptr;
  const void* grad_input = nullptr;  // added to dx, dtype of x; or absent
  void* dx = nullptr;                // dtype of x
  int slots = 0;
  float* partial = nullptr;     // (slots, 2, columns) of the weight and the bias
  float* parameters = nullptr;  // (2, columns)
};

// Each returns a CUDA error code (0: success); kType: of the result. That of x is the same, or one
// of the two is float.
template <DType kType>
int launch_forward(const Norm& p, CUstream_st* stream);
template <DType kType>
int launch_backward(const Norm& p, CUstream_st* stream);

}  // namespace layer_norm
}  // namespace mmvim
