#include "cuda_backward.cuh"

namespace mmvim {
namespace cross {

template <>
int launch_backward<DType::kFloat>(Discretization method, const Backward& p, CUstream_st* stream) {
  return launch_backward_of<float>(method, p, stream);
}

template <>
int launch_finish<DType::kFloat>(const Finish& p, CUstream_st* stream) {
  return launch_finish_of<float>(p, stream);
}

template <>
int launch_expand<DType::kFloat>(const Expand& p, CUstream_st* stream) {
  return launch_expand_of<float>(p, stream);
}

}  // namespace cross
}  // namespace mmvim
