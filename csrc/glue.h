// What ops.cpp and soft.cpp share: the kernels of an instruction set, and tensors as the kernels take them.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <chrono>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"

namespace dynfed {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kCacheBytes = 32 << 20;      // an output of this size is in no cache when it is read
constexpr int64_t kElementsPerThread = 32768;  // about 10 us of work; less is not worth waking a thread

inline int64_t best_isa() {
#ifdef DYNFED_X86
  static const int64_t best = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c") ||
        !__builtin_cpu_supports("bmi2"))
      return 1;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
      return 2;
    return __builtin_cpu_supports("avx512vbmi") ? 4 : 3;
  }();
  return best;
#else
  return 1;
#endif
}

inline const Kernels& kernels(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= best_isa(), "Expected `isa` to be from 0 to ", best_isa(), ", but got ", isa, ".");
#ifdef DYNFED_X86
  const int64_t level = isa == 0 ? best_isa() : isa;
  if (level == 4) return kAvx512VbmiKernels;
  if (level == 3) return kAvx512Kernels;
  if (level == 2) return kAvx2Kernels;
#endif
  return kScalarKernels;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

inline void check_buffer(const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == dtype, "Expected `", name,
                  "` to be a contiguous CPU tensor of the right type.");
}

inline void check_buffer(const char* name, const Tensor& t, ScalarType dtype, int64_t size) {
  check_buffer(name, t, dtype);
  STD_TORCH_CHECK(t.numel() == size, "Expected `", name, "` to have ", size, " elements, but got ", t.numel(), ".");
}

// Asks for huge pages under a large output before it is first written. A fresh 256 MiB otherwise costs 65536 page faults, which
// is several times what the kernels cost; memory that has its pages already is left as it is. Where this fails nothing is lost.
// A virtual machine may have given free huge pages back to its host, and then waits milliseconds for each: so every page is
// touched here, and after the first slow one the rest, and the next outputs, do with small pages.
inline void expect_writes(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  constexpr auto kSlow = std::chrono::microseconds(1000);  // a page at hand takes 100 to 200, one of the host's 2700 here
  constexpr int kPause = 16;
  static std::atomic<int> pause{0};
  if (bytes < int64_t(2 * kHugePage)) return;
  if (pause.load(std::memory_order_relaxed) > 0) {
    pause.fetch_sub(1, std::memory_order_relaxed);
    return;
  }
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(kHugePage - 1);
  if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) != 0) return;
  auto before = std::chrono::steady_clock::now();
  for (uintptr_t page = begin; page < end; page += kHugePage) {
    __atomic_fetch_or(reinterpret_cast<uint8_t*>(page), 0, __ATOMIC_RELAXED);  // a write that changes nothing
    const auto now = std::chrono::steady_clock::now();
    if (now - before > kSlow) {
      madvise(reinterpret_cast<void*>(page), end - page, MADV_NOHUGEPAGE);
      pause.store(kPause, std::memory_order_relaxed);
      return;
    }
    before = now;
  }
#else
  (void)data, (void)bytes;
#endif
}

// Where a kernel writes a whole tensor.
template <class T>
T* output(const Tensor& t) {
  void* const data = t.mutable_data_ptr();
  expect_writes(data, t.numel() * int64_t(sizeof(T)));
  return static_cast<T*>(data);
}

struct Input {
  const char* data;
  int64_t n;
  DType dtype;
  int64_t item_size;
};

inline Input input(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "Expected `x` to be a tensor of float32, bfloat16 or float16.");
  check_buffer("x", x, type);
  const auto dtype = type == ScalarType::Float      ? DType::kFloat32
                     : type == ScalarType::BFloat16 ? DType::kBFloat16
                                                    : DType::kFloat16;
  return {static_cast<const char*>(x.const_data_ptr()), x.numel(), dtype, type == ScalarType::Float ? 4 : 2};
}

}  // namespace dynfed
