// Matrix products of ATen.
#include "products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "../common/scratch.h"

namespace mmvim {
namespace mixers {
Tensor linear(const Tensor& x, const Tensor& w, const Tensor& bias, bool is_kept) {
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

// One after the other: cuBLAS has much slower kernels for batches of these shapes.
void add_products(const Tensor& sum, const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < sum.size(0); ++i) at_index(sum, i).addmm_(at_index(a, i), at_index(b, i));
}

}  // namespace mixers
}  // namespace mmvim
