// What every AVX-512 CPU has (F, BW, DQ, VL). Included inside an anonymous namespace by avx512.cpp and avx512vbmi.cpp, each of
// which compiles its own copy.

template <class Vector>
struct OneLane;  // dense.inl

struct Avx512 {
  struct Lanes {  // of double, for eigh.h
    using V = __m512d;
    using M = __mmask8;
    static constexpr int kLanes = 8, kWidth = 1, kColumns = 4;
    using Wide = Lanes;
    using One = OneLane<Lanes>;
    DYNFED_INLINE V spread(V a) { return a; }
    DYNFED_INLINE V load(const double* p) { return _mm512_loadu_pd(p); }
    DYNFED_INLINE void store(double* p, V a) { _mm512_storeu_pd(p, a); }
    DYNFED_INLINE V set(double x) { return _mm512_set1_pd(x); }
    DYNFED_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
    DYNFED_INLINE V fnma(V a, V b, V c) { return _mm512_fnmadd_pd(a, b, c); }
    DYNFED_INLINE V sqrt(V a) { return _mm512_sqrt_pd(a); }
    DYNFED_INLINE V abs(V a) { return _mm512_abs_pd(a); }
    DYNFED_INLINE M less(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
    DYNFED_INLINE M both(M a, M b) { return M(a & b); }
    DYNFED_INLINE M either(M a, M b) { return M(a | b); }
    DYNFED_INLINE M except(M a, M b) { return M(a & ~b); }
    DYNFED_INLINE M all() { return M(0xff); }
    DYNFED_INLINE M none() { return M(0); }
    DYNFED_INLINE bool any(M a) { return a != 0; }
    DYNFED_INLINE V select(M m, V a, V b) { return _mm512_mask_blend_pd(m, b, a); }
  };

  using Floats = Floats512;
  using Codes = __m512i;    // 64 bytes
  using Maximum = __m512i;  // 16 bit patterns
  using Sum = __m512i;      // 8 of 64 bits

  static Codes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint8_t* p, Codes c) { _mm512_storeu_si512(p, c); }
  static void stream(uint8_t* p, Codes c) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), c); }
  static void merge(Codes& all, Codes c) { all = _mm512_or_si512(all, c); }

  // Eight Philox blocks at once, a counter word in the low half of each 64-bit lane: the multiplier reads nothing else, so the
  // high halves may hold rubbish and a round is two products, two shifts and two three-way xors. Six independent sets hide the
  // latency of the products: the multiplier is then never idle.
  template <int kCount>
  static void noise(uint64_t seed, uint64_t group, uint32_t pass, uint16_t* out) {
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
    __m512i k0[kPhiloxRounds], k1[kPhiloxRounds];
    for (uint32_t r = 0; r < kPhiloxRounds; ++r) {
      k0[r] = _mm512_set1_epi64(uint32_t(uint32_t(seed) + r * kPhiloxW0));
      k1[r] = _mm512_set1_epi64(uint32_t(uint32_t(seed >> 32) + r * kPhiloxW1));
    }
    const uint64_t product = uint64_t(kPhiloxM1) * pass;  // of the first round, the same for all
    const __m512i first = _mm512_xor_si512(k0[0], _mm512_set1_epi64(int64_t(product >> 32)));
    // This order of blocks makes the final interleaving a matter of 128-bit lanes.
    const __m512i lane = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    constexpr int kSets = 6;
    static_assert(kCount % (64 * kSets) == 0, "whole sets");
    for (int i = 0; i < kCount; i += 64 * kSets) {
      __m512i c0[kSets], c1[kSets], c2[kSets], c3[kSets];
#pragma GCC unroll 6
      for (int s = 0; s < kSets; ++s) {  // the first round, with c2 = pass and c3 = 0
        const __m512i g = _mm512_add_epi64(_mm512_set1_epi64(int64_t(group + i / 8 + 8 * s)), lane);
        const __m512i a = _mm512_mul_epu32(g, m0);
        c0[s] = _mm512_xor_si512(_mm512_srli_epi64(g, 32), first);
        c1[s] = _mm512_set1_epi64(int64_t(product));
        c2[s] = _mm512_xor_si512(_mm512_srli_epi64(a, 32), k1[0]);
        c3[s] = a;
      }
#pragma GCC unroll 9
      for (int r = 1; r < kPhiloxRounds; ++r) {
#pragma GCC unroll 6
        for (int s = 0; s < kSets; ++s) {
          const __m512i a = _mm512_mul_epu32(c0[s], m0), b = _mm512_mul_epu32(c2[s], m1);
          c0[s] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), c1[s], k0[r], 0x96);
          c2[s] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), c3[s], k1[r], 0x96);
          c1[s] = b;
          c3[s] = a;
        }
      }
#pragma GCC unroll 6
      for (int s = 0; s < kSets; ++s) {
        const __m512i w01 = _mm512_mask_blend_epi32(0xAAAA, c0[s], _mm512_slli_epi64(c1[s], 32));
        const __m512i w23 = _mm512_mask_blend_epi32(0xAAAA, c2[s], _mm512_slli_epi64(c3[s], 32));
        _mm512_storeu_si512(out + i + 64 * s, _mm512_unpacklo_epi64(w01, w23));
        _mm512_storeu_si512(out + i + 64 * s + 32, _mm512_unpackhi_epi64(w01, w23));
      }
    }
  }

  static __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
  static __m512 load16(const BFloat16* x) {
    const __m256i bits = load32b(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static __m512 load16(const Float16* x) {
    return _mm512_cvtph_ps(load32b(x));
  }

  template <class T>
  static void maximum64(Maximum& maximum, const T* x) {
    const __m512i mask = _mm512_set1_epi32(int(kMagnitude));
    __m512i m[4];  // a tree: a chain of four would wait for itself
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) m[j] = _mm512_and_si512(_mm512_castps_si512(load16(x + 16 * j)), mask);
    m[0] = _mm512_max_epi32(_mm512_max_epi32(m[0], m[1]), _mm512_max_epi32(m[2], m[3]));
    maximum = _mm512_max_epi32(maximum, m[0]);
  }
  static uint32_t reduce(Maximum maximum) { return uint32_t(_mm512_reduce_max_epi32(maximum)); }

  template <class T>
  static void total64(Sum& sum, const T* x, float inverse) {
    __m512i lanes = _mm512_setzero_si512();  // at most 4 * 2^20 each
#pragma GCC unroll 4
    for (int j = 0; j < 64; j += 16) lanes = _mm512_add_epi32(lanes, _mm512_abs_epi32(units16(x + j, inverse)));
    sum = _mm512_add_epi64(sum, widen(lanes));
  }
  template <class T>
  static void energy64(Sum& sum, const T* x, float inverse) {
#pragma GCC unroll 4
    for (int j = 0; j < 64; j += 16) {
      const __m512i even = units16(x + j, inverse), odd = _mm512_srli_epi64(even, 32);
      sum = _mm512_add_epi64(sum, _mm512_add_epi64(_mm512_mul_epi32(even, even), _mm512_mul_epi32(odd, odd)));
    }
  }
  static int64_t total(Sum sum) { return _mm512_reduce_add_epi64(sum); }
  static float square_root(float v) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(v))); }

  template <int B, class T>
  static Codes eden64(Sum& dot, const T* x, float inverse, float inverse_step) {
    const __m512 step = _mm512_set1_ps(inverse_step);
    const __m512i half = _mm512_set1_epi32(int(kNearest));
    const __m512i lowest = _mm512_set1_epi32(-(1 << (B - 1))), highest = _mm512_set1_epi32((1 << (B - 1)) - 1);
    __m512i lanes = _mm512_setzero_si512(), q[4];  // at most 4 * 2^27 each
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i units = units16(x + 16 * j, inverse);
      const __m512i v = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(units), step));
      q[j] = _mm512_srai_epi32(_mm512_add_epi32(v, half), 16);
      q[j] = _mm512_min_epi32(_mm512_max_epi32(q[j], lowest), highest);
      lanes = _mm512_add_epi32(lanes, _mm512_mullo_epi32(units, q[j]));
    }
    dot = _mm512_add_epi64(dot, widen(lanes));
    return narrow<B>(q);
  }

  template <int B, bool kNoisy, class T>
  static Codes quantize64(const T* x, float inverse, const uint16_t* noise) {
    if (B == 1) {
      uint64_t signs = 0;
#pragma GCC unroll 4
      for (int j = 0; j < 64; j += 16)
        signs |= uint64_t(_mm512_cmp_ps_mask(load16(x + j), _mm512_setzero_ps(), _CMP_GE_OQ)) << j;
      return _mm512_maskz_set1_epi8(signs, 1);
    }
    __m512i q[4];
    fixed_points<kNoisy>(x, inverse, noise, q);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) q[j] = _mm512_srai_epi32(q[j], 16);
    return narrow<B>(q);
  }

  template <int B>
  static void pack64(Codes c, uint8_t* out) {
    if (B == 8) return _mm512_storeu_si512(out, c);
    if (B == 1) {
      const uint64_t bits = _mm512_test_epi8_mask(c, _mm512_set1_epi8(1));
      memcpy(out, &bits, 8);
      return;
    }
    __m512i w = by_pairs<B>(c);
    if (B == 4) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(w));
      return;
    }
    if (B == 2) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(by_fours<B>(w)));
      return;
    }
    w = by_eights<B>(w);
    w = _mm512_shuffle_epi8(w, _mm512_broadcast_i32x4(squeeze<B>()));
    store16(out, _mm512_castsi512_si128(w));
    store16(out + 2 * B, _mm512_extracti32x4_epi32(w, 1));
    store16(out + 4 * B, _mm512_extracti32x4_epi32(w, 2));
    store16(out + 6 * B, _mm512_extracti32x4_epi32(w, 3));
  }

  template <int B>
  static Codes unpack64(const uint8_t* in) {
    if (B == 8) return _mm512_loadu_si512(in);
    if (B == 1) {
      uint64_t bits;
      memcpy(&bits, in, 8);
      return _mm512_maskz_set1_epi8(bits, 1);
    }
    constexpr uint64_t by4 = comb((4 * B) & 63, 64), by2 = comb(2 * B, 32), by1 = comb(B, 16);
    __m512i w;
    if (B == 4) {
      w = _mm512_cvtepu8_epi16(load32b(in));
    } else if (B == 2) {
      w = spread<16 - 2 * B>(_mm512_cvtepu8_epi32(load16b(in)), by2, by2 << 16);
    } else {
      w = _mm512_castsi128_si512(load16b(in));
      w = _mm512_inserti32x4(w, load16b(in + 2 * B), 1);
      w = _mm512_inserti32x4(w, load16b(in + 4 * B), 2);
      w = _mm512_inserti32x4(w, load16b(in + 6 * B), 3);
      w = _mm512_shuffle_epi8(w, _mm512_broadcast_i32x4(stretch<B>()));
      w = spread<32 - 4 * B>(w, by4, by4 << 32);
      w = spread<16 - 2 * B>(w, by2, by2 << 16);
    }
    return spread<8 - B>(w, by1, by1 << 8);
  }

  static constexpr int kSegment = 4;  // half of the 32 registers
  struct Values {
    __m512 part[4];
  };
  static Values load_values(const float* p) {
    return {{_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16), _mm512_loadu_ps(p + 32), _mm512_loadu_ps(p + 48)}};
  }
  static void store_values(float* p, const Values& v) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(p + 16 * j, v.part[j]);
  }
  static void stream_values(float* p, const Values& v) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_stream_ps(p + 16 * j, v.part[j]);
  }
  static void fence() { _mm_sfence(); }
  template <int B>
  static Values scale64(const uint8_t* in, float factor) {
    Values v;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) v.part[j] = _mm512_mul_ps(levels16<B>(in + 2 * B * j), _mm512_set1_ps(factor));
    return v;
  }
  template <int B>
  static void add64(const uint8_t* in, float factor, Values& sums) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sums.part[j] = _mm512_fmadd_ps(levels16<B>(in + 2 * B * j), _mm512_set1_ps(factor), sums.part[j]);
  }

  static constexpr int kLanes = 16;
  using Vector = __m512;
  static Vector load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector multiply(Vector v, float factor) { return _mm512_mul_ps(v, _mm512_set1_ps(factor)); }
  static Vector flip(Vector v, const uint8_t* bits) {
    uint16_t lanes;
    memcpy(&lanes, bits, 2);
    return _mm512_mask_xor_ps(v, lanes, v, _mm512_set1_ps(-0.0f));
  }
  // A product with 1 or -1 is exact, so the fused sum is the plain sum or difference.
  static Vector butterfly(Vector v) {
    v = _mm512_fmadd_ps(v, signs(0xAAAA), _mm512_permute_ps(v, 0xB1));
    v = _mm512_fmadd_ps(v, signs(0xCCCC), _mm512_permute_ps(v, 0x4E));
    v = _mm512_fmadd_ps(v, signs(0xF0F0), _mm512_shuffle_f32x4(v, v, 0xB1));
    return _mm512_fmadd_ps(v, signs(0xFF00), _mm512_shuffle_f32x4(v, v, 0x4E));
  }

 protected:
  // 2^16 times the levels, plus what rounds them when the low 16 bits go.
  template <bool kNoisy, class T>
  static void fixed_points(const T* x, float inverse, const uint16_t* noise, __m512i (&q)[4]) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i r = kNoisy ? _mm512_cvtepu16_epi32(load32b(noise + 16 * j)) : _mm512_set1_epi32(int(kNearest));
      q[j] = _mm512_add_epi32(units16(x + 16 * j, inverse), r);
    }
  }
  // Neighbours merged, as core/pack.h: two codes to 2 * B bits in 16, four to 4 * B in 32, eight to 8 * B in 64.
  template <int B>
  static __m512i by_pairs(__m512i c) {
    if (B == 7)  // 2^7 is no signed byte
      return _mm512_or_si512(_mm512_and_si512(c, _mm512_set1_epi16(0xff)), _mm512_slli_epi16(_mm512_srli_epi16(c, 8), 7));
    return _mm512_maddubs_epi16(c, _mm512_set1_epi16(int16_t(1 | (1 << ((B & 7) + 8)))));
  }
  template <int B>
  static __m512i by_fours(__m512i pairs) {
    return _mm512_madd_epi16(pairs, _mm512_set1_epi32(1 | (1 << ((2 * B + 16) & 31))));
  }
  template <int B>
  static __m512i by_eights(__m512i pairs) {
    const __m512i w = by_fours<B>(pairs), low = _mm512_set1_epi64((int64_t(1) << 4 * B) - 1);
    return _mm512_ternarylogic_epi64(low, w, _mm512_srli_epi64(w, 32 - 4 * B), 0xCA);  // bits of w where `low` is set
  }

 private:
  static __m512 signs(__mmask16 negative) {
    return _mm512_mask_blend_ps(negative, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
  }
  template <class T>
  static __m512i units16(const T* x, float inverse) {
    return _mm512_cvttps_epi32(_mm512_mul_ps(load16(x), _mm512_set1_ps(inverse)));
  }
  static __m512i widen(__m512i lanes) {
    return _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(lanes)),
                            _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(lanes, 1)));
  }
  // Levels to codes: bytes within 128-bit lanes, then the lanes in order. Levels fit a signed byte, so nothing saturates.
  template <int B>
  static Codes narrow(const __m512i (&q)[4]) {
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_add_epi8(_mm512_permutexvar_epi32(order, bytes), _mm512_set1_epi8(char(1 << (B - 1))));
  }
  static __m256i load32b(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m128i load16b(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static void store16(uint8_t* p, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }

  // Shuffles between two 64-bit words of B bytes each and 2 * B bytes in a row.
  template <int B>
  static __m128i squeeze() {
    alignas(16) int8_t index[16];
    for (int i = 0; i < 16; ++i) index[i] = int8_t(i < B ? i : i < 2 * B ? 8 + i - B : -1);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(index));
  }
  template <int B>
  static __m128i stretch() {
    alignas(16) int8_t index[16];
    for (int i = 0; i < 16; ++i) index[i] = int8_t((i & 7) < B ? (i >> 3) * B + (i & 7) : -1);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(index));
  }
  template <int kShift>
  static __m512i spread(__m512i w, uint64_t low, uint64_t high) {
    const __m512i moved = _mm512_and_si512(_mm512_slli_epi64(w, kShift), _mm512_set1_epi64(int64_t(high)));
    return _mm512_or_si512(_mm512_and_si512(w, _mm512_set1_epi64(int64_t(low))), moved);
  }
  // The levels of sixteen codes, which are 2 * B bytes: each 32-bit lane takes the two bytes that hold its code, and shifts.
  template <int B>
  static __m512 levels16(const uint8_t* in) {
    alignas(64) int8_t index[64];
    alignas(64) int32_t shift[16];
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 4; ++k) index[4 * i + k] = int8_t(k < 2 && B * i / 8 + k < 2 * B ? B * i / 8 + k : -1);
      shift[i] = B * i & 7;
    }
    __m512i w = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load16b(in)), _mm512_load_si512(index));
    w = _mm512_srlv_epi32(w, _mm512_load_si512(shift));
    if (B <= 4) {  // sixteen levels are a table in a register
      alignas(64) float level[16];
      for (int i = 0; i < 16; ++i) level[i] = float(level_of(uint8_t(i & ((1 << B) - 1)), B));
      return _mm512_permutexvar_ps(w, _mm512_load_ps(level));
    }
    // 2^23 + code as a float has the code for its low bits; the difference is exact. The constant: (w & mask) | 2^23.
    w = _mm512_ternarylogic_epi32(w, _mm512_set1_epi32((1 << B) - 1), _mm512_set1_epi32(0x4b000000), 0xEA);
    return _mm512_sub_ps(_mm512_castsi512_ps(w), _mm512_set1_ps(8388608.0f + float(1 << (B - 1))));
  }
};
