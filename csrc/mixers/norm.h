// The layer norm inside a branch: the kernels of ../layer_norm where they cover it, else ATen's.
#pragma once

#include <ATen/ops/add.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>

#include <tuple>

#include "../common/direct.h"
#include "../common/glue.h"
#include "../layer_norm/cuda.h"

namespace mmvim {
namespace mixers {

inline Tensor as(const Tensor& t, at::ScalarType type) {
  return t.scalar_type() == type ? t : t.to(type);
}

// The norm, and what its backward pass needs.
struct Norm {
  Tensor out, first, second;  // mean and 1 / deviation, or both in the first
};

// Of the last dimension of a contiguous tensor; parameters have the dtype of the arithmetic.
class LayerNorm {
 public:
  LayerNorm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
            at::ScalarType type)
      : x_(x), weight_(weight), bias_(bias), eps_(eps), type_(type) {
    const auto wide = weight.scalar_type();
    has_kernel_ = x.is_cuda() && direct::cuda.layer_norm != nullptr && wide != type &&
                  (x.scalar_type() == wide || x.scalar_type() == type) && x.size(-1) % 4 == 0 &&
                  x.size(-1) <= layer_norm::kMostColumns;
  }

  Norm forward(bool gradient) const {
    if (has_kernel_) {
      auto [out, statistics] = direct::cuda.layer_norm(x_, weight_, bias_, eps_, type_, gradient);
      return {out, statistics, {}};
    }
    auto [out, mean, deviation] =
        at::native_layer_norm(input(), {x_.size(-1)}, weight_, bias_, eps_);
    return {as(out, type_), mean, deviation};
  }

  // Of x + added, without a backward pass, and this sum.
  std::tuple<Tensor, Tensor> forward(const Tensor& added) const {
    if (has_kernel_ && x_.scalar_type() != type_ && added.scalar_type() == type_) {
      return direct::cuda.add_layer_norm(x_, added, weight_, bias_, eps_);
    }
    const Tensor sum = at::add(x_, added);
    return {LayerNorm(sum, weight_, bias_, eps_, type_).forward(false).out, sum};
  }

  // Gradients of x, the weight and the bias. That of x is added to `other`, if there is one.
  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Norm& n,
                                              const Tensor& other = {}) const {
    if (has_kernel_) {
      const bool inside = other.defined() && other.scalar_type() == x_.scalar_type();
      auto grads = direct::cuda.layer_norm_backward(grad, x_, weight_, n.first,
                                                    inside ? OptTensor(other) : OptTensor());
      if (other.defined() && !inside) std::get<0>(grads) = at::add(other, std::get<0>(grads));
      return grads;
    }
    const Tensor given = input();
    auto grads =
        at::native_layer_norm_backward(as(grad, given.scalar_type()), given, {x_.size(-1)}, n.first,
                                       n.second, weight_, bias_, {true, true, true});
    Tensor& dx = std::get<0>(grads);
    dx = as(dx, x_.scalar_type());
    if (other.defined()) {
      dx = dx.scalar_type() == other.scalar_type() ? dx.add_(other) : at::add(other, dx);
    }
    return grads;
  }

 private:
  // Torch's kernels for GPUs want the dtype of the weight.
  Tensor input() const { return x_.is_cuda() ? as(x_, weight_.scalar_type()) : x_; }

  const Tensor &x_, &weight_, &bias_;
  double eps_;
  at::ScalarType type_;
  bool has_kernel_;
};

}  // namespace mixers
}  // namespace mmvim
