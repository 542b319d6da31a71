// Selective scans on a CPU, of a sequence or along the routes of a map: arguments of the kernels,
// as plain data. Shapes and meanings are those of the op schemas in mmvim/ops/selective_scan.py and
// mmvim/ops/cross_scan.py.
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
  View u;
  View delta;  // (batch, length, channels or rank)
  GroupedView B, C;
  int64_t groups = 1;
  const void* A = nullptr;
  const void* D = nullptr;
  const void* delta_bias = nullptr;
  const void* delta_weight = nullptr;  // (channels, rank): makes step sizes of their low rank
  int64_t rank = 0;                    // 0: there is none
  bool reverse = false;
  int64_t column = 0;           // the length of a map's columns if steps follow them, 0: rows
  void* checkpoints = nullptr;  // (batch, count, channels, states): written, read by backward
};

struct ScanForwardArgs {
  ScanShape shape;
  int directions = 1;
  const ScanInputs* inputs = nullptr;  // of each direction; their outputs are added
  int64_t checkpoint_interval = 0;
  const void* initial_state = nullptr;  // (batch, channels, initial_parts * states)
  int64_t initial_parts = 0;
  void* last_state = nullptr;  // (batch, channels, state_parts * states)
  View z;
  double scale = 1.0;
  Output out;      // absent: only checkpoints are wanted
  Output pregate;  // optional: the sum over directions, before scale and gate
};

// Gradients of what is one direction's own. Those that may be null are those of optional inputs.
struct ScanGradients {
  Output delta;  // (batch, length, channels or rank)
  Output B, C;   // (batch, length, groups * states)
  void* A = nullptr;
  void* D = nullptr;
  void* delta_bias = nullptr;
  void* delta_weight = nullptr;
};

struct ScanBackwardArgs {
  ScanShape shape;
  int directions = 1;
  const ScanInputs* inputs = nullptr;
  const ScanGradients* gradients = nullptr;
  int64_t checkpoint_interval = 0;  // > 0
  const void* initial_state = nullptr;
  int64_t initial_parts = 0;
  View grad_out;
  const void* grad_last_state = nullptr;
  View z;
  double scale = 1.0;
  Output du;                       // the sum over directions
  Output dz;                       // optional; of one direction
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
