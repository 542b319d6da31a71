#include "cpu_products.h"

namespace mmvim {
namespace MMVIM_ISA {
namespace {

// Sums that are held in registers: kRows by kVectors.
constexpr int kRows = 4;
#if defined(MMVIM_AVX512_INTRINSICS)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

template <int kR, int kC, class S>
void block_of_product(const S* a, int64_t row, int64_t column, const S* b, S* out, int64_t count,
                      int64_t width, bool add) {
  using M = VectorMath<S>;
  using V = typename M::V;
  V sum[kR][kC];
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) {
      sum[r][c] = add ? load(out + r * width + c * kLanes<S>) : M::set(S(0));
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    V right[kC];
    for (int c = 0; c < kC; ++c) right[c] = load(b + k * width + c * kLanes<S>);
    for (int r = 0; r < kR; ++r) {
      const V left = M::set(a[r * row + k * column]);
      for (int c = 0; c < kC; ++c) sum[r][c] = M::fma(left, right[c], sum[r][c]);
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) store(out + r * width + c * kLanes<S>, sum[r][c]);
  }
}

template <int kC, class S>
void columns_of_product(const S* a, int64_t row, int64_t column, const S* b, S* out, int64_t rows,
                        int64_t count, int64_t width, bool add) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    block_of_product<kRows, kC>(a + i * row, row, column, b, out + i * width, count, width, add);
  }
  for (; i < rows; ++i) {
    block_of_product<1, kC>(a + i * row, row, column, b, out + i * width, count, width, add);
  }
}

template <int kR, int kC, class S>
void block_of_transposed(const S* a, const S* b, S* out, int64_t columns, int64_t width) {
  using M = VectorMath<S>;
  using V = typename M::V;
  V sum[kR][kC];
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) sum[r][c] = M::set(S(0));
  }
  for (int64_t k = 0; k < width; k += kLanes<S>) {
    V right[kC];
    for (int c = 0; c < kC; ++c) right[c] = load(b + c * width + k);
    for (int r = 0; r < kR; ++r) {
      const V left = load(a + r * width + k);
      for (int c = 0; c < kC; ++c) sum[r][c] = M::fma(left, right[c], sum[r][c]);
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) out[r * columns + c] = sum_lanes<S>(sum[r][c]);
  }
}

template <int kR, class S>
void rows_of_transposed(const S* a, const S* b, S* out, int64_t columns, int64_t width) {
  int64_t j = 0;
  for (; j + kVectors <= columns; j += kVectors) {
    block_of_transposed<kR, kVectors>(a, b + j * width, out + j, columns, width);
  }
  for (; j < columns; ++j) block_of_transposed<kR, 1>(a, b + j * width, out + j, columns, width);
}

}  // namespace

template <class S>
void multiply(const S* a, int64_t row, int64_t column, const S* b, S* out, int64_t rows,
              int64_t count, int64_t width, bool add) {
  constexpr int64_t kStep = kVectors * kLanes<S>;
  int64_t c = 0;
  for (; c + kStep <= width; c += kStep) {
    columns_of_product<kVectors>(a, row, column, b + c, out + c, rows, count, width, add);
  }
  for (; c < width; c += kLanes<S>) {
    columns_of_product<1>(a, row, column, b + c, out + c, rows, count, width, add);
  }
}

template <class S>
void multiply_transposed(const S* a, const S* b, S* out, int64_t rows, int64_t columns,
                         int64_t width) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    rows_of_transposed<kRows>(a + i * width, b, out + i * columns, columns, width);
  }
  for (; i < rows; ++i) {
    rows_of_transposed<1>(a + i * width, b, out + i * columns, columns, width);
  }
}

template void multiply(const float*, int64_t, int64_t, const float*, float*, int64_t, int64_t,
                       int64_t, bool);
template void multiply(const double*, int64_t, int64_t, const double*, double*, int64_t, int64_t,
                       int64_t, bool);
template void multiply_transposed(const float*, const float*, float*, int64_t, int64_t, int64_t);
template void multiply_transposed(const double*, const double*, double*, int64_t, int64_t, int64_t);

}  // namespace MMVIM_ISA
}  // namespace mmvim
