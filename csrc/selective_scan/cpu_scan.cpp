// The outer loops of the scan: blocks of channels in parallel, tiles of time in order. A tile is
// read into aligned arrays of the computing type, in scan order and with the gate and the softplus
// applied, so that the inner loops (cpu_tile.cpp) know nothing of types, strides and directions.
#include <initializer_list>

#include "../common/cpu_products.h"
#include "../common/cpu_rows.h"
#include "cpu_kernels.h"
#include "cpu_tile.h"

namespace mmvim {
namespace MMVIM_ISA {
namespace {

// Channels are cut into blocks, equal if they can be, that do not straddle groups.
template <class S>
struct Blocks {
  int64_t batch, group_channels, groups, block, per_group;

  Blocks(const ScanShape& s, int64_t most_channels)
      : batch(s.batch),
        group_channels(s.groups == 0 ? 0 : s.channels / s.groups),
        groups(s.groups) {
    const int64_t channels = larger(group_channels, 1);
    block = round_up<S>(divide_up(channels, divide_up(channels, most_channels)));
    per_group = divide_up(group_channels, block);
  }

  int64_t count() const { return batch * groups * per_group; }
  // Whether each block is of as many channels, in whole vectors.
  bool equal() const { return group_channels % block == 0; }
};

struct Block {
  int64_t batch, group, index, channel;
  int count;  // channels

  template <class S>
  Block(const Blocks<S>& b, int64_t task) {
    index = task % b.per_group;
    group = task / b.per_group % b.groups;
    batch = task / (b.per_group * b.groups);
    const int64_t first = index * b.block;
    channel = group * b.group_channels + first;
    count = static_cast<int>(smaller(b.block, b.group_channels - first));
  }
};

// (channels, parts * states) in memory, one part of it in (vector, state, lane) order.
template <class S>
void load_states(S* dst, const S* src, int64_t states, int64_t parts, int64_t part, int count,
                 int64_t vectors) {
  constexpr int kWidth = kLanes<S>;
  for (int64_t v = 0; v < vectors; ++v) {
    for (int64_t n = 0; n < states; ++n) {
      for (int i = 0; i < kWidth; ++i) {
        const int64_t c = v * kWidth + i;
        dst[(v * states + n) * kWidth + i] =
            c < count ? src[(c * parts + part) * states + n] : S(0);
      }
    }
  }
}

template <class S>
void store_states(S* dst, const S* src, int64_t states, int64_t parts, int64_t part, int count,
                  S scale = S(1)) {
  constexpr int kWidth = kLanes<S>;
  for (int c = 0; c < count; ++c) {
    const S* lane = src + (c / kWidth) * states * kWidth + c % kWidth;
    for (int64_t n = 0; n < states; ++n) {
      dst[(c * parts + part) * states + n] = scale * lane[n * kWidth];
    }
  }
}

// What makes the step sizes of a tile of their low rank.
template <class S>
struct LowRank {
  S* rows = nullptr;    // (steps, rank)
  S* weight = nullptr;  // (rank, channels of the block)

  void take(Arena& arena, int64_t rank, int64_t steps, int64_t padded) {
    rows = arena.template take<S>(steps * rank);
    weight = arena.template take<S>(rank * padded);
  }
};

// A sum over the directions, row by row: in the output where rows are of the computing type and in
// whole vectors, else in a buffer.
template <class S>
class SumOfRows {
 public:
  SumOfRows(const Output& out, int directions, int64_t length, const Blocks<S>& blocks)
      : out_(out),
        needed_(directions > 1 && out.data != nullptr),
        in_place_(out.dtype == kDType<S> && blocks.equal()),
        size_(needed_ && !in_place_ ? length * blocks.block : 0),
        width_(blocks.block) {}

  void take(Arena& arena) { buffer_ = arena.template take<S>(size_); }
  // Need not be aligned.
  S* row(const Block& block, int64_t t) const {
    if (!needed_) return nullptr;
    return in_place_ ? static_cast<S*>(out_.at(block.batch, t, block.channel))
                     : buffer_ + t * width_;
  }

 private:
  const Output& out_;
  const bool needed_, in_place_;
  const int64_t size_, width_;
  S* buffer_ = nullptr;
};

// One direction's inputs of one block, a tile at a time.
template <class S>
class TileReader {
 public:
  using M = VectorMath<S>;
  using V = typename M::V;

  TileReader(const ScanShape& shape, const ScanInputs& inputs, const Block& block, int64_t padded,
             const LowRank<S>& low_rank)
      : shape_(shape),
        in_(inputs),
        block_(block),
        padded_(padded),
        group_(block.channel / (shape.channels / inputs.groups)),
        low_rank_(low_rank) {
    const S* weight = static_cast<const S*>(in_.delta_weight) + block.channel * in_.rank;
    for (int64_t r = 0; r < in_.rank; ++r) {
      S* row = low_rank.weight + r * padded;
      for (int c = 0; c < block.count; ++c) row[c] = weight[c * in_.rank + r];
      fill(row + block.count, S(0), padded - block.count);
    }
  }

  int64_t row_of(int64_t step) const {
    const int64_t t = in_.reverse ? shape_.length - 1 - step : step;
    if (in_.column == 0) return t;
    return t % in_.column * (shape_.length / in_.column) + t / in_.column;
  }

  // Whether a sequence begins with this step where another one ends.
  bool starts_sequence(int64_t step) const {
    if (shape_.seq_idx == nullptr || step == 0) return false;
    const int32_t* row = shape_.seq_idx + block_.batch * shape_.length;
    return row[row_of(step)] != row[row_of(step - 1)];
  }
  // Of the steps [first, end), those up to the next such step.
  int64_t up_to_sequence(int64_t first, int64_t end) const {
    if (shape_.seq_idx == nullptr) return end;
    int64_t step = first + 1;
    while (step < end && !starts_sequence(step)) ++step;
    return step;
  }
  // Of the steps [first, end), those from the last such step on.
  int64_t from_sequence(int64_t first, int64_t end) const {
    if (shape_.seq_idx == nullptr) return first;
    int64_t step = end - 1;
    while (step > first && !starts_sequence(step)) --step;
    return step;
  }

  // `slope`, where wanted, receives d(delta) / d(raw delta); u is left out where `u` is null.
  void read(int64_t first, int64_t steps, S* u, S* delta, S* slope, S* B, S* C,
            const S* bias) const {
    const int64_t n = shape_.states, rank = in_.rank;
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t t = row_of(first + i);
      if (u != nullptr) row(u + i * padded_, in_.u, t);
      states(B + i * n, in_.B, t);
      states(C + i * n, in_.C, t);
      if (rank == 0) continue;
      columns(low_rank_.rows + i * rank, in_.delta, t, 0, rank);
    }
    if (rank > 0) {
      multiply(low_rank_.rows, rank, 1, low_rank_.weight, delta, steps, rank, padded_, false);
    }
    for (int64_t i = 0; i < steps; ++i) {
      S* d = delta + i * padded_;
      const S* raw = rank > 0 ? d : row_at(in_.delta, row_of(first + i), d);
      if (slope == nullptr) {
        for (int64_t c = 0; c < padded_; c += kLanes<S>) {
          const V v = load_unaligned(raw + c) + load(bias + c);
          store(d + c, shape_.delta_softplus ? M::softplus(v) : v);
        }
      } else {
        for (int64_t c = 0; c < padded_; c += kLanes<S>) {
          V v = load_unaligned(raw + c) + load(bias + c);
          V derivative = M::set(S(1));
          if (shape_.delta_softplus) v = M::softplus(v, &derivative);
          store(d + c, v);
          store(slope + i * padded_ + c, derivative);
        }
      }
    }
  }

  // B u of the step before `first`, for the two-tap methods.
  void read_tap(int64_t first, S* v, S* u, S* B) const {
    const int64_t t = row_of(first - 1);
    row(u, in_.u, t);
    states(B, in_.B, t);
    for (int64_t c = 0; c < padded_; c += kLanes<S>) {
      for (int64_t n = 0; n < shape_.states; ++n) {
        store(v + (c / kLanes<S> * shape_.states + n) * kLanes<S>, load(u + c) * M::set(B[n]));
      }
    }
  }

  // Steps along columns touch rows far apart, which no hardware foresees.
  template <class Tensor>
  void prefetch_rows(const Tensor& tensor, int64_t first, int64_t steps) const {
    if (in_.column == 0 || tensor.data == nullptr) return;
    const int64_t bytes = block_.count * element_size(tensor.dtype);
    for (int64_t step = larger(first, 0); step < smaller(first + steps, shape_.length); ++step) {
      const void* row = tensor.at(block_.batch, row_of(step), block_.channel);
      for (int64_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(row) + i);
    }
  }

  void row(S* dst, const View& view, int64_t t) const {
    load_padded(dst, view, block_.batch, t, block_.channel, block_.count,
                static_cast<int>(padded_));
  }

  // Whether whole vectors of the computing type lie side by side, to be used where they are.
  bool in_place(const View& view) const {
    return view.dtype == kDType<S> && view.stride_d == 1 && block_.count == padded_;
  }
  const S* at(const View& view, int64_t t) const {
    return static_cast<const S*>(view.at(block_.batch, t, block_.channel));
  }
  const S* row_at(const View& view, int64_t t, S* buffer) const {
    if (in_place(view)) return at(view, t);
    row(buffer, view, t);
    return buffer;
  }

  // A per-channel parameter, zero where absent.
  void parameter(S* dst, const void* data) const {
    fill(dst, S(0), padded_);
    if (data == nullptr) return;
    std::memcpy(dst, static_cast<const S*>(data) + block_.channel, block_.count * sizeof(S));
  }

 private:
  void states(S* dst, const GroupedView& g, int64_t t) const {
    columns(dst, g.view, t, g.stride_g * group_, shape_.states);
  }
  // `count` elements of a row, from the one at `offset` on: often one or few.
  void columns(S* dst, const View& view, int64_t t, int64_t offset, int64_t count) const {
    const void* src =
        static_cast<const char*>(view.at(block_.batch, t, 0)) + offset * element_size(view.dtype);
    if (view.dtype != kDType<S>) {
      return load_row(dst, src, view.dtype, view.stride_d, static_cast<int>(count));
    }
    const S* row = static_cast<const S*>(src);
    for (int64_t i = 0; i < count; ++i) dst[i] = row[i * view.stride_d];
  }

  const ScanShape& shape_;
  const ScanInputs& in_;
  const Block& block_;
  const int64_t padded_, group_;
  const LowRank<S>& low_rank_;
};

template <class S>
const S* state_at(const void* states, const ScanShape& shape, const Block& block, int64_t parts) {
  return static_cast<const S*>(states) +
         (block.batch * shape.channels + block.channel) * parts * shape.states;
}
template <class S>
S* state_at(void* states, const ScanShape& shape, const Block& block, int64_t parts) {
  return const_cast<S*>(state_at<S>(static_cast<const void*>(states), shape, block, parts));
}

template <class S>
S* checkpoint_at(void* checkpoints, const ScanShape& shape, const Block& block, int64_t interval,
                 int64_t index) {
  const int64_t count = larger(divide_up(shape.length, interval) - 1, 0);
  return static_cast<S*>(checkpoints) +
         ((block.batch * count + index) * shape.channels + block.channel) * shape.states;
}

constexpr int64_t kForwardSteps = 16;
// Wide: where a block's part of a row is short, the hardware does not foresee the next one, and the
// tensors are read at a fraction of the speed.
constexpr int64_t kForwardChannels = 384;

template <class S>
class ForwardTask {
 public:
  using M = VectorMath<S>;
  using V = typename M::V;

  ForwardTask(const ScanForwardArgs& args, const Blocks<S>& blocks)
      : a_(args),
        n_(args.shape.states),
        kernels_(tile_kernels<S>(args.shape.method)),
        padded_(blocks.block),
        vectors_(padded_ / kLanes<S>),
        sum_(args.out, args.directions, args.shape.length, blocks) {
    take();
    arena_.reserve();
    take();
  }

  void run(const Block& block) {
    for (int i = 0; i < a_.directions; ++i) direction(block, i);
  }

 private:
  void take() {
    const int64_t tile = kForwardSteps * padded_;
    u_ = arena_.template take<S>(tile);
    delta_ = arena_.template take<S>(tile);
    y_ = arena_.template take<S>(tile);
    B_ = arena_.template take<S>(kForwardSteps * n_);
    C_ = arena_.template take<S>(kForwardSteps * n_);
    rate_ = arena_.template take<S>(n_ * padded_);
    h_ = arena_.template take<S>(n_ * padded_);
    v_ = arena_.template take<S>(n_ * padded_);
    D_ = arena_.template take<S>(padded_);
    bias_ = arena_.template take<S>(padded_);
    line_ = arena_.template take<S>(padded_);
    low_rank_.take(arena_, a_.inputs[0].rank, kForwardSteps, padded_);
    sum_.take(arena_);
  }

  void direction(const Block& block, int which) {
    const ScanInputs& in = a_.inputs[which];
    const TileReader<S> reader(a_.shape, in, block, padded_, low_rank_);
    const int64_t length = a_.shape.length, interval = a_.checkpoint_interval;
    reader.parameter(D_, in.D);
    reader.parameter(bias_, in.delta_bias);
    load_states(rate_, static_cast<const S*>(in.A) + block.channel * n_, n_, 1, 0, block.count,
                vectors_);
    for (int64_t i = 0; i < n_ * padded_; ++i) rate_[i] *= S(kernels_.rate_scale);
    fill(h_, S(0), n_ * padded_);
    fill(v_, S(0), n_ * padded_);
    if (a_.initial_state != nullptr) {
      const S* s = state_at<S>(a_.initial_state, a_.shape, block, a_.initial_parts);
      load_states(h_, s, n_, a_.initial_parts, 0, block.count, vectors_);
      if (a_.initial_parts == 2) load_states(v_, s, n_, 2, 1, block.count, vectors_);
    }

    for (int64_t first = 0; first < length;) {
      int64_t steps = smaller(kForwardSteps, length - first);
      if (interval > 0) steps = smaller(steps, interval - first % interval);
      steps = reader.up_to_sequence(first, first + steps) - first;
      if (reader.starts_sequence(first)) {
        fill(h_, S(0), n_ * padded_);
        fill(v_, S(0), n_ * padded_);
      }
      const Rows u = rows_of_u(reader, in, first, steps);
      reader.prefetch_rows(a_.out, first, steps);
      reader.prefetch_rows(in.u, first + steps, steps);
      reader.read(first, steps, u.data == u_ ? u_ : nullptr, delta_, nullptr, B_, C_, bias_);
      for (int64_t v = 0; v < vectors_; ++v) {
        const int64_t lane = v * kLanes<S>, state = v * n_ * kLanes<S>;
        kernels_.forward({steps, n_, padded_, rate_ + state, u.data + lane, u.stride, delta_ + lane,
                          B_, C_, h_ + state, 0, v_ + state, y_ + lane, nullptr});
      }
      if (a_.out.data != nullptr) {
        for (int64_t i = 0; i < steps; ++i) {
          finish_row(block, reader, which, first + i, u.data + i * u.stride, y_ + i * padded_);
        }
      }
      first += steps;
      if (interval > 0 && first % interval == 0 && first < length) {
        store_states(
            checkpoint_at<S>(in.checkpoints, a_.shape, block, interval, first / interval - 1), h_,
            n_, 1, 0, block.count);
      }
    }

    if (a_.last_state != nullptr) {
      const int64_t parts = a_.shape.state_parts();
      S* s = state_at<S>(a_.last_state, a_.shape, block, parts);
      store_states(s, h_, n_, parts, 0, block.count);
      if (parts == 2) store_states(s, v_, n_, 2, 1, block.count);
    }
  }

  struct Rows {
    const S* data;
    int64_t stride;
  };
  Rows rows_of_u(const TileReader<S>& reader, const ScanInputs& in, int64_t first,
                 int64_t steps) const {
    if (!reader.in_place(in.u)) return {u_, padded_};
    const int64_t t = reader.row_of(first), last = reader.row_of(first + steps - 1);
    const int64_t step = steps > 1 ? reader.row_of(first + 1) - t : 0;
    // The steps of two columns.
    if (last - t != (steps - 1) * step) return {u_, padded_};
    return {reader.at(in.u, t), step * in.u.stride_l};
  }

  // D u, the sum over directions, the gate, and the one rounding.
  void finish_row(const Block& block, const TileReader<S>& reader, int which, int64_t step,
                  const S* u, S* y) {
    const int64_t t = reader.row_of(step);
    const auto each = [&](auto&& f) {
      for (int64_t c = 0; c < padded_; c += kLanes<S>) f(c);
    };
    S* sum = sum_.row(block, t);
    const auto add = [&](int64_t c) {
      const V direct = M::fma(load(D_ + c), load_unaligned(u + c), load(y + c));
      return which == 0 ? direct : load_unaligned(sum + c) + direct;
    };
    if (which + 1 < a_.directions) {
      each([&](int64_t c) { store_unaligned(sum + c, add(c)); });
      return;
    }
    each([&](int64_t c) { store(y + c, add(c)); });
    if (a_.pregate.data != nullptr) {
      store_row(a_.pregate.at(block.batch, t, block.channel), a_.pregate.dtype, y, block.count);
    }
    void* out = a_.out.at(block.batch, t, block.channel);
    const bool in_place = a_.out.dtype == kDType<S> && block.count == padded_;
    S* row = in_place ? static_cast<S*>(out) : y;
    const V scale = M::set(S(a_.scale));
    if (a_.z.data != nullptr) {
      const S* gate = reader.row_at(a_.z, t, line_);
      each([&](int64_t c) {
        const V z = load_unaligned(gate + c);
        store_unaligned(row + c, load(y + c) * scale * (z * M::sigmoid(z)));
      });
    } else {
      each([&](int64_t c) { store_unaligned(row + c, load(y + c) * scale); });
    }
    if (!in_place) store_row(out, a_.out.dtype, y, block.count);
  }

  const ScanForwardArgs& a_;
  const int64_t n_;
  const TileKernels<S> kernels_;
  const int64_t padded_, vectors_;
  Arena arena_;
  LowRank<S> low_rank_;
  SumOfRows<S> sum_;
  S *u_, *delta_, *y_, *B_, *C_, *rate_, *h_, *v_, *D_, *bias_, *line_;
};

template <class S>
void forward(const ScanForwardArgs& args) {
  // Each channel is computed alone: the cut changes no result and may follow the thread count.
  int64_t width = kForwardChannels;
  while (width > kLanes<S> && Blocks<S>(args.shape, width).count() < 2 * thread_count()) width /= 2;
  const Blocks<S> blocks(args.shape, width);
  parallel(blocks.count(), [&](int64_t begin, int64_t end) {
    ForwardTask<S> task(args, blocks);
    for (int64_t i = begin; i < end; ++i) task.run(Block(blocks, i));
  });
}

// Sums over channels (dB, dC) are kept per block and sums over the batch (dA, dD, ddelta_bias) per
// batch entry; both are added up in a fixed order afterwards. The cut depends on the shape alone,
// so that results depend neither on timing nor on the number of threads.
template <class S>
struct Partials {
  // (directions, batch, channels, states + 2 + rank): dA, dD, ddelta_bias, ddelta_weight
  S* parameters = nullptr;
  // Null if there is one block. (directions, blocks per group, batch, length, groups * states)
  S* dB = nullptr;
  S* dC = nullptr;
  S* ddelta = nullptr;  // (directions, blocks per group, batch, length, rank)
};

template <class S>
class BackwardTask {
 public:
  using M = VectorMath<S>;
  using V = typename M::V;

  BackwardTask(const ScanBackwardArgs& args, const Partials<S>& partials, const Blocks<S>& blocks)
      : a_(args),
        partials_(partials),
        blocks_(blocks),
        n_(args.shape.states),
        rank_(args.inputs[0].rank),
        two_tap_(is_two_tap(args.shape.method)),
        steps_(smaller(args.checkpoint_interval, smaller(32, larger(4, 256 / larger(n_, 1))))),
        tiles_(divide_up(smaller(args.checkpoint_interval, args.shape.length), steps_)),
        kernels_(tile_kernels<S>(args.shape.method)),
        padded_(blocks.block),
        vectors_(padded_ / kLanes<S>),
        sum_(args.du, args.directions, args.shape.length, blocks) {
    take();
    arena_.reserve();
    take();
  }

  void run(const Block& block) {
    for (which_ = 0; which_ < a_.directions; ++which_) direction(block);
  }

 private:
  const ScanInputs& inputs() const { return a_.inputs[which_]; }

  void direction(const Block& block) {
    const TileReader<S> reader(a_.shape, inputs(), block, padded_, low_rank_);
    const int64_t length = a_.shape.length, interval = a_.checkpoint_interval;
    reader.parameter(D_, inputs().D);
    reader.parameter(bias_, inputs().delta_bias);
    load_states(rate_, static_cast<const S*>(inputs().A) + block.channel * n_, n_, 1, 0,
                block.count, vectors_);
    for (int64_t i = 0; i < n_ * padded_; ++i) rate_[i] *= S(kernels_.rate_scale);
    fill(dweight_, S(0), rank_ * padded_);
    fill(dweight_sum_, S(0), rank_ * padded_);
    for (S* sum : {dh_, dv_, dA_, dA_sum_}) fill(sum, S(0), n_ * padded_);
    for (S* sum : {dD_, dD_sum_, dbias_, dbias_sum_}) fill(sum, S(0), padded_);
    if (a_.grad_last_state != nullptr) {
      const int64_t parts = a_.shape.state_parts();
      const S* s = state_at<S>(a_.grad_last_state, a_.shape, block, parts);
      load_states(dh_, s, n_, parts, 0, block.count, vectors_);
      if (parts == 2) load_states(dv_, s, n_, 2, 1, block.count, vectors_);
    }

    // Segments start at a checkpoint or with a sequence.
    for (int64_t end = length, first; end > 0; end = first) {
      first = reader.from_sequence((end - 1) / interval * interval, end);
      const int64_t tiles = divide_up(end - first, steps_);
      load_start(reader, block, first);
      for (int64_t k = 0; k + 1 < tiles; ++k) {
        const int64_t at = first + k * steps_;
        reader.read(at, steps_, u_, delta_, nullptr, B_, C_, bias_);
        load_tap(reader, block, at);
        std::memcpy(start(k + 1), start(k), n_ * padded_ * sizeof(S));
        for (int64_t v = 0; v < vectors_; ++v) {
          kernels_.forward(recomputed(v, steps_, start(k + 1) + v * n_ * kLanes<S>, 0));
        }
      }
      for (int64_t k = tiles - 1; k >= 0; --k) {
        const int64_t at = first + k * steps_;
        tile(block, reader, at, smaller(steps_, end - at), start(k));
      }
      if (reader.starts_sequence(first)) {
        fill(dh_, S(0), n_ * padded_);
        fill(dv_, S(0), n_ * padded_);
      }
    }
    store_sums(block);
  }

  void take() {
    const int64_t tile = steps_ * padded_;
    for (S** p : {&u_, &delta_, &slope_, &dy_, &gate_, &y_, &du_, &ddelta_}) {
      *p = arena_.template take<S>(tile);
    }
    for (S** p : {&B_, &C_}) *p = arena_.template take<S>(steps_ * n_);
    for (S** p : {&rate_, &dh_, &dv_, &dA_, &dA_sum_, &v_, &v_work_}) {
      *p = arena_.template take<S>(n_ * padded_);
    }
    for (S** p : {&D_, &bias_, &dD_, &dD_sum_, &dbias_, &dbias_sum_, &line_}) {
      *p = arena_.template take<S>(padded_);
    }
    for (S** p : {&dB_, &dC_}) *p = arena_.template take<S>(steps_ * n_ * kLanes<S>);
    h_ = arena_.template take<S>((steps_ + 1) * n_ * kLanes<S>);
    a_kept_ = arena_.template take<S>(kernels_.keep_decay ? steps_ * n_ * kLanes<S> : 0);
    sums_ = arena_.template take<S>(n_);
    starts_ = arena_.template take<S>(tiles_ * n_ * padded_);
    low_rank_.take(arena_, rank_, steps_, padded_);
    low_rank_sums_ = arena_.template take<S>(steps_ * rank_);
    for (S** p : {&dweight_, &dweight_sum_}) *p = arena_.template take<S>(rank_ * padded_);
    sum_.take(arena_);
  }

  S* start(int64_t tile) const { return starts_ + tile * n_ * padded_; }

  void load_start(const TileReader<S>& reader, const Block& block, int64_t first) {
    if (reader.starts_sequence(first)) {
      fill(start(0), S(0), n_ * padded_);
    } else if (first > 0) {
      const int64_t interval = a_.checkpoint_interval;
      const S* saved =
          checkpoint_at<S>(inputs().checkpoints, a_.shape, block, interval, first / interval - 1);
      load_states(start(0), saved, n_, 1, 0, block.count, vectors_);
    } else if (a_.initial_state != nullptr) {
      const S* s = state_at<S>(a_.initial_state, a_.shape, block, a_.initial_parts);
      load_states(start(0), s, n_, a_.initial_parts, 0, block.count, vectors_);
    } else {
      fill(start(0), S(0), n_ * padded_);
    }
  }

  void load_tap(const TileReader<S>& reader, const Block& block, int64_t first) {
    if (!two_tap_) return;
    if (first > 0 && !reader.starts_sequence(first)) {
      reader.read_tap(first, v_, line_, sums_);
    } else if (first == 0 && a_.initial_parts == 2) {
      const S* s = state_at<S>(a_.initial_state, a_.shape, block, 2);
      load_states(v_, s, n_, 2, 1, block.count, vectors_);
    } else {
      fill(v_, S(0), n_ * padded_);
    }
    std::memcpy(v_work_, v_, n_ * padded_ * sizeof(S));
  }

  ForwardTile<S> recomputed(int64_t vector, int64_t steps, S* h, int64_t h_step) const {
    const int64_t lane = vector * kLanes<S>, state = vector * n_ * kLanes<S>;
    return {steps, n_, padded_, rate_ + state, u_ + lane,       padded_,   delta_ + lane,
            B_,    C_, h,       h_step,        v_work_ + state, y_ + lane, a_kept_};
  }

  void tile(const Block& block, const TileReader<S>& reader, int64_t first, int64_t steps,
            const S* start) {
    reader.prefetch_rows(a_.du, first, steps);
    reader.prefetch_rows(inputs().u, first - steps_, steps_);
    reader.prefetch_rows(a_.grad_out, first - steps_, steps_);
    reader.read(first, steps, u_, delta_, slope_, B_, C_, bias_);
    for (int64_t i = 0; i < steps; ++i) read_gradient(reader, reader.row_of(first + i), i);
    load_tap(reader, block, first);
    const int64_t state_row = n_ * kLanes<S>;
    fill(dB_, S(0), steps * state_row);
    fill(dC_, S(0), steps * state_row);
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t lane = v * kLanes<S>, state = v * state_row;
      std::memcpy(h_, start + state, state_row * sizeof(S));
      kernels_.recompute(recomputed(v, steps, h_, state_row));
      kernels_.backward({steps, n_, padded_, rate_ + state, u_ + lane, delta_ + lane, B_, C_, h_,
                         a_kept_, v_ + state, dy_ + lane, dh_ + state, dv_ + state, du_ + lane,
                         ddelta_ + lane, dA_ + state, dB_, dC_});
    }
    for (int64_t i = 0; i < steps; ++i) finish_row(block, reader.row_of(first + i), i);
    if (rank_ > 0) {
      multiply(low_rank_.rows, 1, rank_, ddelta_, dweight_, rank_, steps, padded_, true);
      multiply_transposed(ddelta_, low_rank_.weight, low_rank_sums_, steps, rank_, padded_);
      for (int64_t i = 0; i < steps; ++i) {
        put_sums(a_.gradients[which_].delta, partials_.ddelta, block, reader.row_of(first + i),
                 rank_, 0, low_rank_sums_ + i * rank_, rank_);
      }
      carry(dweight_, dweight_sum_, rank_ * padded_);
    }
    carry(dA_, dA_sum_, n_ * padded_);
    carry(dD_, dD_sum_, padded_);
    carry(dbias_, dbias_sum_, padded_);
  }

  // Sums over time are kept per tile first: one sum of many steps would lose digits.
  static void carry(S* tile, S* total, int64_t size) {
    for (int64_t i = 0; i < size; i += kLanes<S>) {
      store(total + i, load(total + i) + load(tile + i));
      store(tile + i, M::set(S(0)));
    }
  }

  // dy = scale * grad_out * silu(z); `gate` keeps dz / y.
  void read_gradient(const TileReader<S>& reader, int64_t t, int64_t i) {
    S* dy = dy_ + i * padded_;
    reader.row(dy, a_.grad_out, t);
    const V scale = M::set(S(a_.scale));
    if (a_.z.data == nullptr) {
      if (a_.scale == 1.0) return;
      for (int64_t c = 0; c < padded_; c += kLanes<S>) store(dy + c, load(dy + c) * scale);
      return;
    }
    reader.row(line_, a_.z, t);
    for (int64_t c = 0; c < padded_; c += kLanes<S>) {
      const V z = load(line_ + c), g = load(dy + c) * scale, s = M::sigmoid(z);
      store(dy + c, g * (z * s));
      store(gate_ + i * padded_ + c, g * M::silu_slope(z, s));
    }
  }

  void finish_row(const Block& block, int64_t t, int64_t i) {
    const int64_t at = i * padded_;
    for (int64_t c = 0; c < padded_; c += kLanes<S>) {
      const V D = load(D_ + c), u = load(u_ + at + c), dy = load(dy_ + at + c);
      if (a_.dz.data != nullptr) {
        const V y = M::fma(D, u, load(y_ + at + c));
        store(y_ + at + c, load(gate_ + at + c) * y);
      }
      store(du_ + at + c, M::fma(D, dy, load(du_ + at + c)));
      store(dD_ + c, M::fma(dy, u, load(dD_ + c)));
      const V ddelta = load(ddelta_ + at + c) * load(slope_ + at + c);
      store(ddelta_ + at + c, ddelta);
      store(dbias_ + c, load(dbias_ + c) + ddelta);
    }
    const auto put = [&](const Output& out, const S* row) {
      if (out.data == nullptr) return;
      store_row(out.at(block.batch, t, block.channel), out.dtype, row, block.count);
    };
    put(a_.dz, y_ + at);
    if (add_row(sum_.row(block, t), du_ + at)) put(a_.du, du_ + at);
    const ScanGradients& g = a_.gradients[which_];
    if (rank_ == 0) put(g.delta, ddelta_ + at);
    put_states(g.B, partials_.dB, block, t, dB_ + i * n_ * kLanes<S>);
    put_states(g.C, partials_.dC, block, t, dC_ + i * n_ * kLanes<S>);
  }

  // Adds the row to those of the directions before, or them to it; whether it is complete.
  bool add_row(S* sum, S* row) const {
    const bool last = which_ + 1 == a_.directions;
    if (last && which_ == 0) return true;
    for (int64_t c = 0; c < padded_; c += kLanes<S>) {
      V v = load(row + c);
      if (which_ > 0) v = load_unaligned(sum + c) + v;
      last ? store(row + c, v) : store_unaligned(sum + c, v);
    }
    return last;
  }

  void put_states(const Output& out, S* partial, const Block& block, int64_t t, const S* lanes) {
    for (int64_t n = 0; n < n_; ++n) sums_[n] = sum_lanes<S>(load(lanes + n * kLanes<S>));
    put_sums(out, partial, block, t, a_.shape.groups * n_, block.group * n_, sums_, n_);
  }

  // `count` sums over the block's channels, from `column` of a row of `width` on.
  void put_sums(const Output& out, S* partial, const Block& block, int64_t t, int64_t width,
                int64_t column, const S* sums, int64_t count) {
    if (partial == nullptr) {
      store_row(out.at(block.batch, t, column), out.dtype, sums, static_cast<int>(count));
      return;
    }
    const int64_t part = which_ * blocks_.per_group + block.index;
    const int64_t row = (part * a_.shape.batch + block.batch) * a_.shape.length + t;
    std::memcpy(partial + row * width + column, sums, count * sizeof(S));
  }

  void store_sums(const Block& block) {
    const int64_t parts = n_ + 2 + rank_;
    const int64_t entry = which_ * a_.shape.batch + block.batch;
    S* p = partials_.parameters + (entry * a_.shape.channels + block.channel) * parts;
    for (int c = 0; c < block.count; ++c) {
      const S* lane = dA_sum_ + (c / kLanes<S>)*n_ * kLanes<S> + c % kLanes<S>;
      for (int64_t n = 0; n < n_; ++n) p[c * parts + n] = lane[n * kLanes<S>];
      p[c * parts + n_] = dD_sum_[c];
      p[c * parts + n_ + 1] = dbias_sum_[c];
      for (int64_t r = 0; r < rank_; ++r) {
        p[c * parts + n_ + 2 + r] = dweight_sum_[r * padded_ + c];
      }
    }
    if (a_.dinitial_state == nullptr) return;
    S* s = state_at<S>(a_.dinitial_state, a_.shape, block, a_.initial_parts);
    store_states(s, dh_, n_, a_.initial_parts, 0, block.count);
    if (a_.initial_parts == 2) store_states(s, dv_, n_, 2, 1, block.count);
  }

  const ScanBackwardArgs& a_;
  const Partials<S>& partials_;
  const Blocks<S>& blocks_;
  const int64_t n_, rank_;
  const bool two_tap_;
  const int64_t steps_, tiles_;
  const TileKernels<S> kernels_;
  const int64_t padded_, vectors_;
  int which_ = 0;  // direction
  Arena arena_;
  LowRank<S> low_rank_;
  SumOfRows<S> sum_;
  S *u_, *delta_, *slope_, *dy_, *gate_, *y_, *du_, *ddelta_, *B_, *C_, *rate_, *dh_, *dv_, *dA_,
      *dA_sum_, *v_, *v_work_, *D_, *bias_, *dD_, *dD_sum_, *dbias_, *dbias_sum_, *line_, *dB_,
      *dC_, *h_, *a_kept_, *sums_, *starts_, *low_rank_sums_, *dweight_, *dweight_sum_;
};

template <class S>
void sum_parameters(const ScanBackwardArgs& a, S* partials) {
  const int64_t n = a.shape.states, rank = a.inputs[0].rank, parts = n + 2 + rank;
  const int64_t channels = a.shape.channels;
  parallel(a.directions * channels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / channels, c = i % channels;
      S* sum = partials + (k * a.shape.batch * channels + c) * parts;
      for (int64_t b = 1; b < a.shape.batch; ++b) {
        const S* other = sum + b * channels * parts;
        for (int64_t p = 0; p < parts; ++p) sum[p] += other[p];
      }
      const auto put = [&](void* out, int64_t count, int64_t part) {
        if (out == nullptr) return;
        for (int64_t p = 0; p < count; ++p) {
          static_cast<S*>(out)[c * count + p] = a.shape.batch > 0 ? sum[part + p] : S(0);
        }
      };
      const ScanGradients& g = a.gradients[k];
      put(g.A, n, 0);
      put(g.D, 1, n);
      put(g.delta_bias, 1, n + 1);
      put(g.delta_weight, rank, n + 2);
    }
  });
}

template <class S>
void sum_blocks(const ScanBackwardArgs& a, const Output& out, S* partial, int64_t blocks,
                int64_t width) {
  const int64_t rows = a.shape.batch * a.shape.length;
  constexpr int64_t kRows = 64;
  parallel(divide_up(rows, kRows), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kRows; row < smaller(end * kRows, rows); ++row) {
      S* sum = partial + row * width;
      for (int64_t k = 1; k < blocks; ++k) {
        const S* other = sum + k * rows * width;
        for (int64_t i = 0; i < width; ++i) sum[i] += other[i];
      }
      store_row(out.at(row / a.shape.length, row % a.shape.length, 0), out.dtype, sum,
                static_cast<int>(width));
    }
  });
}

template <class S>
void backward(const ScanBackwardArgs& args) {
  // Short parts of rows far apart would leave much of what is fetched unused.
  const int64_t least = args.directions > 1 ? 96 : 32;
  int64_t width = 128;
  while (width > least && Blocks<S>(args.shape, width).count() < 32) width /= 2;
  const Blocks<S> blocks(args.shape, width);
  const ScanShape& s = args.shape;
  const int64_t columns = s.groups * s.states, rank = args.inputs[0].rank;
  const int64_t part = blocks.per_group > 1 ? blocks.per_group * s.batch * s.length : 0;

  Partials<S> partials;
  Arena arena;
  for (int pass = 0; pass < 2; ++pass) {
    const int64_t sums = s.batch * s.channels * (s.states + 2 + rank);
    partials.parameters = arena.take<S>(args.directions * sums);
    S* dB = arena.take<S>(args.directions * part * columns);
    S* dC = arena.take<S>(args.directions * part * columns);
    S* ddelta = arena.take<S>(args.directions * part * rank);
    if (pass == 0) {
      arena.reserve();
    } else if (part > 0) {
      partials.dB = dB;
      partials.dC = dC;
      partials.ddelta = ddelta;
    }
  }
  parallel(blocks.count(), [&](int64_t begin, int64_t end) {
    BackwardTask<S> task(args, partials, blocks);
    for (int64_t i = begin; i < end; ++i) task.run(Block(blocks, i));
  });
  sum_parameters(args, partials.parameters);
  for (int64_t k = 0; k < args.directions && part > 0; ++k) {
    const ScanGradients& g = args.gradients[k];
    const auto sum = [&](const Output& out, S* partial, int64_t width) {
      sum_blocks(args, out, partial + k * part * width, blocks.per_group, width);
    };
    sum(g.B, partials.dB, columns);
    sum(g.C, partials.dC, columns);
    if (rank > 0) sum(g.delta, partials.ddelta, rank);
  }
}

template <class S>
void backward_of_gate(const GateBackwardArgs& a) {
  using M = VectorMath<S>;
  using V = typename M::V;
  const int64_t padded = round_up<S>(a.channels);
  constexpr int64_t kRows = 16;
  const int64_t rows = a.batch * a.length;
  parallel(divide_up(rows, kRows), [&](int64_t begin, int64_t end) {
    Arena arena;
    S *g = nullptr, *y = nullptr, *z = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      for (S** p : {&g, &y, &z}) *p = arena.take<S>(padded);
      if (pass == 0) arena.reserve();
    }
    for (int64_t row = begin * kRows; row < smaller(end * kRows, rows); ++row) {
      const int64_t b = row / a.length, t = row % a.length;
      const int count = static_cast<int>(a.channels), all = static_cast<int>(padded);
      load_padded(g, a.grad_out, b, t, 0, count, all);
      load_padded(y, a.pregate, b, t, 0, count, all);
      load_padded(z, a.z, b, t, 0, count, all);
      for (int64_t c = 0; c < padded; c += kLanes<S>) {
        const V one = M::set(S(1)), v = load(z + c), s = M::sigmoid(v);
        const V slope = s * M::fma(v, one - s, one);
        store(g + c, load(g + c) * M::set(S(a.scale)) * load(y + c) * slope);
      }
      store_row(a.dz.at(b, t, 0), a.dz.dtype, g, count);
    }
  });
}

}  // namespace

void scan_forward(const ScanForwardArgs& args, bool is_double) {
  is_double ? forward<double>(args) : forward<float>(args);
}

void scan_backward(const ScanBackwardArgs& args, bool is_double) {
  is_double ? backward<double>(args) : backward<float>(args);
}

void gate_backward(const GateBackwardArgs& args, bool is_double) {
  is_double ? backward_of_gate<double>(args) : backward_of_gate<float>(args);
}

}  // namespace MMVIM_ISA
}  // namespace mmvim
