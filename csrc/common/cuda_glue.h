// What the CUDA glue files share: element types, launch errors, the alignment of rows.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <type_traits>

#include "glue.h"

namespace mmvim {

inline DType dtype_of(const Tensor& t, const char* name) {
  const DType type = dtype_of(t.scalar_type(), name);
  TORCH_CHECK_TYPE(type != DType::kDouble, name,
                   " must be float32, bfloat16 or float16 for the CUDA kernels, got float64");
  return type;
}

// Makes the dtype a template parameter: `f` gets an integral constant.
template <class F>
int by_dtype(DType type, F&& f) {
  switch (type) {
    case DType::kBFloat16:
      return f(std::integral_constant<DType, DType::kBFloat16>());
    case DType::kHalf:
      return f(std::integral_constant<DType, DType::kHalf>());
    default:
      return f(std::integral_constant<DType, DType::kFloat>());
  }
}

inline void check_launch(int error, const char* kernel) {
  TORCH_CHECK(error == 0, "launching mmvim::", kernel,
              " failed: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

inline int multiprocessor_count() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// The tensor itself if neighbouring channels are neighbours in memory, else a copy.
inline Tensor with_unit_stride(const Tensor& t) {
  return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous();
}

// Whether each row of the last dimension starts at a multiple of 16 bytes and holds whole 16-byte
// words.
inline bool rows_are_aligned(const Tensor& t) {
  const int64_t size = t.element_size();
  bool aligned =
      reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.size(-1) * size % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) {
    aligned = aligned && (t.size(i) <= 1 || t.stride(i) * size % 16 == 0);
  }
  return aligned;
}

}  // namespace mmvim
