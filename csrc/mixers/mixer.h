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

using OptTensor = std::optional<at::Tensor>;

// The output, the stream (empty without a norm), and what backward needs.
std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> forward(
    const at::Tensor& x, const OptTensor& residual, const OptTensor& keep,
    const Parameters& parameters, std::string_view kind, bool reverse, double scale,
    double bias_scale, std::string_view discretization, bool recompute, double eps,
    bool residual_in_fp32, int64_t checkpoint_interval);

// `x` is there without a norm, `stream` with one; `residual_type` if there was a residual.
std::vector<at::Tensor> backward(const at::Tensor& grad_out, const OptTensor& grad_stream,
                                 const OptTensor& x, const OptTensor& stream, const OptTensor& keep,
                                 const Parameters& parameters, at::TensorList kept,
                                 std::string_view kind, bool reverse, double scale,
                                 double bias_scale, std::string_view discretization, bool recompute,
                                 double eps, bool residual_in_fp32, int64_t checkpoint_interval,
                                 std::optional<at::ScalarType> residual_type, int64_t needed);

}  // namespace mixers
}  // namespace mmvim
