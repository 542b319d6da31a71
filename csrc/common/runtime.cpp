#include "runtime.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <new>

#include "isa.h"

// From 2.10 on torch runs loops for others in its own thread pool; before, at::parallel_for is a
// header that needs OpenMP, and this file is compiled with it.
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
#include <torch/csrc/stable/c/shim.h>
#define MMVIM_TORCH_PARALLEL_FOR
#endif

namespace mmvim {

void parallel_for(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count <= 0) return;
#if defined(MMVIM_TORCH_PARALLEL_FOR)
  struct Call {
    void (*body)(void*, int64_t, int64_t);
    void* context;
  } call{body, context};
  const auto run = [](int64_t begin, int64_t end, void* c) {
    static_cast<Call*>(c)->body(static_cast<Call*>(c)->context, begin, end);
  };
  TORCH_CHECK(torch_parallel_for(0, count, 1, run, &call) == 0, "mmvim: a CPU kernel failed");
#else
  at::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
#endif
}

int64_t thread_count() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void* allocate(size_t bytes) {
  return ::operator new(bytes == 0 ? 1 : bytes, std::align_val_t(64));
}

void release(void* memory) { ::operator delete(memory, std::align_val_t(64)); }

}  // namespace mmvim

#if defined(_WIN32)
#define MMVIM_EXPORT __declspec(dllexport)
#else
#define MMVIM_EXPORT __attribute__((visibility("default")))
#endif

// For mmvim.ops.backend_info().
extern "C" MMVIM_EXPORT const char* mmvim_cpu_isa() { return mmvim::isa_name(mmvim::cpu_isa()); }
