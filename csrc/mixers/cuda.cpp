// Registers the mixer for CUDA devices.
#include <torch/library.h>

#include "../common/cuda_glue.h"
#include "../common/direct.h"
#include "mixer.h"
#include "parameters.h"

namespace mmvim {
namespace mixers {
namespace {

void gate(const at::Tensor& z, const at::Tensor& y, const at::Tensor& out,
          const at::Tensor& cleared) {
  Gate p;
  p.z = z.const_data_ptr();
  p.y = y.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.rows = z.size(0) * z.size(1);
  p.channels = z.size(2);
  p.stride = z.stride(1);
  p.vectorized = rows_are_aligned(z) && rows_are_aligned(y);
  if (cleared.defined()) {
    p.cleared = cleared.mutable_data_ptr<float>();
    p.cleared_count = cleared.numel();
  }
  auto* stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch(launch_gate(dtype_of(z, "z"), p, stream), "mixer_backward");
}

const bool known = [] {
  direct::cuda.gate = gate;
  direct::cuda.convert = [](const Segments& segments, bool is_double) {
    TORCH_CHECK(!is_double, "mmvim::mixer has no CUDA kernels for float64");
    check_launch(launch_convert_segments(segments, c10::cuda::getCurrentCUDAStream().stream()),
                 "mixer");
  };
  return true;
}();

}  // namespace

TORCH_LIBRARY_IMPL(mmvim, CUDA, m) {
  m.impl("mixer", forward);
  m.impl("mixer_backward", backward);
}

}  // namespace mixers
}  // namespace mmvim
