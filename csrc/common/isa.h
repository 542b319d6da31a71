// Instruction sets of the CPU kernels. Each kernel source is compiled once per set, with
// MMVIM_ISA naming it; everything that is compiled more than once lives in that namespace, so that
// the linker can never merge code of different sets.
#pragma once

namespace mmvim {

enum class Isa : int { kPortable = 0, kAvx2, kAvx512 };

// The best set that this CPU has and this library contains. MMVIM_CPU_ISA=portable|avx2|avx512
// asks for a lesser one (for tests and for finding faults).
Isa cpu_isa();
const char* isa_name(Isa isa);

}  // namespace mmvim

#if defined(MMVIM_BUILD_X86)
#define MMVIM_DECLARE_PER_ISA(declaration) \
  namespace portable {                     \
  declaration;                             \
  }                                        \
  namespace avx2 {                         \
  declaration;                             \
  }                                        \
  namespace avx512 {                       \
  declaration;                             \
  }
// Calls the function of the chosen set.
#define MMVIM_PER_ISA(function)                                            \
  (::mmvim::cpu_isa() == ::mmvim::Isa::kAvx512 ? ::mmvim::avx512::function \
   : ::mmvim::cpu_isa() == ::mmvim::Isa::kAvx2 ? ::mmvim::avx2::function   \
                                               : ::mmvim::portable::function)
#else
#define MMVIM_DECLARE_PER_ISA(declaration) \
  namespace portable {                     \
  declaration;                             \
  }
#define MMVIM_PER_ISA(function) (::mmvim::portable::function)
#endif
