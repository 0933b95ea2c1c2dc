// Runs CUDA kernels on the CPU, one fiber per CUDA thread and one block after the other, for the tests: g++ finds this file in
// the place of NVIDIA's and compiles the very .cu files that nvcc does. It finds wrong indices, tails and alignments,
// barriers that not all threads reach, and use of shared memory that was not asked for or not written. It finds no data races,
// unless the results differ where the threads run the other way round (DYNFED_SHIM_BACKWARDS), and says nothing about speed.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <functional>
#include <map>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks run one after the other

#define DYNFED_LAUNCH(kernel, grid, threads, stream, ...) \
  ((void)(stream), shim::launch(grid, threads, [&] { (kernel)(__VA_ARGS__); }))

#define DYNFED_LAUNCH_SHARED(kernel, grid, threads, bytes, stream, ...) \
  ((void)(stream), shim::allow((const void*)(kernel), bytes), shim::launch(grid, threads, [&] { (kernel)(__VA_ARGS__); }, bytes))
#define DYNFED_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(shim::machine.shared)

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace shim {

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kStack = 64 << 10;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = true;
  unsigned exchanges = 0;
};

struct Barrier {
  unsigned waiting = 0, generation = 0;
};

struct Machine {
  Fiber fibers[kMaxThreads];
  Barrier block, warps[kMaxThreads / kWarp];
  unsigned char slots[2][kMaxThreads][16];
  jmp_buf scheduler;
  std::function<void()> body;
  unsigned threads = 0;
  bool progress = false;
  unsigned char* shared = nullptr;
  std::map<const void*, size_t> allowed;  // dynamic shared memory, by kernel
};
inline Machine machine;

// What a GPU has: as on sm_90, or what the environment says.
inline int most_shared() {
  const char* given = std::getenv("DYNFED_SHIM_SHARED");
  return given == nullptr ? 232448 : std::atoi(given);
}

inline void allow(const void* kernel, size_t bytes) {
  const auto found = machine.allowed.find(kernel);
  if (bytes > (found == machine.allowed.end() ? size_t(48) << 10 : found->second)) fail("more shared memory than asked for");
}

// Dynamic shared memory: NaN in each new block, and what follows it must not be touched.
class Shared {
 public:
  explicit Shared(size_t bytes) : bytes_(bytes), page_(size_t(sysconf(_SC_PAGESIZE))) {
    if (bytes_ % 16 != 0) fail("shared memory is emulated in units of 16 bytes");
    inner_ = (bytes_ + page_ - 1) / page_ * page_;
    base_ = static_cast<unsigned char*>(mmap(nullptr, inner_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + inner_, page_, PROT_NONE) != 0) fail("no memory");
    machine.shared = base_ + inner_ - bytes_;
  }
  ~Shared() {
    munmap(base_, inner_ + page_);
    machine.shared = nullptr;
  }
  void poison() { std::memset(machine.shared, 0xff, bytes_); }

 private:
  size_t bytes_, page_, inner_;
  unsigned char* base_;
};

// _setjmp and _longjmp switch in a few nanoseconds; swapcontext asks the kernel each time.
inline __attribute__((noinline)) void yield() {
  if (_setjmp(machine.fibers[threadIdx.x].resume) == 0) _longjmp(machine.scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    machine.body();
    machine.fibers[threadIdx.x].done = true;
    machine.progress = true;
    yield();
  }
}

inline __attribute__((noinline)) void resume(unsigned thread) {
  Fiber& fiber = machine.fibers[thread];
  threadIdx.x = thread;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = std::malloc(kStack);
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

template <class F>
void launch(unsigned grid, unsigned threads, const F& body, size_t bytes = 0) {
  if (threads > kMaxThreads || threads % kWarp != 0) fail("this number of threads is not emulated");
  machine.body = body;
  machine.threads = threads;
  gridDim.x = grid;
  const bool backwards = std::getenv("DYNFED_SHIM_BACKWARDS") != nullptr;
  Shared shared(bytes);
  for (unsigned block = 0; block < grid; ++block) {
    blockIdx.x = block;
    shared.poison();
    for (unsigned t = 0; t < threads; ++t) machine.fibers[t].done = false;
    for (bool busy = true; busy;) {
      busy = machine.progress = false;
      for (unsigned i = 0; i < threads; ++i) {
        const unsigned t = backwards ? threads - 1 - i : i;
        if (machine.fibers[t].done) continue;
        busy = true;
        resume(t);
      }
      if (busy && !machine.progress) fail("threads wait at a barrier that others never reach");
    }
  }
}

inline void wait(Barrier& barrier, unsigned expected) {
  const unsigned generation = barrier.generation;
  if (++barrier.waiting == expected) {
    barrier.waiting = 0;
    ++barrier.generation;
    machine.progress = true;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void wait_warp(uint32_t mask) {
  if (mask != 0xffffffffu) fail("only whole warps are emulated");
  wait(machine.warps[threadIdx.x / kWarp], kWarp);
}

// Two sets of slots in turn: no lane can be two exchanges ahead of another.
template <class T>
T exchange(uint32_t mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 16, "");
  auto& slots = machine.slots[machine.fibers[threadIdx.x].exchanges++ % 2];
  std::memcpy(slots[threadIdx.x], &value, sizeof(T));
  wait_warp(mask);
  std::memcpy(&value, slots[threadIdx.x / kWarp * kWarp + source % kWarp], sizeof(T));
  return value;
}

template <class T>
const T* aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) fail("a misaligned access");
  return p;
}

}  // namespace shim

// ---- the part of CUDA that the kernels use ----

using std::abs;
using std::fabs;
using std::fma;
using std::max;
using std::min;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class T>
T __ldg(const T* p) {
  return *shim::aligned(p);
}
template <class T>
T __ldcs(const T* p) {
  return *shim::aligned(p);
}
template <class T>
void __stcs(T* p, T value) {
  shim::aligned(p);
  *p = value;
}
inline int atomicOr(int* p, int value) {
  const int before = *p;
  *p |= value;
  return before;
}

template <class T>
T atomicAdd(T* p, T value) {
  const T before = *shim::aligned(p);
  *p = before + value;
  return before;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t(((uint64_t(high) << 32) | low) >> (shift & 31));
}

inline void __syncthreads() { shim::wait(shim::machine.block, shim::machine.threads); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { shim::wait_warp(mask); }
template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
  return shim::exchange(mask, value, unsigned(source));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return shim::exchange(mask, value, (threadIdx.x % shim::kWarp) ^ unsigned(lanes));
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned lanes) {
  const unsigned lane = threadIdx.x % shim::kWarp;
  return shim::exchange(mask, value, lane < lanes ? lane : lane - lanes);
}
inline uint32_t __ballot_sync(uint32_t mask, bool value) {
  uint32_t bits = uint32_t(value) << threadIdx.x % shim::kWarp;
  for (int lanes = 1; lanes < int(shim::kWarp); lanes *= 2) bits |= __shfl_xor_sync(mask, bits, lanes);
  return bits;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline int __float2int_rz(float x) {
  if (std::isnan(x)) return 0;
  return x >= 2147483648.0f ? INT32_MAX : x <= -2147483648.0f ? INT32_MIN : int(x);
}

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = shim::most_shared();
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, int, int bytes) {
  if (bytes > shim::most_shared()) return cudaErrorInvalidValue;
  shim::machine.allowed[(const void*)(kernel)] = size_t(bytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
