#include "cuda_forward_launch.cuh"

namespace mmvim {
namespace scan {

template <>
int launch_forward<DType::kFloat>(Discretization method, const Plan& plan, const Forward& p,
                                  CUstream_st* stream) {
  return launch_forward_of<float>(method, plan, p, stream);
}

}  // namespace scan
}  // namespace mmvim
