#include "cuda_backward_launch.cuh"

namespace mmvim {
namespace scan {

template <>
int launch_backward<DType::kFloat>(Discretization method, const Plan& plan, const Backward& p,
                                   CUstream_st* stream) {
  return launch_backward_of<float>(method, plan, p, stream);
}

}  // namespace scan
}  // namespace mmvim
