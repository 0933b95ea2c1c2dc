// The randomised Hadamard transform H D / sqrt(size): which signs D flips, and the factor. The butterfly is the caller's: for
// half = 1, 2, 4, .. size / 2 in this order, every pair (a, b) at distance `half` becomes (a + b, a - b).
#pragma once
#include "macros.h"
#include "philox.h"

namespace dynfed {

constexpr int64_t kRotateBlock = 8192;  // the largest block

enum : uint32_t { kRotateBlocks = 1, kRotateTail = 2 };  // counter word c2: the pass; rounding uses 0

// 128 flips: value i of a pass flips if bit i % 128 of this block for i / 128 is set. `first` is the row's offset / 8.
DYNFED_INLINE PhiloxBlock rotate_flips(uint64_t seed, uint64_t first, uint64_t i128, uint32_t pass) {
  const uint64_t group = first + i128;
  return philox4x32(seed, uint32_t(group), uint32_t(group >> 32), pass, 0);
}

// The block size of a row of `length` >= 1 values: the largest power of two in both.
DYNFED_INLINE int64_t rotate_size(int64_t length, int64_t block) {
  int64_t size = 1;
  while (2 * size <= length && 2 * size <= block) size *= 2;
  return size;
}

// size ^ -1/2 rounded once, for a power of two.
DYNFED_INLINE float rotate_factor(int64_t size) {
  float factor = 1.0f;
  for (; size >= 4; size /= 4) factor *= 0.5f;
  return size == 2 ? factor * 0.70710678118654752f : factor;
}

}  // namespace dynfed
