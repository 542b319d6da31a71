// The mixer for every kind of device whose functions are known (see common/direct.h).
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace mmvim {
namespace mixers {

using Parameters = c10::List<std::optional<at::Tensor>>;

std::tuple<at::Tensor, std::vector<at::Tensor>> forward(
    const at::Tensor& x, const Parameters& parameters, std::string_view kind, bool reverse,
    double scale, double bias_scale, std::string_view discretization, bool recompute,
    int64_t checkpoint_interval);

std::vector<at::Tensor> backward(const at::Tensor& grad_out, const at::Tensor& x,
                                 const Parameters& parameters, at::TensorList kept,
                                 std::string_view kind, bool reverse, double scale,
                                 double bias_scale, std::string_view discretization, bool recompute,
                                 int64_t checkpoint_interval, int64_t needed);

}  // namespace mixers
}  // namespace mmvim
