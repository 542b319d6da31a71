// What all glue shares: element types, checks, names of methods.
//
// A wrong shape, device or value is a ValueError, a wrong dtype a TypeError, and what cannot be
// done on a device a RuntimeError. The checks cover whatever would be unsafe in memory; the Python
// wrappers check first, and more kindly.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <string_view>

#include "discretization.h"
#include "dtype.h"

namespace mmvim {

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
      TORCH_CHECK_TYPE(false, name, " must be float32, float64, bfloat16 or float16, got ", type);
  }
}

// The dtype of parameters and of all arithmetic for activations of `type`.
inline at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_place(const Tensor& t, const char* name, at::IntArrayRef sizes,
                        at::Device device) {
  TORCH_CHECK_VALUE(t.device() == device && t.layout() == at::kStrided, name,
                    " must be a strided tensor on ", device, ", got ", t.layout(), " on ",
                    t.device());
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must have shape ", sizes, ", got ", t.sizes());
}

inline void check(const Tensor& t, const char* name, at::IntArrayRef sizes, at::ScalarType type,
                  at::Device device) {
  check_place(t, name, sizes, device);
  TORCH_CHECK_TYPE(t.scalar_type() == type, name, " must be ", type, ", got ", t.scalar_type());
}
inline void check(const OptTensor& t, const char* name, at::IntArrayRef sizes, at::ScalarType type,
                  at::Device device) {
  if (t.has_value()) check(*t, name, sizes, type, device);
}

// The same for what may be of the dtype of activations or of the arithmetic.
inline void check_either(const Tensor& t, const char* name, at::IntArrayRef sizes,
                         at::ScalarType type, at::Device device) {
  check_place(t, name, sizes, device);
  TORCH_CHECK_TYPE(t.scalar_type() == type || t.scalar_type() == compute_type(type), name,
                   " must be ", type, " or ", compute_type(type), ", got ", t.scalar_type());
}

inline OptTensor contiguous(const OptTensor& t) {
  return t.has_value() ? OptTensor(t->contiguous()) : OptTensor();
}

inline Discretization method_of(std::string_view name) {
  std::string known;
  for (const Method& m : kMethods) {
    if (name == m.name) return static_cast<Discretization>(&m - kMethods);
    known += std::string(known.empty() ? "" : ", ") + m.name;
  }
  TORCH_CHECK_VALUE(false, "discretization must be one of ", known, "; got '", name, "'");
}

}  // namespace mmvim
