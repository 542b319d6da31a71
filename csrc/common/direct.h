// The functions of the glue that mixers call without the dispatcher in between, one table for each
// kind of device. The glue of a device fills its table when the library is loaded. A tensor `dx` is
// the place of a result, whose rows may be those of a wider tensor; undefined: anywhere.
#pragma once

#include <string_view>
#include <tuple>
#include <utility>

#include "glue.h"

namespace mmvim {

struct Segments;

namespace direct {

// Where the gradients of one direction are to be written, for a single group; undefined: anywhere.
// Rows of B, C and z may be those of a wider tensor, u and delta are contiguous. Of two directions
// the first one has z.
struct ScanPlaces {
  Tensor u, delta, B, C, z;
  // Floats that are zero, for sums: (directions, 1, batch, length, 1, 2, states), on a GPU.
  Tensor sums;
};

// Arguments and results are those of the ops, unless a comment says otherwise.
struct Functions {
  std::tuple<Tensor, Tensor> (*conv)(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                     const OptTensor& initial_state, std::string_view mode,
                                     bool silu, bool return_last_state) = nullptr;
  std::tuple<Tensor, Tensor, Tensor, Tensor> (*conv_backward)(
      const Tensor& grad_out, const OptTensor& grad_last_state, const Tensor& x,
      const Tensor& weight, const OptTensor& bias, const OptTensor& initial_state,
      std::string_view mode, bool silu, const Tensor& dx) = nullptr;
  // Into two contiguous tensors.
  void (*two_convs)(const Tensor& x, const Tensor& weight_f, const OptTensor& bias_f,
                    const Tensor& weight_b, const OptTensor& bias_b, bool silu, const Tensor& out_f,
                    const Tensor& out_b) = nullptr;
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> (*two_convs_backward)(
      const Tensor& grad_f, const Tensor& grad_b, const Tensor& x, const Tensor& weight_f,
      const OptTensor& bias_f, const Tensor& weight_b, const OptTensor& bias_b, bool silu,
      const Tensor& dx) = nullptr;

  std::tuple<Tensor, Tensor, Tensor> (*scan)(const Tensor& u, const Tensor& delta, const Tensor& A,
                                             const Tensor& B, const Tensor& C, const OptTensor& D,
                                             const OptTensor& z, const OptTensor& delta_bias,
                                             const OptTensor& initial_state, bool delta_softplus,
                                             std::string_view discretization, bool reverse,
                                             bool return_last_state,
                                             int64_t checkpoint_interval) = nullptr;
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> (
      *scan_backward)(const Tensor& grad_out, const OptTensor& grad_last_state, const Tensor& u,
                      const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                      const OptTensor& D, const OptTensor& z, const OptTensor& delta_bias,
                      const OptTensor& initial_state, const Tensor& checkpoints,
                      bool delta_softplus, std::string_view discretization, bool reverse,
                      int64_t checkpoint_interval, const ScanPlaces& places) = nullptr;
  std::tuple<Tensor, Tensor, Tensor, Tensor> (*two_scans)(
      const Tensor& u_f, const Tensor& delta_f, const Tensor& A_f, const Tensor& B_f,
      const Tensor& C_f, const OptTensor& D_f, const OptTensor& delta_bias_f, const Tensor& u_b,
      const Tensor& delta_b, const Tensor& A_b, const Tensor& B_b, const Tensor& C_b,
      const OptTensor& D_b, const OptTensor& delta_bias_b, const OptTensor& z, double scale,
      bool delta_softplus, std::string_view discretization, int64_t checkpoint_interval) = nullptr;
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
             Tensor, Tensor, Tensor, Tensor> (*two_scans_backward)(
      const Tensor& grad_out, const Tensor& u_f, const Tensor& delta_f, const Tensor& A_f,
      const Tensor& B_f, const Tensor& C_f, const OptTensor& D_f, const OptTensor& delta_bias_f,
      const Tensor& u_b, const Tensor& delta_b, const Tensor& A_b, const Tensor& B_b,
      const Tensor& C_b, const OptTensor& D_b, const OptTensor& delta_bias_b, const OptTensor& z,
      const Tensor& pregate, const Tensor& checkpoints_f, const Tensor& checkpoints_b, double scale,
      bool delta_softplus, std::string_view discretization, int64_t checkpoint_interval,
      const ScanPlaces (&places)[2]) = nullptr;

  // out = y silu(z); y and out (b, l, d) contiguous, z with neighbouring channels. `cleared`, of
  // floats and contiguous, if it is there, becomes zero.
  void (*gate)(const Tensor& z, const Tensor& y, const Tensor& out,
               const Tensor& cleared) = nullptr;

  // With factors of x for each batch entry, of its dtype: x and dx are multiplied by them. The norm
  // and its rstd go into `out` and `rstd`; the sum is the result.
  Tensor (*norm)(const Tensor& x, const OptTensor& residual, const Tensor& weight, double eps,
                 bool residual_in_fp32, const OptTensor& keep, const Tensor& out,
                 const Tensor& rstd) = nullptr;
  std::tuple<Tensor, Tensor, Tensor> (*norm_backward)(
      const Tensor& grad_out, const OptTensor& grad_residual_out, const Tensor& residual_out,
      const Tensor& weight, const Tensor& rstd, bool has_residual, at::ScalarType x_type,
      at::ScalarType residual_type, const OptTensor& keep) = nullptr;

  // On a GPU.
  std::tuple<Tensor, Tensor> (*layer_norm)(const Tensor& x, const Tensor& weight,
                                           const Tensor& bias, double eps, at::ScalarType type,
                                           bool keep_statistics) = nullptr;
  // The norm of x + added and this sum; x is float, the others are not.
  std::tuple<Tensor, Tensor> (*add_layer_norm)(const Tensor& x, const Tensor& added,
                                               const Tensor& weight, const Tensor& bias,
                                               double eps) = nullptr;
  std::tuple<Tensor, Tensor, Tensor> (*layer_norm_backward)(const Tensor& grad, const Tensor& x,
                                                            const Tensor& weight,
                                                            const Tensor& statistics,
                                                            const OptTensor& grad_input) = nullptr;

  void (*convert)(const Segments& segments, bool is_double) = nullptr;
};

// Makes an op's function an entry, which lacks its last argument: mixers pack no sequences.
template <auto kOp, class Result, class... Arguments>
void enter(Result (*&entry)(Arguments...)) {
  entry = [](Arguments... arguments) -> Result {
    return kOp(std::forward<Arguments>(arguments)..., OptTensor());
  };
}

inline Functions cpu;
inline Functions cuda;

inline const Functions& of(const Tensor& t) { return t.is_cuda() ? cuda : cpu; }

}  // namespace direct
}  // namespace mmvim
