// Registers the mixer for the CPU.
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include "../common/direct.h"
#include "mixer.h"
#include "parameters.h"

namespace mmvim {
namespace mixers {
namespace {

const bool known = [] {
  direct::cpu.convert = [](const Segments& segments, bool is_double) {
    MMVIM_PER_ISA(convert_segments)(segments, is_double);
  };
  direct::cpu.gate = [](const at::Tensor& z, const at::Tensor& y, const at::Tensor& out,
                        const at::Tensor& cleared) {
    at::Tensor result = out;
    at::silu_out(result, z).mul_(y);
    if (cleared.defined()) cleared.zero_();
  };
  return true;
}();

}  // namespace

TORCH_LIBRARY_IMPL(mmvim, CPU, m) {
  m.impl("mixer", forward);
  m.impl("mixer_backward", backward);
}

}  // namespace mixers
}  // namespace mmvim
