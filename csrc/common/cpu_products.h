// Products of small matrices whose rows are rows of channels: aligned, and `width` elements apart,
// a multiple of a vector's. The order of each sum depends on the sizes alone.
#pragma once

#include "simd.h"

namespace mmvim {
namespace MMVIM_ISA {

// out (rows, width) = a b, or += a b, of b (count, width), where a(i, k) is a[i * row + k *
// column].
template <class S>
void multiply(const S* a, int64_t row, int64_t column, const S* b, S* out, int64_t rows,
              int64_t count, int64_t width, bool add);

// out (rows, columns), contiguous, = a b^T of a (rows, width) and b (columns, width).
template <class S>
void multiply_transposed(const S* a, const S* b, S* out, int64_t rows, int64_t columns,
                         int64_t width);

}  // namespace MMVIM_ISA
}  // namespace mmvim
