// Registers the CPU kernels of add_rms_norm.
#include <torch/library.h>

#include <tuple>

#include "../common/cpu_glue.h"
#include "../common/direct.h"
#include "cpu_kernels.h"

namespace mmvim {
namespace norm {
namespace {

// (..., d) as (1, rows, d).
struct Lines {
  Tensor tensor;

  explicit Lines(const Tensor& t)
      : tensor(t.contiguous().view({1, t.numel() / std::max<int64_t>(t.size(-1), 1), t.size(-1)})) {
  }
};

Output lines_output(const Tensor& t, int64_t rows) {
  Output o;
  o.data = t.mutable_data_ptr();
  o.dtype = dtype_of(t.scalar_type(), "output");
  o.length = rows;
  o.pitch = t.size(-1);
  return o;
}

void check_x(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) > 0, name,
                    " must have a last dimension that is not empty, got shape ", x.sizes());
  dtype_of(x.scalar_type(), name);
  check(x, name, x.sizes(), x.scalar_type(), at::kCPU);
}

// One factor for each entry of the first dimension.
OptTensor factors(const OptTensor& keep, const Tensor& x) {
  if (!keep.has_value()) return {};
  check(*keep, "keep", {x.size(0)}, x.scalar_type(), at::kCPU);
  return keep->to(compute_type(x.scalar_type())).contiguous();
}
int64_t rows_of_sample(const Tensor& x) {
  return std::max<int64_t>(x.numel() / std::max<int64_t>(x.size(0) * x.size(-1), 1), 1);
}

Tensor forward_into(const Tensor& x, const OptTensor& residual, const Tensor& weight, double eps,
                    bool residual_in_fp32, const OptTensor& keep, const Tensor& out,
                    const Tensor& rstd) {
  check_x(x, "x");
  const auto type = x.scalar_type(), compute = compute_type(type);
  if (residual.has_value()) check_either(*residual, "residual", x.sizes(), type, at::kCPU);
  check_either(weight, "weight", {x.size(-1)}, type, at::kCPU);
  const Lines lines(x);
  const OptTensor other = residual.has_value() ? OptTensor(Lines(*residual).tensor) : OptTensor();
  const Tensor w = weight.to(compute).contiguous();
  const auto residual_type = residual_in_fp32       ? compute
                             : residual.has_value() ? residual->scalar_type()
                                                    : type;
  Tensor residual_out = empty(x.sizes(), residual_type);
  NormForwardArgs a;
  a.rows = lines.tensor.size(1);
  a.channels = x.size(-1);
  a.eps = eps;
  a.x = view(lines.tensor);
  const OptTensor shares = factors(keep, x);
  a.keep = data(shares);
  a.sample = rows_of_sample(x);
  a.residual = view(other);
  a.weight = w.const_data_ptr();
  a.out = lines_output(out, a.rows);
  a.residual_out = lines_output(residual_out, a.rows);
  a.rstd = rstd.mutable_data_ptr();
  MMVIM_PER_ISA(norm_forward)(a, compute == at::kDouble);
  return residual_out;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const OptTensor& residual,
                                           const Tensor& weight, double eps,
                                           bool residual_in_fp32) {
  check_x(x, "x");
  const Tensor out = empty_like(x);
  const Tensor rstd = empty(x.sizes().slice(0, x.dim() - 1), compute_type(x.scalar_type()));
  const Tensor total = forward_into(x, residual, weight, eps, residual_in_fp32, {}, out, rstd);
  return {out, total, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward_kept(
    const Tensor& grad_out, const OptTensor& grad_residual_out, const Tensor& residual_out,
    const Tensor& weight, const Tensor& rstd, bool has_residual, at::ScalarType x_dtype,
    at::ScalarType residual_dtype, const OptTensor& keep) {
  check_x(residual_out, "residual_out");
  const auto compute = compute_type(x_dtype);
  const at::IntArrayRef sizes = residual_out.sizes();
  check_either(residual_out, "residual_out", sizes, x_dtype, at::kCPU);
  check(grad_out, "grad_out", sizes, x_dtype, at::kCPU);
  check(grad_residual_out, "grad_residual_out", sizes, residual_out.scalar_type(), at::kCPU);
  check_either(weight, "weight", {sizes.back()}, x_dtype, at::kCPU);
  check(rstd, "rstd", sizes.slice(0, sizes.size() - 1), compute, at::kCPU);
  dtype_of(residual_dtype, "residual");
  TORCH_CHECK_VALUE(residual_dtype == x_dtype || residual_dtype == compute,
                    "residual_dtype must be ", x_dtype, " or ", compute, ", got ", residual_dtype);
  const Lines grad(grad_out), r(residual_out);
  const OptTensor grad_r =
      grad_residual_out.has_value() ? OptTensor(Lines(*grad_residual_out).tensor) : OptTensor();
  const Tensor w = weight.to(compute).contiguous(), inverse = rstd.contiguous();
  Tensor dx = empty(sizes, x_dtype), dweight = empty(weight.sizes(), compute);
  Tensor dresidual = has_residual ? empty(sizes, residual_dtype) : empty({0}, compute);
  NormBackwardArgs a;
  a.rows = r.tensor.size(1);
  a.channels = sizes.back();
  a.grad_out = view(grad.tensor);
  const OptTensor shares = factors(keep, grad_out);
  a.keep = data(shares);
  a.sample = rows_of_sample(grad_out);
  a.grad_residual_out = view(grad_r);
  a.residual_out = view(r.tensor);
  a.weight = w.const_data_ptr();
  a.rstd = inverse.const_data_ptr();
  a.dx = lines_output(dx, a.rows);
  if (has_residual) a.dresidual = lines_output(dresidual, a.rows);
  a.dweight = dweight.mutable_data_ptr();
  MMVIM_PER_ISA(norm_backward)(a, compute == at::kDouble);
  return {dx, dresidual, dweight.to(weight.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out,
                                            const OptTensor& grad_residual_out,
                                            const Tensor& residual_out, const Tensor& weight,
                                            const Tensor& rstd, bool has_residual,
                                            at::ScalarType x_dtype, at::ScalarType residual_dtype) {
  return backward_kept(grad_out, grad_residual_out, residual_out, weight, rstd, has_residual,
                       x_dtype, residual_dtype, {});
}

const bool known = [] {
  direct::cpu.norm = forward_into;
  direct::cpu.norm_backward = backward_kept;
  return true;
}();

}  // namespace

TORCH_LIBRARY_IMPL(mmvim, CPU, m) {
  m.impl("add_rms_norm", forward);
  m.impl("add_rms_norm_backward", backward);
}

}  // namespace norm
}  // namespace mmvim
