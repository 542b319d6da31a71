#include "cuda_backward.cuh"

namespace mmvim {
namespace cross {

template <>
int launch_backward<DType::kHalf>(Discretization method, const Backward& p, CUstream_st* stream) {
  return launch_backward_of<__half>(method, p, stream);
}

template <>
int launch_finish<DType::kHalf>(const Finish& p, CUstream_st* stream) {
  return launch_finish_of<__half>(p, stream);
}

template <>
int launch_expand<DType::kHalf>(const Expand& p, CUstream_st* stream) {
  return launch_expand_of<__half>(p, stream);
}

}  // namespace cross
}  // namespace mmvim
