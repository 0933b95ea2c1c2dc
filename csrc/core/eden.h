// Nearest rounding in steps of the root mean square, with EDEN's unbiased scale (Vargaftik et al., ICML 2022, section 3.1):
// sum(x * x) / sum(x * level) over a bucket. Both sums are of integers, x in units of the largest magnitude / 2^20, so their
// order does not matter. A bucket has at most kEdenBucket values: then no integer here overflows.
#pragma once
#include "macros.h"
#include "quantize.h"

namespace dynfed {

constexpr int64_t kEdenBucket = 65536;

// The step, in root mean squares, of least error for normally distributed values (dynfed_lightning/_reference.py).
DYNFED_INLINE float eden_step(int bits) {
  switch (bits) {
    case 2: return bit_cast<float>(0x3f863bcdu);   // 1.0487
    case 3: return bit_cast<float>(0x3f1a36e3u);   // 0.6024
    case 4: return bit_cast<float>(0x3ead844du);   // 0.3389
    case 5: return bit_cast<float>(0x3e410625u);   // 0.1885
    case 6: return bit_cast<float>(0x3dd566cfu);   // 0.1042
    case 7: return bit_cast<float>(0x3d683e42u);   // 0.0567
    default: return bit_cast<float>(0x3cfb7e91u);  // 0.0307
  }
}

// A bucket that counts as zero, or is not finite, has no units: everything is level 0.
DYNFED_INLINE bool eden_usable(uint32_t largest) { return largest > kTinyBits && largest < kInfinityBits; }

// First pass. fixed_point(x, eden_inverse(largest)) is x in units, at most 2^20 of them; the energy is the sum of their squares.
DYNFED_INLINE float eden_inverse(uint32_t largest) {
  return eden_usable(largest) ? 1048576.0f / bit_cast<float>(largest) : 0.0f;
}

// Second pass. float(units) * eden_inverse_step is a value in units of 2^-16 of a level; below 2^30.
template <class Sqrt>
DYNFED_INLINE float eden_inverse_step(uint32_t largest, int64_t energy, int64_t count, int bits, Sqrt sqrt_rn) {
  if (!eden_usable(largest)) return 0.0f;
  return 65536.0f / (eden_step(bits) * sqrt_rn(float(energy) / float(count)));
}

DYNFED_INLINE int32_t eden_level(int32_t units, float inverse_step, int bits) {
  const int32_t level = (fixed_point(float(units), inverse_step) + 32768) >> 16, top = 1 << (bits - 1);
  return level < -top ? -top : level > top - 1 ? top - 1 : level;
}

// dot: the sum of units * level; with one bit, of |units|.
DYNFED_INLINE float eden_scale(uint32_t largest, int64_t energy, int64_t dot) {
  if (largest >= kInfinityBits) return quiet_nan();
  if (largest <= kTinyBits) return 0.0f;
  return (bit_cast<float>(largest) * 0.00000095367431640625f) * (float(energy) / float(dot));  // 2^-20
}

}  // namespace dynfed
