// bfloat16 and float16 bit patterns to float32, which is exact, as every such value is a float32; and back, to nearest
// even, every NaN to a quiet one.
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

DYNFED_INLINE BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fc0u)};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

DYNFED_INLINE Float16 to_float16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above are nearer to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14 the values are multiples of 2^-24: the sum rounds to them
    const float sum = bit_cast<float>(magnitude) + 0.5f;  // whose last bit is 2^-24
    return {uint16_t(sign | (bit_cast<uint32_t>(sum) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13))};
}

}  // namespace dynfed
