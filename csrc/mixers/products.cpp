// Matrix products of ATen: cuBLAS on GPUs. On a CPU they are MKL's, which keeps AVX-512 to Intel's
// processors: elsewhere oneDNN multiplies float matrices twice as fast.
#include "products.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <optional>
#include <string_view>

#include "../common/isa.h"
#include "../common/scratch.h"

namespace mmvim {
namespace mixers {
namespace {

using OneDnnLinear = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                            std::string_view, c10::List<std::optional<at::Scalar>>,
                            std::optional<std::string_view>);

// oneDNN's x w' + bias, where it is the faster one.
std::optional<c10::TypedOperatorHandle<OneDnnLinear>> find_onednn() {
#if defined(MMVIM_BUILD_X86) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  if (cpu_isa() != Isa::kAvx512 || __builtin_cpu_is("intel")) return {};
  const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (found.has_value()) return found->typed<OneDnnLinear>();
#endif
  return {};
}

// Undefined where oneDNN is not to be used. Smaller products spend their time elsewhere.
Tensor by_onednn(const Tensor& x, const Tensor& w, const Tensor& bias) {
  constexpr int64_t kLeastRows = 8, kLeastColumns = 16, kLeastDepth = 64;
  if (x.is_cuda() || x.scalar_type() != at::kFloat || x.size(-1) < kLeastDepth ||
      w.size(0) < kLeastColumns || x.numel() < kLeastRows * x.size(-1) ||
      !at::globalContext().userEnabledMkldnn()) {
    return {};
  }
  static const auto found = find_onednn();
  if (!found.has_value()) return {};
  return found->call(x, w, bias.defined() ? std::optional<Tensor>(bias) : std::nullopt, "none",
                     c10::List<std::optional<at::Scalar>>(), "");
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& w, const Tensor& bias, bool is_kept) {
  const Tensor found = by_onednn(x, w, bias);
  if (found.defined()) return found;
  const int64_t sizes[] = {x.size(0), x.size(1), w.size(0)};
  const Tensor out = is_kept ? at::empty(sizes, x.options()) : Scratch::empty(sizes, x.options());
  Tensor out_rows = rows(out);
  if (bias.defined()) {
    at::addmm_out(out_rows, bias, rows(x), transposed(w));
  } else {
    at::mm_out(out_rows, rows(x), transposed(w));
  }
  return out;
}

void product(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (b.stride(0) == 1 && a.stride(1) == 1) {
    const Tensor found = by_onednn(a, transposed(b), {});
    if (found.defined()) {
      out.copy_(found);
      return;
    }
  }
  at::mm_out(const_cast<Tensor&>(out), a, b);
}

void products(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (out.is_cuda() && out.size(0) > 1) {
    at::bmm_out(const_cast<Tensor&>(out), a, b);
  } else {
    for (int64_t i = 0; i < out.size(0); ++i) {
      product(at_index(out, i), at_index(a, i), at_index(b, i));
    }
  }
}

bool are_batched(const Tensor& stack) {
  constexpr int64_t kFewRows = 2048;
  return stack.is_cuda() && stack.size(0) > 1 && stack.size(1) <= kFewRows;
}

void add_products(const Tensor& sum, const Tensor& a, const Tensor& b) {
  if (are_batched(sum)) {
    sum.baddbmm_(a, b);
    return;
  }
  for (int64_t i = 0; i < sum.size(0); ++i) at_index(sum, i).addmm_(at_index(a, i), at_index(b, i));
}

}  // namespace mixers
}  // namespace mmvim
