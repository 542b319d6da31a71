// Conversions that are collected, and then made at once.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../common/direct.h"
#include "../common/glue.h"
#include "parameters.h"

namespace mmvim {
namespace mixers {

class Conversions {
 public:
  explicit Conversions(at::ScalarType wide) : is_double_(wide == at::kDouble) {}

  void add(const Tensor& from, const Tensor& to, Conversion conversion = Conversion::kScale,
           double scale = 1, const Tensor& factor = {}) {
    keep_.push_back(from.contiguous());
    Segment& s = segments_.segment[segments_.count++];
    s.from = keep_.back().const_data_ptr();
    s.from_type = dtype_of(from.scalar_type(), "a parameter");
    s.to = to.mutable_data_ptr();
    s.to_type = dtype_of(to.scalar_type(), "a parameter");
    s.count = from.numel();
    s.conversion = conversion;
    s.scale = static_cast<float>(scale);
    if (factor.defined()) s.factor = factor.const_data_ptr();
  }
  void clear(const Tensor& floats) { add(floats, floats, Conversion::kClear); }
  void run(const Tensor& device_of) const {
    if (segments_.count > 0) direct::of(device_of).convert(segments_, is_double_);
  }

 private:
  bool is_double_;
  Segments segments_;
  std::vector<Tensor> keep_;
};

}  // namespace mixers
}  // namespace mmvim
