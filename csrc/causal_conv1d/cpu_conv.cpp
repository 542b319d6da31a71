// Blocks of channels and chunks of time in parallel; within them tiles of rows that are read once,
// with the halo that the filters need, into arrays of the computing type.
#include <initializer_list>

#include "../common/cpu_rows.h"
#include "cpu_kernels.h"

namespace mmvim {
namespace MMVIM_ISA {
namespace {

constexpr int64_t kChannels = 128;
constexpr int64_t kTile = 32;
constexpr int64_t kChunk = 256;  // a multiple of kTile; sums over time are cut here
constexpr int64_t kMaxWidth = 4;

struct ConvTask {
  int64_t batch, chunk, channel;
  int count;

  ConvTask(const ConvInput& in, int64_t index) {
    const int64_t blocks = divide_up(in.channels, kChannels), chunks = chunk_count(in);
    channel = index % blocks * kChannels;
    count = static_cast<int>(smaller(kChannels, in.channels - channel));
    chunk = index / blocks % chunks;
    batch = index / (blocks * chunks);
  }

  // At least one, which carries the states when the length is 0.
  static int64_t chunk_count(const ConvInput& in) {
    return larger(divide_up(in.length, kChunk), 1);
  }
  static int64_t count_of(const ConvInput& in) {
    return in.batch * chunk_count(in) * divide_up(in.channels, kChannels);
  }
};

template <class S>
class ConvWorker {
 public:
  using M = VectorMath<S>;
  using V = typename M::V;

 protected:
  explicit ConvWorker(const ConvInput& in) : in_(in), reach_(in.width - 1) {}

  void take_common(Arena& arena, int64_t rows) {
    x_ = arena.take<S>(rows * kChannels);
    line_ = arena.take<S>(kChannels);
    for (int f = 0; f < in_.filters; ++f) {
      taps_[f] = arena.take<S>(kMaxWidth * kChannels);
      bias_[f] = arena.take<S>(kChannels);
    }
  }

  // Taps in the order in which they meet the input, one row of channels each.
  void load_taps(const ConvTask& task) {
    padded_ = round_up<S>(task.count);
    for (int f = 0; f < in_.filters; ++f) {
      const ConvFilter& filter = in_.filter[f];
      const S* weight = static_cast<const S*>(filter.weight) + task.channel * in_.width;
      fill(taps_[f], S(0), kMaxWidth * kChannels);
      fill(bias_[f], S(0), kChannels);
      for (int64_t k = 0; k < in_.width; ++k) {
        const int64_t from = filter.reverse ? in_.width - 1 - k : k;
        for (int c = 0; c < task.count; ++c) {
          taps_[f][k * kChannels + c] = weight[c * in_.width + from];
        }
      }
      if (filter.bias != nullptr) {
        std::memcpy(bias_[f], static_cast<const S*>(filter.bias) + task.channel,
                    task.count * sizeof(S));
      }
    }
  }

  // Rows [begin, end) of the input, which continues into the initial state and then zeros.
  void load_input(const ConvTask& task, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      S* row = x_ + (p - begin) * kChannels;
      if (p >= 0 && p < in_.length) {
        load_padded(row, in_.x, task.batch, p, task.channel, task.count, static_cast<int>(padded_));
      } else {
        load_state(row, task, in_.initial, initial_index(p));
      }
    }
  }

  void load_state(S* row, const ConvTask& task, const ConvState& state, int64_t index) const {
    fill(row, S(0), padded_);
    if (state.data == nullptr || index < 0 || index >= reach_) return;
    load_row(row, state_at(task, state, index), state.dtype, reach_, task.count);
  }

  void store_state(const ConvTask& task, const ConvState& state, int64_t index,
                   const S* row) const {
    char* to = static_cast<char*>(state_at(task, state, index));
    const int64_t step = reach_ * element_size(state.dtype);
    for (int c = 0; c < task.count; ++c) store_row(to + c * step, state.dtype, row + c, 1);
  }

  // Which entry of the initial and of the last state position p is; out of range where none.
  int64_t initial_index(int64_t p) const {
    return in_.filter[0].reverse ? reach_ - 1 - (p - in_.length) : p + reach_;
  }
  int64_t last_index(int64_t p) const {
    return in_.filter[0].reverse ? reach_ - 1 - p : p - (in_.length - reach_);
  }

  struct Taps {
    int64_t begin, end;
  };
  // The taps of output t that meet inputs of its own sequence. What lies before and behind a row
  // belongs to the sequences next to it.
  template <bool kPacked>
  Taps taps_of(const ConvTask& task, int f, int64_t t) const {
    Taps taps{0, in_.width};
    if constexpr (!kPacked) return taps;
    const int64_t left = in_.filter[f].left, first = t - left;
    while (taps.begin < left && !joined(task, first + taps.begin, t)) ++taps.begin;
    while (taps.end > left + 1 && !joined(task, t, first + taps.end - 1)) --taps.end;
    return taps;
  }
  // Whether position p belongs to the last sequence in scan order.
  bool is_of_last(const ConvTask& task, int64_t p) const {
    return in_.filter[0].reverse ? joined(task, 0, p) : joined(task, p, in_.length - 1);
  }

  // Filter f at one vector of one output row whose first input row is `x`.
  template <bool kPacked>
  MMVIM_HD V convolve(const S* x, int f, const Taps& taps, int64_t c) const {
    V sum = load(bias_[f] + c);
    for (int64_t k = kPacked ? taps.begin : 0; k < (kPacked ? taps.end : in_.width); ++k) {
      sum = M::fma(load(x + k * kChannels + c), load(taps_[f] + k * kChannels + c), sum);
    }
    return sum;
  }

  const ConvInput& in_;
  const int64_t reach_;
  int64_t padded_ = 0;
  S *x_ = nullptr, *line_ = nullptr;
  S* taps_[2] = {nullptr, nullptr};
  S* bias_[2] = {nullptr, nullptr};

 private:
  // Whether one sequence holds the positions [first, last].
  bool joined(const ConvTask& task, int64_t first, int64_t last) const {
    if (in_.seq_idx == nullptr) return true;
    const int32_t* row = in_.seq_idx + task.batch * in_.length;
    for (int64_t p = larger(first, 0) + 1; p <= smaller(last, in_.length - 1); ++p) {
      if (row[p] != row[p - 1]) return false;
    }
    return true;
  }

  void* state_at(const ConvTask& task, const ConvState& state, int64_t index) const {
    const int64_t at = (task.batch * in_.channels + task.channel) * reach_ + index;
    return static_cast<char*>(state.data) + at * element_size(state.dtype);
  }
};

template <class S, bool kPacked>
class ConvForward : ConvWorker<S> {
  using Base = ConvWorker<S>;
  using typename Base::M;
  using typename Base::V;

 public:
  explicit ConvForward(const ConvForwardArgs& args) : Base(args.in), a_(args) {
    for (int pass = 0; pass < 2; ++pass) {
      this->take_common(arena_, kTile + 2 * this->reach_);
      if (pass == 0) arena_.reserve();
    }
  }

  void run(const ConvTask& task) {
    const ConvInput& in = a_.in;
    this->load_taps(task);
    const int64_t begin = task.chunk * kChunk, end = smaller(begin + kChunk, in.length);
    for (int64_t t = begin; t < end; t += kTile) tile(task, t, smaller(t + kTile, end));
    if (a_.last.data != nullptr && task.chunk == 0) {
      const int64_t first = in.filter[0].reverse ? 0 : in.length - this->reach_;
      this->load_input(task, first, first + this->reach_);
      for (int64_t i = 0; i < this->reach_; ++i) {
        if (kPacked && !this->is_of_last(task, first + i)) {
          fill(this->x_ + i * kChannels, S(0), this->padded_);
        }
        this->store_state(task, a_.last, this->last_index(first + i), this->x_ + i * kChannels);
      }
    }
  }

 private:
  void tile(const ConvTask& task, int64_t begin, int64_t end) {
    const ConvInput& in = a_.in;
    int64_t before = 0, after = 0;
    for (int f = 0; f < in.filters; ++f) {
      before = larger(before, in.filter[f].left);
      after = larger(after, this->reach_ - in.filter[f].left);
    }
    this->load_input(task, begin - before, end + after);
    for (int f = 0; f < in.filters; ++f) {
      for (int64_t t = begin; t < end; ++t) {
        const S* x = this->x_ + (t - begin + before - in.filter[f].left) * kChannels;
        const auto taps = this->template taps_of<kPacked>(task, f, t);
        for (int64_t c = 0; c < this->padded_; c += kLanes<S>) {
          V y = this->template convolve<kPacked>(x, f, taps, c);
          if (in.silu) y = y * M::sigmoid(y);
          store(this->line_ + c, y);
        }
        store_row(a_.out[f].at(task.batch, t, task.channel), a_.out[f].dtype, this->line_,
                  task.count);
      }
    }
  }

  const ConvForwardArgs& a_;
  Arena arena_;
};

// Gradients of weights and biases are summed per chunk of time and batch entry, and those sums in a
// fixed order: the cut depends on the shape alone.
template <class S, bool kPacked>
class ConvBackward : ConvWorker<S> {
  using Base = ConvWorker<S>;
  using typename Base::M;
  using typename Base::V;

 public:
  ConvBackward(const ConvBackwardArgs& args, S* partial)
      : Base(args.in), a_(args), partial_(partial) {
    for (int pass = 0; pass < 2; ++pass) {
      this->take_common(arena_, kTile + 2 * this->reach_);
      dpre_ = arena_.template take<S>((kTile + this->reach_) * kChannels);
      dx_ = arena_.template take<S>(kTile * kChannels);
      for (int f = 0; f < a_.in.filters; ++f) {
        sums_[f] = arena_.template take<S>((kMaxWidth + 1) * kChannels);
      }
      if (pass == 0) arena_.reserve();
    }
  }

  void run(const ConvTask& task) {
    const ConvInput& in = a_.in;
    this->load_taps(task);
    for (int f = 0; f < in.filters; ++f) fill(sums_[f], S(0), (kMaxWidth + 1) * kChannels);
    // The first and the last chunk also own the positions before and after the input.
    int64_t begin = task.chunk * kChunk, end = smaller(begin + kChunk, in.length);
    if (in.initial.data != nullptr) {
      if (task.chunk == 0) begin -= in.filter[0].left;
      if (task.chunk + 1 == ConvTask::chunk_count(in)) end += this->reach_ - in.filter[0].left;
    }
    for (int64_t p = begin; p < end; p += kTile) tile(task, p, smaller(p + kTile, end));
    const int64_t rows = in.width + 1;
    for (int f = 0; f < in.filters; ++f) {
      const int64_t slot = (task.batch * ConvTask::chunk_count(in) + task.chunk) * in.filters + f;
      for (int64_t k = 0; k < rows; ++k) {
        const S* from = sums_[f] + (k < in.width ? k : kMaxWidth) * kChannels;
        std::memcpy(partial_ + (slot * rows + k) * in.channels + task.channel, from,
                    task.count * sizeof(S));
      }
    }
  }

 private:
  void tile(const ConvTask& task, int64_t begin, int64_t end) {
    const ConvInput& in = a_.in;
    const int64_t reach = this->reach_;
    this->load_input(task, begin - reach, end + reach);
    for (int64_t p = begin; p < end; ++p) {
      const bool has_last = a_.grad_last.data != nullptr && (!kPacked || this->is_of_last(task, p));
      this->load_state(dx_ + (p - begin) * kChannels, task, a_.grad_last,
                       has_last ? this->last_index(p) : -1);
    }
    for (int f = 0; f < in.filters; ++f) filter(task, f, begin, end);
    for (int64_t p = begin; p < end; ++p) {
      const S* row = dx_ + (p - begin) * kChannels;
      if (p >= 0 && p < in.length) {
        store_row(a_.dx.at(task.batch, p, task.channel), a_.dx.dtype, row, task.count);
      } else {
        this->store_state(task, a_.dinitial, this->initial_index(p), row);
      }
    }
  }

  // Adds filter f's part of the gradient of positions [begin, end) to dx_.
  void filter(const ConvTask& task, int f, int64_t begin, int64_t end) {
    const ConvInput& in = a_.in;
    const int64_t width = in.width, left = in.filter[f].left, reach = this->reach_;
    // Outputs that see these positions.
    const int64_t first = larger(begin + left - reach, 0);
    const int64_t last = smaller(end + left, in.length);
    for (int64_t t = first; t < last; ++t) {
      S* g = dpre_ + (t - first) * kChannels;
      load_padded(g, a_.grad[f], task.batch, t, task.channel, task.count,
                  static_cast<int>(this->padded_));
      const S* x = this->x_ + (t - left - (begin - reach)) * kChannels;
      const bool own = t >= begin && t < end;
      const auto taps = this->template taps_of<kPacked>(task, f, t);
      if (kPacked) seen_[t - first] = taps;
      for (int64_t c = 0; c < this->padded_; c += kLanes<S>) {
        V v = load(g + c);
        if (in.silu) {
          const V pre = this->template convolve<kPacked>(x, f, taps, c);
          v = v * M::silu_slope(pre, M::sigmoid(pre));
          store(g + c, v);
        }
        if (!own) continue;
        for (int64_t k = kPacked ? taps.begin : 0; k < (kPacked ? taps.end : width); ++k) {
          S* sum = sums_[f] + k * kChannels + c;
          store(sum, M::fma(v, load(x + k * kChannels + c), load(sum)));
        }
        S* sum = sums_[f] + kMaxWidth * kChannels + c;
        store(sum, load(sum) + v);
      }
    }
    for (int64_t p = begin; p < end; ++p) {
      S* dx = dx_ + (p - begin) * kChannels;
      for (int64_t k = 0; k < width; ++k) {
        const int64_t t = p + left - k;
        if (t < first || t >= last) continue;
        if (kPacked && (k < seen_[t - first].begin || k >= seen_[t - first].end)) continue;
        const S* g = dpre_ + (t - first) * kChannels;
        const S* tap = this->taps_[f] + k * kChannels;
        for (int64_t c = 0; c < this->padded_; c += kLanes<S>) {
          store(dx + c, M::fma(load(g + c), load(tap + c), load(dx + c)));
        }
      }
    }
  }

  const ConvBackwardArgs& a_;
  S* partial_;
  Arena arena_;
  S *dpre_ = nullptr, *dx_ = nullptr;
  typename Base::Taps seen_[kTile + kMaxWidth];  // by the outputs of a tile
  S* sums_[2] = {nullptr, nullptr};
};

template <class S, bool kPacked>
void forward(const ConvForwardArgs& args) {
  parallel(ConvTask::count_of(args.in), [&](int64_t begin, int64_t end) {
    ConvForward<S, kPacked> worker(args);
    for (int64_t i = begin; i < end; ++i) worker.run(ConvTask(args.in, i));
  });
}

template <class S, bool kPacked>
void backward(const ConvBackwardArgs& args) {
  const ConvInput& in = args.in;
  const int64_t slots = in.batch * ConvTask::chunk_count(in), rows = in.width + 1;
  Arena arena;
  arena.take<S>(slots * in.filters * rows * in.channels);
  arena.reserve();
  S* partial = arena.take<S>(slots * in.filters * rows * in.channels);
  parallel(ConvTask::count_of(in), [&](int64_t begin, int64_t end) {
    ConvBackward<S, kPacked> worker(args, partial);
    for (int64_t i = begin; i < end; ++i) worker.run(ConvTask(in, i));
  });
  parallel(in.filters * rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t f = i / rows, k = i % rows;
      const bool is_bias = k == in.width;
      S* out = static_cast<S*>(is_bias ? args.dbias[f] : args.dweight[f]);
      if (out == nullptr) continue;
      const int64_t step = is_bias ? 1 : in.width;
      if (!is_bias) out += in.filter[f].reverse ? in.width - 1 - k : k;
      for (int64_t c = 0; c < in.channels; ++c) out[c * step] = S(0);
      for (int64_t s = 0; s < slots; ++s) {
        const S* sum = partial + ((s * in.filters + f) * rows + k) * in.channels;
        for (int64_t c = 0; c < in.channels; ++c) out[c * step] += sum[c];
      }
    }
  });
}

}  // namespace

void conv_forward(const ConvForwardArgs& args, bool is_double) {
  if (args.in.seq_idx != nullptr) {
    is_double ? forward<double, true>(args) : forward<float, true>(args);
  } else {
    is_double ? forward<double, false>(args) : forward<float, false>(args);
  }
}

void conv_backward(const ConvBackwardArgs& args, bool is_double) {
  if (args.in.seq_idx != nullptr) {
    is_double ? backward<double, true>(args) : backward<float, true>(args);
  } else {
    is_double ? backward<double, false>(args) : backward<float, false>(args);
  }
}

}  // namespace MMVIM_ISA
}  // namespace mmvim
