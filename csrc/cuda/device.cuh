// What the kernels share: their place in the grid, lists of work as parameters, aligned and unaligned access.
#pragma once
#include <cuda_runtime.h>

#include "../core/convert.h"
#include "../core/macros.h"
#include "launchers.h"

// A launch as one macro: the emulated build of the tests replaces it, and g++ knows no <<<>>>.
#ifndef DYNFED_LAUNCH
#define DYNFED_LAUNCH(kernel, grid, threads, stream, ...) \
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
// With `bytes` of shared memory whose size is known at run time, which the kernel finds by DYNFED_DYNAMIC_SHARED.
#define DYNFED_LAUNCH_SHARED(kernel, grid, threads, bytes, stream, ...) \
  kernel<<<grid, threads, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define DYNFED_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

namespace dynfed::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // in a thread block of every kernel
constexpr int kThreads = kWarps * kWarp;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr size_t kParameterBytes = 4096;  // the classic limit of a launch's parameters

__device__ __forceinline__ int lane_id() { return int(threadIdx.x % kWarp); }

__device__ __forceinline__ int warp_id() { return int(threadIdx.x / kWarp); }

__device__ __forceinline__ int64_t warp_in_grid() { return int64_t(blockIdx.x) * kWarps + warp_id(); }

inline unsigned blocks_for(int64_t warps) { return unsigned((warps + kWarps - 1) / kWarps); }

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// A list of rows of work given by value. Row r owns the units of work from rows[r - 1].end up to rows[r].end.
template <class Row>
__device__ __forceinline__ int row_of(const Row* rows, int count, int64_t unit) {
  int first = 0, last = count - 1;
  while (first < last) {
    const int middle = (first + last) / 2;
    if (unit < rows[middle].end) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  return first;
}

template <class Row>
__device__ __forceinline__ int64_t unit_within(const Row* rows, int row, int64_t unit) {
  return row == 0 ? unit : unit - rows[row - 1].end;
}

__device__ __forceinline__ bool is_aligned(const void* p, unsigned bytes) {
  return (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) == 0;
}

// ---- vectors that are read or written once: they should not push anything out of the caches ----

__device__ __forceinline__ float4 load4(const float* p) { return __ldcs(reinterpret_cast<const float4*>(p)); }

__device__ __forceinline__ void store4(float* p, float4 v) { __stcs(reinterpret_cast<float4*>(p), v); }

// ---- numbers of half precision ----

__device__ __forceinline__ float widen(float x) { return x; }

__device__ __forceinline__ float widen(BFloat16 x) { return to_float(x); }

__device__ __forceinline__ float widen(Float16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return to_float(x);
#endif
}

// The nearest number of half precision, ties to even.
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }

__device__ __forceinline__ void narrow(float x, BFloat16& to) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to = to_bfloat16(x);
#endif
}

__device__ __forceinline__ void narrow(float x, Float16& to) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to = to_float16(x);
#endif
}

// ---- eight neighbouring values ----

__device__ __forceinline__ void load8_vector(const float* x, float (&v)[8]) {
  const float4 a = load4(x), b = load4(x + 4);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

template <class T>
__device__ __forceinline__ void load8_vector(const T* x, float (&v)[8]) {
  const uint4 a = __ldcs(reinterpret_cast<const uint4*>(x));
  const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = widen(T{uint16_t(words[i / 2] >> 16 * (i % 2))});
}

// Values x[0] .. x[count - 1], then zeros. A count of 0 or less touches nothing.
template <class T>
__device__ __forceinline__ void load8(const T* x, int count, bool aligned, float (&v)[8]) {
  if (aligned && count >= 8) {
    load8_vector(x, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < count ? widen(x[i]) : 0.0f;
}

// f(pointer to values of the right type), for a type that is the same in all threads.
template <class F>
__device__ __forceinline__ void with_type(const void* x, DType dtype, const F& f) {
  if (dtype == DType::kFloat32) {
    f(static_cast<const float*>(x));
  } else if (dtype == DType::kBFloat16) {
    f(static_cast<const BFloat16*>(x));
  } else {
    f(static_cast<const Float16*>(x));
  }
}

// The first `count` of eight values, and nothing for a count of 0 or less.
template <class T>
__device__ __forceinline__ void store8(T* to, int count, bool aligned, const float (&v)[8]) {
  T narrowed[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) narrow(v[i], narrowed[i]);
  if (aligned && count >= 8) {
    uint32_t words[2 * sizeof(T)];
    memcpy(words, narrowed, sizeof(narrowed));
#pragma unroll
    for (int i = 0; i < int(sizeof(T)) / 2; ++i)
      __stcs(reinterpret_cast<uint4*>(to) + i, make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]));
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) to[i] = narrowed[i];
}

// ---- packed codes ----

// 32 bits of a stream of words, from bit `shift` < 32 on. `needed` of them are used: only then is the second word read.
__device__ __forceinline__ uint32_t window(const uint32_t* words, int shift, int needed) {
  return __funnelshift_r(__ldg(words), shift + needed > 32 ? __ldg(words + 1) : 0, shift);
}

// Where bit `at` of a stream of bytes is, in words: the words hold the bytes, wherever these begin.
struct BitPosition {
  const uint32_t* words;
  int shift;  // below 32
};

__device__ __forceinline__ BitPosition bit_position(const uint8_t* bytes, int64_t at) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(bytes) + uintptr_t(at >> 3);
  return {reinterpret_cast<const uint32_t*>(address & ~uintptr_t(3)), int(address & 3) * 8 + int(at & 7)};
}

// Eight codes of B bits, the first one lowest, in 8 * B bits.
template <int B>
__device__ __forceinline__ uint64_t join8(const uint32_t (&code)[8]) {
  const uint32_t low = code[0] | code[1] << B | code[2] << 2 * B | code[3] << 3 * B;
  const uint32_t high = code[4] | code[5] << B | code[6] << 2 * B | code[7] << 3 * B;
  return low | uint64_t(high) << 4 * B;
}

// The B bytes of eight codes, at a multiple of B bytes from an address that is a multiple of 16.
template <int B>
__device__ __forceinline__ void stage8(uint8_t* at, uint64_t codes) {
  if constexpr (B == 8) {
    *reinterpret_cast<uint64_t*>(at) = codes;
  } else if constexpr (B == 4) {
    *reinterpret_cast<uint32_t*>(at) = uint32_t(codes);
  } else if constexpr (B % 2 == 0) {
#pragma unroll
    for (int i = 0; i < B / 2; ++i) reinterpret_cast<uint16_t*>(at)[i] = uint16_t(codes >> 16 * i);
  } else {
#pragma unroll
    for (int i = 0; i < B; ++i) at[i] = uint8_t(codes >> 8 * i);
  }
}

constexpr int kStagePadding = 16;  // what copy_out may read beyond the bytes staged

// A warp writes `bytes` bytes staged in shared memory (at a multiple of 16) to wherever they belong, as wide as it allows.
__device__ __forceinline__ void copy_out(uint8_t* to, const uint8_t* staged, unsigned bytes) {
  const unsigned lane = lane_id();
  if (is_aligned(to, 16)) {
#pragma unroll 1
    for (unsigned i = lane * 16; i + 16 <= bytes; i += kWarp * 16)
      __stcs(reinterpret_cast<uint4*>(to + i), *reinterpret_cast<const uint4*>(staged + i));
    const unsigned rest = (bytes & ~15u) + lane;
    if (rest < bytes) to[rest] = staged[rest];
    return;
  }
  // Bytes up to a multiple of 4, words put together from two staged ones, and the bytes that remain.
  const unsigned head = min(unsigned(-reinterpret_cast<uintptr_t>(to) & 3), bytes), words = (bytes - head) / 4;
  if (lane < head) to[lane] = staged[lane];
  const auto* from = reinterpret_cast<const uint32_t*>(staged);
  auto* target = reinterpret_cast<uint32_t*>(to + head);
#pragma unroll 1
  for (unsigned i = lane; i < words; i += kWarp) target[i] = __funnelshift_r(from[i], from[i + 1], 8 * head);
  const unsigned rest = head + 4 * words + lane;
  if (rest < bytes) to[rest] = staged[rest];
}

}  // namespace dynfed::cuda
