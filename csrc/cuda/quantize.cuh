// The pieces of quantisation: eight neighbouring values in, eight codes out. One thread holds all eight values of a Philox
// block, so that each block is computed once.
#pragma once
#include "../core/eden.h"
#include "../core/philox.h"
#include "../core/quantize.h"
#include "device.cuh"

namespace dynfed::cuda {

struct QuantizeItem {
  const void* x;
  uint8_t* packed;
  float* scales;
  int64_t n;
  uint64_t offset;
  int64_t end;
  int64_t bucket;
  DType dtype;
  int16_t bits;
  int16_t span_log2;  // how many lanes share a bucket: a power of two, at most a warp
};

struct QuantizeList {
  static constexpr int kCapacity = 63;
  QuantizeItem item[kCapacity];
  uint64_t seed;
  int64_t units;
  int32_t count;
};
static_assert(sizeof(QuantizeList) <= kParameterBytes, "a list is passed as parameters");

// The larger magnitude; NaN if one of them is, which `largest` then shows as the integer maximum would: above all numbers.
__device__ __forceinline__ float larger_magnitude(float a, float b) {
#ifdef __CUDA_ARCH__
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(fabsf(b)));
  return y;
#else
  return magnitude(a) > magnitude(b) ? fabsf(a) : fabsf(b);
#endif
}

// fixed_point of the core, with 0 for NaN: a bucket with a value that is not finite has an inverse of 0.
__device__ __forceinline__ int32_t to_units(float x, float inverse) { return __float2int_rz(__fmul_rn(x, inverse)); }

__device__ __forceinline__ uint32_t one_bit(float x, uint32_t largest) {
  return x >= 0.0f || largest >= kInfinityBits ? 1u : 0u;
}

struct SquareRoot {
  __device__ __forceinline__ float operator()(float x) const { return __fsqrt_rn(x); }
};

// Sums and maxima over `span` neighbouring lanes, known to all of them.
__device__ __forceinline__ uint32_t span_max(uint32_t x, int span) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2)
    if (d < span) x = max(x, __shfl_xor_sync(kAllLanes, x, d));
  return x;
}

template <class T>
__device__ __forceinline__ T span_sum(T x, int span) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2)
    if (d < span) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}

// The 16 random bits of element i of eight neighbours that share a block.
__device__ __forceinline__ int32_t noise(const PhiloxBlock& block, int i) {
  return int32_t(i % 2 == 0 ? block.word[i / 2] & 0xffffu : block.word[i / 2] >> 16);
}

// The eight random numbers from global index `index` on, which need not be a multiple of 8.
__device__ __forceinline__ PhiloxBlock unaligned_block(uint64_t seed, uint64_t index) {
  const PhiloxBlock a = element_block(seed, index >> 3);
  const int skip = int(index & 7);
  if (skip == 0) return a;
  const PhiloxBlock b = element_block(seed, (index >> 3) + 1);
  uint32_t words[8] = {a.word[0], a.word[1], a.word[2], a.word[3], b.word[0], b.word[1], b.word[2], b.word[3]};
  // Shifted in steps of 4, 2 and 1 numbers: an index known only at run time would move the words to memory.
#pragma unroll
  for (int step = 4; step >= 2; step /= 2) {
#pragma unroll
    for (int i = 0; i + step / 2 < 8; ++i) words[i] = skip & step ? words[i + step / 2] : words[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = skip & 1 ? __funnelshift_r(words[i], words[i + 1], 16) : words[i];
  return {{words[0], words[1], words[2], words[3]}};
}

}  // namespace dynfed::cuda
