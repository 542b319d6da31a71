#include "cuda_forward.cuh"

namespace mmvim {
namespace cross {

template <>
int launch_forward<DType::kFloat>(Discretization method, const Forward& p, CUstream_st* stream) {
  return launch_forward_of<float>(method, p, stream);
}

template <>
int launch_local<DType::kFloat>(Discretization method, const Forward& p, CUstream_st* stream) {
  return launch_local_of<float>(method, p, stream);
}

template <>
int launch_local<DType::kFloat>(Discretization method, const Backward& p, CUstream_st* stream) {
  return launch_local_of<float>(method, p, stream);
}

}  // namespace cross
}  // namespace mmvim
