// Plain C++ for any CPU: what the other instruction sets must equal, bit for bit.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../core/convert.h"
#include "../core/pack.h"
#include "../core/philox.h"
#include "../core/quantize.h"
#include "kernels.h"

namespace dynfed {
namespace {

struct Scalar {
  struct Codes {
    uint8_t code[64];
  };
  using Maximum = uint32_t;

  static Codes load(const uint8_t* p) {
    Codes c;
    memcpy(c.code, p, 64);
    return c;
  }
  static void store(uint8_t* p, const Codes& c) { memcpy(p, c.code, 64); }
  static void merge(Codes& all, const Codes& c) {
    for (int i = 0; i < 64; ++i) all.code[i] |= c.code[i];
  }

  template <int kCount>
  static void noise(uint64_t seed, uint64_t group, uint16_t* out) {
    for (int g = 0; g < kCount / 8; ++g) {
      const PhiloxBlock block = element_block(seed, group + g);
      memcpy(out + 8 * g, block.word, 16);  // little-endian words: random16's order
    }
  }

  template <class T>
  static void maximum64(Maximum& maximum, const T* x) {
    for (int i = 0; i < 64; ++i) {
      const uint32_t m = magnitude(to_float(x[i]));
      maximum = m > maximum ? m : maximum;
    }
  }
  static uint32_t reduce(Maximum maximum) { return maximum; }

  template <class T>
  static int64_t total64(const T* x, float inverse) {
    int64_t total = 0;
    for (int i = 0; i < 64; ++i) {
      const int32_t v = fixed_point(to_float(x[i]), inverse);
      total += v < 0 ? -v : v;
    }
    return total;
  }

  template <int B, class T>
  static Codes quantize64(const T* x, float inverse, const uint16_t* noise) {
    Codes c;
    for (int i = 0; i < 64; ++i)
      c.code[i] = B == 1 ? one_bit_code(to_float(x[i])) : code_of(to_float(x[i]), inverse, noise[i], B);
    return c;
  }

  template <int B>
  static void pack64(const Codes& c, uint8_t* out) {
    for (int g = 0; g < 8; ++g) {
      uint64_t w;
      memcpy(&w, c.code + 8 * g, 8);
      w = pack8<B>(w);
      memcpy(out + B * g, &w, B);
    }
  }
  template <int B>
  static Codes unpack64(const uint8_t* in) {
    Codes c;
    for (int g = 0; g < 8; ++g) {
      uint64_t w = 0;
      memcpy(&w, in + B * g, B);
      w = unpack8<B>(w);
      memcpy(c.code + 8 * g, &w, 8);
    }
    return c;
  }

  template <int B, bool kAccumulate>
  static void dequantize64(const Codes& c, float factor, float* out) {
    for (int i = 0; i < 64; ++i) {
      const float level = float(level_of(c.code[i], B));
      out[i] = kAccumulate ? std::fma(factor, level, out[i]) : level * factor;
    }
  }
};

#include "kernels.inl"

}  // namespace

extern const Kernels kScalarKernels = Table<Scalar>::make();

}  // namespace dynfed
