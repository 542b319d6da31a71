#include "cuda_forward.cuh"

namespace mmvim {
namespace cross {

template <>
int launch_forward<DType::kHalf>(Discretization method, const Forward& p, CUstream_st* stream) {
  return launch_forward_of<__half>(method, p, stream);
}

template <>
int launch_local<DType::kHalf>(Discretization method, const Forward& p, CUstream_st* stream) {
  return launch_local_of<__half>(method, p, stream);
}

template <>
int launch_local<DType::kHalf>(Discretization method, const Backward& p, CUstream_st* stream) {
  return launch_local_of<__half>(method, p, stream);
}

}  // namespace cross
}  // namespace mmvim
