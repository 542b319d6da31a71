// mmvim::selective_scan as a custom operator of ONNX Runtime, without torch.
#include <atomic>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <new>
#include <string>
#include <thread>

#include "../common/runtime.h"
#include "../selective_scan/cpu_kernels.h"
#include "interface.h"
#include "scan.h"

namespace mmvim {
namespace {

using ort::Api;
using ort::Context;
using ort::CustomOp;
using ort::KernelInfo;
using ort::Status;
using ort::Table;
using ort::Value;

// The call that this thread is in: its session's threads serve parallel_for.
struct Call {
  const Api* api;
  const Context* context;
};
thread_local const Call* current = nullptr;

struct Error {
  ort::ErrorCode code;
  std::string message;
};

enum Input { kU, kDelta, kA, kB, kC, kD, kDeltaBias, kInitialState, kSeqIdx, kInputs };
constexpr const char* kNames[kInputs] = {"u",          "delta",         "A",      "B", "C", "D",
                                         "delta_bias", "initial_state", "seq_idx"};

void check(const Api& api, Status* status) {
  if (status == nullptr) return;
  api.release(status);
  throw Error{ort::kFail, "mmvim::selective_scan: ONNX Runtime refused a call"};
}

struct Tensor {
  static constexpr size_t kMaxRank = 4;
  int64_t sizes[kMaxRank] = {};
  size_t rank = 0;
  void* data = nullptr;  // null: absent

  std::string text() const {
    std::string s = "(";
    for (size_t i = 0; i < rank && i < kMaxRank; ++i) {
      s += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
    }
    return s + ")";
  }
  bool is(std::initializer_list<int64_t> wanted) const {
    if (rank != wanted.size()) return false;
    const int64_t* size = sizes;
    for (const int64_t w : wanted) {
      if (*size++ != w) return false;
    }
    return true;
  }
};

Tensor input(const Api& api, const Context* context, size_t index, size_t count) {
  Tensor t;
  const Value* value = nullptr;
  if (index < count) check(api, api.input(context, index, &value));
  if (value == nullptr) return t;
  ort::Shape* shape = nullptr;
  check(api, api.shape(value, &shape));
  Status* failed = api.rank(shape, &t.rank);
  if (failed == nullptr && t.rank <= Tensor::kMaxRank) failed = api.sizes(shape, t.sizes, t.rank);
  api.release(shape);
  check(api, failed);
  check(api, api.data(const_cast<Value*>(value), &t.data));
  // An empty tensor may have no memory.
  if (t.data == nullptr) t.data = &t;
  return t;
}

float* output(const Api& api, Context* context, size_t index,
              std::initializer_list<int64_t> sizes) {
  Value* value = nullptr;
  void* data = nullptr;
  check(api, api.output(context, index, sizes.begin(), sizes.size(), &value));
  check(api, api.data(value, &data));
  return static_cast<float*>(data);
}

// The attributes of a node.
struct Kernel {
  Api api;
  Discretization method = Discretization::kZoh;
  bool softplus = false, reverse = false;

  Kernel(Table table, const KernelInfo* info) : api(table) {
    int64_t flag = 0;
    check(api, api.attribute(info, "delta_softplus", &flag));
    softplus = flag != 0;
    check(api, api.attribute(info, "reverse", &flag));
    reverse = flag != 0;
    char name[32] = {};
    size_t size = sizeof(name);
    check(api, api.attribute(info, "discretization", name, &size));
    for (const Method& m : kMethods) {
      if (std::strcmp(name, m.name) == 0) {
        method = static_cast<Discretization>(&m - kMethods);
        return;
      }
    }
    throw Error{ort::kInvalidArgument,
                "mmvim::selective_scan: unknown discretization '" + std::string(name) + "'"};
  }

  OnnxScan scan(Context* context) const {
    size_t count = 0;
    check(api, api.input_count(context, &count));
    Tensor in[kInputs];
    for (size_t i = 0; i < kInputs; ++i) in[i] = input(api, context, i, count);
    const auto require = [&](Input i, std::initializer_list<int64_t> sizes) {
      if (in[i].data == nullptr && i > kC) return;
      if (in[i].data != nullptr && in[i].is(sizes)) return;
      Tensor wanted;
      for (const int64_t size : sizes) wanted.sizes[wanted.rank++] = size;
      throw Error{ort::kInvalidArgument, std::string("mmvim::selective_scan: ") + kNames[i] +
                                             " must have shape " + wanted.text() + ", got " +
                                             in[i].text()};
    };
    OnnxScan s;
    s.method = method;
    s.softplus = softplus;
    s.reverse = reverse;
    const int64_t b = s.batch = in[kU].sizes[0], l = s.length = in[kU].sizes[1];
    const int64_t d = s.channels = in[kU].sizes[2], n = s.states = in[kA].sizes[1];
    const int64_t g = s.groups = in[kB].sizes[2];
    require(kU, {b, l, d});
    require(kDelta, {b, l, d});
    require(kA, {d, n});
    require(kB, {b, l, g, n});
    require(kC, {b, l, g, n});
    if (g == 0 || d % g != 0 || n > 256) {
      throw Error{ort::kInvalidArgument,
                  "mmvim::selective_scan: the groups of B must divide the channels, and A must "
                  "have at most 256 states; got A " +
                      in[kA].text() + ", B " + in[kB].text()};
    }
    require(kD, {d});
    require(kDeltaBias, {d});
    require(kSeqIdx, {b, l});
    s.initial_parts = s.state_parts() == 2 && in[kInitialState].is({b, d, 2 * n}) ? 2 : 1;
    require(kInitialState, {b, d, s.initial_parts * n});
    const auto floats = [&](Input i) { return static_cast<const float*>(in[i].data); };
    s.u = floats(kU);
    s.delta = floats(kDelta);
    s.A = floats(kA);
    s.B = floats(kB);
    s.C = floats(kC);
    s.D = floats(kD);
    s.delta_bias = floats(kDeltaBias);
    s.initial_state = floats(kInitialState);
    s.seq_idx = static_cast<const int32_t*>(in[kSeqIdx].data);
    s.out = output(api, context, 0, {b, l, d});
    s.last_state = output(api, context, 1, {b, d, s.state_parts() * n});
    return s;
  }
};

View view(const float* data, int64_t length, int64_t channels) {
  View v;
  v.data = data;
  v.stride_b = length * channels;
  v.stride_l = channels;
  v.stride_d = 1;
  return v;
}

void run_cpu(const OnnxScan& s) {
  ScanForwardArgs a;
  a.shape.batch = s.batch;
  a.shape.length = s.length;
  a.shape.channels = s.channels;
  a.shape.states = s.states;
  a.shape.groups = s.groups;
  a.shape.method = s.method;
  a.shape.delta_softplus = s.softplus;
  a.shape.seq_idx = s.seq_idx;
  ScanInputs in;
  a.inputs = &in;
  in.u = view(s.u, s.length, s.channels);
  in.delta = view(s.delta, s.length, s.channels);
  in.B = {view(s.B, s.length, s.groups * s.states), s.states};
  in.C = {view(s.C, s.length, s.groups * s.states), s.states};
  in.groups = s.groups;
  in.A = s.A;
  in.D = s.D;
  in.delta_bias = s.delta_bias;
  in.reverse = s.reverse;
  a.initial_state = s.initial_state;
  a.initial_parts = s.initial_state == nullptr ? 0 : s.initial_parts;
  a.last_state = s.last_state;
  a.out.data = s.out;
  a.out.length = s.length;
  a.out.pitch = s.channels;
  MMVIM_PER_ISA(scan_forward)(a, false);
}

// Runs `body`, whose errors become a status.
template <class F>
Status* guarded(const Api& api, const F& body) {
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return api.error(error.code, error.message.c_str());
  } catch (const std::exception& error) {
    return api.error(ort::kFail, error.what());
  }
}

Status* MMVIM_ORT_CALL compute_cpu(void* kernel, Context* context) {
  const Kernel& k = *static_cast<const Kernel*>(kernel);
  const Call call{&k.api, context};
  return guarded(k.api, [&] {
    const OnnxScan scan = k.scan(context);
    current = &call;
    try {
      run_cpu(scan);
    } catch (...) {
      current = nullptr;
      throw;
    }
    current = nullptr;
  });
}

#if defined(MMVIM_BUILD_CUDA)
Status* MMVIM_ORT_CALL compute_cuda(void* kernel, Context* context) {
  const Kernel& k = *static_cast<const Kernel*>(kernel);
  return guarded(k.api, [&] {
    void* stream = nullptr;
    check(k.api, k.api.stream(context, &stream));
    const int code = onnx_scan_cuda(k.scan(context), static_cast<CUstream_st*>(stream));
    if (code != 0) {
      throw Error{ort::kFail, "mmvim::selective_scan: CUDA error " + std::to_string(code)};
    }
  });
}
#endif

CustomOp custom_op() {
  CustomOp op;
  op.name = [](const CustomOp*) { return "selective_scan"; };
  op.provider = [](const CustomOp*) -> const char* { return nullptr; };
  op.input_count = [](const CustomOp*) -> size_t { return kInputs; };
  op.output_count = [](const CustomOp*) -> size_t { return 2; };
  op.input_type = [](const CustomOp*, size_t i) -> int {
    return i == kSeqIdx ? ort::kInt32 : ort::kFloat;
  };
  op.output_type = [](const CustomOp*, size_t) -> int { return ort::kFloat; };
  op.input_presence = [](const CustomOp*, size_t i) -> int {
    return i > kC ? ort::kOptional : ort::kRequired;
  };
  op.output_presence = [](const CustomOp*, size_t) -> int { return ort::kRequired; };
  op.input_memory = [](const CustomOp*, size_t) { return 0; };
  for (auto& variadic : op.variadic) variadic = [](const CustomOp*) { return 1; };
  op.create_kernel = [](const CustomOp*, Table table, const KernelInfo* info, void** out) {
    return guarded(Api(table), [&] { *out = new Kernel(table, info); });
  };
  op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.compute = compute_cpu;
  op.first_version = [](const CustomOp*) { return 1; };
  op.last_version = [](const CustomOp*) { return INT32_MAX; };
  return op;
}

// All of this process: ONNX Runtime keeps pointers to them.
struct Operators {
  CustomOp cpu = custom_op();
  ort::Domain* domain = nullptr;
#if defined(MMVIM_BUILD_CUDA)
  CustomOp cuda = custom_op();
#endif

  explicit Operators(const Api& api) {
    check(api, api.create_domain("mmvim", &domain));
    check(api, api.add(domain, &cpu));
#if defined(MMVIM_BUILD_CUDA)
    cuda.provider = [](const CustomOp*) { return "CUDAExecutionProvider"; };
    cuda.compute = compute_cuda;
    check(api, api.add(domain, &cuda));
#endif
  }
};

}  // namespace

void parallel_for(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count <= 0) return;
  struct Ranges {
    void (*body)(void*, int64_t, int64_t);
    void* context;
    int64_t count, parts;
    std::exception_ptr failure;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
  };
  const int64_t threads = thread_count();
  Ranges ranges{body, context, count, count < threads ? count : threads, {}};
  const auto run = [](void* data, size_t i) {
    Ranges& r = *static_cast<Ranges*>(data);
    const int64_t part = static_cast<int64_t>(i);
    try {
      r.body(r.context, part * r.count / r.parts, (part + 1) * r.count / r.parts);
    } catch (...) {
      if (!r.failed.test_and_set()) r.failure = std::current_exception();
    }
  };
  const Call& call = *current;
  check(*call.api, call.api->parallel_for(call.context, run, ranges.parts, &ranges));
  if (ranges.failure) std::rethrow_exception(ranges.failure);
}

// The session's threads cannot be counted; parts beyond their number only wait.
int64_t thread_count() {
  static const int64_t count = std::thread::hardware_concurrency();
  return count > 0 ? count : 1;
}

void* allocate(size_t bytes) {
  return ::operator new(bytes == 0 ? 1 : bytes, std::align_val_t(64));
}

void release(void* memory) { ::operator delete(memory, std::align_val_t(64)); }

}  // namespace mmvim

#if defined(_WIN32)
#define MMVIM_EXPORT __declspec(dllexport)
#else
#define MMVIM_EXPORT __attribute__((visibility("default")))
#endif

// ONNX Runtime calls this when a session's options are told of the library.
extern "C" MMVIM_EXPORT mmvim::ort::Status* MMVIM_ORT_CALL
RegisterCustomOps(mmvim::ort::Options* options, const mmvim::ort::Base* base) {
  using namespace mmvim;
  const ort::Table table = base->table(ort::kVersion);
  if (table == nullptr) {
    // Version 1, which every ONNX Runtime has, to say so.
    return ort::Api(base->table(1))
        .error(ort::kFail, "mmvim's operators need ONNX Runtime 1.17 or later");
  }
  const ort::Api api(table);
  return guarded(api, [&] {
    static const Operators operators(api);
    check(api, api.add(options, operators.domain));
  });
}
