// AVX2 with FMA and F16C. The pragma comes first and holds to the end: nothing else in this file may run elsewhere.
#include "kernels.h"
#ifdef DYNFED_X86
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "../core/convert.h"
#include "../core/eden.h"
#include "../core/eigh.h"
#include "../core/pack.h"
#include "../core/philox.h"
#include "../core/quantize.h"
#include "../core/rotate.h"

namespace dynfed {
namespace {

#include "floats_avx2.inl"

template <class Vector>
struct OneLane;  // dense.inl

struct Avx2 {
  struct Lanes {  // of double, for eigh.h
    using V = __m256d;
    using M = __m256d;
    static constexpr int kLanes = 4, kWidth = 1, kColumns = 4;
    using Wide = Lanes;
    using One = OneLane<Lanes>;
    DYNFED_INLINE V spread(V a) { return a; }
    DYNFED_INLINE V load(const double* p) { return _mm256_loadu_pd(p); }
    DYNFED_INLINE void store(double* p, V a) { _mm256_storeu_pd(p, a); }
    DYNFED_INLINE V set(double x) { return _mm256_set1_pd(x); }
    DYNFED_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
    DYNFED_INLINE V fnma(V a, V b, V c) { return _mm256_fnmadd_pd(a, b, c); }
    DYNFED_INLINE V sqrt(V a) { return _mm256_sqrt_pd(a); }
    DYNFED_INLINE V abs(V a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a); }
    DYNFED_INLINE M less(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_LT_OQ); }
    DYNFED_INLINE M both(M a, M b) { return _mm256_and_pd(a, b); }
    DYNFED_INLINE M either(M a, M b) { return _mm256_or_pd(a, b); }
    DYNFED_INLINE M except(M a, M b) { return _mm256_andnot_pd(b, a); }
    DYNFED_INLINE M all() { return _mm256_castsi256_pd(_mm256_set1_epi64x(-1)); }
    DYNFED_INLINE M none() { return _mm256_setzero_pd(); }
    DYNFED_INLINE bool any(M a) { return _mm256_movemask_pd(a) != 0; }
    DYNFED_INLINE V select(M m, V a, V b) { return _mm256_blendv_pd(b, a, m); }
  };

  using Floats = Floats256;
  struct Codes {
    __m256i part[2];  // 32 bytes each
  };
  using Maximum = __m256i;  // 8 bit patterns
  using Sum = __m256i;      // 4 of 64 bits

  static Codes load(const uint8_t* p) { return {{load32(p), load32(p + 32)}}; }
  static void store(uint8_t* p, const Codes& c) {
    store32(p, c.part[0]);
    store32(p + 32, c.part[1]);
  }
  static void stream(uint8_t* p, const Codes& c) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), c.part[0]);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 32), c.part[1]);
  }
  static void merge(Codes& all, const Codes& c) {
    for (int h = 0; h < 2; ++h) all.part[h] = _mm256_or_si256(all.part[h], c.part[h]);
  }

  // As avx512.cpp, four blocks at once; two independent sets are what sixteen registers hold.
  template <int kCount>
  static void noise(uint64_t seed, uint64_t group, uint32_t pass, uint16_t* out) {
    const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
    __m256i k0[kPhiloxRounds], k1[kPhiloxRounds];
    for (uint32_t r = 0; r < kPhiloxRounds; ++r) {
      k0[r] = _mm256_set1_epi64x(uint32_t(uint32_t(seed) + r * kPhiloxW0));
      k1[r] = _mm256_set1_epi64x(uint32_t(uint32_t(seed >> 32) + r * kPhiloxW1));
    }
    const uint64_t product = uint64_t(kPhiloxM1) * pass;  // of the first round, the same for all
    const __m256i first = _mm256_xor_si256(k0[0], _mm256_set1_epi64x(int64_t(product >> 32)));
    const __m256i lane = _mm256_setr_epi64x(0, 2, 1, 3);
    constexpr int kSets = 2;
    for (int i = 0; i < kCount; i += 32 * kSets) {
      __m256i c0[kSets], c1[kSets], c2[kSets], c3[kSets];
#pragma GCC unroll 2
      for (int s = 0; s < kSets; ++s) {  // the first round, with c2 = pass and c3 = 0
        const __m256i g = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(group + i / 8 + 4 * s)), lane);
        const __m256i a = _mm256_mul_epu32(g, m0);
        c0[s] = _mm256_xor_si256(_mm256_srli_epi64(g, 32), first);
        c1[s] = _mm256_set1_epi64x(int64_t(product));
        c2[s] = _mm256_xor_si256(_mm256_srli_epi64(a, 32), k1[0]);
        c3[s] = a;
      }
#pragma GCC unroll 9
      for (int r = 1; r < kPhiloxRounds; ++r) {
#pragma GCC unroll 2
        for (int s = 0; s < kSets; ++s) {
          const __m256i a = _mm256_mul_epu32(c0[s], m0), b = _mm256_mul_epu32(c2[s], m1);
          c0[s] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(b, 32), k0[r]), c1[s]);
          c2[s] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), k1[r]), c3[s]);
          c1[s] = b;
          c3[s] = a;
        }
      }
#pragma GCC unroll 2
      for (int s = 0; s < kSets; ++s) {
        const __m256i w01 = _mm256_blend_epi32(c0[s], _mm256_slli_epi64(c1[s], 32), 0xAA);
        const __m256i w23 = _mm256_blend_epi32(c2[s], _mm256_slli_epi64(c3[s], 32), 0xAA);
        store32(out + i + 32 * s, _mm256_unpacklo_epi64(w01, w23));
        store32(out + i + 32 * s + 16, _mm256_unpackhi_epi64(w01, w23));
      }
    }
  }

  static __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
  static __m256 load8(const BFloat16* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16b(x)), 16));
  }
  static __m256 load8(const Float16* x) { return _mm256_cvtph_ps(load16b(x)); }

  template <class T>
  static void maximum64(Maximum& maximum, const T* x) {
    const __m256i mask = _mm256_set1_epi32(int(kMagnitude));
#pragma GCC unroll 8
    for (int j = 0; j < 64; j += 8)
      maximum = _mm256_max_epi32(maximum, _mm256_and_si256(_mm256_castps_si256(load8(x + j)), mask));
  }
  static uint32_t reduce(Maximum maximum) {
    uint32_t lane[8], largest = 0;
    store32(lane, maximum);
    for (uint32_t m : lane) largest = m > largest ? m : largest;
    return largest;
  }

  template <class T>
  static void total64(Sum& sum, const T* x, float inverse) {
    __m256i lanes = _mm256_setzero_si256();  // at most 8 * 2^20 each
#pragma GCC unroll 8
    for (int j = 0; j < 64; j += 8) lanes = _mm256_add_epi32(lanes, _mm256_abs_epi32(units8(x + j, inverse)));
    sum = _mm256_add_epi64(sum, widen(lanes));
  }
  template <class T>
  static void energy64(Sum& sum, const T* x, float inverse) {
#pragma GCC unroll 8
    for (int j = 0; j < 64; j += 8) {
      const __m256i even = units8(x + j, inverse), odd = _mm256_srli_epi64(even, 32);
      sum = _mm256_add_epi64(sum, _mm256_add_epi64(_mm256_mul_epi32(even, even), _mm256_mul_epi32(odd, odd)));
    }
  }
  static int64_t total(Sum sum) {
    int64_t lane[4];
    store32(lane, sum);
    return lane[0] + lane[1] + lane[2] + lane[3];
  }
  static float square_root(float v) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(v))); }

  template <int B, class T>
  static Codes eden64(Sum& dot, const T* x, float inverse, float inverse_step) {
    Codes c;
    const __m256 step = _mm256_set1_ps(inverse_step);
    const __m256i half = _mm256_set1_epi32(int(kNearest)), top = _mm256_set1_epi32(1 << (B - 1));
    const __m256i lowest = _mm256_sub_epi32(_mm256_setzero_si256(), top), highest = _mm256_sub_epi32(top, _mm256_set1_epi32(1));
    __m256i lanes = _mm256_setzero_si256();  // at most 8 * 2^27 each
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      __m256i q[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m256i units = units8(x + 32 * h + 8 * j, inverse);
        const __m256i v = _mm256_cvttps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(units), step));
        q[j] = _mm256_srai_epi32(_mm256_add_epi32(v, half), 16);
        q[j] = _mm256_min_epi32(_mm256_max_epi32(q[j], lowest), highest);
        lanes = _mm256_add_epi32(lanes, _mm256_mullo_epi32(units, q[j]));
      }
      c.part[h] = narrow<B>(q);
    }
    dot = _mm256_add_epi64(dot, widen(lanes));
    return c;
  }

  template <int B, bool kNoisy, class T>
  static Codes quantize64(const T* x, float inverse, const uint16_t* noise) {
    Codes c;
    const __m256 inv = _mm256_set1_ps(inverse);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      __m256i q[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int at = 32 * h + 8 * j;
        if (B == 1) {
          q[j] = _mm256_castps_si256(_mm256_cmp_ps(load8(x + at), _mm256_setzero_ps(), _CMP_GE_OQ));  // 0 or -1
        } else {
          const __m256i v = _mm256_cvttps_epi32(_mm256_mul_ps(load8(x + at), inv));
          const __m256i r = kNoisy ? _mm256_cvtepu16_epi32(load16b(noise + at)) : _mm256_set1_epi32(int(kNearest));
          q[j] = _mm256_srai_epi32(_mm256_add_epi32(v, r), 16);
        }
      }
      c.part[h] = narrow<B>(q);
    }
    return c;
  }

  template <int B>
  static void pack64(const Codes& c, uint8_t* out) {
    if (B == 8) return store(out, c);
    if (B == 4) {
      const __m256i pair = _mm256_set1_epi16(1 | (16 << 8));
      const __m256i low = _mm256_maddubs_epi16(c.part[0], pair), high = _mm256_maddubs_epi16(c.part[1], pair);
      return store32(out, _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xD8));
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      __m256i w = c.part[h];
      if (B == 1) {
        const uint32_t bits = uint32_t(_mm256_movemask_epi8(_mm256_slli_epi16(w, 7)));
        memcpy(out + 4 * h, &bits, 4);
        continue;
      }
      // Merge neighbours: two codes to 2 * B bits in 16, four to 4 * B in 32, eight to 8 * B in 64 (core/pack.h).
      if (B == 7) {  // 2^7 is no signed byte
        w = _mm256_or_si256(_mm256_and_si256(w, _mm256_set1_epi16(0xff)), _mm256_slli_epi16(_mm256_srli_epi16(w, 8), 7));
      } else {
        w = _mm256_maddubs_epi16(w, _mm256_set1_epi16(int16_t(1 | (1 << ((B & 7) + 8)))));
      }
      w = _mm256_madd_epi16(w, _mm256_set1_epi32(1 | (1 << ((2 * B + 16) & 31))));
      const __m256i low = _mm256_and_si256(w, _mm256_set1_epi64x(0xffffffff));
      w = _mm256_or_si256(low, _mm256_slli_epi64(_mm256_srli_epi64(w, 32), 4 * B));
      w = _mm256_shuffle_epi8(w, _mm256_broadcastsi128_si256(squeeze<B>()));
      store16(out + 4 * B * h, _mm256_castsi256_si128(w));
      store16(out + 4 * B * h + 2 * B, _mm256_extracti128_si256(w, 1));
    }
  }

  template <int B>
  static Codes unpack64(const uint8_t* in) {
    if (B == 8) return load(in);
    constexpr uint64_t by4 = comb((4 * B) & 63, 64), by2 = comb(2 * B, 32), by1 = comb(B, 16);
    Codes c;
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      __m256i w;
      if (B == 4) {
        w = _mm256_cvtepu8_epi16(load16b(in + 16 * h));
      } else {
        w = _mm256_castsi128_si256(load16b(in + 4 * B * h));
        w = _mm256_inserti128_si256(w, load16b(in + 4 * B * h + 2 * B), 1);
        w = _mm256_shuffle_epi8(w, _mm256_broadcastsi128_si256(stretch<B>()));
        w = spread<32 - 4 * B>(w, by4, by4 << 32);
        w = spread<16 - 2 * B>(w, by2, by2 << 16);
      }
      c.part[h] = spread<8 - B>(w, by1, by1 << 8);
    }
    return c;
  }

  static constexpr int kSegment = 1;  // half of the sixteen registers
  struct Values {
    __m256 part[8];
  };
  static Values load_values(const float* p) {
    Values v;
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) v.part[j] = _mm256_loadu_ps(p + 8 * j);
    return v;
  }
  static void store_values(float* p, const Values& v) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) _mm256_storeu_ps(p + 8 * j, v.part[j]);
  }
  static void stream_values(float* p, const Values& v) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) _mm256_stream_ps(p + 8 * j, v.part[j]);
  }
  static void fence() { _mm_sfence(); }
  template <int B>
  static Values scale64(const uint8_t* in, float factor) {
    Values v;
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) v.part[j] = _mm256_mul_ps(levels8<B>(in, j), _mm256_set1_ps(factor));
    return v;
  }
  template <int B>
  static void add64(const uint8_t* in, float factor, Values& sums) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums.part[j] = _mm256_fmadd_ps(levels8<B>(in, j), _mm256_set1_ps(factor), sums.part[j]);
  }

  static constexpr int kLanes = 8;
  using Vector = __m256;
  static Vector load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store_floats(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
  static Vector multiply(Vector v, float factor) { return _mm256_mul_ps(v, _mm256_set1_ps(factor)); }
  static Vector flip(Vector v, const uint8_t* bits) {
    const __m256i to_top = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    const __m256i sign = _mm256_and_si256(_mm256_sllv_epi32(_mm256_set1_epi32(*bits), to_top), _mm256_set1_epi32(INT32_MIN));
    return _mm256_xor_ps(v, _mm256_castsi256_ps(sign));
  }
  // A product with 1 or -1 is exact, so the fused sum is the plain sum or difference.
  static Vector butterfly(Vector v) {
    v = _mm256_fmadd_ps(v, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(v, 0xB1));
    v = _mm256_fmadd_ps(v, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_permute_ps(v, 0x4E));
    return _mm256_fmadd_ps(v, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(v, v, 0x01));
  }

 private:
  template <class T>
  static __m256i units8(const T* x, float inverse) {
    return _mm256_cvttps_epi32(_mm256_mul_ps(load8(x), _mm256_set1_ps(inverse)));
  }
  static __m256i widen(__m256i lanes) {
    return _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(lanes)),
                            _mm256_cvtepi32_epi64(_mm256_extracti128_si256(lanes, 1)));
  }
  // Levels to codes: bytes within 128-bit lanes, then the lanes in order. Levels fit a signed byte, so nothing saturates.
  template <int B>
  static __m256i narrow(const __m256i (&q)[4]) {
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return B == 1 ? _mm256_and_si256(bytes, _mm256_set1_epi8(1)) : _mm256_add_epi8(bytes, _mm256_set1_epi8(char(1 << (B - 1))));
  }
  static __m128i load16b(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store16(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
  static void store32(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

  // Shuffles between two 64-bit words of B bytes each and 2 * B bytes in a row.
  template <int B>
  static __m128i squeeze() {
    alignas(16) int8_t index[16];
    for (int i = 0; i < 16; ++i) index[i] = int8_t(i < B ? i : i < 2 * B ? 8 + i - B : -1);
    return load16b(index);
  }
  template <int B>
  static __m128i stretch() {
    alignas(16) int8_t index[16];
    for (int i = 0; i < 16; ++i) index[i] = int8_t((i & 7) < B ? (i >> 3) * B + (i & 7) : -1);
    return load16b(index);
  }
  template <int kShift>
  static __m256i spread(__m256i w, uint64_t low, uint64_t high) {
    const __m256i moved = _mm256_and_si256(_mm256_slli_epi64(w, kShift), _mm256_set1_epi64x(int64_t(high)));
    return _mm256_or_si256(_mm256_and_si256(w, _mm256_set1_epi64x(int64_t(low))), moved);
  }
  // The levels of elements 8 * j .. 8 * j + 7 of a block. Sixteen codes are 2 * B whole bytes, in both halves of a vector; each
  // 32-bit lane takes the two bytes that hold its code, and shifts.
  template <int B>
  static __m256 levels8(const uint8_t* in, int j) {
    alignas(32) int8_t index[32];
    alignas(32) int32_t shift[8];
    for (int i = 0; i < 8; ++i) {
      const int bit = B * (8 * (j & 1) + i);
      for (int k = 0; k < 4; ++k) index[4 * i + k] = int8_t(k < 2 && bit / 8 + k < 2 * B ? bit / 8 + k : -1);
      shift[i] = bit & 7;
    }
    __m256i w = _mm256_broadcastsi128_si256(load16b(in + 2 * B * (j >> 1)));
    w = _mm256_srlv_epi32(_mm256_shuffle_epi8(w, load32(index)), load32(shift));
    if (B <= 3) {  // eight levels are a table in a register
      alignas(32) float level[8];
      for (int i = 0; i < 8; ++i) level[i] = float(level_of(uint8_t(i & ((1 << B) - 1)), B));
      return _mm256_permutevar8x32_ps(_mm256_load_ps(level), w);
    }
    // 2^23 + code as a float has the code for its low bits; the difference is exact.
    w = _mm256_or_si256(_mm256_and_si256(w, _mm256_set1_epi32((1 << B) - 1)), _mm256_set1_epi32(0x4b000000));
    return _mm256_sub_ps(_mm256_castsi256_ps(w), _mm256_set1_ps(8388608.0f + float(1 << (B - 1))));
  }
};

#include "kernels.inl"

}  // namespace

extern const Kernels kAvx2Kernels = Table<Avx2>::make();

}  // namespace dynfed
#endif
