#include "cuda_kernels.cuh"

namespace mmvim {
namespace norm {

template <>
int launch_forward<DType::kHalf>(const Forward& p, cudaStream_t stream) {
  return forward_launch<__half>(p, stream);
}

template <>
int launch_backward<DType::kHalf>(const Backward& p, cudaStream_t stream) {
  return backward_launch<__half>(p, stream);
}

}  // namespace norm
}  // namespace mmvim
