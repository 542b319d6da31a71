#include "cuda_backward_launch.cuh"

namespace mmvim {
namespace scan {

template <>
int launch_backward<DType::kHalf>(Discretization method, const Plan& plan, const Backward& p,
                                  CUstream_st* stream) {
  return launch_backward_of<__half>(method, plan, p, stream);
}

}  // namespace scan
}  // namespace mmvim
