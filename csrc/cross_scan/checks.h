// What the glue of all devices checks of a call of cross_scan. See mmvim/ops/cross_scan.py.
#pragma once

#include "../common/glue.h"

namespace mmvim {
namespace cross {

struct Sizes {
  int64_t b, h, w, d, k, n;
  int64_t rank;  // 0: delta has a column for each channel

  int64_t length() const { return h * w; }
  bool empty() const { return b * h * w * d == 0; }
};

inline Sizes check_inputs(const Tensor& x, const Tensor& delta, const OptTensor& weight,
                          const Tensor& A, const Tensor& B, const Tensor& C, const OptTensor& D,
                          const OptTensor& delta_bias, at::IntArrayRef routes) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be (b, h, w, d), got shape ", x.sizes());
  const auto type = x.scalar_type(), compute = compute_type(type);
  dtype_of(type, "x");
  Sizes s{x.size(0), x.size(1), x.size(2), x.size(3), static_cast<int64_t>(routes.size()), 0, 0};
  TORCH_CHECK_VALUE(s.k >= 1, "routes must not be empty");
  for (const int64_t route : routes) {
    TORCH_CHECK_VALUE(route >= 0 && route < 4, "routes are 0 to 3, got ", route);
  }
  TORCH_CHECK_VALUE(A.dim() == 3 && A.size(2) >= 1 && A.size(2) <= 256,
                    "A must be (k, d, n) with n of 1 to 256, got shape ", A.sizes());
  s.n = A.size(2);
  const at::Device device = x.device();
  if (weight.has_value()) {
    TORCH_CHECK_VALUE(weight->dim() == 3 && weight->size(2) > 0,
                      "delta_weight must be (k, d, r) with r > 0, got shape ", weight->sizes());
    s.rank = weight->size(2);
    check_either(*weight, "delta_weight", {s.k, s.d, s.rank}, type, device);
  }
  check(x, "x", x.sizes(), type, device);
  check(delta, "delta", {s.b, s.h, s.w, s.k, s.rank > 0 ? s.rank : s.d}, type, device);
  check(A, "A", {s.k, s.d, s.n}, compute, device);
  check(B, "B", {s.b, s.h, s.w, s.k, s.n}, type, device);
  check(C, "C", {s.b, s.h, s.w, s.k, s.n}, type, device);
  check(D, "D", {s.k, s.d}, compute, device);
  check(delta_bias, "delta_bias", {s.k, s.d}, compute, device);
  return s;
}

// Whether one step leads from position to position of (b, h, w, ...), and which.
inline bool has_positions(const Tensor& t) {
  return t.size(1) <= 1 || t.size(2) <= 1 || t.stride(1) == t.size(2) * t.stride(2);
}
inline int64_t step_of(const Tensor& t) { return t.size(2) > 1 ? t.stride(2) : t.stride(1); }

}  // namespace cross
}  // namespace mmvim
