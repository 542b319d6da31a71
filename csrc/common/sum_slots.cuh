// Second pass of a sum over blocks, in a fixed order: equal results in every run, no atomics.
#pragma once

#include <cstdint>

namespace mmvim {

// Block: (32 columns, 32 parts of the slots); grid: (groups of columns, branches).
static __global__ void __launch_bounds__(1024)
    sum_slots_kernel(const float* partial, float* result, int64_t slots, int64_t columns) {
  __shared__ float shared[32][33];
  const int64_t column = blockIdx.x * 32 + threadIdx.x;
  const float* source = partial + blockIdx.y * slots * columns;
  float sum = 0.f;
  if (column < columns) {
    for (int64_t s = threadIdx.y; s < slots; s += 32) sum += source[s * columns + column];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    float total = 0.f;
    for (int y = 0; y < 32; ++y) total += shared[y][threadIdx.x];
    result[blockIdx.y * columns + column] = total;
  }
}

// result[i, c] = sum over s of partial[i, s, c]; (parts, slots, columns) and (parts, columns).
static inline void sum_slots(const float* partial, float* result, int parts, int64_t slots,
                             int64_t columns, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((columns + 31) / 32), parts);
  sum_slots_kernel<<<grid, dim3(32, 32), 0, stream>>>(partial, result, slots, columns);
}

}  // namespace mmvim
