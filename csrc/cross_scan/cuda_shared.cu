#include "cuda_common.cuh"

namespace mmvim {
namespace cross {

int64_t shared_bytes(const Problem& p, Discretization method, bool backward) {
  const bool keeps_dA = backward && !is_one(method, p.states);
  return int64_t{4} * Layout(p, backward ? kBackwardPlanes : kForwardPlanes, keeps_dA).total;
}

}  // namespace cross
}  // namespace mmvim
