// What the kernels need of the outside, without torch's headers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "macros.h"

namespace mmvim {

// at::parallel_for over [0, count), grain 1.
void parallel_for(int64_t count, void (*body)(void*, int64_t, int64_t), void* context);
int64_t thread_count();

// 64-byte aligned memory; throws std::bad_alloc.
void* allocate(size_t bytes);
void release(void* memory);

}  // namespace mmvim
