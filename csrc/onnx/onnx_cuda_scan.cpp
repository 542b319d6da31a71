// The scan of an ONNX graph on a GPU: a launch for each kMaxStates states, in the session's stream.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "../selective_scan/cuda.h"
#include "scan.h"

namespace mmvim {
namespace {

using namespace scan;

// Floats that are freed, in the order of the stream, at the end of the call.
class Workspace {
 public:
  explicit Workspace(cudaStream_t stream) : stream_(stream) {}
  ~Workspace() {
    for (void* memory : memory_) {
      if (memory != nullptr) cudaFreeAsync(memory, stream_);
    }
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  int allocate(float** out, int64_t count) {
    void*& memory = memory_[used_++];
    const int code = cudaMallocAsync(&memory, 4 * static_cast<size_t>(count), stream_);
    *out = static_cast<float*>(memory);
    return code;
  }

 private:
  cudaStream_t stream_;
  void* memory_[3] = {};
  int used_ = 0;
};

// A contiguous (batch, length, groups, inner) array; `unit`: neighbours that one block begins at.
Rows rows(const float* data, int64_t length, int64_t groups, int64_t inner, int64_t unit) {
  Rows r;
  r.data = data;
  r.stride_b = length * groups * inner;
  r.stride_l = static_cast<int>(groups * inner);
  r.stride_g = groups > 1 ? inner : 0;
  const int64_t bytes = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % 16) | 4 * unit;
  r.vector = bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : 0;
  return r;
}

// The state after no steps.
int copy_state(const OnnxScan& s, cudaStream_t stream) {
  const size_t to = 4 * s.state_parts() * s.states, from = 4 * s.initial_parts * s.states;
  const size_t count = s.batch * s.channels;
  const int code = cudaMemsetAsync(s.last_state, 0, to * count, stream);
  if (code != 0 || s.initial_state == nullptr) return code;
  return cudaMemcpy2DAsync(s.last_state, to, s.initial_state, from, from, count,
                           cudaMemcpyDeviceToDevice, stream);
}

}  // namespace

int onnx_scan_cuda(const OnnxScan& s, CUstream_st* stream) {
  if (s.length > INT32_MAX || s.channels > INT32_MAX || s.groups * s.states > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  if (s.batch * s.channels == 0 || s.states == 0) return 0;
  if (s.length == 0) return copy_state(s, stream);
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);

  Forward p;
  p.size.batch = s.batch;
  p.size.length = static_cast<int>(s.length);
  p.size.channels = static_cast<int>(s.channels);
  p.size.states = static_cast<int>(std::min<int64_t>(s.states, kMaxStates));
  p.size.pitch = static_cast<int>(s.states);
  p.size.units = static_cast<int>(s.groups);
  p.size.softplus = s.softplus;
  p.seq_idx = s.seq_idx;
  const Plan plan = plan_forward(p.size, 1, s.seq_idx != nullptr, multiprocessors);

  Workspace workspace(stream);
  int code = 0;
  float* sum = nullptr;
  if (s.states > kMaxStates) {
    code = workspace.allocate(&sum, s.batch * s.length * s.channels);
    if (code != 0) return code;
  }
  if (plan.chunks > 1) {
    const int64_t size = plan.chunks * s.batch * s.channels * s.states;
    for (float** memory : {&p.chunks.state, &p.chunks.decay}) {
      code = workspace.allocate(memory, size);
      if (code != 0) return code;
    }
  }

  const int64_t unit = s.channels / s.groups;
  Scan& scan = p.scan[0];
  scan.u = rows(s.u, s.length, 1, s.channels, unit);
  scan.delta = rows(s.delta, s.length, 1, s.channels, unit);
  scan.delta_bias = s.delta_bias;
  scan.groups = static_cast<int>(s.groups);
  scan.reverse = s.reverse;
  scan.initial_pitch = static_cast<int>(s.initial_parts * s.states);
  p.last_pitch = static_cast<int>(s.state_parts() * s.states);
  for (int64_t n = 0; n < s.states; n += kMaxStates) {
    const bool last = n + kMaxStates >= s.states;
    p.size.states = static_cast<int>(std::min<int64_t>(s.states - n, kMaxStates));
    scan.A = s.A + n;
    scan.B = rows(s.B + n, s.length, s.groups, s.states, s.states);
    scan.C = rows(s.C + n, s.length, s.groups, s.states, s.states);
    for (Rows* r : {&scan.B, &scan.C}) r->vector = std::max(r->vector, 4);
    // The skip connection counts once.
    scan.D = last ? s.D : nullptr;
    if (s.initial_state != nullptr) {
      scan.initial = s.initial_state + n;
      if (s.initial_parts == 2) scan.initial_drive = s.initial_state + s.states + n;
    }
    p.last[0] = s.last_state + n;
    p.last_drive[0] = s.state_parts() == 2 ? s.last_state + s.states + n : nullptr;
    p.sum_in = n == 0 ? nullptr : sum;
    p.sum_out = last ? nullptr : sum;
    p.out = last ? s.out : nullptr;
    code = launch_forward<DType::kFloat>(s.method, plan, p, stream);
    if (code != 0) return code;
  }
  return 0;
}

}  // namespace mmvim
