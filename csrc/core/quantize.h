// One bucket's scale, one element's code, one code's level. dynfed_lightning/_reference.py is the specification.
#pragma once
#include "macros.h"

namespace dynfed {

constexpr uint32_t kMagnitude = 0x7fffffffu;     // all of a float32 but its sign
constexpr uint32_t kInfinityBits = 0x7f800000u;  // a larger magnitude is infinity or NaN
constexpr uint32_t kTinyBits = 0x0DA24260u;      // float32(1e-30): a bucket that nowhere exceeds it counts as zero
constexpr uint32_t kNearest = 32768u;            // the "random" bits that round to nearest

// Non-negative floats are ordered as their bit patterns, so a maximum of integers is one of floats, in any order.
DYNFED_INLINE uint32_t magnitude(float x) { return bit_cast<uint32_t>(x) & kMagnitude; }

DYNFED_INLINE bool is_finite_bucket(uint32_t largest) { return largest < kInfinityBits; }

DYNFED_INLINE float quiet_nan() { return bit_cast<float>(0x7fc00000u); }

// x * inverse is x in units of 2^-16 of a level. Zero for an all-zero bucket, and for one that is not finite.
DYNFED_INLINE float bucket_inverse(uint32_t largest, int bits) {
  if (largest <= kTinyBits || largest >= kInfinityBits) return 0.0f;
  const int levels = bits == 1 ? 1 : (1 << (bits - 1)) - 1;
  return float(65536 * levels) / bit_cast<float>(largest);
}

DYNFED_INLINE float bucket_scale(uint32_t largest, int bits) {
  if (largest >= kInfinityBits) return quiet_nan();
  if (largest <= kTinyBits) return 0.0f;
  return bit_cast<float>(largest) * (1.0f / float((1 << (bits - 1)) - 1));
}

// One bit: the mean magnitude, from the integer sum of the magnitudes in units of largest / 65536.
DYNFED_INLINE float one_bit_scale(uint32_t largest, int64_t total, int64_t count) {
  if (largest >= kInfinityBits) return quiet_nan();
  if (largest <= kTinyBits) return 0.0f;
  return (bit_cast<float>(largest) * 0.0000152587890625f) * (float(total) / float(count));  // 2^-16
}

// Towards zero, in units of 2^-16 of a level; |x * inverse| < 2^23.
DYNFED_INLINE int32_t fixed_point(float x, float inverse) { return int32_t(x * inverse); }

DYNFED_INLINE uint8_t code_of(float x, float inverse, uint32_t r16, int bits) {
  return uint8_t(((fixed_point(x, inverse) + int32_t(r16)) >> 16) + (1 << (bits - 1)));
}

DYNFED_INLINE uint8_t one_bit_code(float x) { return x >= 0.0f ? 1 : 0; }

// The level a code stands for: -2^(bits-1) .. 2^(bits-1) - 1, or -1 and +1 for one bit.
DYNFED_INLINE int32_t level_of(uint8_t code, int bits) {
  return bits == 1 ? 2 * int32_t(code) - 1 : int32_t(code) - (1 << (bits - 1));
}

}  // namespace dynfed
