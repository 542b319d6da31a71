// Glue of the CUDA layer norm: checks, allocation, dispatch on the dtype, registration.
#include "cuda.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../common/cuda_glue.h"
#include "../common/direct.h"

namespace mmvim {
namespace layer_norm {
namespace {

auto* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// Four columns at a time are read as one word.
Tensor aligned(const Tensor& t) {
  Tensor c = t.contiguous();
  return reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 == 0 ? c : c.clone();
}

// `x`, `weight` and `bias` are aligned.
Norm norm_of(const Tensor& x, const Tensor& weight, const Tensor& bias, at::ScalarType type) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_cuda(), "x must be (..., d) on a CUDA device, got ",
                    x.sizes(), " on ", x.device());
  const int64_t columns = x.size(-1);
  TORCH_CHECK_VALUE(columns > 0 && columns % 4 == 0 && columns <= kMostColumns,
                    "x must have a multiple of 4 columns up to ", kMostColumns, ", got ", columns);
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                   "the result must be float32, bfloat16 or float16, got ", type);
  Norm p;
  p.x_type = dtype_of(x, "x");
  TORCH_CHECK_TYPE(p.x_type == DType::kFloat || type == at::kFloat || x.scalar_type() == type,
                   "x must be float32 or ", type, ", got ", x.scalar_type());
  check(weight, "weight", {columns}, at::kFloat, x.device());
  check(bias, "bias", {columns}, at::kFloat, x.device());
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr<float>();
  p.bias = bias.const_data_ptr<float>();
  p.rows = x.numel() / columns;
  p.columns = static_cast<int>(columns);
  return p;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_in, const Tensor& weight_in,
                                   const Tensor& bias_in, double eps, at::ScalarType type,
                                   bool keep_statistics) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor x = aligned(x_in), weight = aligned(weight_in), bias = aligned(bias_in);
  Norm p = norm_of(x, weight, bias, type);
  Tensor out = at::empty(x.sizes(), x.options().dtype(type));
  Tensor statistics = at::empty({keep_statistics ? p.rows : 0, 2}, x.options().dtype(at::kFloat));
  if (p.rows == 0) return {out, statistics};
  p.eps = static_cast<float>(eps);
  p.out = out.mutable_data_ptr();
  if (keep_statistics) p.statistics = statistics.mutable_data_ptr<float>();
  const auto run = [&](auto t) { return launch_forward<t.value>(p, current_stream()); };
  check_launch(by_dtype(dtype_of(type, "the result"), run), "layer_norm");
  return {out, statistics};
}

// The norm of x + added, and this sum.
std::tuple<Tensor, Tensor> add_forward(const Tensor& x_in, const Tensor& added_in,
                                       const Tensor& weight_in, const Tensor& bias_in, double eps) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor x = aligned(x_in), added = aligned(added_in), weight = aligned(weight_in),
               bias = aligned(bias_in);
  const auto type = added.scalar_type();
  check(x, "x", added.sizes(), at::kFloat, added.device());
  TORCH_CHECK_TYPE(type == at::kBFloat16 || type == at::kHalf,
                   "added must be bfloat16 or float16, got ", type);
  Norm p = norm_of(x, weight, bias, type);
  Tensor out = at::empty(x.sizes(), added.options()), sum = at::empty(x.sizes(), x.options());
  if (p.rows == 0) return {out, sum};
  p.eps = static_cast<float>(eps);
  p.out = out.mutable_data_ptr();
  p.added = added.const_data_ptr();
  p.sum = sum.mutable_data_ptr();
  const auto run = [&](auto t) { return launch_forward<t.value>(p, current_stream()); };
  check_launch(by_dtype(dtype_of(type, "added"), run), "add_layer_norm");
  return {out, sum};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_in, const Tensor& x_in,
                                            const Tensor& weight_in, const Tensor& statistics_in,
                                            const OptTensor& grad_input_in) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor grad = aligned(grad_in), x = aligned(x_in), weight = aligned(weight_in),
               statistics = aligned(statistics_in);
  Norm p = norm_of(x, weight, weight, grad.scalar_type());
  check(grad, "grad", x.sizes(), grad.scalar_type(), x.device());
  check(statistics, "statistics", {p.rows, 2}, at::kFloat, x.device());
  Tensor dx = at::empty(x.sizes(), x.options());
  Tensor parameters = at::empty({2, p.columns}, weight.options());
  Tensor dweight = parameters.select(0, 0), dbias = parameters.select(0, 1);
  Tensor grad_input;
  if (grad_input_in.has_value()) {
    check(*grad_input_in, "grad_input", x.sizes(), x.scalar_type(), x.device());
    grad_input = aligned(*grad_input_in);
    p.grad_input = grad_input.const_data_ptr();
  }
  if (p.rows == 0) return {dx, dweight.zero_(), dbias.zero_()};
  p.slots = static_cast<int>(
      std::min<int64_t>((p.rows + 3) / 4, 12 * static_cast<int64_t>(multiprocessor_count())));
  Tensor partial = at::empty({p.slots, 2, p.columns}, weight.options());
  p.statistics = const_cast<float*>(statistics.const_data_ptr<float>());
  p.grad = grad.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.partial = partial.mutable_data_ptr<float>();
  p.parameters = parameters.mutable_data_ptr<float>();
  const auto run = [&](auto t) { return launch_backward<t.value>(p, current_stream()); };
  check_launch(by_dtype(dtype_of(grad, "grad"), run), "layer_norm_backward");
  return {dx, dweight, dbias};
}

const bool known = [] {
  direct::cuda.layer_norm = forward;
  direct::cuda.add_layer_norm = add_forward;
  direct::cuda.layer_norm_backward = backward;
  return true;
}();

}  // namespace

TORCH_LIBRARY_IMPL(mmvim, CUDA, m) {
  m.impl("layer_norm", forward);
  m.impl("layer_norm_backward", backward);
}

}  // namespace layer_norm
}  // namespace mmvim
