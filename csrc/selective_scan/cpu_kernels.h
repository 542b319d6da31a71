// Selective scan on a CPU: arguments of the kernels, as plain data. Shapes and meanings are those
// of the op schemas in mmvim/ops/selective_scan.py.
#pragma once

#include <cstdint>

#include "../common/discretization.h"
#include "../common/dtype.h"
#include "../common/isa.h"

namespace mmvim {

struct ScanShape {
  // groups: a common multiple of the groups of all inputs, and a divisor of the channels.
  int64_t batch = 0, length = 0, channels = 0, states = 0, groups = 1;
  Discretization method = Discretization::kZoh;
  bool delta_softplus = false;
  const int32_t* seq_idx = nullptr;  // (batch, length) or null: a change starts the states anew

  int64_t state_parts() const { return is_two_tap(method) ? 2 : 1; }
};

// A (batch, length, groups, states) tensor: the view of group 0, and the distance between groups.
struct GroupedView {
  View view;
  int64_t stride_g = 0;
};

// One direction's inputs. Parameters are contiguous and of the computing type.
struct ScanInputs {
  View u, delta;
  GroupedView B, C;
  int64_t groups = 1;
  const void* A = nullptr;
  const void* D = nullptr;
  const void* delta_bias = nullptr;
  bool reverse = false;
};

struct ScanForwardArgs {
  ScanShape shape;
  int directions = 1;
  ScanInputs inputs[2];
  void* checkpoints[2] = {nullptr, nullptr};  // (batch, count, channels, states)
  int64_t checkpoint_interval = 0;
  const void* initial_state = nullptr;  // (batch, channels, initial_parts * states)
  int64_t initial_parts = 0;
  void* last_state = nullptr;  // (batch, channels, state_parts * states)
  View z;
  double scale = 1.0;
  Output out;      // absent: only checkpoints are wanted
  Output pregate;  // optional: the sum over directions, before scale and gate
};

struct ScanBackwardArgs {
  ScanShape shape;
  ScanInputs inputs;
  const void* checkpoints = nullptr;
  int64_t checkpoint_interval = 0;  // > 0
  const void* initial_state = nullptr;
  int64_t initial_parts = 0;
  View grad_out;
  const void* grad_last_state = nullptr;
  View z;
  double scale = 1.0;
  Output du, ddelta;
  Output dz;      // optional
  Output dB, dC;  // (batch, length, groups * states)
  void* dA = nullptr;
  void* dD = nullptr;
  void* ddelta_bias = nullptr;
  void* dinitial_state = nullptr;  // as initial_state
};

// dz of a gated sum whose value before scale and gate was kept.
struct GateBackwardArgs {
  int64_t batch = 0, length = 0, channels = 0;
  View grad_out, pregate, z;
  double scale = 1.0;
  Output dz;
};

// `is_double` selects the computing type.
MMVIM_DECLARE_PER_ISA(void scan_forward(const ScanForwardArgs& args, bool is_double))
MMVIM_DECLARE_PER_ISA(void scan_backward(const ScanBackwardArgs& args, bool is_double))
MMVIM_DECLARE_PER_ISA(void gate_backward(const GateBackwardArgs& args, bool is_double))

}  // namespace mmvim
