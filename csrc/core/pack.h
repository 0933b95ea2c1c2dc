// Eight codes of B bits, a byte each in one 64-bit word, to and from the low 8 * B bits: neighbours are merged pair by pair.
#pragma once
#include "macros.h"

namespace dynfed {

template <int B>
DYNFED_INLINE uint64_t pack8(uint64_t w) {
  if (B == 8) return w;
  w = (w & 0x00ff00ff00ff00ffull) | ((w & 0xff00ff00ff00ff00ull) >> (8 - B));
  w = (w & 0x0000ffff0000ffffull) | ((w & 0xffff0000ffff0000ull) >> (16 - 2 * B));
  return (w & 0x00000000ffffffffull) | ((w & 0xffffffff00000000ull) >> (32 - 4 * B));
}

// Ones in the low `width` bits of every `period` bits.
DYNFED_INLINE constexpr uint64_t comb(int width, int period) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += period) mask |= ((uint64_t(1) << width) - 1) << at;
  return mask;
}

template <int B>
DYNFED_INLINE uint64_t unpack8(uint64_t w) {
  if (B == 8) return w;
  constexpr uint64_t by4 = comb((4 * B) & 63, 64), by2 = comb(2 * B, 32), by1 = comb(B, 16);
  w = (w & by4) | ((w << (32 - 4 * B)) & (by4 << 32));
  w = (w & by2) | ((w << (16 - 2 * B)) & (by2 << 16));
  return (w & by1) | ((w << (8 - B)) & (by1 << 8));
}

}  // namespace dynfed
