// The part of ONNX Runtime's C interface that custom operators use. Its headers are in no Python
// package, so that building would need a second download. The interface is versioned: functions are
// known by their places in a table, and neither they nor the fields of CustomOp ever move.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define MMVIM_ORT_CALL __stdcall
#else
#define MMVIM_ORT_CALL
#endif

namespace mmvim {
namespace ort {

// ONNX Runtime 1.17, the first one whose thread pool custom operators can use.
constexpr uint32_t kVersion = 17;

struct Status;
struct Value;
struct Shape;  // of a tensor, with its element type
struct Options;
struct Domain;
struct KernelInfo;
struct Context;  // of one call of a kernel
struct ShapeContext;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kInt32 = 6 };
enum Presence : int { kRequired = 0, kOptional = 1 };

using Table = const void* const*;

struct Base {
  Table(MMVIM_ORT_CALL* table)(uint32_t version);
  const char*(MMVIM_ORT_CALL* version)();
};

// Calls the function at a place of the table.
template <class Result, class... Arguments>
Result call(Table table, int place, Arguments... arguments) {
  using Function = Result(MMVIM_ORT_CALL*)(Arguments...);
  return reinterpret_cast<Function>(const_cast<void*>(table[place]))(arguments...);
}

class Api {
 public:
  explicit Api(Table table) : table_(table) {}

  Status* error(ErrorCode code, const char* message) const {
    return call<Status*>(table_, 0, static_cast<int>(code), message);
  }
  Status* create_domain(const char* name, Domain** out) const {
    return call<Status*>(table_, 26, name, out);
  }
  Status* add(Domain* domain, const struct CustomOp* op) const {
    return call<Status*>(table_, 27, domain, op);
  }
  Status* add(Options* options, Domain* domain) const {
    return call<Status*>(table_, 28, options, domain);
  }
  Status* data(Value* value, void** out) const { return call<Status*>(table_, 51, value, out); }
  Status* rank(const Shape* shape, size_t* out) const {
    return call<Status*>(table_, 61, shape, out);
  }
  Status* sizes(const Shape* shape, int64_t* out, size_t rank) const {
    return call<Status*>(table_, 62, shape, out, rank);
  }
  Status* shape(const Value* value, Shape** out) const {
    return call<Status*>(table_, 65, value, out);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const {
    return call<Status*>(table_, 86, info, name, out);
  }
  // `size`: of `out`, then of the text with its final zero.
  Status* attribute(const KernelInfo* info, const char* name, char* out, size_t* size) const {
    return call<Status*>(table_, 87, info, name, out, size);
  }
  Status* input_count(const Context* context, size_t* out) const {
    return call<Status*>(table_, 88, context, out);
  }
  Status* input(const Context* context, size_t index, const Value** out) const {
    return call<Status*>(table_, 90, context, index, out);
  }
  Status* output(Context* context, size_t index, const int64_t* sizes, size_t rank,
                 Value** out) const {
    return call<Status*>(table_, 91, context, index, sizes, rank, out);
  }
  void release(Status* status) const { call<void>(table_, 93, status); }
  void release(Shape* shape) const { call<void>(table_, 99, shape); }
  Status* stream(const Context* context, void** out) const {
    return call<Status*>(table_, 193, context, out);
  }
  // Calls body(data, i) for all i below `count`, in the session's threads.
  Status* parallel_for(const Context* context, void (*body)(void*, size_t), size_t count,
                       void* data) const {
    return call<Status*>(table_, 274, context, body, count, size_t{0}, data);
  }

 private:
  Table table_;
};

// An operator for one kind of device, as a table of functions.
struct CustomOp {
  template <class Result, class... Arguments>
  using Method = Result(MMVIM_ORT_CALL*)(const CustomOp*, Arguments...);

  uint32_t version = kVersion;
  Method<void*, Table, const KernelInfo*> create_kernel_v1 = nullptr;
  Method<const char*> name = nullptr;
  Method<const char*> provider = nullptr;
  Method<int, size_t> input_type = nullptr;
  Method<size_t> input_count = nullptr;
  Method<int, size_t> output_type = nullptr;
  Method<size_t> output_count = nullptr;
  void(MMVIM_ORT_CALL* compute_v1)(void* kernel, Context*) = nullptr;
  void(MMVIM_ORT_CALL* destroy_kernel)(void* kernel) = nullptr;
  Method<int, size_t> input_presence = nullptr;
  Method<int, size_t> output_presence = nullptr;
  Method<int, size_t> input_memory = nullptr;
  Method<int> variadic[4] = {};
  Method<Status*, Table, const KernelInfo*, void**> create_kernel = nullptr;
  Status*(MMVIM_ORT_CALL* compute)(void* kernel, Context*) = nullptr;
  Method<Status*, ShapeContext*> infer_shapes = nullptr;
  Method<int> first_version = nullptr;
  Method<int> last_version = nullptr;
};

}  // namespace ort
}  // namespace mmvim
