// The state of dispatch in which the functions of a mixer run.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

namespace mmvim {
namespace mixers {

// No autograd and no autocast inside: everything has its dtype.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  c10::OptionalDeviceGuard device;

  explicit Plain(const at::Tensor& t) : device(t.device()) {}
};

}  // namespace mixers
}  // namespace mmvim
