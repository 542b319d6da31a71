// What does not depend on the method: plans, the step between chunks, the last sums of backward.
#include <cstdlib>

#include "../common/gpu_math.cuh"
#include "../common/vector.cuh"
#include "cuda_backward.cuh"
#include "cuda_backward_few.cuh"
#include "cuda_chunks.cuh"
#include "cuda_forward.cuh"

namespace mmvim {
namespace scan {
namespace {

constexpr int kCarryThreads = 128;

// One thread per direction, batch entry, channel and state.
MMVIM_KERNEL void carry_kernel(const MMVIM_GRID_CONSTANT Carry p) {
  constexpr int kAhead = 8;
  const Sizes& size = p.size;
  const int64_t rows = size.batch * size.channels;
  const int64_t i = gpu::block_index() * kCarryThreads + gpu::thread_index();
  if (i >= rows * size.states * p.directions) return;
  const int state = static_cast<int>(i % size.states);
  const int direction = static_cast<int>(i / size.states / rows);
  const int64_t row = i / size.states % rows;

  const int64_t initial = row * p.initial_pitch + state;
  float h = p.initial[direction] == nullptr ? 0.f : p.initial[direction][initial];
  float v = p.initial_drive[direction] == nullptr ? 0.f : p.initial_drive[direction][initial];
  const int64_t pitch = rows * size.pitch;
  const int64_t base = direction * p.chunks.count * pitch + row * size.pitch + state;
  for (int c = 0; c < p.chunks.count; c += kAhead) {
    float state_out[kAhead], decay[kAhead];
    MMVIM_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      if (c + j >= p.chunks.count) continue;
      const int chunk = p.backwards[direction] ? p.chunks.count - 1 - c - j : c + j;
      state_out[j] = p.chunks.state[base + chunk * pitch];
      decay[j] = p.chunks.decay[base + chunk * pitch];
    }
    MMVIM_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      if (c + j >= p.chunks.count) continue;
      const int chunk = p.backwards[direction] ? p.chunks.count - 1 - c - j : c + j;
      const int64_t at = base + chunk * pitch;
      p.chunks.state[at] = h;
      if (p.chunks.drive != nullptr) {
        const float leaving = gpu::fused(p.chunks.drive_decay[at], h, p.chunks.drive[at]);
        p.chunks.drive[at] = v;
        v = leaving;
      }
      h = gpu::fused(decay[j], h, state_out[j]);
    }
  }
}

struct FinishLaunch {
  Finish finish;
  int64_t convert_blocks[2] = {};
  int64_t sum_blocks = 0;
};

constexpr int kFinishThreads = 256;
constexpr int kFinishColumns = 32;

// Block [0, convert_blocks): gradients of B and C, an element a thread. The others: sums over rows
// of dA, dD and ddelta_bias, kFinishColumns columns a block.
template <class T>
MMVIM_KERNEL void finish_kernel(const MMVIM_GRID_CONSTANT FinishLaunch p) {
  const Sizes& size = p.finish.size;
  int64_t block = gpu::block_index();
  const int index = gpu::thread_index();
  for (int d = 0; d < p.finish.directions; ++d) {
    const int64_t elements = size.batch * size.length * p.finish.groups[d] * 2 * size.pitch;
    if (block < p.convert_blocks[d]) {
      const int64_t i = block * kFinishThreads + index;
      if (i >= elements) return;
      float sum = 0.f;
      for (int part = 0; part < p.finish.parts[d]; ++part)
        sum += p.finish.dBC[d][part * elements + i];
      const int64_t row = i / (2 * size.pitch);
      const int column = static_cast<int>(i - row * 2 * size.pitch);
      const bool is_C = column >= size.pitch;
      T* out = static_cast<T*>(is_C ? p.finish.out_dC[d] : p.finish.out_dB[d]);
      out[row * p.finish.out_pitch + column - (is_C ? size.pitch : 0)] = from_float<T>(sum);
      return;
    }
    block -= p.convert_blocks[d];
    if (block < p.sum_blocks) {
      // Columns: those of dA (d, n), then dD and ddelta_bias (2, d).
      const int64_t columns_A = static_cast<int64_t>(size.channels) * size.pitch;
      const int64_t column = block * kFinishColumns + index % kFinishColumns;
      const bool of_A = column < columns_A;
      const int64_t columns = of_A ? columns_A : 2 * size.channels;
      const int64_t at = of_A ? column : column - columns_A;
      const float* from = (of_A ? p.finish.dA[d] : p.finish.dD[d]) + at;
      float sum = 0.f;
      if (at < columns) {
        MMVIM_UNROLL_BY(4)
        for (int64_t row = index / kFinishColumns; row < p.finish.rows;
             row += kFinishThreads / kFinishColumns) {
          sum += from[row * columns];
        }
      }
      float* shared = reinterpret_cast<float*>(gpu::shared_memory());
      shared[index] = sum;
      gpu::sync_block();
      if (index >= kFinishColumns || at >= columns) return;
      for (int i = 1; i < kFinishThreads / kFinishColumns; ++i)
        sum += shared[i * kFinishColumns + index];
      if (of_A) {
        p.finish.out_dA[d][at] = sum;
      } else {
        float* out = at < size.channels ? p.finish.out_dD[d] : p.finish.out_ddelta_bias[d];
        if (out != nullptr) out[at % size.channels] = sum;
      }
      return;
    }
    block -= p.sum_blocks;
  }
}

template <class T>
int launch_finish_of(const Finish& finish, CUstream_st* stream) {
  FinishLaunch p;
  p.finish = finish;
  const Sizes& size = finish.size;
  const int64_t columns = static_cast<int64_t>(size.channels) * (size.pitch + 2);
  p.sum_blocks = (columns + kFinishColumns - 1) / kFinishColumns;
  int64_t blocks = 0;
  for (int d = 0; d < finish.directions; ++d) {
    const int64_t elements = size.batch * size.length * finish.groups[d] * 2 * size.pitch;
    p.convert_blocks[d] = (elements + kFinishThreads - 1) / kFinishThreads;
    blocks += p.convert_blocks[d] + p.sum_blocks;
  }
  return gpu::launch(finish_kernel<T>, gpu::Grid{blocks}, kFinishThreads,
                     kFinishThreads * sizeof(float), stream, p);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void set_chunks_of(const Sizes& size, int64_t tiles_each, int granularity, Plan* plan) {
  const int64_t tiles = divide_up(size.length, granularity);
  plan->chunk_length = static_cast<int>(tiles_each) * granularity;
  plan->chunks = static_cast<int>(divide_up(tiles, tiles_each));
}

void set_chunks(const Sizes& size, int64_t count, int granularity, Plan* plan) {
  const int64_t tiles = divide_up(size.length, granularity);
  set_chunks_of(size, divide_up(tiles, count < 1 ? 1 : count), granularity, plan);
}

// `MMVIM_SCAN_PLAN=<channels>x<chunks>[j|t]` overrides the plans, for tests and measurements; j, t:
// of 32 channels, joint with more or fewer registers.
bool plan_from_environment(const Sizes& size, int directions, int granularity, Plan* plan) {
  const char* text = std::getenv("MMVIM_SCAN_PLAN");
  if (text == nullptr) return false;
  char* rest = nullptr;
  plan->channels = std::strtol(text, &rest, 10) == 32 ? 32 : 64;
  set_chunks(size, *rest == 'x' ? std::strtol(rest + 1, &rest, 10) : 1, granularity, plan);
  if (directions == 2 && (*rest == 'j' || *rest == 't')) {
    plan->channels = 32;
    plan->joint = *rest == 'j' ? Joint::kWide : Joint::kTight;
  }
  return true;
}

// What a pass needs: the steps of a tile and of the shortest chunk that pays, and of blocks of 32
// and of 64 channels the registers of a thread and the shared memory.
struct Pass {
  int granularity, chunk_steps;
  int registers[2], shared_bytes[2];
  // Chunks, which do most of the scan twice, pay if blocks fill less of the GPU's rounds than this.
  double worth_chunks;
  bool packed;

  // Blocks that run at a time.
  int64_t capacity(int channels, int slices, int multiprocessors) const {
    const int i = channels / 64;
    return capacity_of(registers[i], shared_bytes[i], slices, multiprocessors);
  }
  // Of two directions side by side.
  int64_t joint_capacity(Joint joint, int slices, int multiprocessors) const {
    return capacity_of(joint == Joint::kWide ? kWideRegisters : kTightRegisters, shared_bytes[0],
                       slices, multiprocessors);
  }

 private:
  static int64_t capacity_of(int registers, int shared_bytes, int slices, int multiprocessors) {
    const int64_t by_registers = 65536 / (registers * 32 * slices);
    const int64_t by_memory = 227 * 1024 / (shared_bytes + 1024);
    const int64_t blocks = by_registers < by_memory ? by_registers : by_memory;
    return multiprocessors * (blocks < 1 ? 1 : blocks);
  }
};

// Tiles of a chunk such that rounds of blocks are full ones: the fewest chunks whose time is within
// a twentieth of the best.
int64_t best_tiles(int64_t tiles, int64_t least, int64_t blocks, int64_t capacity) {
  constexpr int64_t kMostChunks = 256;
  const auto each = [&](int64_t chunks) { return divide_up(tiles, chunks); };
  const auto time = [&](int64_t chunks) {
    return divide_up(divide_up(tiles, each(chunks)) * blocks, capacity) * each(chunks);
  };
  const int64_t most = tiles / least < kMostChunks ? tiles / least : kMostChunks;
  int64_t best = time(1);
  for (int64_t c = 2; c <= most; ++c) best = time(c) < best ? time(c) : best;
  int64_t chunks = 1;
  while (chunks < most && time(chunks) * 20 > best * 21) ++chunks;
  return each(chunks);
}

Plan plan_of(const Sizes& size, int directions, int multiprocessors, const Pass& pass) {
  Plan plan;
  if (plan_from_environment(size, directions, pass.granularity, &plan)) {
    if (pass.packed) {
      plan.channels = 32;
      plan.joint = Joint::kNo;
    }
    return plan;
  }
  const int widest = pass.packed ? 32 : 64;
  const int slices = slices_of(size);
  const auto blocks = [&](int channels) { return size.batch * channel_blocks(size, channels); };
  const int64_t capacity = pass.capacity(32, slices, multiprocessors);
  const auto worth_chunks = [&](int64_t whole) {
    return size.length >= 4 * pass.chunk_steps &&
           whole < pass.worth_chunks * (divide_up(whole, capacity) * capacity);
  };
  // Side by side, two directions fill a GPU that one alone leaves idle; to meet costs as much as
  // many steps, and more than chunks of one direction.
  if (directions == 2 && !pass.packed && size.length >= 2 * pass.chunk_steps &&
      !worth_chunks(2 * blocks(32))) {
    for (const Joint joint : {Joint::kTight, Joint::kWide}) {
      const int64_t room = pass.joint_capacity(joint, slices, multiprocessors);
      if (2 * blocks(32) <= room) plan.joint = joint;
    }
  }
  set_chunks(size, 1, pass.granularity, &plan);
  if (plan.joint != Joint::kNo) return plan;
  // Two channels a thread share loads of B and C, but one channel a thread makes twice the warps,
  // and a GPU that is half empty, or blocks of few warps, need those.
  if (slices > 2 && 2 * blocks(64) >= pass.capacity(64, slices, multiprocessors)) {
    plan.channels = widest;
  }
  if (!worth_chunks(blocks(32))) return plan;
  plan.channels = widest;
  set_chunks_of(
      size,
      best_tiles(divide_up(size.length, pass.granularity), pass.chunk_steps / pass.granularity,
                 blocks(widest), pass.capacity(widest, slices, multiprocessors)),
      pass.granularity, &plan);
  return plan;
}

}  // namespace

int blocks_per_group(const Sizes& size, int groups, int block_channels) {
  return channel_blocks(size, block_channels) / groups;
}

Plan plan_forward(const Sizes& size, int directions, bool packed, int multiprocessors) {
  const int slices = slices_of(size);
  const int shared[2] = {ForwardShared(2, slices, 32).total, ForwardShared(2, slices, 64).total};
  return plan_of(size, directions, multiprocessors,
                 {kForwardTile,
                  4 * kForwardTile,
                  {kSingleRegisters, kSingleRegisters},
                  {shared[0], shared[1]},
                  0.4,
                  packed});
}

Plan plan_backward(const Sizes& size, int directions, bool plain, bool packed,
                   int multiprocessors) {
  // Without blocks for all multiprocessors it is better to cut the length; two states of short
  // scans are faster as scans of many are.
  const bool few = size.pitch == 1 || (size.pitch <= kFewStates && size.length > 1024);
  if (plain && few && !packed && directions == 1 && std::getenv("MMVIM_SCAN_PLAN") == nullptr &&
      size.batch * channel_blocks(size, 32) >= multiprocessors) {
    Plan plan;
    plan.chunk_length = size.length;
    plan.few = true;
    return plan;
  }
  // One launch does both directions.
  Sizes all = size;
  all.batch *= directions;
  const int slices = slices_of(size);
  const int shared[2] = {BackwardShared(slices, 32).total, BackwardShared(slices, 64).total};
  return plan_of(all, 1, multiprocessors,
                 {kBackwardTile,
                  2 * kBackwardTile,
                  {kBackwardRegisters<1>, kBackwardRegisters<2>},
                  {shared[0], shared[1]},
                  0.7,
                  packed});
}

int launch_carry(const Carry& p, CUstream_st* stream) {
  const int64_t count = p.size.batch * p.size.channels * p.size.states * p.directions;
  return gpu::launch(carry_kernel, gpu::Grid{divide_up(count, kCarryThreads)}, kCarryThreads, 0,
                     stream, p);
}

template <>
int launch_finish<DType::kFloat>(const Finish& p, CUstream_st* stream) {
  return launch_finish_of<float>(p, stream);
}
template <>
int launch_finish<DType::kBFloat16>(const Finish& p, CUstream_st* stream) {
  return launch_finish_of<__nv_bfloat16>(p, stream);
}
template <>
int launch_finish<DType::kHalf>(const Finish& p, CUstream_st* stream) {
  return launch_finish_of<__half>(p, stream);
}

}  // namespace scan
}  // namespace mmvim
