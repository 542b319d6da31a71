// What the CPU glue files share: checks, views, allocation. The checks cover whatever would be
// unsafe in memory; the Python wrappers check first, and more kindly.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>

#include "dtype.h"

namespace mmvim {
namespace cpu {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

inline DType dtype_of(at::ScalarType type, const char* name) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat;
    case at::kDouble:
      return DType::kDouble;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kHalf;
    default:
      TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got ", type);
  }
}

// The dtype of parameters and of all arithmetic for activations of `type`.
inline at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check(const Tensor& t, const char* name, at::IntArrayRef sizes, at::ScalarType type) {
  TORCH_CHECK(t.device().is_cpu() && t.layout() == at::kStrided, name,
              " must be a strided tensor on the CPU, got ", t.layout(), " on ", t.device());
  TORCH_CHECK(t.sizes() == sizes, name, " must have shape ", sizes, ", got ", t.sizes());
  TORCH_CHECK(t.scalar_type() == type, name, " must be ", type, ", got ", t.scalar_type());
}

inline void check(const OptTensor& t, const char* name, at::IntArrayRef sizes,
                  at::ScalarType type) {
  if (t.has_value()) check(*t, name, sizes, type);
}

inline View view(const Tensor& t) {
  View v;
  v.data = t.const_data_ptr();
  v.dtype = dtype_of(t.scalar_type(), "tensor");
  v.stride_b = t.stride(0);
  v.stride_l = t.stride(1);
  v.stride_d = t.stride(2);
  return v;
}
inline View view(const OptTensor& t) { return t.has_value() ? view(*t) : View(); }

// `t` is contiguous, (batch, length, ...).
inline Output output(const Tensor& t) {
  Output o;
  o.data = t.mutable_data_ptr();
  o.dtype = dtype_of(t.scalar_type(), "output");
  o.length = t.size(1);
  o.channels = t.dim() == 4 ? t.size(2) * t.size(3) : t.size(2);
  return o;
}

inline OptTensor contiguous(const OptTensor& t) {
  return t.has_value() ? OptTensor(t->contiguous()) : OptTensor();
}
inline const void* data(const OptTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

inline Tensor empty(at::IntArrayRef sizes, at::ScalarType type) {
  return at::empty(sizes, at::TensorOptions().dtype(type));
}
inline Tensor empty_like(const Tensor& t) { return empty(t.sizes(), t.scalar_type()); }
// The gradient of an optional input; empty(0) where it is absent.
inline Tensor empty_like(const OptTensor& t, at::ScalarType type) {
  return t.has_value() ? empty_like(*t) : empty({0}, type);
}
inline void* data_if(const OptTensor& input, const Tensor& gradient) {
  return input.has_value() ? gradient.mutable_data_ptr() : nullptr;
}

}  // namespace cpu
}  // namespace mmvim
