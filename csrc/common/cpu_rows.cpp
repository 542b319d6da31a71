#include "cpu_rows.h"

namespace mmvim {
namespace MMVIM_ISA {
namespace {

inline float float_from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
inline uint32_t bits_from_float(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

struct BFloat16 {
  static MMVIM_HD float decode(uint16_t h) { return float_from_bits(uint32_t(h) << 16); }
  static MMVIM_HD uint16_t encode(float f) {
    const uint32_t u = bits_from_float(f);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

struct Half {
  static MMVIM_HD float decode(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16;
    const uint32_t exponent = h & 0x7c00u, body = uint32_t(h & 0x7fffu) << 13;
    const uint32_t tiny = bits_from_float(float(int32_t(h & 0x3ffu)) * 0x1p-24f);
    const uint32_t normal = body + (exponent == 0x7c00u ? 0x70000000u : 0x38000000u);
    const uint32_t magnitude = exponent == 0 ? tiny : normal;
    return float_from_bits(magnitude | sign);
  }
  static MMVIM_HD uint16_t encode(float f) {
    const uint32_t u = bits_from_float(f);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t a = u & 0x7fffffffu;
    // Below 2^-14 the result is subnormal: adding 0.5 lets the FPU round at the right bit.
    const uint32_t tiny = bits_from_float(float_from_bits(a) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
    const uint32_t finite = a < 0x38800000u ? tiny : normal;
    // From 65520 on, rounding gives infinity.
    const uint32_t body = a > 0x7f800000u ? 0x7e00u : (a >= 0x477ff000u ? 0x7c00u : finite);
    return uint16_t(sign | body);
  }
};

template <class Code>
void decode_row(float* dst, const void* source, int64_t stride, int count) {
  const uint16_t* src = static_cast<const uint16_t*>(source);
  if (stride == 1) {
    for (int i = 0; i < count; ++i) dst[i] = Code::decode(src[i]);
  } else {
    for (int i = 0; i < count; ++i) dst[i] = Code::decode(src[i * stride]);
  }
}

template <class Code>
void encode_row(void* destination, const float* src, int count) {
  uint16_t* dst = static_cast<uint16_t*>(destination);
  for (int i = 0; i < count; ++i) dst[i] = Code::encode(src[i]);
}

template <class S, class From>
void copy_row(S* dst, const void* source, int64_t stride, int count) {
  const From* src = static_cast<const From*>(source);
  if (stride == 1) {
    for (int i = 0; i < count; ++i) dst[i] = static_cast<S>(src[i]);
  } else {
    for (int i = 0; i < count; ++i) dst[i] = static_cast<S>(src[i * stride]);
  }
}

template <class To, class S>
void write_row(void* destination, const S* src, int count) {
  To* dst = static_cast<To*>(destination);
  for (int i = 0; i < count; ++i) dst[i] = static_cast<To>(src[i]);
}

}  // namespace

void load_row(float* dst, const void* src, DType type, int64_t stride, int count) {
  switch (type) {
    case DType::kFloat:
      return copy_row<float, float>(dst, src, stride, count);
    case DType::kDouble:
      return copy_row<float, double>(dst, src, stride, count);
    case DType::kBFloat16:
      return decode_row<BFloat16>(dst, src, stride, count);
    case DType::kHalf:
      return decode_row<Half>(dst, src, stride, count);
  }
}

void load_row(double* dst, const void* src, DType type, int64_t stride, int count) {
  if (type == DType::kDouble) return copy_row<double, double>(dst, src, stride, count);
  copy_row<double, float>(dst, src, stride, count);
}

void store_row(void* dst, DType type, const float* src, int count) {
  switch (type) {
    case DType::kFloat:
      return write_row<float>(dst, src, count);
    case DType::kDouble:
      return write_row<double>(dst, src, count);
    case DType::kBFloat16:
      return encode_row<BFloat16>(dst, src, count);
    case DType::kHalf:
      return encode_row<Half>(dst, src, count);
  }
}

void store_row(void* dst, DType type, const double* src, int count) {
  if (type == DType::kDouble) return write_row<double>(dst, src, count);
  write_row<float>(dst, src, count);
}

}  // namespace MMVIM_ISA
}  // namespace mmvim
