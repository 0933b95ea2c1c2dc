// bfloat16 and float16 bit patterns to float32: exact, as every such value is a float32.
#pragma once
#include "macros.h"

namespace dynfed {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

DYNFED_INLINE float to_float(float x) { return x; }

DYNFED_INLINE float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

DYNFED_INLINE float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 0x3ffu;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24, exact
    return bit_cast<float>(sign | bit_cast<uint32_t>(magnitude));
  }
  return bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

}  // namespace dynfed
