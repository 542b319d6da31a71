// Views that cost next to nothing, and the matrix products of a mixer.
#pragma once

#include <ATen/core/Tensor.h>

namespace mmvim {
namespace mixers {

using at::IntArrayRef;
using at::Tensor;

// A view without a way through the dispatcher.
inline Tensor view(const Tensor& base, int64_t offset, IntArrayRef sizes, IntArrayRef strides) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), base.dtype());
  impl->set_sizes_and_strides(sizes, strides, base.storage_offset() + offset);
  return Tensor(std::move(impl));
}
inline Tensor view(const Tensor& base, int64_t offset, IntArrayRef sizes) {
  at::DimVector strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * sizes[i - 1];
  return view(base, offset, sizes, strides);
}
// (..., rows, columns) with the last two dimensions exchanged.
inline Tensor transposed(const Tensor& t) {
  at::DimVector sizes(t.sizes()), strides(t.strides());
  std::swap(sizes[t.dim() - 1], sizes[t.dim() - 2]);
  std::swap(strides[t.dim() - 1], strides[t.dim() - 2]);
  return view(t, 0, sizes, strides);
}
// (batch, length, d) as (batch * length, d). Length steps over whole rows of one batch entry.
inline Tensor rows(const Tensor& t) {
  return view(t, 0, {t.size(0) * t.size(1), t.size(2)}, {t.stride(1), t.stride(2)});
}
// One of a stack.
inline Tensor at_index(const Tensor& stack, int64_t i) {
  return view(stack, i * stack.stride(0), stack.sizes().slice(1), stack.strides().slice(1));
}

// x w' + bias for x (b, l, in) and w (out, in): contiguous, and it may outlive the call if
// `is_kept`.
Tensor linear(const Tensor& x, const Tensor& w, const Tensor& bias, bool is_kept);
// out = a b.
void product(const Tensor& out, const Tensor& a, const Tensor& b);
// Of each of a stack; one launch on GPUs.
void products(const Tensor& out, const Tensor& a, const Tensor& b);
// Whether products of all rows, or over all rows, of a stack (count, rows, columns) are one launch:
// on GPUs, if they are few. cuBLAS has much slower kernels for batches of many.
bool are_batched(const Tensor& stack);
// sum += a b, of each of a stack.
void add_products(const Tensor& sum, const Tensor& a, const Tensor& b);

}  // namespace mixers
}  // namespace mmvim
