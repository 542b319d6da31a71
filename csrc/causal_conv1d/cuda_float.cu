#include "cuda_kernels.cuh"

namespace mmvim {
namespace conv {

template <>
int launch_forward<DType::kFloat>(const Forward& p, cudaStream_t stream) {
  return forward_launch<float>(p, stream);
}

template <>
int launch_backward<DType::kFloat>(const Backward& p, cudaStream_t stream) {
  return backward_launch<float>(p, stream);
}

}  // namespace conv
}  // namespace mmvim
