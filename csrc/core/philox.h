// Philox4x32-10 (Salmon et al., SC 2011) and the 16 random bits of an element.
#pragma once
#include "macros.h"

namespace dynfed {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxBlock {
  uint32_t word[4];
};

DYNFED_INLINE uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  // For the plain product nvcc adds a zero to every high half: a fifth more instructions in all.
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}

// Ten rounds over the counter (c0, c1, c2, c3) with the key (low half, high half of the seed).
DYNFED_INLINE PhiloxBlock philox4x32(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = wide_product(kPhiloxM0, c0), b = wide_product(kPhiloxM1, c2);
    const uint32_t next0 = uint32_t(b >> 32) ^ c1 ^ k0, next2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    c0 = next0;
    c2 = next2;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The block that elements 8 * group .. 8 * group + 7 share.
DYNFED_INLINE PhiloxBlock element_block(uint64_t seed, uint64_t group) {
  return philox4x32(seed, uint32_t(group), uint32_t(group >> 32), 0, 0);
}

// The 16-bit word of element `index` within its block.
DYNFED_INLINE uint32_t random16(const PhiloxBlock& block, uint64_t index) {
  const uint32_t h = uint32_t(index & 7);
  return (block.word[h >> 1] >> (16 * (h & 1))) & 0xffffu;
}

}  // namespace dynfed
