#include "cuda_one.cuh"

namespace mmvim {
namespace cross {

int64_t shared_bytes(const Problem& p, bool backward) {
  const int planes = backward ? kBackwardPlanes : kForwardPlanes;
  if (!p.one) return int64_t{4} * Layout(p, planes, backward).total;
  const int weights = p.element == 2 ? weights_of<__half>(p.rank) : weights_of<float>(p.rank);
  return int64_t{4} * OneLayout(p, planes, weights).total;
}

}  // namespace cross
}  // namespace mmvim
