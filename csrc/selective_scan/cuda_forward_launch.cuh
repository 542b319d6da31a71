// Launches of the forward scan for one dtype.
#pragma once

#include "cuda_chunks.cuh"
#include "cuda_forward.cuh"

namespace mmvim {
namespace scan {

template <class T, Discretization kMethod, int kCpt, bool kPacked = false>
int launch_forward_as(const Plan& plan, Forward p, CUstream_st* stream) {
  const int slices = slices_of(p.size);
  const gpu::Grid grid = grid_of(p.size, 32 * kCpt, p.directions, plan.chunks);
  p.chunks.count = plan.chunks;
  p.chunks.length = plan.chunk_length;
  if (plan.chunks > 1) {
    Local local;
    local.size = p.size;
    local.directions = p.directions;
    local.chunks = p.chunks;
    local.seq_idx = p.seq_idx;
    Carry carry;
    carry.size = p.size;
    carry.directions = p.directions;
    carry.initial_pitch = p.scan[0].initial_pitch;
    carry.chunks = p.chunks;
    for (int d = 0; d < p.directions; ++d) {
      local.scan[d] = p.scan[d];
      carry.backwards[d] = p.scan[d].reverse;
      carry.initial[d] = p.scan[d].initial;
    }
    const LocalShared shared(sizeof(T), slices, 32 * kCpt);
    int error = gpu::launch(local_kernel<T, kMethod, kCpt, false, kPacked>, grid, 32 * slices,
                            shared.total, stream, local);
    if (error == 0) error = launch_carry(carry, stream);
    if (error != 0) return error;
  }
  auto* kernel = forward_kernel<T, kMethod, kCpt, false, kSingleRegisters, kPacked>;
  if constexpr (kCpt == 1 && !kPacked) {
    if (plan.joint == Joint::kWide) kernel = forward_kernel<T, kMethod, 1, true, kWideRegisters>;
    if (plan.joint == Joint::kTight) kernel = forward_kernel<T, kMethod, 1, true, kTightRegisters>;
  }
  const ForwardShared shared(sizeof(T), slices, 32 * kCpt);
  return gpu::launch(kernel, grid, 32 * slices, shared.total, stream, p);
}

template <class T>
int launch_forward_of(Discretization method, const Plan& plan, const Forward& p,
                      CUstream_st* stream) {
  int error = 0;
  with_discretization(method, [&](auto tag) {
    constexpr Discretization kMethod = decltype(tag)::value;
    error = p.seq_idx != nullptr  ? launch_forward_as<T, kMethod, 1, true>(plan, p, stream)
            : plan.channels == 64 ? launch_forward_as<T, kMethod, 2>(plan, p, stream)
                                  : launch_forward_as<T, kMethod, 1>(plan, p, stream);
  });
  return error;
}

}  // namespace scan
}  // namespace mmvim
