// VMamba's mixer of maps (SS2D) as the body of a residual branch.
#pragma once

#include <string_view>
#include <vector>

#include "mixer.h"

namespace mmvim {
namespace mixers {
namespace ss2d {

constexpr int64_t kCount = 13;  // of parameters

struct Options {
  at::ScalarType type;  // of the matrix products and maps
  at::IntArrayRef routes;
  std::string_view discretization;
  int64_t round_steps;  // of cross_scan_fused
  double eps;           // of the norm behind the scans
  bool gradient;        // whether there will be a backward pass
};

// Of x (batch, height * width, channels). What backward needs goes into `kept`.
at::Tensor forward(const at::Tensor& x, int64_t height, int64_t width, const Parameters& parameters,
                   const Options& options, std::vector<at::Tensor>& kept);

// Gradients of x and the parameters; bit i of `needed` is that of result i.
std::vector<at::Tensor> backward(const at::Tensor& grad, const at::Tensor& x, int64_t height,
                                 int64_t width, const Parameters& parameters,
                                 const Options& options, at::TensorList kept, int64_t needed);

}  // namespace ss2d
}  // namespace mixers
}  // namespace mmvim
