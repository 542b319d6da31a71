#include "cuda_backward_launch.cuh"

namespace mmvim {
namespace scan {

template <>
int launch_backward<DType::kBFloat16>(Discretization method, const Plan& plan, const Backward& p,
                                      CUstream_st* stream) {
  return launch_backward_of<__nv_bfloat16>(method, plan, p, stream);
}

}  // namespace scan
}  // namespace mmvim
