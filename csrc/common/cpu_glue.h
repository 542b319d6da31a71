// What the CPU glue files share: views, allocation.
#pragma once

#include <ATen/ops/empty.h>

#include "glue.h"

namespace mmvim {

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

// `t`, (batch, length, ...), is contiguous or columns of what is.
inline Output output(const Tensor& t) {
  Output o;
  o.data = t.mutable_data_ptr();
  o.dtype = dtype_of(t.scalar_type(), "output");
  o.length = t.size(1);
  o.pitch = t.stride(1);
  return o;
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

}  // namespace mmvim
