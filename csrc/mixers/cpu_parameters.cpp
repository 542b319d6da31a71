// Blocks of all arrays in parallel, each through a row of the computing type.
#include "../common/cpu_rows.h"
#include "parameters.h"

namespace mmvim {
namespace MMVIM_ISA {
namespace {

constexpr int64_t kBlock = 1024;

template <class S>
void convert_block(const Segment& s, int64_t begin, int count) {
  using M = VectorMath<S>;
  alignas(64) S row[kBlock];
  alignas(64) S factor[kBlock];
  load_row(row, static_cast<const char*>(s.from) + begin * element_size(s.from_type), s.from_type,
           1, count);
  if (s.conversion == Conversion::kDecay) {
    fill(row + count, S(0), round_up<S>(count) - count);
    for (int64_t i = 0; i < count; i += kLanes<S>) {
      store(row + i, M::set(S(0)) - M::exp(load(row + i)));
    }
  } else if (s.conversion == Conversion::kMultiply) {
    load_row(factor, static_cast<const S*>(s.factor) + begin, kDType<S>, 1, count);
    for (int i = 0; i < count; ++i) row[i] *= factor[i];
  } else if (s.conversion == Conversion::kClear) {
    fill(row, S(0), count);
  } else if (s.scale != 1.f) {
    for (int i = 0; i < count; ++i) row[i] *= static_cast<S>(s.scale);
  }
  store_row(static_cast<char*>(s.to) + begin * element_size(s.to_type), s.to_type, row, count);
}

}  // namespace

void convert_segments(const Segments& segments, bool is_double) {
  int64_t first[kMaxSegments + 1] = {0};
  for (int i = 0; i < segments.count; ++i) {
    first[i + 1] = first[i] + divide_up(segments.segment[i].count, kBlock);
  }
  parallel(first[segments.count], [&](int64_t begin, int64_t end) {
    int i = 0;
    for (int64_t block = begin; block < end; ++block) {
      while (block >= first[i + 1]) ++i;
      const Segment& s = segments.segment[i];
      const int64_t start = (block - first[i]) * kBlock;
      const int count = static_cast<int>(smaller(kBlock, s.count - start));
      if (is_double) {
        convert_block<double>(s, start, count);
      } else {
        convert_block<float>(s, start, count);
      }
    }
  });
}

}  // namespace MMVIM_ISA
}  // namespace mmvim
