// Plain C++ for any CPU: what the other instruction sets must equal, bit for bit.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../core/convert.h"
#include "../core/eden.h"
#include "../core/eigh.h"
#include "../core/pack.h"
#include "../core/philox.h"
#include "../core/quantize.h"
#include "../core/rotate.h"
#include "kernels.h"

namespace dynfed {
namespace {

#include "floats_scalar.inl"

template <class Vector>
struct OneLane;  // dense.inl

struct Scalar {
  using Floats = Floats1;
  using Lanes = OneLane<void>;
  struct Codes {
    uint8_t code[64];
  };
  using Maximum = uint32_t;
  using Sum = int64_t;

  static Codes load(const uint8_t* p) {
    Codes c;
    memcpy(c.code, p, 64);
    return c;
  }
  static void store(uint8_t* p, const Codes& c) { memcpy(p, c.code, 64); }
  static void stream(uint8_t* p, const Codes& c) { store(p, c); }  // plain C++ has no such store
  static void merge(Codes& all, const Codes& c) {
    for (int i = 0; i < 64; ++i) all.code[i] |= c.code[i];
  }

  template <int kCount>
  static void noise(uint64_t seed, uint64_t group, uint32_t pass, uint16_t* out) {
    for (int g = 0; g < kCount / 8; ++g) {
      const uint64_t counter = group + uint64_t(g);
      const PhiloxBlock block = philox4x32(seed, uint32_t(counter), uint32_t(counter >> 32), pass, 0);
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
  static void total64(Sum& sum, const T* x, float inverse) {
    for (int i = 0; i < 64; ++i) {
      const int32_t v = fixed_point(to_float(x[i]), inverse);
      sum += v < 0 ? -v : v;
    }
  }
  template <class T>
  static void energy64(Sum& sum, const T* x, float inverse) {
    for (int i = 0; i < 64; ++i) {
      const int64_t v = fixed_point(to_float(x[i]), inverse);
      sum += v * v;
    }
  }
  template <int B, class T>
  static Codes eden64(Sum& dot, const T* x, float inverse, float inverse_step) {
    Codes c;
    for (int i = 0; i < 64; ++i) {
      const int32_t units = fixed_point(to_float(x[i]), inverse), level = eden_level(units, inverse_step, B);
      dot += int64_t(units) * level;
      c.code[i] = uint8_t(level + (1 << (B - 1)));
    }
    return c;
  }
  static int64_t total(Sum sum) { return sum; }
  static float square_root(float v) { return std::sqrt(v); }

  template <int B, bool kNoisy, class T>
  static Codes quantize64(const T* x, float inverse, const uint16_t* noise) {
    Codes c;
    for (int i = 0; i < 64; ++i)
      c.code[i] = B == 1 ? one_bit_code(to_float(x[i])) : code_of(to_float(x[i]), inverse, kNoisy ? noise[i] : kNearest, B);
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

  static constexpr int kSegment = 1;
  struct Values {
    float value[64];
  };
  static Values load_values(const float* p) {
    Values v;
    memcpy(v.value, p, sizeof(v.value));
    return v;
  }
  static void store_values(float* p, const Values& v) { memcpy(p, v.value, sizeof(v.value)); }
  static void stream_values(float* p, const Values& v) { store_values(p, v); }
  static void fence() {}
  template <int B>
  static Values scale64(const uint8_t* in, float factor) {
    const Codes c = unpack64<B>(in);
    Values v;
    for (int i = 0; i < 64; ++i) v.value[i] = float(level_of(c.code[i], B)) * factor;
    return v;
  }
  template <int B>
  static void add64(const uint8_t* in, float factor, Values& sums) {
    const Codes c = unpack64<B>(in);
    for (int i = 0; i < 64; ++i) sums.value[i] = std::fma(factor, float(level_of(c.code[i], B)), sums.value[i]);
  }

  static constexpr int kLanes = 8;  // the flips of a byte
  struct Vector {
    float lane[kLanes];
  };
  static Vector load_floats(const float* p) {
    Vector v;
    memcpy(v.lane, p, sizeof(v.lane));
    return v;
  }
  static void store_floats(float* p, const Vector& v) { memcpy(p, v.lane, sizeof(v.lane)); }
  static Vector add(Vector a, const Vector& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Vector subtract(Vector a, const Vector& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  static Vector multiply(Vector v, float factor) {
    for (int i = 0; i < kLanes; ++i) v.lane[i] *= factor;
    return v;
  }
  static Vector flip(Vector v, const uint8_t* bits) {
    for (int i = 0; i < kLanes; ++i)
      v.lane[i] = bit_cast<float>(bit_cast<uint32_t>(v.lane[i]) ^ (uint32_t(*bits) >> i & 1u) << 31);
    return v;
  }
  static Vector butterfly(Vector v) {
    for (int half = 1; half < kLanes; half *= 2) {
      Vector w;
      for (int i = 0; i < kLanes; ++i) w.lane[i] = i & half ? v.lane[i ^ half] - v.lane[i] : v.lane[i] + v.lane[i ^ half];
      v = w;
    }
    return v;
  }
};

#include "kernels.inl"

}  // namespace

extern const Kernels kScalarKernels = Table<Scalar>::make();

}  // namespace dynfed
