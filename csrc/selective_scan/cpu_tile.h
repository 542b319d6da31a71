// The inner loops of the scan: one vector of channels, a few time steps, all states.
#pragma once

#include "../common/discretization.h"
#include "../common/simd.h"

namespace mmvim {
namespace MMVIM_ISA {

// Rows of delta, y ... are `row` elements apart, rows of B and C `states`. Arrays over states hold
// one vector per state. Time runs in scan order.
template <class S>
struct ForwardTile {
  int64_t steps, states, row;
  const S* rate;
  const S* u;  // need not be aligned
  int64_t u_row;
  const S* delta;
  const S* B;
  const S* C;
  S* h;  // the state before step t is at h + t * h_step: 0 updates in place
  int64_t h_step;
  S* v;  // two taps: B u of the step before; updated
  S* y;  // sum over states of C h
  S* a;  // keep_decay: (steps, states) vectors, written; otherwise unused
};

template <class S>
struct BackwardTile {
  int64_t steps, states, row;
  const S* rate;
  const S* u;
  const S* delta;
  const S* B;
  const S* C;
  const S* h;  // steps + 1 states, as ForwardTile with h_step != 0 leaves them
  const S* a;  // keep_decay: as ForwardTile left it
  const S* v;  // two taps: B u of the step before the tile
  const S* dy;
  S* dh;      // gradient of the state after the tile; becomes that of the state before it
  S* dv;      // two taps: the same for v
  S* du;      // written
  S* ddelta;  // written
  S* dA;      // added to
  S* dB;      // (steps, states) vectors, added to: the sum over lanes is left to the caller
  S* dC;
};

template <class S>
struct TileKernels {
  void (*forward)(const ForwardTile<S>&);
  // The same for a backward tile to follow, which saves it the exponentials if `keep_decay`.
  void (*recompute)(const ForwardTile<S>&);
  void (*backward)(const BackwardTile<S>&);
  double rate_scale;
  bool keep_decay;
};

template <class S>
TileKernels<S> tile_kernels(Discretization method);

}  // namespace MMVIM_ISA
}  // namespace mmvim
