#include "cuda_kernels.cuh"

namespace mmvim {
namespace norm {

template <>
int launch_forward<DType::kBFloat16>(const Forward& p, cudaStream_t stream) {
  return forward_launch<__nv_bfloat16>(p, stream);
}

template <>
int launch_backward<DType::kBFloat16>(const Backward& p, cudaStream_t stream) {
  return backward_launch<__nv_bfloat16>(p, stream);
}

}  // namespace norm
}  // namespace mmvim
