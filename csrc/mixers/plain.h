// The state of dispatch in which the functions of a mixer run.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <optional>

namespace mmvim {
namespace mixers {

// No autograd and no autocast inside: everything has its dtype.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  c10::OptionalDeviceGuard device;

  explicit Plain(const at::Tensor& t) : device(t.device()) {}
};

// Refuses what has a tangent (forward-mode differentiation), which would be lost.
inline void check_no_tangent(const std::optional<at::Tensor>& t) {
  TORCH_CHECK_NOT_IMPLEMENTED(!t.has_value() || !t->_fw_grad(/*level=*/0).defined(),
                              "mmvim's fused layers have no forward-mode derivative");
}
template <class Parameters>
void check_no_tangents(const at::Tensor& x, const Parameters& parameters) {
  check_no_tangent(x);
  for (size_t i = 0; i < parameters.size(); ++i) check_no_tangent(parameters.get(i));
}

}  // namespace mixers
}  // namespace mmvim
