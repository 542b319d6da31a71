// Memory for what lives no longer than one call of a mixer, and for what it leaves together: one
// allocation each, cut into tensors. An allocation takes the host of a GPU as long as half a
// launch, and a mixer makes dozens.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace mmvim {

// Where parts of one allocation start.
inline int64_t padded_bytes(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// A contiguous tensor from byte `begin` of `memory` on.
inline at::Tensor part_of(const at::Tensor& memory, int64_t begin, at::IntArrayRef sizes,
                          caffe2::TypeMeta type) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(memory.storage()), memory.key_set(), type);
  impl->set_storage_offset(begin / static_cast<int64_t>(type.itemsize()));
  impl->set_sizes_contiguous(sizes);
  return at::Tensor(std::move(impl));
}

// Tensors that lie side by side, and live as long as the last of them.
class Neighbours {
 public:
  explicit Neighbours(const at::Tensor& device_of)
      : options_(device_of.options().dtype(at::kByte)) {}

  // Before the first tensor is taken.
  void expect(at::IntArrayRef sizes, at::ScalarType type) {
    bytes_ +=
        padded_bytes(c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(type)));
  }
  // A tensor of its own where no room is left.
  at::Tensor take(at::IntArrayRef sizes, at::ScalarType type) {
    const auto meta = c10::scalarTypeToTypeMeta(type);
    const int64_t begin = used_, bytes = padded_bytes(c10::multiply_integers(sizes) *
                                                      static_cast<int64_t>(meta.itemsize()));
    if (begin + bytes > bytes_) return at::empty(sizes, options_.dtype(type));
    if (!memory_.defined()) memory_ = at::empty({bytes_}, options_);
    used_ += bytes;
    return part_of(memory_, begin, sizes, meta);
  }

 private:
  at::TensorOptions options_;
  at::Tensor memory_;
  int64_t bytes_ = 0, used_ = 0;
};

class Scratch {
 public:
  // In force in this thread while it lives. No bytes: nothing is in force.
  Scratch(int64_t bytes, const at::Tensor& like) : outer_(current()) {
    if (bytes > 0) memory_ = at::empty({bytes}, like.options().dtype(at::kByte));
    current() = bytes > 0 ? this : nullptr;
  }
  ~Scratch() { current() = outer_; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // A contiguous tensor; one of its own where none is in force, or it is full.
  static at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    Scratch* s = current();
    if (s != nullptr) {
      const int64_t bytes = bytes_of(sizes, options);
      if (s->used_ + bytes <= s->memory_.numel()) {
        const int64_t begin = s->used_;
        s->used_ += padded_bytes(bytes);
        return part_of(s->memory_, begin, sizes, options.dtype());
      }
    }
    return at::empty(sizes, options);
  }

  // Zeros: the block that zeros_to_make() gave out, once and if they fit.
  static at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options) {
    Scratch* s = current();
    if (s == nullptr || bytes_of(sizes, options) > s->zero_bytes_) return at::zeros(sizes, options);
    s->zero_bytes_ = 0;
    return part_of(s->memory_, s->zeros_, sizes, options.dtype());
  }
  // A block that the caller clears before zeros() is called; undefined if there is no room.
  at::Tensor zeros_to_make(int64_t floats) {
    if (used_ + 4 * floats > memory_.numel()) return {};
    zeros_ = used_;
    zero_bytes_ = 4 * floats;
    return empty({floats}, memory_.options().dtype(at::kFloat));
  }

  static bool in_force() { return current() != nullptr; }
  // Whether `t` ends with the scratch memory in force.
  static bool owns(const at::Tensor& t) {
    const Scratch* s = current();
    return s != nullptr &&
           t.storage().unsafeGetStorageImpl() == s->memory_.storage().unsafeGetStorageImpl();
  }

 private:
  at::Tensor memory_;
  int64_t used_ = 0, zeros_ = 0, zero_bytes_ = 0;
  Scratch* outer_;

  static int64_t bytes_of(at::IntArrayRef sizes, const at::TensorOptions& options) {
    return c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
  }

  static Scratch*& current() {
    static thread_local Scratch* scratch = nullptr;
    return scratch;
  }
};

}  // namespace mmvim
