// Launches of the backward scan for one dtype.
#pragma once

#include "cuda_backward.cuh"
#include "cuda_backward_few.cuh"
#include "cuda_chunks.cuh"

namespace mmvim {
namespace scan {

template <class T, Discretization kMethod, int kCpt, bool kPacked = false>
int launch_backward_as(const Plan& plan, Backward p, CUstream_st* stream) {
  const int slices = slices_of(p.size);
  const gpu::Grid grid = grid_of(p.size, 32 * kCpt, p.directions, plan.chunks);
  p.chunks.count = plan.chunks;
  p.chunks.length = plan.chunk_length;
  if (plan.chunks > 1) {
    Local local;
    local.size = p.size;
    local.directions = p.directions;
    local.z = p.z;
    local.grad_out = p.grad_out;
    local.scale = p.scale;
    local.chunks = p.chunks;
    local.in_scan_order = true;
    local.seq_idx = p.seq_idx;
    Carry carry;
    carry.size = p.size;
    carry.directions = p.directions;
    carry.initial_pitch = p.grad_last_pitch;
    carry.chunks = p.chunks;
    for (int d = 0; d < p.directions; ++d) {
      local.scan[d] = p.scan[d];
      carry.backwards[d] = true;
      carry.initial[d] = p.grad_last[d];
      carry.initial_drive[d] = p.grad_last_drive[d];
    }
    const LocalShared shared(sizeof(T), slices, 32 * kCpt);
    int error = gpu::launch(local_kernel<T, kMethod, kCpt, true, kPacked>, grid, 32 * slices,
                            shared.total, stream, local);
    if (error == 0) error = launch_carry(carry, stream);
    if (error != 0) return error;
  }
  if constexpr (kMethod == Discretization::kZoh && kCpt == 1 && !kPacked) {
    if (plan.few) return launch_few_backward<T>(p, grid, stream);
  }
  const BackwardShared shared(slices, 32 * kCpt);
  return gpu::launch(backward_kernel<T, kMethod, kCpt, kPacked>, grid, 32 * slices, shared.total,
                     stream, p);
}

template <class T>
int launch_backward_of(Discretization method, const Plan& plan, const Backward& p,
                       CUstream_st* stream) {
  int error = 0;
  with_discretization(method, [&](auto tag) {
    constexpr Discretization kMethod = decltype(tag)::value;
    error = p.seq_idx != nullptr  ? launch_backward_as<T, kMethod, 1, true>(plan, p, stream)
            : plan.channels == 64 ? launch_backward_as<T, kMethod, 2>(plan, p, stream)
                                  : launch_backward_as<T, kMethod, 1>(plan, p, stream);
  });
  return error;
}

}  // namespace scan
}  // namespace mmvim
