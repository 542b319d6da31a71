// Element types and strided views, as plain data: what the glue hands to the kernels.
#pragma once

#include <cstdint>

namespace mmvim {

enum class DType : int { kFloat = 0, kDouble, kBFloat16, kHalf };

template <class S>
constexpr DType kDType = sizeof(S) == 8 ? DType::kDouble : DType::kFloat;

constexpr int64_t element_size(DType t) {
  return t == DType::kDouble ? 8 : t == DType::kFloat ? 4 : 2;
}

// A (batch, length, channels) tensor; strides in elements. data == nullptr: absent.
struct View {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t stride_b = 0, stride_l = 0, stride_d = 0;

  const void* at(int64_t b, int64_t t, int64_t c) const {
    return static_cast<const char*>(data) +
           (b * stride_b + t * stride_l + c * stride_d) * element_size(dtype);
  }
};

// A (batch, length, channels) output: neighbouring channels, and rows at equal distances.
struct Output {
  void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t length = 0, pitch = 0;

  void* at(int64_t b, int64_t t, int64_t c) const {
    return static_cast<char*>(data) + ((b * length + t) * pitch + c) * element_size(dtype);
  }
};

}  // namespace mmvim
