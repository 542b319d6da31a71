#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(MMVIM_BUILD_X86) && defined(_MSC_VER) && !defined(__clang__)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace mmvim {
namespace {

#if defined(MMVIM_BUILD_X86) && defined(_MSC_VER) && !defined(__clang__)
Isa detect() {
  int r[4];
  __cpuid(r, 0);
  if (r[0] < 7) return Isa::kPortable;
  __cpuidex(r, 1, 0);
  const bool xsave = r[2] & (1 << 27), fma = r[2] & (1 << 12), f16c = r[2] & (1 << 29);
  if (!xsave || !fma || !f16c) return Isa::kPortable;
  const unsigned long long state = _xgetbv(0);
  __cpuidex(r, 7, 0);
  const bool avx2 = (r[1] & (1 << 5)) && (state & 0x6) == 0x6;
  const int wanted = (1 << 16) | (1 << 17) | (1 << 30) | static_cast<int>(1u << 31);
  const bool avx512 = (r[1] & wanted) == wanted && (state & 0xe6) == 0xe6;
  return avx512 && avx2 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kPortable;
}
#elif defined(MMVIM_BUILD_X86)
Isa detect() {
  __builtin_cpu_init();
  // Every CPU with AVX2 has F16C, which older compilers cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 && avx2 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kPortable;
}
#else
Isa detect() { return Isa::kPortable; }
#endif

Isa choose() {
  const Isa best = detect();
  const char* wish = std::getenv("MMVIM_CPU_ISA");
  if (wish == nullptr) return best;
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(wish, isa_name(isa)) == 0) {
      return static_cast<int>(isa) < static_cast<int>(best) ? isa : best;
    }
  }
  return best;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace mmvim
