// Glue of the CUDA add_rms_norm: checks, allocation, dispatch on the dtype, registration.

#include "cuda.h"

#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../common/cuda_glue.h"
#include "../common/direct.h"
#include "../common/scratch.h"

namespace mmvim {
namespace norm {
namespace {

// Four columns at a time are read as one word.
Tensor aligned(const Tensor& t) {
  Tensor c = t.contiguous();
  return reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 == 0 ? c : c.clone();
}

DType float_or(DType own, at::ScalarType type, const char* name, at::ScalarType own_type) {
  TORCH_CHECK_TYPE(type == at::kFloat || type == own_type, name, " must be float32 or ", own_type,
                   ", got ", type);
  return type == at::kFloat ? DType::kFloat : own;
}

auto* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

void launch(DType dtype, const Forward& p) {
  const auto run = [&](auto type) { return launch_forward<type.value>(p, current_stream()); };
  check_launch(by_dtype(dtype, run), "add_rms_norm");
}
void launch(DType dtype, const Backward& p) {
  const auto run = [&](auto type) { return launch_backward<type.value>(p, current_stream()); };
  check_launch(by_dtype(dtype, run), "add_rms_norm_backward");
}

Tensor checked_weight(const Tensor& weight, const Tensor& x) {
  check_either(weight, "weight", {x.size(-1)}, x.scalar_type(), x.device());
  return aligned(weight.to(at::kFloat));
}

// One factor for each entry of the first dimension.
const void* factors(const OptTensor& keep, const Tensor& x) {
  if (!keep.has_value()) return nullptr;
  check(*keep, "keep", {x.size(0)}, x.scalar_type(), x.device());
  TORCH_CHECK_VALUE(keep->is_contiguous(), "keep must be contiguous");
  return keep->const_data_ptr();
}
int64_t rows_of_sample(const Tensor& x) {
  return std::max<int64_t>(x.numel() / std::max<int64_t>(x.size(0) * x.size(-1), 1), 1);
}

Tensor forward_into(const Tensor& x_in, const OptTensor& residual_in, const Tensor& weight_in,
                    double eps, bool residual_in_fp32, const OptTensor& keep, const Tensor& out,
                    const Tensor& rstd) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const DType dtype = dtype_of(x_in, "x");
  const Tensor x = aligned(x_in), weight = checked_weight(weight_in, x);
  Tensor residual;
  Forward p;
  at::ScalarType residual_type = x.scalar_type();
  if (residual_in.has_value()) {
    check_either(*residual_in, "residual", x.sizes(), x.scalar_type(), x.device());
    residual = aligned(*residual_in);
    residual_type = residual.scalar_type();
    p.residual = residual.const_data_ptr();
    p.residual_type = float_or(dtype, residual_type, "residual", x.scalar_type());
  }
  const auto out_type = residual_in_fp32 ? at::kFloat : residual_type;
  Tensor residual_out = at::empty(x.sizes(), x.options().dtype(out_type));
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr<float>();
  p.out = out.mutable_data_ptr();
  p.residual_out = residual_out.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr<float>();
  p.residual_out_type = float_or(dtype, out_type, "residual", x.scalar_type());
  p.rows = rstd.numel();
  p.columns = x.size(-1);
  p.eps = static_cast<float>(eps);
  p.keep = factors(keep, x);
  p.sample = rows_of_sample(x);
  launch(dtype, p);
  return residual_out;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const OptTensor& residual,
                                           const Tensor& weight, double eps,
                                           bool residual_in_fp32) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_cuda(), "x must be (..., d) on a CUDA device, got ",
                    x.sizes(), " on ", x.device());
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor out = at::empty(x.sizes(), x.options());
  const Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  const Tensor total = forward_into(x, residual, weight, eps, residual_in_fp32, {}, out, rstd);
  return {out, total, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward_kept(
    const Tensor& grad_out, const OptTensor& grad_residual_out, const Tensor& residual_out_in,
    const Tensor& weight_in, const Tensor& rstd_in, bool has_residual, at::ScalarType x_type,
    at::ScalarType residual_type, const OptTensor& keep) {
  const c10::cuda::CUDAGuard guard(residual_out_in.device());
  check(grad_out, "grad_out", residual_out_in.sizes(), x_type, residual_out_in.device());
  const DType dtype = dtype_of(grad_out, "grad_out");
  const Tensor grad = aligned(grad_out), residual_out = aligned(residual_out_in),
               weight = checked_weight(weight_in, residual_out),
               rstd = rstd_in.to(at::kFloat).contiguous();
  check(rstd, "rstd", residual_out.sizes().slice(0, residual_out.dim() - 1), at::kFloat,
        grad.device());
  Backward p;
  Tensor grad_residual;
  if (grad_residual_out.has_value()) {
    check(*grad_residual_out, "grad_residual_out", residual_out.sizes(), residual_out.scalar_type(),
          residual_out.device());
    grad_residual = aligned(*grad_residual_out);
    p.grad_residual = grad_residual.const_data_ptr();
  }
  const auto options = residual_out.options();
  Tensor dx = at::empty(residual_out.sizes(), options.dtype(x_type));
  Tensor dresidual = has_residual ? at::empty(residual_out.sizes(), options.dtype(residual_type))
                                  : at::empty({0}, options.dtype(at::kFloat));
  if (has_residual) {
    p.dresidual = dresidual.mutable_data_ptr();
    p.residual_type = float_or(dtype, residual_type, "residual", x_type);
  }
  p.residual_out_type = float_or(dtype, residual_out.scalar_type(), "residual_out", x_type);
  p.grad_out = grad.const_data_ptr();
  p.residual_out = residual_out.const_data_ptr();
  p.weight = weight.const_data_ptr<float>();
  p.rstd = rstd.const_data_ptr<float>();
  p.dx = dx.mutable_data_ptr();
  p.rows = rstd.numel();
  p.columns = residual_out.size(-1);
  const int64_t most = 4 * static_cast<int64_t>(multiprocessor_count());
  p.slots = std::max<int64_t>(std::min<int64_t>((p.rows + 3) / 4, most), 1);
  // A block's sums for the weight lie in shared memory.
  TORCH_CHECK(p.columns <= 12288, "add_rms_norm_backward takes at most 12288 columns on CUDA, got ",
              p.columns);
  Tensor partial = Scratch::empty({p.slots, p.columns}, options.dtype(at::kFloat));
  Tensor dweight = at::empty(weight_in.sizes(), options.dtype(at::kFloat));
  p.partial = partial.mutable_data_ptr<float>();
  p.dweight = dweight.mutable_data_ptr<float>();
  p.keep = factors(keep, grad);
  p.sample = rows_of_sample(grad);
  launch(dtype, p);
  return {dx, dresidual, dweight.to(weight_in.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out,
                                            const OptTensor& grad_residual_out,
                                            const Tensor& residual_out, const Tensor& weight,
                                            const Tensor& rstd, bool has_residual,
                                            at::ScalarType x_type, at::ScalarType residual_type) {
  return backward_kept(grad_out, grad_residual_out, residual_out, weight, rstd, has_residual,
                       x_type, residual_type, {});
}

const bool known = [] {
  direct::cuda.norm = forward_into;
  direct::cuda.norm_backward = backward_kept;
  return true;
}();

}  // namespace

TORCH_LIBRARY_IMPL(mmvim, CUDA, m) {
  m.impl("add_rms_norm", forward);
  m.impl("add_rms_norm_backward", backward);
}

}  // namespace norm
}  // namespace mmvim
