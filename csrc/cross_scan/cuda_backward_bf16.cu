#include "cuda_backward.cuh"

namespace mmvim {
namespace cross {

template <>
int launch_backward<DType::kBFloat16>(Discretization method, const Backward& p,
                                      CUstream_st* stream) {
  return launch_backward_of<__nv_bfloat16>(method, p, stream);
}

template <>
int launch_finish<DType::kBFloat16>(const Finish& p, CUstream_st* stream) {
  return launch_finish_of<__nv_bfloat16>(p, stream);
}

template <>
int launch_expand<DType::kBFloat16>(const Expand& p, CUstream_st* stream) {
  return launch_expand_of<__nv_bfloat16>(p, stream);
}

}  // namespace cross
}  // namespace mmvim
